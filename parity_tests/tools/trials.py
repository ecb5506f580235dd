"""Training runs in forked processes that are stopped, resumed and compared with an uninterrupted run.

Each command runs in a fork, so that a trial costs the run, not the start of Python. The model is smaller than tiny;
nothing is plotted, and nothing waits for the disk, since no trial simulates a power cut.
"""

import json
import os
import random
import re
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from unittest.mock import patch

import matplotlib.figure  # a fork need not import what its parent has
import safetensors.numpy  # noqa: F401

from numpy_gpt import load
from numpy_gpt.cli.main import main
from numpy_gpt.runs import settings
from numpy_gpt.runs.folder import Run
from numpy_gpt.weights.checkpoint import load_training

KEEP = 2
STOPPED = 2
"""Steps of the stopped run that trials resume."""

SETTINGS = {
    "encoding": "bytes",
    "context-length": 8,
    "batch-size": 4,
    "drop-rate": 0.1,
    "lr": 0.1,  # too high, so that the best is neither the first nor the last
    "warmup-steps": 2,
    "eval-freq": 2,
    "eval-iter": 1,
    "epochs": 99,
    "prompt": "a",
}
SAVES = ["--save-freq", "1", "--keep", str(KEEP)]


class DifferentError(AssertionError):
    """The files left, or the resumed run's outcome, are wrong."""


@dataclass(frozen=True)
class Ending:
    """A command's exit code (negative: the signal that killed it), stderr and stdout."""

    code: int
    errors: str
    output: str = ""

    @property
    def last_line(self) -> str:
        return (self.errors.strip().splitlines() or [""])[-1][:200]

    @property
    def traceback(self) -> bool:
        """Whether it ended with a traceback, other than a KeyboardInterrupt's.

        An interrupt that Python ignores while closing a generator, and prints, does not count either.
        """
        errors = re.sub(r"Exception ignored in: .*?\nKeyboardInterrupt:? ?\n", "", self.errors, flags=re.DOTALL)
        return "Traceback" in errors and self.last_line != "KeyboardInterrupt"


def begin(folder: Path | None, text: Path, steps: int = 4, seed: int = 123) -> list[str]:
    """The arguments of a new run. folder None: the command chooses one."""
    settings = [str(word) for name, value in SETTINGS.items() for word in (f"--{name}", value)]
    out = [] if folder is None else ["--out", str(folder)]
    return ["pretrain", "--text", str(text), "--seed", str(seed), "--max-steps", str(steps), *settings, *SAVES, *out]


def resume(folder: Path) -> list[str]:
    """The arguments for resuming a run."""
    return ["pretrain", "--resume", str(folder), *SAVES]


def write_text(file: Path) -> Path:
    """Write a text to train on, and return its path."""
    file.write_text("".join(random.Random(0).choices("abcdefgh ", k=1000)))
    return file


def fork(job: Callable[[], object]) -> int:
    """Fork a process that does job, and exits with 1 if that raises. -> its process id."""
    pid = os.fork()
    if pid:
        return pid
    try:
        job()
        os._exit(0)
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)


def wait(pid: int) -> int:
    """Wait for a process. -> its exit code, or minus the signal that killed it. Ctrl-C kills the process first."""
    with killed_by_ctrl_c(pid):
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


@contextmanager
def killed_by_ctrl_c(pid: int) -> Iterator[None]:
    """On a KeyboardInterrupt in the block, kill the process and wait for its end."""
    try:
        yield
    except KeyboardInterrupt:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        raise


def ended(pid: int) -> int | None:
    """The exit code of a process, or None while it is running."""
    done, status = os.waitpid(pid, os.WNOHANG)
    return os.waitstatus_to_exitcode(status) if done else None


def ended_or_saved(pid: int, log: Path, number: int) -> int | None:
    """Wait until log has `number` saves (-> None) or the process has ended (-> its exit code)."""
    code = None
    while code is None and len(saves(log)) < number:
        time.sleep(1e-3)
        code = ended(pid)
    return code


class _NoFigure:
    """A stand-in for matplotlib's Figure that accepts every call and draws nothing."""

    def __init__(self, *args, **kwargs):
        pass

    def __getattr__(self, name):
        return self

    def __call__(self, *args, **kwargs):
        return self

    def savefig(self, path, **kwargs):
        with open(path, "wb") as f:
            f.write(b"a drawing")


