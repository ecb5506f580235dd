"""The saves in a run's folder: the newest, the best, and the kept copies; no save is changed in place."""

import math
import os
import re
import shutil
import stat
from collections.abc import Callable
from functools import partial
from pathlib import Path

from numpy_gpt.errors import InputError
from numpy_gpt.io.files import PARTIAL, disk_fix, flush, partial_folder, replacing, written
from numpy_gpt.io.paths import is_file
from numpy_gpt.weights.checkpoint import MODEL_FILE, read_header

RUN_FILE = "run.json"

CHECKPOINT, BEST = "checkpoint", "best"
"""The run's subfolders for its newest save, and for the saved model with the lowest validation loss."""

COPY = re.compile(r"checkpoint-(\d{6,})")
"""The name of a save kept by --keep, and its step."""


def own_folder(run: Path, name: str) -> Path:
    """The run's subfolder of this name. A link to another save is first replaced with a copy, so that save survives."""
    place = run / name
    with written(place):
        if place.is_symlink() and _is_a_save(place.resolve()):
            with partial_folder(place) as beside:
                shutil.copytree(place, beside / name)
                place.unlink()
                (beside / name).rename(place)
    return place


def copy_newest(run: Path, keep: int) -> list[str]:
    """Copy the checkpoint to best and to the kept saves where due; returns a sentence for each failure."""
    notes: list[str] = []
    try:
        about = read_header(run / CHECKPOINT).about
    except InputError as error:
        return [f"the checkpoint is saved, but could not be read for copying: {error}"]
    works: dict[str, Callable[[dict[str, str]], list[str]]] = {
        f"{BEST} could not be updated": partial(_copy_best, run),
        "a copy of it could not be kept": partial(copy_kept, run, keep=keep),
        "older copies could not be removed": partial(_prune, run, keep=keep),
    }
    for failed, work in works.items():
        try:
            notes += work(about)
        except (InputError, OSError) as error:  # no path: a temporary folder's name changes each time
            why = f"{error.strerror or error}; {disk_fix(error)}" if isinstance(error, OSError) else str(error)
            notes.append(f"the checkpoint is saved, but {failed}: {why}")
    return notes


def _copy_best(run: Path, about: dict[str, str]) -> list[str]:
    best = run / BEST
    loss = float(about.get("val_loss", "nan"))
    if not math.isfinite(loss):
        return []
    if os.path.lexists(best / MODEL_FILE):
        try:
            old = read_header(best).about
            if old["val_batches"] != about["val_batches"]:
                raise ValueError("its validation loss covers other batches")
            if not math.isfinite(best_loss := float(old["val_loss"])):
                raise ValueError(f"its validation loss is {best_loss}")
            if loss >= best_loss:
                return []
        except (InputError, KeyError, ValueError) as error:
            return [f"{best} is unchanged, since it cannot be compared with this save: {error}"]
    best = own_folder(run, BEST)
    best.mkdir(exist_ok=True)
    with replacing(best / MODEL_FILE) as beside:
        shutil.copyfile(run / CHECKPOINT / MODEL_FILE, beside)
    return []


def copy_kept(run: Path, about: dict[str, str], keep: int) -> list[str]:
    if keep < 2 or "step" not in about:
        return []
    place = run / f"{CHECKPOINT}-{int(about['step']):06d}"
    old = kept_save(place)
    if old == about:
        return []
    if os.path.lexists(place) and (why := "is not a save of this run" if old is None else owned(place)):
        return [f"{place} {why}, so it stays: step {about['step']} is not kept"]
    with partial_folder(place) as beside:
        for name in (about["training"], MODEL_FILE):
            shutil.copyfile(run / CHECKPOINT / name, beside / name)
            flush(beside / name)
        if old is not None:  # saved before the run went back to an earlier step
            _discard(place)
        beside.rename(place)
        flush(run)
    return []


def _prune(run: Path, about: dict[str, str], keep: int) -> list[str]:
    if keep < 2 or "step" not in about:
        return []
    saves = kept_saves(run)
    # saves beyond this step predate a return to an earlier one: not among this run's last
    old = sorted(step for step in saves if step <= int(about["step"]))[:-keep]
    for step in old:
        if not owned(saves[step]):
            _discard(saves[step])
    return []


def check_about(save: Path, step: int) -> None:
    """Raise InputError if the metadata of this step's save has a count or a loss that `Run.save` never writes."""
    about = read_header(save).about
    try:
        if about.get("step", str(step)) != str(step):
            raise ValueError(f"step {about['step']:.80}, but its training state is of step {step}")
        if (loss := float(about.get("val_loss", "0"))) < 0:  # NaN is fine: training may have diverged
            raise ValueError(f"the validation loss {loss}")
        if not 1 <= int(about.get("val_batches", "1")) < 1 << 63:
            raise ValueError(f"{about['val_batches']:.80} validation batches")
    except ValueError as error:
        raise InputError(
            f"{save / MODEL_FILE} has metadata that no run writes ({error!s:.200}): start from it with --init"
        ) from error


def kept_save(folder: Path) -> dict[str, str] | None:
    """The metadata of the kept save in this folder; None if it is anything else."""
    match = COPY.fullmatch(folder.name)
    if match is None or folder.is_symlink() or not folder.is_dir():
        return None
    try:
        about = read_header(folder).about
    except InputError:
        return None
    return about if about.get("step") == str(int(match[1])) and "training" in about else None


def kept_saves(run: Path) -> dict[int, Path]:
    """Step -> folder of the kept saves in a run's folder."""
    return {int(about["step"]): folder for folder in run.iterdir() if (about := kept_save(folder)) is not None}


def owned(save: Path) -> str:
    """Why a save is the user's and must stay: it is read-only, or has other files in it; "" if neither."""
    if not all(path.stat().st_mode & stat.S_IWUSR for path in (save, save / MODEL_FILE)):
        return "is read-only"
    saved = (MODEL_FILE, read_header(save).about.get("training"))
    more = (path.name for path in save.iterdir() if path.name not in saved and not PARTIAL.fullmatch(path.name))
    return f"has {first} in it" if (first := next(more, None)) else ""


def _is_a_save(folder: Path) -> bool:
    """Whether a folder is a save: it is in a run (this or another), or has a kept save's name."""
    return is_file(folder.parent / RUN_FILE) or COPY.fullmatch(folder.name) is not None


def _discard(folder: Path) -> None:
    """Remove a folder: rename it away at once, then delete its content."""
    with partial_folder(folder) as beside:
        folder.rename(beside / folder.name)
