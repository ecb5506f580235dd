"""Chains of stops: a run is stopped repeatedly, by kill -9 and by handled signals, and resumed each time.

Each process of a chain is stopped at a random instant: a number of saves after its start, and a moment later. The
checkpoint must then be that of the last completed save or of the next one, and the last process must match an
undisturbed run bit for bit. A handled signal ends the process in order, with everything saved.
"""

import os
import random
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from parity_tests.tools.trials import (
    DifferentError,
    Ending,
    Stage,
    check_left,
    ended,
    ended_or_saved,
    logged,
    resume,
    saves,
    start,
    wait,
)

STEPS = 16

SIGNALS = {
    "kill -9": (signal.SIGKILL,),
    "SIGINT": (signal.SIGINT,),
    "SIGTERM": (signal.SIGTERM,),
    "SIGHUP": (signal.SIGHUP,),
    "SIGINT, SIGTERM": (signal.SIGINT, signal.SIGTERM),
    "SIGINT, SIGINT": (signal.SIGINT, signal.SIGINT),
    "SIGTERM, SIGHUP": (signal.SIGTERM, signal.SIGHUP),
}


class Chains:
    """Trials, identified by name, that send signals to resumed runs."""

    def __init__(self, base: Path):
        begin = time.perf_counter()
        self.stage = Stage(base, STEPS)
        self._moment = (time.perf_counter() - begin) / STEPS

    def chains(self, trials: int, seed: int) -> list[str]:
        """The names of `trials` chains, and of a run under nohup."""
        return [f"chains {seed + k}" for k in range(trials)] + ["chains nohup"]

    def trial(self, name: str) -> str:
        """Do the trial of this name: one to five signals. -> their number. Raises DifferentError at a fault."""
        self.stage.clear()
        if name == "chains nohup":
            return self._nohup()
        rng, links = random.Random(int(name.split()[1])), []
        try:
            for link in range(rng.randint(1, 5)):
                links.append(rng.choice(list(SIGNALS)))
                code = self._link(rng, SIGNALS[links[-1]], link > 0)
                links[-1] += ", too late" if code == 0 else ""
            self.stage.finish()
        except Exception as error:  # a checkpoint that does not load is a fault too
            text = str(error) if isinstance(error, DifferentError) else repr(error)
            raise DifferentError(f"[{'; '.join(links)}] {text}") from error
        return f"{sum('too late' not in link for link in links)} signals"

    def _nohup(self) -> str:
        """Check that a run told to ignore SIGHUP, as by nohup, continues to its end."""
        pid = start(self.stage.begin, self.stage.errors, logged(self.stage.log), ignoring(signal.SIGHUP))
        ended_or_saved(pid, self.stage.log, 1)
        os.kill(pid, signal.SIGHUP)
        if (code := wait(pid)) != 0:
            raise DifferentError(f"the process ends with {code}")
        self.stage.finish()
        return "SIGHUP ignored"

    def _link(self, rng: random.Random, numbers: tuple[signal.Signals, ...], resumed: bool) -> int:
        """Start a process, stop it, and check what it left. -> its exit code."""
        stage = self.stage
        before = len(saves(stage.log))
        pid = start(resume(stage.run) if resumed else stage.begin, stage.errors, logged(stage.log))
        code = ended_or_saved(pid, stage.log, before + rng.randint(0 if resumed else 1, 4))
        time.sleep(rng.uniform(0, self._moment))
        handled = len(saves(stage.log)) > before
        for number in numbers:
            if code is None:
                os.kill(pid, number)
                time.sleep(rng.choice([0, rng.uniform(0, self._moment)]))
                code = ended(pid)
        ending = Ending(wait(pid) if code is None else code, stage.errors.read_text(encoding="utf-8"))
        if ending.traceback or ending.code in (2, 70):
            raise DifferentError(f"the process ends with {ending.code}: {ending.last_line}")
        alone = len(numbers) == 1 and numbers[0] != signal.SIGKILL
        if alone and handled and ending.code == -numbers[0] and max(saves(stage.log)) < STEPS:
            raise DifferentError(f"{numbers[0].name} ends the process before it has saved")
        check_left(stage.run, stage.log)
        return ending.code


@contextmanager
def ignoring(number: signal.Signals) -> Iterator[None]:
    """Make this process ignore a signal, from now on."""
    signal.signal(number, signal.SIG_IGN)
    yield