def small() -> None:
    """Make this process's runs quick, and its signals act as in a terminal. For use in a fork only."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)
    settings.TINY |= {"emb_dim": 16, "n_layers": 1, "n_heads": 2}
    object.__setattr__(settings.for_tiny, "sample_tokens", 1)
    matplotlib.figure.Figure = _NoFigure
    os.fsync = lambda handle: None


def start(arguments: list[str], errors: Path, *within: AbstractContextManager) -> int:
    """Fork a process that runs the command within these contexts. -> its process id.

    Its stderr goes to the file errors, its stdout to the file of the same name ending in .out. A SIGINT that comes
    before the command has begun ends it with 130 too: on a busy machine the fork takes as long as the test waits.
    """

    def job():
        begun = False
        try:
            out = errors.with_suffix(".out")
            sys.stdout, sys.stderr = (Path.open(file, "w", encoding="utf-8") for file in (out, errors))
            small()
            with ExitStack() as stack:
                for context in within:
                    stack.enter_context(context)
                begun = True
                main(arguments, prog_name="numpy-gpt")
        except KeyboardInterrupt:
            if begun:
                raise
            os._exit(130)
        except SystemExit as end:
            sys.stderr.flush()
            sys.stdout.flush()
            os._exit(end.code if isinstance(end.code, int) else end.code is not None)

    return fork(job)


def command(arguments: list[str], errors: Path, *within: AbstractContextManager) -> Ending:
    """Run a command to its end in a fork, within these contexts."""
    code = wait(start(arguments, errors, *within))
    return Ending(code, errors.read_text(encoding="utf-8"), errors.with_suffix(".out").read_text(encoding="utf-8"))


@contextmanager
def logged(log: Path) -> Iterator[None]:
    """In the block, log the step of every save completed or resumed from, one per line."""

    def logging(real):
        def call(self, first, second, position, *args):
            notes = real(self, first, second, position, *args)
            with log.open("a") as f:
                f.write(f"{position.step}\n")
            return notes

        return call

    with patch.object(Run, "save", logging(Run.save)), patch.object(Run, "resume", logging(Run.resume)):
        yield


@contextmanager
def stopped_after(step: int) -> Iterator[None]:
    """In the block, end the process at once, as kill -9 does, after the save of this step."""
    save = Run.save

    def save_and_end(self, config, learner, position, *args, **kwargs):
        notes = save(self, config, learner, position, *args, **kwargs)
        if position.step == step:
            os._exit(9)
        return notes

    with patch.object(Run, "save", save_and_end):
        yield


def saves(log: Path) -> list[int]:
    """The steps in the complete lines of a log."""
    lines = log.read_text().splitlines(keepends=True) if log.exists() else []
    return [int(line) for line in lines if line.endswith("\n")]


def listing(folder: Path) -> set[str]:
    """The relative paths of everything below a folder."""
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def outcome(folder: Path) -> dict[str, bytes]:
    """A run's outcome: parameters, states, losses (without the seconds), copies and the best."""
    parts = {}
    kept = [file.parent for file in sorted(folder.glob("checkpoint-[0-9]*/model.safetensors"))]
    for place in [folder / "checkpoint", folder / "best", *kept]:
        parts |= {f"{place.name}: {name}": array.tobytes() for name, array in load(place).params.items()}
        if place.name != "best":
            parts |= {f"{place.name}: {name}": array.tobytes() for name, array in load_training(place).items()}
    rows = (folder / "losses.csv").read_text().splitlines()
    settings = json.loads((folder / "run.json").read_text())["settings"]
    return parts | {
        "losses": "\n".join(row.rpartition(",")[0] for row in rows).encode(),
        "settings": json.dumps(settings, sort_keys=True).encode(),
    }


def same(got: set[str] | dict[str, bytes], want: set[str] | dict[str, bytes], what: str, subset: bool = False) -> None:
    """Raise DifferentError unless two outcomes or listings are equal. subset: `got` may lack names."""
    if isinstance(got, dict):
        wrong = {name for name in got if got[name] != want.get(name)}
        wrong |= set() if subset else want.keys() - got.keys()
        if wrong:
            raise DifferentError(f"{what}: {min(wrong)} differs from the undisturbed run")
    elif got != want:
        left, missing = sorted(got - want), sorted(want - got)
        raise DifferentError(f"{what}: left over {left[:4]}, missing {missing[:4]}")


def check_left(folder: Path, log: Path) -> int | None:
    """Check a stopped run: its checkpoint is of the last completed save or the next, and all saves load.

    -> the checkpoint's step; None if no save was completed and there is no checkpoint.
    """
    ended = max(saves(log), default=None)
    if ended is None and not (folder / "checkpoint" / "model.safetensors").exists():
        return None
    load(folder / "checkpoint")
    step = int(load_training(folder / "checkpoint")["loop.counters"][0])
    if ended is not None and not ended <= step <= ended + 1:
        raise DifferentError(f"a save of step {ended} was completed, but the checkpoint is of step {step}")
    for place in [file.parent for file in folder.glob("[!.]*/model.safetensors")]:
        load(place)
        if place.name != "best":
            load_training(place)
    return step


