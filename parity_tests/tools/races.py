"""Races of two or three commands, started at once, for the same folder.

One of them gets it and ends as if alone: the folder has that command's files and nothing else. The others end with exit
code 2 and one sentence, and remove nothing. Runs without --out each get their own folder. A command that fails or is
interrupted must not touch the work of another that finishes in the same folder.
"""

import json
import os
import random
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import chdir, contextmanager
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pooch  # noqa: F401  # a fork need not import what its parent has
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from numpy_gpt.errors import InputError
from numpy_gpt.runs.folder import Run
from numpy_gpt.weights import download
from parity_tests.tools.trials import (
    DifferentError,
    Ending,
    begin,
    command,
    listing,
    outcome,
    resume,
    same,
    start,
    stopped_after,
    wait,
    write_text,
)

STEPS = 3
SEEDS = (1, 2, 3)


@contextmanager
def at_the_gate(gate: tuple[int, int], seconds: float, create: bool) -> Iterator[None]:
    """Wait, at the start of the block or when it creates a run, until the gate opens and `seconds` more."""

    def wait_there():
        os.close(gate[1])
        os.read(gate[0], 1)
        end = time.perf_counter() + seconds
        while time.perf_counter() < end:
            pass

    if not create:
        wait_there()
        yield
        return
    real = Run.create

    def create_then(*args, **kwargs):
        wait_there()
        return real(*args, **kwargs)

    with patch.object(Run, "create", create_then):
        yield


@contextmanager
def download_that_ends(tell: int, told: int, error: BaseException) -> Iterator[None]:
    """In the block, make the download of GPT-2 report that it has started, wait for a signal, and fail."""

    def fetch(size, folder, report):
        os.write(tell, b"1")
        os.read(told, 1)
        raise error

    with patch.object(download, "fetch_gpt2", fetch):
        yield


