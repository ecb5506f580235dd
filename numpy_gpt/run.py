"""A pretraining run as a folder: its settings, its batches, losses.csv, the plot and the checkpoint."""

import csv
import hashlib
import json
import math
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Protocol

from numpy_gpt.config import GPT2_SIZES, GPTConfig
from numpy_gpt.data import Loader, load_text, sliding_windows, split_text
from numpy_gpt.errors import InputError
from numpy_gpt.files import flush, new_folder, replacing
from numpy_gpt.tokenizer import ENCODINGS, encode, get_encoding, vocabulary_files
from numpy_gpt.train import Learner, Position, Step
from numpy_gpt.typing import Params
from numpy_gpt.weights.checkpoint import MODEL_FILE, load_training, read_header, save_params
from numpy_gpt.weights.stored import Weights

TINY = {"emb_dim": 128, "n_layers": 2, "n_heads": 4}
"""The size called tiny: half a million parameters with the encoding bytes, for a laptop and a minute."""

VOCABULARY = "vocabulary"
"""The folder of a run for the two files of an encoding that is not known by its name."""

COPY = re.compile(r"checkpoint-(\d{6,})")
"""The folder of a save that --keep keeps, and the steps made by then."""

TRAIN_RATIO = 0.9
"""Share of the text's characters that is trained on; the rest is for validation (the book's)."""

COLUMNS = ("step", "epoch", "tokens_seen", "train_loss", "val_loss", "step_loss", "learning_rate", "seconds")
"""Of losses.csv: nats per token, epochs counted from 1, seconds since this process began to train."""


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
        self.batches_per_epoch = len(Loader(*self._train, settings.batch_size, drop_last=True))
        self.train_tokens = self.batches_per_epoch * settings.batch_size * T
        self.val_tokens = self._val[0].size

    def loaders(self, learner: Learner) -> tuple[Loader, Loader]:
        """Train (shuffled, last batch dropped) and validation loader (neither), on the learner's random stream."""
        train = Loader(*self._train, self._batch_size, drop_last=True, begin_epoch=learner.shuffled_order)
        val = Loader(*self._val, self._batch_size, drop_last=False, begin_epoch=learner.file_order)
        return train, val


class MakeLearner(Protocol):
    """How a backend makes its learner: new weights from settings.seed, or the given params."""

    def __call__(self, config: GPTConfig, settings: Settings, total_steps: int, params: Weights | None) -> Learner: ...


