"""Kill -9 at random instants of a training run that saves after every step: what is left, and where it leads.

After each kill the run's folder must hold a whole checkpoint, not older than the last save that had ended, every copy
that it keeps and its best model must load, and the run resumed must end as one that was never stopped, bit for bit:
parameters, training state, losses, the copies and the best. The instants are drawn from the first save's end to the
last one's. Processes are forked, so that a trial costs the run and not the start of Python.
"""

import os
import random
import shutil
import signal
import time
import traceback
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import matplotlib.figure  # noqa: F401 (a fork need not import what its parent has: a run is then mostly saves)
import safetensors.numpy  # noqa: F401

from numpy_gpt import load
from numpy_gpt.learner import NumpyLearner
from numpy_gpt.pretrain import pretrain
from numpy_gpt.run import Run
from numpy_gpt.weights.checkpoint import load_training

STEPS = 24
KEEP = 3
FLAGS = {
    "model": "tiny",
    "encoding": "bytes",
    "context_length": 16,
    "batch_size": 4,
    "drop_rate": 0.1,
    "lr": 0.1,  # too high, so that the best is neither the first nor the last
    "warmup_steps": 3,
    "clip": 1.0,
    "eval_freq": 3,
    "eval_iter": 1,
    "epochs": 9,
    "max_steps": STEPS,
    "prompt": "a",
    "sample_tokens": 4,
}


class DifferentError(AssertionError):
    """What a kill left, or what a resumed run came to, is not as it must be."""


def forked(job) -> int:
    """The process id of a fork that does job, and ends with 1 if that raises."""
    pid = os.fork()
    if pid:
        return pid
    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        job()
        os._exit(0)
    except BaseException:
        traceback.print_exc()
        os._exit(1)


def logged(log: Path, job) -> None:
    """job, with a line in log for every save that has ended or is resumed from: the step, and the time."""

    def logging(real):
        def call(self, first, second, position, *args):
            notes = real(self, first, second, position, *args)
            with log.open("a") as f:
                f.write(f"{position.step} {time.time()}\n")
            return notes

        return call

    Run.save, Run.go_on = logging(Run.save), logging(Run.go_on)
    job()


def saves(log: Path) -> list[tuple[int, float]]:
    """The saves in a log, as far as its lines are whole."""
    lines = log.read_text().splitlines(keepends=True) if log.exists() else []
    return [(int(step), float(at)) for step, at in (line.split() for line in lines if line.endswith("\n"))]


def train(folder: Path, text: Path) -> None:
    pretrain(FLAGS | {"text": str(text)}, NumpyLearner, "kills", out=folder, save_freq=1, keep=KEEP)


def go_on(folder: Path) -> None:
    pretrain({}, NumpyLearner, "kills", resume=folder, save_freq=1, keep=KEEP)


def wait(pid: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def outcome(folder: Path) -> dict[str, bytes]:
    """What a run came to: parameters, states, losses (but for the seconds in them), copies and the best."""
    parts = {}
    for place in [folder / "checkpoint", folder / "best", *sorted(folder.glob("checkpoint-*"))]:
        parts |= {f"{place.name}: {name}": array.tobytes() for name, array in load(place).params.items()}
        if place.name != "best":
            parts |= {f"{place.name}: {name}": array.tobytes() for name, array in load_training(place).items()}
    rows = (folder / "losses.csv").read_text().splitlines()
    return parts | {"losses": "\n".join(row.rpartition(",")[0] for row in rows).encode()}


def check_left(folder: Path, log: Path) -> int:
    """What a kill left: a checkpoint of the last save that ended, or of the one after it, and copies. -> its step."""
    load(folder / "checkpoint")
    step, ended = int(load_training(folder)["loop.counters"][0]), max(each for each, _ in saves(log))
    if not ended <= step <= ended + 1:
        raise DifferentError(f"a save of step {ended} had ended, and the checkpoint is of step {step}")
    for place in [folder / "best", *folder.glob("checkpoint-*")]:
        if (place / "model.safetensors").exists():
            load(place)
            if place.name != "best":
                load_training(place)
    return step


def kill_and_resume(trials: int, place: Path, seed: int) -> Iterator[int]:
    """Of each of so many kills the step of the checkpoint that it left. Raises DifferentError at the first fault."""
    text, log = place / "text.txt", place / "saves"
    text.write_text("".join(random.Random(0).choices("abcdefgh ", k=2000)))
    start = time.time()
    if wait(forked(partial(logged, log, partial(train, place / "whole", text)))):
        raise DifferentError("the run that is not killed fails")
    first, last = (saves(log)[k][1] - start for k in (0, -1))
    want = outcome(place / "whole")
    rng, done = random.Random(seed), 0
    while done < trials:
        folder = place / "killed"
        shutil.rmtree(folder, ignore_errors=True)
        log.unlink()
        pid = forked(partial(logged, log, partial(train, folder, text)))
        time.sleep(rng.uniform(first, last))
        os.kill(pid, signal.SIGKILL)
        if wait(pid) != -signal.SIGKILL or not saves(log):
            log.touch()
            continue  # on a busy machine: it had ended before, or not yet saved for the first time
        step = check_left(folder, log)
        while rng.random() < 0.3:  # killed again as it goes on
            pid = forked(partial(logged, log, partial(go_on, folder)))
            time.sleep(rng.uniform(0, last))
            os.kill(pid, signal.SIGKILL)
            wait(pid)
            check_left(folder, log)
        if wait(forked(partial(go_on, folder))):
            raise DifferentError(f"kill {done}, at step {step}: the run does not go on")
        got = outcome(folder)
        if wrong := sorted({name for name in want if got.get(name) != want[name]} | (got.keys() - want.keys())):
            raise DifferentError(f"kill {done}, at step {step}: {wrong[0]} is not as without it")
        done += 1
        yield step