class Races:
    """Trials, identified by name, of commands started at once."""

    def __init__(self, base: Path):
        self.base, self.place, self.out = base, base / "trial", base / "trial" / "out"
        self.text, self.errors = write_text(base / "text.txt"), [base / f"errors-{k}" for k in range(3)]
        self.alone: dict[str, dict[str, bytes]] = {}
        self.listings: dict[str, set[str]] = {}
        self.commands: dict[str, list[str]] = {}
        self.checkpoints = {seed: base / f"run-{seed}" for seed in SEEDS}
        self.sources = {seed: base / f"source-{seed}" for seed in SEEDS}
        for seed in SEEDS:
            self._alone(f"pretrain {seed}", begin(self.out, self.text, STEPS, seed), self.checkpoints[seed])
        for seed in SEEDS[:2]:
            checkpoint = str(self.checkpoints[seed])
            self._alone(f"export {seed}", ["export", checkpoint, "--out", str(self.out)], self.sources[seed])
            imported = base / f"imported-{seed}"
            self._alone(f"import {seed}", ["import", str(self.sources[seed]), "--out", str(self.out)], imported)
        self.damaged = self._damaged()
        self.stopped = base / "stopped"
        self.clear()
        ending = command(begin(self.out, self.text, STEPS, 1), self.errors[0], stopped_after(1))
        self._expect(ending, 9, "the run that is to be resumed")
        self.out.rename(self.stopped)

    def clear(self) -> None:
        shutil.rmtree(self.place, ignore_errors=True)
        self.place.mkdir()

    def _expect(self, ending: Ending, code: int, what: str) -> None:
        if ending.code != code:
            raise DifferentError(f"{what} ends with {ending.code}: {ending.last_line}")

    def _alone(self, name: str, arguments: list[str], keep: Path) -> None:
        """Run a command alone, and record what it makes."""
        self.clear()
        self._expect(command(arguments, self.errors[0]), 0, f"{name}, alone,")
        self.commands[name], self.listings[name] = arguments, listing(self.place)
        self.alone[name] = contents(self.out)
        self.out.rename(keep)

    def _damaged(self) -> Path:
        """A source whose last tensor is NaN: importing it fails after most of it has been read."""
        folder = shutil.copytree(self.sources[1], self.base / "damaged")
        tensors = load_file(folder / "model.safetensors")
        last = max(tensors)
        tensors[last] = np.full_like(tensors[last], np.nan)
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        return folder

    def races(self, trials: int, seed: int) -> list[str]:
        """The names of `trials` races, of each kind in turn."""
        kinds = [kind.replace(" ", "_") for kind in KINDS]
        return [f"races {kinds[k % len(kinds)]} {seed + k // len(kinds)}" for k in range(trials)]

    def trial(self, name: str) -> str:
        """Do the trial of this name. -> the exit codes. Raises DifferentError at a fault."""
        self.clear()
        _, kind, seed = name.split()
        endings = KINDS[kind.replace("_", " ")](self, random.Random(int(seed)))
        return f"exit codes {', '.join(str(ending.code) for ending in sorted(endings, key=lambda ending: ending.code))}"

    def together(
        self,
        rng: random.Random,
        *commands: list[str],
        interrupt: int | None = None,
    ) -> list[Ending]:
        """Start all commands at once. interrupt: index of the one that gets a SIGINT a moment later."""
        gate, create = os.pipe(), rng.random() < 0.5
        pids = []
        for k, arguments in enumerate(commands):
            seconds = rng.choice([0, rng.uniform(0, 1e-3), rng.uniform(0, 1e-2)])
            at = at_the_gate(gate, seconds, create and arguments[0] == "pretrain" and "--resume" not in arguments)
            pids.append(start(arguments, self.errors[k], at))
        for end in gate:
            os.close(end)
        if interrupt is not None:
            time.sleep(rng.uniform(0, 2e-2))
            os.kill(pids[interrupt], signal.SIGINT)
        codes = [wait(pid) for pid in pids]
        return [Ending(code, self.errors[k].read_text(encoding="utf-8")) for k, code in enumerate(codes)]

    def one_wins(self, rng: random.Random, *names: str) -> list[Ending]:
        """Run commands with the same --out: one must end as it does alone, the others must be refused."""
        endings = self.together(rng, *(self.commands[name] for name in names))
        self.check_refusals(endings)
        winners = [name for name, ending in zip(names, endings, strict=True) if ending.code == 0]
        if len(winners) != 1:
            raise DifferentError(f"{len(winners)} of {len(names)} commands got the folder")
        self.check_alone(winners[0])
        return endings

    def check_alone(self, name: str) -> None:
        """Raise DifferentError unless the folder is as this command leaves it when run alone."""
        same(listing(self.place), self.listings[name], f"{name} won")
        same(contents(self.out), self.alone[name], f"{name} won")

    def check_refusals(self, endings: list[Ending]) -> None:
        """Raise DifferentError unless every command succeeded, or ended with 2 and one sentence."""
        for ending in endings:
            sentence = ending.code == 2 and ending.errors.startswith("Error: ") and ending.errors.count("\n") == 1
            if ending.code and not sentence:
                raise DifferentError(f"a command ends with {ending.code}: {ending.last_line}")

    def one_failed(self, name: str, endings: list[Ending]) -> list[Ending]:
        """Check the endings of a command that must fail and of `name`, which finished there or was refused."""
        failed, ending = endings
        if failed.code == 0 or failed.traceback or failed.code == 70:
            raise DifferentError(f"the command that fails ends with {failed.code}: {failed.last_line}")
        self.check_refusals([ending])
        if ending.code == 0:
            self.check_alone(name)
        else:
            same(listing(self.place) - {"out"}, set(), "nobody won")
        return endings


def contents(folder: Path) -> dict[str, bytes]:
    """A folder's files and their content; for a run, its outcome, without the seconds in losses.csv."""
    if (folder / "run.json").exists():
        return outcome(folder)
    return {str(file.relative_to(folder)): content(file) for file in folder.rglob("*") if file.is_file()}


def content(file: Path) -> bytes:
    """A file's content; for safetensors independent of the metadata's order, which the library does not fix."""
    if file.suffix != ".safetensors":
        return file.read_bytes()
    with safe_open(file, framework="numpy") as tensors:
        metadata = sorted(tensors.metadata().items())
    return repr((metadata, [(name, array.tobytes()) for name, array in sorted(load_file(file).items())])).encode()


