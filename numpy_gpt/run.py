"""A pretraining run as a folder: its settings, its batches, losses.csv, the plot and the checkpoint."""

import csv
import errno
import hashlib
import json
import math
import os
import re
import shutil
import stat
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from numpy_gpt.config import GPT2_SIZES, GPTConfig
from numpy_gpt.data import Loader, load_text, sha256, sliding_windows, split_text
from numpy_gpt.errors import InputError, brief
from numpy_gpt.files import (
    PARTIAL,
    SMALL,
    check_free,
    disk_fix,
    flush,
    lock,
    partial_folder,
    read_json,
    remove,
    replacing,
    sweep_folder,
    taken,
    unlock,
)
from numpy_gpt.paths import check_regular, is_file, is_folder, kind_of
from numpy_gpt.tokenizer import ENCODINGS, encode, get_encoding, vocabulary_files, vocabulary_sha256
from numpy_gpt.train import Learner, Position, Step
from numpy_gpt.typing import Params
from numpy_gpt.weights.checkpoint import MODEL_FILE, load_training, read_header, save_params
from numpy_gpt.weights.stored import Weights

TINY = {"emb_dim": 128, "n_layers": 2, "n_heads": 4}
"""The size called tiny: half a million parameters with the encoding bytes, for a laptop and a minute."""

RUN_FILE = "run.json"

CHECKPOINT, BEST = "checkpoint", "best"
"""The folders of a run for its newest save, and for the model of those saved with the lowest validation loss."""

VOCABULARY = "vocabulary"
"""The folder of a run for the two files of an encoding that is not known by its name."""

COPY = re.compile(r"checkpoint-(\d{6,})")
"""The folder of a save that --keep keeps, and the steps made by then."""

TRAIN_RATIO = 0.9
"""Share of the text's characters that is trained on; the rest is for validation (the book's)."""

COLUMNS = ("step", "epoch", "tokens_seen", "train_loss", "val_loss", "step_loss", "learning_rate", "seconds")
"""Of losses.csv: nats per token, epochs counted from 1, seconds since this process began to train."""

LINE = 4096
"""Characters of a line of losses.csv that are read at once: ten times the longest."""

ROW_BYTES = 640
"""What a row of losses.csv takes in memory."""


@dataclass(frozen=True)
class Settings:
    """All that decides a run's numbers. The defaults are the book's; `for_tiny` are those of the tiny model."""

    model: str = "124M"
    text: str = "python-manual"
    encoding: str = "gpt2"
    context_length: int = 256
    epochs: int = 10
    max_steps: int | None = None
    batch_size: int = 2
    stride: int | None = None  # None: the context length, so that windows do not overlap
    lr: float = 4e-4
    weight_decay: float = 0.1
    warmup_steps: int = 0
    clip: float | None = None
    drop_rate: float = 0.1
    tie_weights: bool = False
    qkv_bias: bool = False
    seed: int = 123
    eval_freq: int = 5
    eval_iter: int = 5
    prompt: str = "Every effort moves you"
    sample_tokens: int = 50

    def config(self, vocab_size: int) -> GPTConfig:
        """The model these settings describe. Raises InputError for an unknown size."""
        if self.model != "tiny" and self.model not in GPT2_SIZES:
            raise InputError(f"unknown model {self.model!r}: choose tiny, {', '.join(GPT2_SIZES)}")
        return GPTConfig(
            vocab_size=vocab_size,
            context_length=self.context_length,
            drop_rate=self.drop_rate,
            tie_weights=self.tie_weights,
            qkv_bias=self.qkv_bias,
            **(TINY if self.model == "tiny" else GPT2_SIZES[self.model]),
        )


for_tiny = Settings(
    model="tiny",
    encoding="bytes",
    context_length=64,
    epochs=2,
    max_steps=1001,
    batch_size=8,
    lr=4e-3,
    warmup_steps=100,
    clip=1.0,
    drop_rate=0.0,
    eval_freq=100,
    prompt="The statement",
    sample_tokens=160,
)

COUNTED_FROM_0 = ("epochs", "max_steps", "warmup_steps", "sample_tokens")
"""Settings that may be 0; the other counts are at least 1."""

