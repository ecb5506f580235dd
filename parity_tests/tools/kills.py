"""Kill -9 at random instants of a training run that saves after every step: what is left, and where it leads.

After each kill the run's folder must hold a whole checkpoint, not older than the last save that had ended, every copy
that it keeps and its best model must load, and the run resumed must end as one that was never stopped, bit for bit:
parameters, training state, losses, the copies and the best. An instant is a number of saves that have ended and a
moment more, so that a process is killed however slow the machine is. Processes are forked, so that a trial costs the
run and not the start of Python.
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
    """The process id of a fork that does job without a word, with its saves in log."""

    def silent():
        with open(os.devnull, "w") as sys.stdout, logged(log):
            job()

    return fork(silent)


def kill_and_resume(trials: int, place: Path, seed: int) -> Iterator[int]:
    """Of each of so many kills the step of the checkpoint that it left. Raises DifferentError at the first fault."""
    text, log, folder = write_text(place / "text.txt"), place / "saves", place / "killed"
    began = time.perf_counter()
    if wait(start(log, partial(begin, place / "whole", text))):
        raise DifferentError("the run that is not killed fails")
    moment, want = (time.perf_counter() - began) / STEPS, outcome(place / "whole")
    rng, done = random.Random(seed), 0

    def kill(job, after: int) -> bool:
        """Do job, and kill it a moment after so many saves. Whether it had not ended before."""
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
