"""Kill -9 at random instants of a training run that saves after every step, then checks and resumes it.

After each kill the run's folder must have a complete checkpoint, not older than the last completed save, and its kept
copies and best model must load. The resumed run must match an uninterrupted one bit for bit: parameters, training
state, losses, the copies and the best. An instant is a number of completed saves and a moment more, so that a process
is killed however slow the machine is. Processes are forked, so that a trial costs the run, not the start of Python.
"""

import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from numpy_gpt.runs.learner import NumpyLearner
from numpy_gpt.runs.pretrain import pretrain
from parity_tests.tools.trials import (
    DifferentError,
    check_left,
    ended_or_saved,
    fork,
    killed_by_ctrl_c,
    logged,
    outcome,
    same,
    saves,
    wait,
    write_text,
)

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


def begin(folder: Path, text: Path) -> None:
    pretrain(FLAGS | {"text": str(text)}, NumpyLearner, "kills", out=folder, save_freq=1, keep=KEEP)


def resume(folder: Path) -> None:
    pretrain({}, NumpyLearner, "kills", resume=folder, save_freq=1, keep=KEEP)


def start(log: Path, job) -> int:
    """Fork a process that does job silently and logs its saves. -> its process id."""

    def silent():
        with open(os.devnull, "w") as sys.stdout, logged(log):
            job()

    return fork(silent)


def kill_and_resume(trials: int, place: Path, seed: int) -> Iterator[int]:
    """Yield the step of the checkpoint that each kill left. Raises DifferentError at the first fault."""
    text, log, folder = write_text(place / "text.txt"), place / "saves", place / "killed"
    began = time.perf_counter()
    if wait(start(log, partial(begin, place / "whole", text))):
        raise DifferentError("the run that is not killed fails")
    moment, want = (time.perf_counter() - began) / STEPS, outcome(place / "whole")
    rng, done = random.Random(seed), 0

    def kill(job, after: int) -> bool:
        """Start job and kill it a moment after `after` saves. -> whether it was still running."""
        pid = start(log, job)
        with killed_by_ctrl_c(pid):
            code = ended_or_saved(pid, log, len(saves(log)) + after)
            time.sleep(rng.uniform(0, moment))
        if code is None:
            os.kill(pid, signal.SIGKILL)
            code = wait(pid)
        return code == -signal.SIGKILL

    while done < trials:
        shutil.rmtree(folder, ignore_errors=True)
        log.write_text("")
        if not kill(partial(begin, folder, text), rng.randint(1, STEPS)):
            continue
        step = check_left(folder, log)
        while rng.random() < 0.3:  # killed again as it resumes
            kill(partial(resume, folder), rng.randint(0, 4))
            check_left(folder, log)
        if wait(start(log, partial(resume, folder))):
            raise DifferentError(f"kill {done}, at step {step}: the run is not resumed")
        same(outcome(folder), want, f"kill {done}, at step {step}")
        done += 1
        yield step