MAY_CHANGE = {"epochs", "max_steps", "eval_freq", "eval_iter", "prompt"}
"""What --resume lets a run be continued with; the rest would make it another run."""


class Batches:
    """A run's text, tokens and loaders."""

    def __init__(self, settings: Settings):
        """Reads the text. Raises InputError if it cannot be had, or either part is too short for one window."""
        self.encoding = get_encoding(settings.encoding)
        self.text = load_text(settings.text)
        words = {} if settings.encoding in ENCODINGS else vocabulary_files(settings.encoding)
        self.sha256 = hashlib.sha256(b"\0".join([self.text.encode(), *words.values()])).hexdigest()
        self.text_sha256 = sha256(self.text)
        self.vocabulary_sha256 = vocabulary_sha256(words) if words else None
        parts = [encode(self.encoding, part) for part in split_text(self.text, TRAIN_RATIO)]
        self.tokens = sum(len(part) for part in parts)
        T = settings.context_length
        windows = []
        for name, part in zip(("training", "validation"), parts, strict=True):
            try:
                windows.append(sliding_windows(part, T, settings.stride or T))
            except InputError as error:
                raise InputError(f"the {name} part of {settings.text}: {error}") from error
        self._train, self._val = windows
        self._batch_size = settings.batch_size
        self.windows = len(self._train[0])
        self.batches_per_epoch = len(Loader(*self._train, settings.batch_size, drop_last=True))
        self.train_tokens = self.batches_per_epoch * settings.batch_size * T
        self.val_tokens = self._val[0].size

    def loaders(self, learner: Learner) -> tuple[Loader, Loader]:
        """Train (shuffled, last batch dropped) and validation loader (neither), on the learner's random stream."""
        train = Loader(*self._train, self._batch_size, drop_last=True, begin_epoch=learner.shuffled_order)
        val = Loader(*self._val, self._batch_size, drop_last=False, begin_epoch=learner.file_order)
        return train, val


class Validation(NamedTuple):
    """Of weights: their loss in nats per token over so many batches of the validation text, its first."""

    loss: float
    batches: int


class MakeLearner(Protocol):
    """How a backend makes its learner: new weights from settings.seed, or the given params."""

    def __call__(self, config: GPTConfig, settings: Settings, total_steps: int, params: Weights | None) -> Learner: ...