class Run:
    """The folder of a run. `settings` are those it was begun with; nothing is written before `create`."""

    def __init__(self, folder: Path, settings: Settings):
        self.folder, self.settings = folder, settings
        self._losses = folder / "losses.csv"

    @classmethod
    def create(cls, folder: Path, settings: Settings, text_sha256: str) -> "Run":
        """A new run in folder, which must not exist yet or be empty. Raises InputError otherwise, touching nothing."""
        if (folder / "run.json").is_file():
            mend = f"go on with --resume {folder}, or choose another --out"
            if not (folder / "checkpoint" / MODEL_FILE).is_file():
                mend = "which ended before its first save: delete it, or choose another --out"
            raise InputError(f"{folder} already holds a run: {mend}")
        with new_folder(folder), _written(folder):
            run = cls(folder, settings)
            run._write_settings(text_sha256)
            run._write_losses([])
            if settings.encoding not in ENCODINGS:
                (folder / VOCABULARY).mkdir()
                for name, content in vocabulary_files(settings.encoding).items():
                    (folder / VOCABULARY / name).write_bytes(content)
        return run

    @classmethod
    def open(cls, folder: Path) -> "Run":
        """The run in folder. Raises InputError if it is not one."""
        try:
            whole = json.loads((folder / "run.json").read_text(encoding="utf-8"))
            settings = Settings(**{field.name: whole["settings"][field.name] for field in fields(Settings)})
            if whole["sha256"] != _sha256(whole["settings"], whole["text_sha256"]):
                raise ValueError("not as it was written: its SHA-256 differs")
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise InputError(
                f"{folder} is not the folder of a run (no usable run.json: {error}): give one made by pretrain"
            ) from error
        if settings.encoding not in ENCODINGS and (folder / VOCABULARY).is_dir():
            settings = replace(settings, encoding=str((folder / VOCABULARY).resolve()))  # wherever the run is by now
        return cls(folder, settings)

    def resume(self, settings: Settings, text_sha256: str) -> tuple[Position, Params]:
        """Where the checkpoint left off, and the state to restore. Writes nothing: that is what `go_on` does.

        settings: the run's own, but for MAY_CHANGE. Raises InputError if more, or the text, is different.
        """
        for name, value in asdict(settings).items():
            if name not in MAY_CHANGE and value != getattr(self.settings, name):
                raise InputError(
                    f"{self.folder} was begun with --{name.replace('_', '-')} {getattr(self.settings, name)}, "
                    f"not {value}: leave it out to go on, or begin another run with --init {self.folder}"
                )
        if json.loads((self.folder / "run.json").read_text(encoding="utf-8"))["text_sha256"] != text_sha256:
            raise InputError(
                f"{settings.text} (or the vocabulary) is not the text that {self.folder} was begun with: "
                f"put the old one back, or begin another run with --init {self.folder}"
            )
        state = load_training(self.folder)
        return Position.restored(state), state

    def go_on(self, settings: Settings, text_sha256: str, position: Position, keep: int) -> None:
        """Take up the run at this position, with these settings: rows of losses.csv beyond it are taken out.

        What a kill kept its last save from, a copy or becoming the best, is made up for.
        """
        rows = [row for row in self.losses() if row["step"] < position.step]
        self.settings = settings
        self._write_settings(text_sha256)
        self._write_losses(rows)
        self._share_newest(keep)

    def append(self, step: Step, seconds: float) -> None:
        """One more row of losses.csv, for a step with an evaluation."""
        assert step.evaluation is not None
        losses = (step.evaluation.train_loss, step.evaluation.val_loss, step.loss)
        with _written(self._losses), self._losses.open("a", newline="") as f:
            csv.writer(f).writerow(
                [
                    step.step,
                    step.epoch,
                    step.tokens_seen,
                    *map(_digits, losses),
                    _digits(step.lr),
                    _digits(round(seconds, 3)),
                ]
            )

    def losses(self) -> list[dict[str, float]]:
        """The rows of losses.csv; step, epoch and tokens_seen are ints. A row cut short by a kill is left out."""
        try:
            with self._losses.open(newline="") as f:
                reader = csv.DictReader(f)
                if tuple(reader.fieldnames or ()) != COLUMNS:
                    raise ValueError("it has other columns")
                return [
                    {name: int(row[name]) if name in COLUMNS[:3] else float(row[name]) for name in COLUMNS}
                    for row in reader
                    if row[COLUMNS[-1]]
                ]
        except (OSError, KeyError, TypeError, ValueError, csv.Error) as error:
            raise InputError(
                f"{self._losses} cannot be read as a table of losses ({error!r}): put it back, or put in its place a "
                f"file with the one line {','.join(COLUMNS)}"
            ) from error

    def save(self, config: GPTConfig, learner: Learner, position: Position, val_loss: float, keep: int = 1) -> None:
        """The checkpoint, at every instant the old one or the new; of the newest `keep` a copy each; and the best.

        checkpoint is the newest; with keep above 1 checkpoint-STEP is the same and the ones before it; best is the
        model of those saved with the lowest val_loss, which is that of the weights being saved. The copies share their
        memory on the disk where the file system can.
        """
        encoding = self.settings.encoding if self.settings.encoding in ENCODINGS else f"../{VOCABULARY}"
        about = {"encoding": encoding, "text": self.settings.text, "step": str(position.step)}
        about["val_loss"] = repr(val_loss)
        training = learner.state() | position.state()
        save_params(config, learner.params(), self.folder / "checkpoint", training=training, about=about)
        self._share_newest(keep)

    def _share_newest(self, keep: int) -> None:
        """Give the checkpoint the second names that it is due: of the best, and of one of the last `keep`."""
        newest, best = self.folder / "checkpoint", self.folder / "best"
        about = read_header(newest).about
        with _written(self.folder):
            if float(about.get("val_loss", math.inf)) < _val_loss(best):
                _share([newest / MODEL_FILE], best)
            if keep > 1 and "step" in about:
                step = int(about["step"])
                _share([newest / about["training"], newest / MODEL_FILE], self.folder / f"checkpoint-{step:06d}")
                copies = {made: copy for copy in self.folder.iterdir() if (made := _copied_step(copy)) is not None}
                # those beyond this step are of a run that was gone back from: none of this one's last
                for old in sorted(made for made in copies if made <= step)[:-keep]:
                    (copies[old] / MODEL_FILE).unlink(missing_ok=True)  # first: what is left is then no checkpoint
                    shutil.rmtree(copies[old])

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
        with _written(path):
            figure.savefig(path, dpi=150)
        return path

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keeps every other process from training in this folder meanwhile. Raises InputError if one is.

        Where the system or the file system has no such locks (Windows) nothing is done.
        """
        try:
            import fcntl
        except ImportError:
            yield
            return
        held = os.open(self.folder, os.O_RDONLY)
        try:
            try:
                fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise InputError(f"another process is training in {self.folder}: wait for it, or stop it") from error
            except OSError:
                pass
            yield
        finally:
            os.close(held)

    def _write_settings(self, text_sha256: str) -> None:
        settings = asdict(self.settings)
        whole = {"settings": settings, "text_sha256": text_sha256, "sha256": _sha256(settings, text_sha256)}
        with _written(self.folder), replacing(self.folder / "run.json") as beside:
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
        raise InputError(
            f"cannot write {path}: {error.strerror or error}; make room, or choose another --out"
        ) from error


def _sha256(settings: dict[str, Any], text_sha256: str) -> str:
    return hashlib.sha256(json.dumps([settings, text_sha256], sort_keys=True).encode()).hexdigest()


def _val_loss(checkpoint: Path) -> float:
    """As a checkpoint says of itself; infinite where there is none that can be read."""
    try:
        return float(read_header(checkpoint).about["val_loss"])
    except (InputError, KeyError, ValueError):
        return math.inf


def _copied_step(folder: Path) -> int | None:
    """The step of a save that is kept in this folder, whole or as a kill left it; None for any other folder or file."""
    match = COPY.fullmatch(folder.name)
    if match is None or folder.is_symlink() or not folder.is_dir():
        return None
    if all(each.name.startswith(("training-", ".training-", f".{MODEL_FILE}")) for each in folder.iterdir()):
        return int(match[1])
    try:
        return int(match[1]) if read_header(folder).about.get("step") == str(int(match[1])) else None
    except InputError:
        return None


def _share(files: Sequence[Path], folder: Path) -> None:
    """The files in another folder too: the same ones under second names, or copies where that cannot be.

    In this order, so the model's last, for with it the folder is a checkpoint.
    """
    if not folder.is_dir():
        folder.mkdir()
        flush(folder.parent)
    for file in files:
        with replacing(folder / file.name) as beside:
            try:
                os.link(file, beside)
            except OSError:
                shutil.copyfile(file, beside)
    for old in folder.glob("training-*.safetensors"):  # of the same step in a run that was gone back from
        if old.name not in [file.name for file in files]:
            old.unlink()


def _digits(value: float) -> str:
    return repr(value)  # the shortest digits that give the same float again


def free_folder(settings: Settings) -> Path:
    """runs/MODEL-TEXT-N with the first N that is not taken: where a run goes without --out."""
    stem = f"{settings.model}-{Path(settings.text).stem}"
    number = 1
    while (folder := Path("runs", f"{stem}-{number}")).exists():
        number += 1
    return folder
