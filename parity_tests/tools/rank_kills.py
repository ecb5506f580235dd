"""Kill -9 of a random rank at random instants of a run on several processes, each resumed on another number of them.

After each kill all processes must have ended within LIMIT seconds, the others with exit code 4 and a sentence that
names the rank; the last save must be complete; and the resumed run must give the uninterrupted one's rows within ROWS.
"""

import random
import re
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from numpy_gpt.weights.checkpoint import load_training
from parity_tests.judge.ranks import finish, ranks, train_on
from parity_tests.judge.runs import SMALL, rows
from parity_tests.tools.trials import DifferentError, write_text

LIMIT, ROWS = 60, 1e-5
STEPS = 40
FLAGS = ["--batch-size", 8, "--epochs", 1000, "--save-freq", 4, "--eval-freq", 4]


def losses(out: Path) -> dict[int, list[float]]:
    return {int(row["step"]): [float(row[k]) for k in ("train_loss", "val_loss", "step_loss")] for row in rows(out)}


def kill_ranks(trials: int, place: Path, seed: int) -> Iterator[float]:
    """Yield the seconds that each kill took to end the run. Raises DifferentError at the first fault."""
    text, rng = write_text(place / "text.txt"), random.Random(seed)
    began = time.monotonic()
    train_on(2, text, place / "whole", *FLAGS, "--max-steps", STEPS)
    seconds, want = time.monotonic() - began, losses(place / "whole")
    for number in range(trials):
        parallel, size = rng.choice(["ddp", "fsdp"]), rng.choice([2, 2, 4])
        rank, instant = rng.randrange(size), rng.uniform(0, seconds * size / 2)
        name = f"kill {number}, of rank {rank} of {size} ({parallel}) after {instant:.2f} s"
        out = place / "killed"
        shutil.rmtree(out, ignore_errors=True)
        yield kill(text, out, parallel, size, rank, instant, name)
        if (out / "checkpoint" / "model.safetensors").exists():
            resume(out, rng.choice([1, 2, 4]), parallel, want, name)


def kill(text: Path, out: Path, parallel: str, size: int, rank: int, instant: float, name: str) -> float:
    command = ["pretrain", "--text", text, "--out", out, *SMALL, *FLAGS, "--max-steps", STEPS, "--parallel", parallel]
    with ranks(size, *command) as processes:
        time.sleep(instant)
        running, begun = all(process.poll() is None for process in processes), (out / "run.json").exists()
        processes[rank].kill()
        killed = time.monotonic()
        if not begun:  # the others may still wait for it to join them: launchers end them then
            for process in processes:
                process.terminate()
        try:
            codes, _, errors = finish(processes, LIMIT)
        except subprocess.TimeoutExpired as error:
            raise DifferentError(f"{name}: a process still runs after {LIMIT} s") from error
        took = time.monotonic() - killed
    del codes[rank], errors[rank]
    if running and begun and not (set(codes) <= {0, 4} and (set(codes) == {0} or named(rank, errors))):
        raise DifferentError(f"{name}: the others ended with {codes} and said {errors}")
    return took


def named(rank: int, errors: list[str]) -> bool:
    return bool(re.search(rf"Error: rank {rank} \(process \d+ on \S+\) has died", "".join(errors)))


def resume(out: Path, size: int, parallel: str, want: dict[int, list[float]], name: str) -> None:
    step = int(load_training(out / "checkpoint")["loop.counters"][0])
    with ranks(size, "pretrain", "--resume", out, "--max-steps", STEPS, "--parallel", parallel) as processes:
        codes, _, errors = finish(processes)
    if codes != [0] * size:
        raise DifferentError(f"{name}: resumed after step {step} on {size}, it ended with {codes}: {errors}")
    got = losses(out)
    if got.keys() != want.keys() or np.abs(np.subtract([got[k] for k in want], list(want.values()))).max() > ROWS:
        raise DifferentError(f"{name}: resumed after step {step} on {size}, its rows differ: {got}, not {want}")
