"""Kill -9 at random instants of a training run that saves after every step: what is left, and where it leads.

After each kill the run's folder must hold a whole checkpoint, each copy that it keeps and its best model must load, and
the run resumed must end with the parameters, the losses and the training state of one that was never stopped, bit for
bit. Processes are forked, so that a trial costs a tenth of a second and not the start of Python.
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
from numpy_gpt.weights.checkpoint import load_training

STEPS = 24
KEEP = 3
FLAGS = {
    "model": "tiny",
    "encoding": "bytes",
    "context_length": 16,
    "batch_size": 4,
    "drop_rate": 0.1,
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


def train(folder: Path, text: Path):
    pretrain(FLAGS | {"text": str(text)}, NumpyLearner, "kills", out=folder, save_freq=1, keep=KEEP)


def go_on(folder: Path):
    pretrain({}, NumpyLearner, "kills", resume=folder, save_freq=1, keep=KEEP)


def wait(pid: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def outcome(folder: Path) -> dict[str, bytes]:
    """What a run came to: parameters, training state and losses, but for the seconds in them."""
    parts = {f"parameter {name}": array.tobytes() for name, array in load(folder).params.items()}
    parts |= {f"state {name}": array.tobytes() for name, array in load_training(folder).items()}
    rows = (folder / "losses.csv").read_text().splitlines()
    return parts | {"losses": "\n".join(row.rpartition(",")[0] for row in rows).encode()}


def check_left(folder: Path) -> int:
    """What a kill left: one whole checkpoint with its state, and copies that load if they are there. -> its step."""
    step = int(load_training(folder)["loop.counters"][0])
    load(folder)
    for copy in [folder / "best", *folder.glob("checkpoint-*")]:
        if copy.is_dir() and (copy / "model.safetensors").exists():
            load(copy)
    return step


def kill_and_resume(trials: int, place: Path, seed: int) -> Iterator[int]:
    """Of each of so many kills the step of the checkpoint that it left. Raises DifferentError at the first fault."""
    text = place / "text.txt"
    text.write_text("".join(random.Random(0).choices("abcdefgh ", k=2000)))
    start = time.perf_counter()
    if wait(forked(lambda: train(place / "whole", text))):
        raise DifferentError("the run that is not killed fails")
    seconds = time.perf_counter() - start
    want = outcome(place / "whole")
    rng, done = random.Random(seed), 0
    while done < trials:
        folder = place / "killed"
        shutil.rmtree(folder, ignore_errors=True)
        pid = forked(partial(train, folder, text))
        time.sleep(rng.uniform(0, seconds))
        os.kill(pid, signal.SIGKILL)
        if wait(pid) != -signal.SIGKILL or not (folder / "checkpoint" / "model.safetensors").exists():
            continue  # it had ended before, or had not yet saved for the first time
        step = check_left(folder)
        while rng.random() < 0.3:  # killed again as it goes on
            pid = forked(partial(go_on, folder))
            time.sleep(rng.uniform(0, seconds))
            os.kill(pid, signal.SIGKILL)
            wait(pid)
            check_left(folder)
        if wait(forked(partial(go_on, folder))):
            raise DifferentError(f"kill {done}, at step {step}: the run does not go on")
        got = outcome(folder)
        if wrong := [name for name in want if got.get(name) != want[name]] or set(got) - set(want):
            raise DifferentError(f"kill {done}, at step {step}: {sorted(wrong)[0]} is not as without it")
        done += 1
        yield step