class Stage:
    """A folder for trials of one run: its text, an undisturbed run, and one stopped after STOPPED steps."""

    def __init__(self, base: Path, steps: int = 4):
        self.base, self.trial = base, base / "trial"
        self.run, self.log, self.errors = self.trial / "run", base / "saves", base / "errors"
        self.begin = begin(self.run, write_text(base / "text.txt"), steps)
        self.clear()
        with self._must(0, "the undisturbed run"):
            self._ending = command(self.begin, self.errors)
        self.want, self.listing = outcome(self.run), listing(self.trial)
        self.clear()
        with self._must(0, "the run that keeps every save"):
            self._ending = command([*self.begin, "--keep", str(steps + 1)], self.errors)
        self._every_save = outcome(self.run)
        self.clear()
        with self._must(9, "the run that is to be resumed"):
            self._ending = command(self.begin, self.errors, stopped_after(STOPPED))
        self.stopped = self.run.rename(base / "stopped")

    @contextmanager
    def _must(self, code: int, what: str) -> Iterator[None]:
        yield
        if self._ending.code != code:
            raise DifferentError(f"{what} ends with {self._ending.code}: {self._ending.last_line}")

    def clear(self) -> None:
        """Empty the folder for the next trial."""
        shutil.rmtree(self.trial, ignore_errors=True)
        self.trial.mkdir()
        self.log.unlink(missing_ok=True)

    def disturbed(self, resumed: bool, disturb: AbstractContextManager) -> Ending:
        """Run a new run, or resume the stopped one, within this context."""
        self.clear()
        if resumed:
            shutil.copytree(self.stopped, self.run)
            self.log.write_text(f"{STOPPED}\n")
        arguments = resume(self.run) if resumed else self.begin
        return command(arguments, self.errors, logged(self.log), disturb)

    def finish(self, noted: bool = False) -> str:
        """Check what a disturbed run has left, resume it, and check that it matches the undisturbed one.

        A user's own files are put next to it first, and must survive. noted: the run reported failed copies, so the
        kept saves and the best may be earlier ones. -> what could be resumed.
        """
        step = check_left(self.run, self.log)
        if self.run.exists() and (step is not None or (self.run / "run.json").exists()):
            mine = self._own_files(self.run) if step is not None else set()
            ending = command(resume(self.run), self.errors)
            if step is not None:
                if ending.code:
                    raise DifferentError(f"the run is not resumed at step {step}: {ending.code}, {ending.last_line}")
                if noted:
                    self._check_copies(f"resumed at step {step}")
                else:
                    same(outcome(self.run), self.want, f"resumed at step {step}")
                    same(listing(self.trial), self.listing | mine, f"resumed at step {step}")
                return f"resumed at step {step}"
            # run.json is created empty, before it is written
            if ending.code != 2 or not ("before its first save" in ending.errors or "run.json" in ending.errors):
                raise DifferentError(f"there was no save, and --resume says: {ending.code}, {ending.last_line}")
            shutil.rmtree(self.run)  # as the message advises
        ending = command(self.begin, self.errors)
        if ending.code:
            raise DifferentError(f"the run does not start again: {ending.code}, {ending.last_line}")
        same(outcome(self.run), self.want, "started again")
        same(listing(self.trial), self.listing, "started again")
        return "no save yet"

    def _check_copies(self, what: str) -> None:
        """Check a run that lacks copies: existing ones must be right, and no more than KEEP."""
        got = outcome(self.run)
        places = {name.partition(": ")[0] for name in got}
        kept = {place for place in places if place.startswith("checkpoint-")}
        if len(kept) > KEEP:
            raise DifferentError(f"{what}: {sorted(kept)} are kept")
        same(
            {n: a for n, a in got.items() if n.startswith("checkpoint-")},
            self._every_save | self.want,
            what,
            subset=True,
        )
        best = {name.removeprefix("best: "): array for name, array in got.items() if name.startswith("best: ")}
        steps = {name.partition(": ")[0] for name in self._every_save if name.startswith("checkpoint-")}
        if not any(all(self._every_save[f"{step}: {name}"] == best[name] for name in best) for step in steps):
            raise DifferentError(f"{what}: best is not a save of this run")
        rest = ("checkpoint: ", "losses", "settings")
        same(*({n: a for n, a in found.items() if n.startswith(rest)} for found in (got, self.want)), what)
        hidden = [path for path in listing(self.run) if path.endswith(".partial")]
        same(set(hidden), set(), what)

    def _own_files(self, folder: Path) -> set[str]:
        """Make a user's own files in a run's folder. -> their paths relative to the trial's."""
        for name in ("checkpoint-000999", "checkpoint-notes", ".cache"):
            (folder / name).mkdir()
        for name in ("notes.txt", "checkpoint-notes/model.safetensors", ".best.old"):
            (folder / name).write_text("mine")
        own = ("checkpoint-000999", "checkpoint-notes", ".cache", "notes.txt", ".best.old")
        return {f"{folder.name}/{name}" for name in (*own, "checkpoint-notes/model.safetensors")}