class Run:
    """The folder of a run. `settings` are those it was begun with; nothing is written before `create`."""

    def __init__(self, folder: Path, settings: Settings, save: Path | None = None):
        """save: the folder of the save to resume from, if it is not the newest, checkpoint."""
        self.folder, self.settings = folder, settings
        self._save = save or folder / CHECKPOINT
        self._losses = folder / "losses.csv"

    @classmethod
    @contextmanager
    def create(cls, folder: Path | None, settings: Settings, text_sha256: str) -> Iterator["Run"]:
        """A new run, which no other process trains until the block ends.

        folder must be new or empty; None: runs/MODEL-TEXT-N with the first N that is free. Raises InputError if it is
        not, having changed nothing.
        """
        for place in _numbered_folders(settings) if folder is None else [folder]:
            with ExitStack() as held:
                try:
                    cls.check_new(place)
                    held.enter_context(taken(place))
                except InputError:
                    if folder is None and os.path.lexists(place):
                        continue  # another process was faster
                    raise
                run = cls(place, settings)
                run._begin(text_sha256)
                yield run
                return

    @staticmethod
    def check_new(folder: Path) -> None:
        """Raise InputError unless a run can be created in folder."""
        if is_file(folder / RUN_FILE):
            raise InputError(_already(folder))
        check_free(folder)

    def _begin(self, text_sha256: str) -> None:
        made = [self.folder / RUN_FILE, self._losses, self.folder / VOCABULARY]
        try:
            with _written(self.folder):
                try:
                    made[0].open("x").close()  # the one act that decides who has the folder where nothing can be locked
                except FileExistsError as error:
                    made = []
                    raise InputError(_already(self.folder)) from error
            self._write_settings(text_sha256)
            self._write_losses([])
            if self.settings.encoding not in ENCODINGS:
                with _written(made[2]):
                    made[2].mkdir()
                    for name, content in vocabulary_files(self.settings.encoding).items():
                        (made[2] / name).write_bytes(content)
        except BaseException:
            for each in reversed(made):  # run.json last: while it is there, the rest is a run that has not saved
                remove(each)
            raise

    @classmethod
    def open(cls, folder: Path) -> "Run":
        """The run in folder, or the one that folder is a save of. Raises InputError if it is neither."""
        if not is_file(folder / RUN_FILE) and is_file(folder.absolute().parent / RUN_FILE):
            run = cls.open(folder.absolute().parent)
            if kind_of(folder) == "missing":
                found = [CHECKPOINT, *(each.name for _, each in sorted(kept_saves(run.folder).items()))]
                raise InputError(f"{folder} does not exist: the saves of this run are {', '.join(found)}")
            return cls(run.folder, run.settings, folder)
        if kind_of(folder) == "missing":
            raise InputError(f"{folder} does not exist: give the folder of a run, or of a save in one")
        try:
            whole = read_json(folder / RUN_FILE)
            settings = Settings(**{field.name: whole["settings"][field.name] for field in fields(Settings)})
            unchanged = whole["sha256"] == _sha256(whole["settings"], whole["text_sha256"])
            _check_settings(settings)
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise InputError(
                f"{folder} is not the folder of a run (no usable run.json: {error}): give one made by pretrain"
            ) from error
        if not unchanged:
            raise InputError(
                f"{folder / RUN_FILE} was changed since it was written (its SHA-256 differs): restore it, and give "
                "other settings as flags"
            )
        if settings.encoding not in ENCODINGS and is_folder(folder / VOCABULARY):
            settings = replace(settings, encoding=str((folder / VOCABULARY).resolve()))  # wherever the run is by now
        return cls(folder, settings)

    @property
    def text_sha256(self) -> str:
        """Of the text and the vocabulary it was begun with, as Batches.sha256."""
        return str(read_json(self.folder / RUN_FILE)["text_sha256"])

    @property
    def to_resume(self) -> Path:
        """The folder of the save to resume from. Raises InputError if there is none yet.

        The newest that is kept, should checkpoint be missing: as where a link of this name was being replaced.
        """
        if is_file(self._save / MODEL_FILE) or self._save.name != CHECKPOINT:
            return self._save
        try:
            saves = kept_saves(self.folder)
        except OSError as error:
            raise InputError(f"{self.folder} cannot be read ({error.strerror}): try again") from error
        if not saves:
            raise InputError(
                f"{self.folder} ended before its first save: begin it again with another --out, or delete it"
            )
        return saves[max(saves)]

    def resume(self, settings: Settings, text_sha256: str) -> tuple[Position, Params]:
        """Where the save to resume from left off, and the state to restore. Writes nothing: that is what `go_on` does.

        settings: the run's own, but for MAY_CHANGE. Raises InputError if more, or the text, is different.
        """
        changed = [name for name, value in asdict(self.settings).items() if value != getattr(settings, name)]
        if text_sha256 != self.text_sha256:
            raise InputError(
                f"{settings.text} (or the vocabulary) is not the text that {self.folder} was begun with: "
                f"put the old one back, or begin another run with --init {self.folder}"
            )
        for name in changed:
            if name not in MAY_CHANGE and _effective(settings, name) != _effective(self.settings, name):
                raise InputError(
                    f"{self.folder} was begun with --{name.replace('_', '-')} {getattr(self.settings, name)}, "
                    f"not {getattr(settings, name)}: leave it out to resume, or begin another run with "
                    f"--init {self.folder}"
                )
        if self._save.name == BEST and not any(self._save.glob("training-*")):
            raise InputError(
                f"{self._save} is a model without a training state: resume the run with --resume {self.folder}, or "
                f"begin another one from it with --init {self._save}"
            )
        state = load_training(self.to_resume)
        position = Position.restored(state)
        _check_about(self.to_resume, position.step)
        return position, state

    def go_on(self, settings: Settings, text_sha256: str, position: Position, keep: int) -> list[str]:
        """Continue the run from this position, with these settings; returns what `save` returns.

        An earlier save becomes the checkpoint first, then rows of losses.csv beyond it are removed. What a kill
        interrupted after the last save, a copy or an update of the best, is finished.
        """
        for place in (self.folder, self.folder / CHECKPOINT, self.folder / BEST):
            sweep_folder(place)
        notes: list[str] = []
        if self.to_resume.resolve() != (self.folder / CHECKPOINT).resolve():
            notes += self._keep_newest()
            with _written(self.folder):
                newest = self._own_folder(CHECKPOINT)
                newest.mkdir(exist_ok=True)
                for name in (read_header(self.to_resume).about["training"], MODEL_FILE):  # the model's last: it decides
                    with replacing(newest / name) as beside:
                        shutil.copyfile(self.to_resume / name, beside)
        rows = [row for row in self.losses() if row["step"] < position.step]
        self.settings = settings
        self._write_settings(text_sha256)
        self._write_losses(rows)
        return notes + self._copy_newest(keep)

    def _keep_newest(self) -> list[str]:
        """Keep the checkpoint, which an earlier save is about to replace, as checkpoint-STEP, if it can be read.

        Raises InputError if something else has that name.
        """
        try:
            about = read_header(self.folder / CHECKPOINT).about
            step = int(about["step"])
        except (InputError, KeyError, ValueError):
            return []
        with _written(self.folder):
            if notes := self._copy_kept(about, keep=2):
                raise InputError(f"{notes[0]}: move it away, or resume the newest save with --resume {self.folder}")
        return [f"the newest save, of step {step}, stays as {CHECKPOINT}-{step:06d}; best and later saves stay too"]

    def append(self, step: Step, seconds: float) -> None:
        """One more row of losses.csv, for a step with an evaluation."""
        assert step.evaluation is not None
        e = step.evaluation
        row = (step.step, step.epoch, step.tokens_seen, e.train_loss, e.val_loss, step.loss, step.lr, round(seconds, 3))
        try:
            check_regular(self._losses)
            with self._losses.open("a", newline="") as f:
                csv.writer(f).writerow(map(_digits, row))
        except FileNotFoundError:  # removed meanwhile: a row alone would be no table
            self._write_losses([dict(zip(COLUMNS, row, strict=True))])
        except OSError:  # a part of it may be there
            before = [each for each in self.losses() if each["step"] < step.step]
            self._write_losses([*before, dict(zip(COLUMNS, row, strict=True))])

    def losses(self) -> list[dict[str, float]]:
        """The rows of losses.csv; step, epoch and tokens_seen are ints. A row cut short by a kill is left out."""
        try:
            check_regular(self._losses)
            with self._losses.open(newline="") as f:
                lines = sum(1 for _ in iter(partial(f.readline, LINE), ""))
                if lines * ROW_BYTES > max(SMALL, 10 * f.seek(0, os.SEEK_END)):
                    raise ValueError(f"its {lines} rows are too short to be losses")
                f.seek(0)
                reader = csv.DictReader(iter(partial(f.readline, LINE), ""))
                if tuple(reader.fieldnames or ()) != COLUMNS:
                    raise ValueError("it has other columns")
                return [_row(row) for row in reader if row[COLUMNS[-1]]]
        except (OSError, KeyError, TypeError, ValueError, csv.Error) as error:
            raise InputError(
                f"{self._losses} cannot be read as a table of losses ({brief(error)}): put it back, or put in its "
                f"place a file with the one line {','.join(COLUMNS)}"
            ) from error

    def best_batches(self, eval_iter: int) -> int:
        """Over how many validation batches saves are compared: as many as the best was, eval_iter if there is none."""
        try:
            return max(1, int(read_header(self.folder / BEST).about["val_batches"]))
        except (InputError, KeyError, ValueError):
            return eval_iter

    def save(
        self,
        config: GPTConfig,
        learner: Learner,
        position: Position,
        batches: Batches,
        validation: Validation,
        keep: int = 1,
    ) -> list[str]:
        """Write the checkpoint, at every instant the old one or the new; a copy of the newest `keep`; and the best.

        checkpoint is the newest; with keep above 1 checkpoint-STEP is a copy of it, beside those before it; best is the
        model of those saved with the lowest validation loss, which is that of the weights being saved. Each is a file
        of its own: none changes with another. Returns a sentence for each copy that could not be made or judged, which
        ends no run. Raises InputError if the checkpoint cannot be written.
        """
        encoding = self.settings.encoding
        about = {
            "encoding": encoding if encoding in ENCODINGS else f"../{VOCABULARY}",
            "text": self.settings.text,
            "text_sha256": batches.text_sha256,
            "step": str(position.step),
            "val_loss": repr(validation.loss),
            "val_batches": str(validation.batches),
        }
        if batches.vocabulary_sha256 is not None:
            about["vocabulary"] = batches.vocabulary_sha256
        training = learner.state() | position.state()
        save_params(config, learner.params(), self._own_folder(CHECKPOINT), training=training, about=about)
        return self._copy_newest(keep)

    def _own_folder(self, name: str) -> Path:
        """The folder of this name in the run's. A link to another save becomes a copy: no save changes later."""
        place = self.folder / name
        with _written(place):
            if place.is_symlink() and _is_a_save(place.resolve()):
                with partial_folder(place) as beside:
                    shutil.copytree(place, beside / name)
                    place.unlink()
                    (beside / name).rename(place)
        return place

    def _copy_newest(self, keep: int) -> list[str]:
        """Copy the checkpoint to best and to the kept saves, where it is due there; what went wrong, in words."""
        notes: list[str] = []
        try:
            about = read_header(self.folder / CHECKPOINT).about
        except InputError as error:
            return [f"the checkpoint is saved, and could not be read for its copies: {error}"]
        works: dict[str, Callable[[dict[str, str]], list[str]]] = {
            f"{BEST} could not be updated": self._copy_best,
            "a copy of it could not be kept": partial(self._copy_kept, keep=keep),
            "older copies could not be removed": partial(self._prune, keep=keep),
        }
        for failed, work in works.items():
            try:
                notes += work(about)
            except (InputError, OSError) as error:  # its path may be an unfinished folder's, which is another each time
                why = f"{error.strerror or error}; {disk_fix(error)}" if isinstance(error, OSError) else str(error)
                notes.append(f"the checkpoint is saved, but {failed}: {why}")
        return notes

    def _copy_best(self, about: dict[str, str]) -> list[str]:
        best = self.folder / BEST
        loss = float(about.get("val_loss", "nan"))
        if not math.isfinite(loss):
            return []
        if os.path.lexists(best / MODEL_FILE):
            try:
                old = read_header(best).about
                if old["val_batches"] != about["val_batches"]:
                    raise ValueError("its validation loss is over other batches")
                if not math.isfinite(best_loss := float(old["val_loss"])):
                    raise ValueError(f"its validation loss is {best_loss}")
                if loss >= best_loss:
                    return []
            except (InputError, KeyError, ValueError) as error:
                return [f"{best} stays as it is, since it cannot be compared with this save: {error}"]
        best = self._own_folder(BEST)
        best.mkdir(exist_ok=True)
        with replacing(best / MODEL_FILE) as beside:
            shutil.copyfile(self.folder / CHECKPOINT / MODEL_FILE, beside)
        return []

    def _copy_kept(self, about: dict[str, str], keep: int) -> list[str]:
        if keep < 2 or "step" not in about:
            return []
        place = self.folder / f"{CHECKPOINT}-{int(about['step']):06d}"
        old = kept_save(place)
        if old == about:
            return []
        if os.path.lexists(place) and (why := "is not a save of this run" if old is None else owned(place)):
            return [f"{place} {why}, and stays: step {about['step']} is not kept"]
        with partial_folder(place) as beside:
            for name in (about["training"], MODEL_FILE):
                shutil.copyfile(self.folder / CHECKPOINT / name, beside / name)
                flush(beside / name)
            if old is not None:  # made before the run was gone back from
                _discard(place)
            beside.rename(place)
            flush(self.folder)
        return []

    def _prune(self, about: dict[str, str], keep: int) -> list[str]:
        if keep < 2 or "step" not in about:
            return []
        saves = kept_saves(self.folder)
        # those beyond this step are of a run that was gone back from: none of this one's last
        old = sorted(step for step in saves if step <= int(about["step"]))[:-keep]
        for step in old:
            if not owned(saves[step]):
                _discard(saves[step])
        return []

    def plot(self, batches_per_epoch: int) -> Path:
        """Draw losses.png: both losses against epochs, and against tokens seen on the upper axis, as the book does."""
        from matplotlib.figure import Figure  # without pyplot: no window system, no global state

        rows = self.losses()
        epochs = [(row["step"] + 1) / batches_per_epoch for row in rows]
        figure = Figure(figsize=(6.4, 4.4), layout="constrained")
        axes = figure.add_subplot()
        axes.plot(epochs, [row["train_loss"] for row in rows], label="training")
        axes.plot(epochs, [row["val_loss"] for row in rows], linestyle="-.", label="validation")
        axes.set_xlabel("epochs")
        axes.set_ylabel("loss (nats per token)")
        axes.grid(alpha=0.3)
        axes.legend()
        tokens_per_epoch = rows[0]["tokens_seen"] / epochs[0] if rows else 1.0

        def to_tokens(epoch: Any) -> Any:
            return epoch * tokens_per_epoch

        def to_epochs(tokens: Any) -> Any:
            return tokens / tokens_per_epoch

        upper = axes.secondary_xaxis("top", functions=(to_tokens, to_epochs))
        upper.set_xlabel("tokens seen")
        upper.xaxis.set_major_formatter("{x:,.0f}")
        path = self.folder / "losses.png"
        with _written(path), replacing(path) as beside:
            figure.savefig(beside, dpi=150)
        return path

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keeps every other process from training in this folder meanwhile. Raises InputError if one is.

        Where the system or the file system has no such locks (Windows) nothing is done.
        """
        try:
            held = lock(self.folder)
        except BlockingIOError as error:
            raise InputError(f"another process is training in {self.folder}: wait for it, or stop it") from error
        except OSError as error:
            raise InputError(f"{self.folder} cannot be used ({error.strerror}): try again") from error
        try:
            yield
        finally:
            unlock(held)

    def _write_settings(self, text_sha256: str) -> None:
        settings = asdict(self.settings)
        whole = {"settings": settings, "text_sha256": text_sha256, "sha256": _sha256(settings, text_sha256)}
        with _written(self.folder), replacing(self.folder / RUN_FILE) as beside:
            beside.write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")

    def _write_losses(self, rows: list[dict[str, float]]) -> None:
        with _written(self.folder), replacing(self._losses) as beside, beside.open("w", newline="") as f:
            writer = csv.writer(f)
            writer.writerow(COLUMNS)
            writer.writerows([_digits(row[name]) for name in COLUMNS] for row in rows)


@contextmanager
def _written(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        in_the_way = error.errno in (errno.EEXIST, errno.EISDIR, errno.ENOTDIR)
        place = (error.filename2 or error.filename or path) if in_the_way else path
        raise InputError(f"cannot write {place}: {error.strerror or error}; {disk_fix(error)}") from error


def _sha256(settings: dict[str, Any], text_sha256: str) -> str:
    return hashlib.sha256(json.dumps([settings, text_sha256], sort_keys=True).encode()).hexdigest()


def _check_about(save: Path, step: int) -> None:
    """Raise InputError if the metadata of a save, of this step, has a count or a loss that `Run.save` never writes."""
    about = read_header(save).about
    try:
        if about.get("step", str(step)) != str(step):
            raise ValueError(f"step {about['step']:.80}, and its training state {step}")
        if (loss := float(about.get("val_loss", "0"))) < 0:  # it may be NaN, where training has diverged
            raise ValueError(f"the validation loss {loss}")
        if not 1 <= int(about.get("val_batches", "1")) < 1 << 63:
            raise ValueError(f"{about['val_batches']:.80} validation batches")
    except ValueError as error:
        raise InputError(
            f"{save / MODEL_FILE} says of itself what no run writes ({error!s:.200}): start from it with --init"
        ) from error


def _check_settings(settings: Settings) -> None:
    """Raise ValueError for a setting of another type, or of a value that no run can have been begun with."""
    for field in fields(Settings):
        name, value = field.name, getattr(settings, field.name)
        if value is None and field.name in ("max_steps", "stride", "clip"):
            continue
        if name in ("tie_weights", "qkv_bias"):
            right = type(value) is bool
        elif name in ("model", "text", "encoding", "prompt"):
            right = type(value) is str
        elif name in ("lr", "weight_decay", "clip", "drop_rate"):
            least = 0.0 if name in ("weight_decay", "drop_rate") else math.ulp(0.0)
            right = type(value) in (int, float) and least <= value <= (1 if name == "drop_rate" else sys.float_info.max)
        else:
            least = {"seed": -(1 << 63), **dict.fromkeys(COUNTED_FROM_0, 0)}.get(name, 1)
            right = type(value) is int and least <= value < 1 << (64 if name == "seed" else 63)
        if not right:
            raise ValueError(f"its {name} is {str(value)[:80]!r}, which no run has")


def kept_save(folder: Path) -> dict[str, str] | None:
    """What a save kept in this folder says of itself; None if it is anything else."""
    match = COPY.fullmatch(folder.name)
    if match is None or folder.is_symlink() or not folder.is_dir():
        return None
    try:
        about = read_header(folder).about
    except InputError:
        return None
    return about if about.get("step") == str(int(match[1])) and "training" in about else None


def kept_saves(run: Path) -> dict[int, Path]:
    """Step -> folder of the saves that are kept in a run's folder."""
    return {int(about["step"]): each for each in run.iterdir() if (about := kept_save(each)) is not None}