def without_out(races: Races, rng: random.Random) -> list[Ending]:
    """Race runs that choose their own folders."""
    seeds = SEEDS[: rng.choice([2, 2, 3])]
    commands = [begin(None, races.text, STEPS, seed) for seed in seeds]
    with chdir(races.place):
        endings = races.together(rng, *commands)
    races.check_refusals(endings)
    won = [seed for seed, ending in zip(seeds, endings, strict=True) if ending.code == 0]
    runs = {json.loads((run / "run.json").read_text())["settings"]["seed"]: run for run in races.place.glob("runs/*")}
    if not won or sorted(runs) != won:
        raise DifferentError(f"runs of the seeds {won} ended, but there are folders of {sorted(runs)}")
    for seed, run in runs.items():
        same(contents(run), races.alone[f"pretrain {seed}"], f"the run of seed {seed}")
    inside = {path.removeprefix("out/") for path in races.listings["pretrain 1"]} - {"out"}
    names = {path for run in runs.values() for path in (run.name, *(f"{run.name}/{each}" for each in inside))}
    training = {path for path in names if "/training-" in path}
    same({path for path in listing(races.place / "runs") if "/training-" not in path}, names - training, "in runs")
    return endings


def one_out(races: Races, rng: random.Random) -> list[Ending]:
    """Race runs with the same new --out."""
    return races.one_wins(rng, *(f"pretrain {seed}" for seed in SEEDS[: rng.choice([2, 2, 3])]))


def resumed_twice(races: Races, rng: random.Random) -> list[Ending]:
    """Resume one run in two or three processes: each must succeed in turn or be refused."""
    shutil.copytree(races.stopped, races.out)
    endings = races.together(rng, *[resume(races.out)] * rng.choice([2, 2, 3]))
    races.check_refusals(endings)
    if all(ending.code for ending in endings):
        raise DifferentError("nobody resumed the run")
    races.check_alone("pretrain 1")
    return endings


def imports(races: Races, rng: random.Random) -> list[Ending]:
    """Race two imports into the same --out."""
    return races.one_wins(rng, "import 1", "import 2")


def exports(races: Races, rng: random.Random) -> list[Ending]:
    """Race two exports to the same --out."""
    return races.one_wins(rng, "export 1", "export 2")


def import_beside_pretrain(races: Races, rng: random.Random) -> list[Ending]:
    """Race an import, or an export, against a run with the same --out."""
    return races.one_wins(rng, rng.choice(["import 1", "export 1"]), "pretrain 2", *["import 2"][: rng.random() < 0.2])


def failing_import(races: Races, rng: random.Random) -> list[Ending]:
    """Race a failing import (damaged or interrupted) against a command that finishes in the same folder."""
    name = rng.choice(["pretrain 2", "import 2"])
    damaged = rng.random() < 0.5
    source = races.damaged if damaged else races.sources[1]
    first = ["import", str(source), "--out", str(races.out)]

    endings = races.together(rng, first, races.commands[name], interrupt=None if damaged else 0)
    if endings[0].code == 0 and not damaged:  # interrupted too late
        races.check_refusals(endings[1:])
        races.check_alone("import 1")
        return endings
    return races.one_failed(name, endings)


def failing_download(races: Races, rng: random.Random) -> list[Ending]:
    """Let a download fail, or be interrupted, after another command has finished in its folder."""
    name = rng.choice(["pretrain 2", "import 2"])
    error = rng.choice([KeyboardInterrupt(), InputError("it was not found: try again")])
    if rng.random() < 0.5:
        races.out.mkdir()

    begun, go = os.pipe(), os.pipe()
    arguments = ["download", "124M", "--out", str(races.out)]
    pid = start(arguments, races.errors[1], download_that_ends(begun[1], go[0], error))
    os.close(begun[1])
    os.read(begun[0], 1)
    ending = command(races.commands[name], races.errors[0])
    os.write(go[1], b"1")
    failed = Ending(wait(pid), races.errors[1].read_text(encoding="utf-8"))
    for end in (begun[0], *go):
        os.close(end)
    return races.one_failed(name, [failed, ending])


KINDS: dict[str, Callable[[Races, random.Random], list[Ending]]] = {
    "pretrain without --out": without_out,
    "pretrain with one --out": one_out,
    "pretrain --resume": resumed_twice,
    "import": imports,
    "export": exports,
    "import beside pretrain": import_beside_pretrain,
    "failing import": failing_import,
    "failing download": failing_download,
}