def owned(save: Path) -> str:
    """How the user has made a save theirs, so that it stays: it is read-only, or has more in it; "" if neither."""
    if not all(each.stat().st_mode & stat.S_IWUSR for each in (save, save / MODEL_FILE)):
        return "is read-only"
    saved = (MODEL_FILE, read_header(save).about.get("training"))
    more = (each.name for each in save.iterdir() if each.name not in saved and not PARTIAL.fullmatch(each.name))
    return f"has {first} in it" if (first := next(more, None)) else ""


def _is_a_save(folder: Path) -> bool:
    """Whether a folder is a save: it lies in a run, this one or another, or has the name of one that is kept."""
    return is_file(folder.parent / RUN_FILE) or COPY.fullmatch(folder.name) is not None


def _discard(folder: Path) -> None:
    """Remove a folder: its name at once, then what is in it."""
    with partial_folder(folder) as beside:
        folder.rename(beside / folder.name)


def _effective(settings: Settings, name: str) -> Any:
    """What a setting comes to. The text and the vocabulary are compared by their SHA-256 instead."""
    if name == "stride":
        return settings.stride or settings.context_length
    return (
        None
        if name == "text" or (name == "encoding" and settings.encoding not in ENCODINGS)
        else getattr(settings, name)
    )


def _already(folder: Path) -> str:
    if is_file(folder / CHECKPOINT / MODEL_FILE):
        return f"{folder} already holds a run: resume it with --resume {folder}, or choose another --out"
    return f"{folder} already holds a run, which has not saved yet: if it has ended delete it, or choose another --out"


def _row(texts: dict[str, str]) -> dict[str, float]:
    """A row of losses.csv. Raises ValueError for a count that no run can have reached, and for more columns."""
    if len(texts) > len(COLUMNS):
        raise ValueError(f"a row has more than {len(COLUMNS)} columns")
    row: dict[str, float] = {n: int(texts[n]) if n in COLUMNS[:3] else float(texts[n]) for n in COLUMNS}
    if not all(least <= row[name] < 1 << 63 for name, least in zip(COLUMNS[:3], (0, 1, 1), strict=True)):
        raise ValueError(f"it counts {row}")
    return row


def _digits(value: float) -> str:
    return repr(value)  # the shortest digits that give the same float again


def _numbered_folders(settings: Settings) -> Iterator[Path]:
    """runs/MODEL-TEXT-N for N = 1, 2, …: where a run goes without --out."""
    for number in count(1):
        yield Path("runs", f"{settings.model}-{Path(settings.text).stem[:60]}-{number}")
