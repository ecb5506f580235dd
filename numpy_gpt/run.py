"""A pretraining run as a folder: its settings, its batches, losses.csv, the plot and the checkpoint."""

import csv
import hashlib
import json
import math
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Protocol

from numpy_gpt.config import GPT2_SIZES, GPTConfig
from numpy_gpt.data import Loader, load_text, sliding_windows, split_text
from numpy_gpt.errors import InputError
from numpy_gpt.files import new_folder, replacing
from numpy_gpt.tokenizer import encode, get_encoding
from numpy_gpt.train import Learner, Position, Step
from numpy_gpt.typing import Params
from numpy_gpt.weights.checkpoint import MODEL_FILE, load_training, read_header, save_params
from numpy_gpt.weights.stored import Weights

TINY = {"emb_dim": 128, "n_layers": 2, "n_heads": 4}
"""The size called tiny: half a million parameters with the encoding bytes, for a laptop and a minute."""

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
        self._val_loss: float | None = None  # of the last evaluation

    @classmethod
    def create(cls, folder: Path, settings: Settings, text: str) -> "Run":
        """A new run in folder, which must not exist yet or be empty. Raises InputError otherwise, touching nothing."""
        if (folder / "run.json").is_file():
            raise InputError(f"{folder} already holds a run: go on with --resume {folder}, or choose another --out")
        new_folder(folder)
        run = cls(folder, settings)
        run._write_settings(hashlib.sha256(text.encode()).hexdigest())
        run._write_losses([])
        return run

    @classmethod
    def open(cls, folder: Path) -> "Run":
        """The run in folder. Raises InputError if it is not one."""
        try:
            whole = json.loads((folder / "run.json").read_text(encoding="utf-8"))
            settings = Settings(**{field.name: whole["settings"][field.name] for field in fields(Settings)})
            if whole["sha256"] != _sha256(whole["settings"], whole["text_sha256"]):
                raise ValueError("not as it was written: its SHA-256 differs")
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(
                f"{folder} is not the folder of a run (no usable run.json: {error}): give one made by pretrain"
            ) from error
        return cls(folder, settings)

    def resume(self, settings: Settings, text: str) -> tuple[Position, Params]:
        """Where the checkpoint left off, and the state to restore. Writes nothing: that is what `go_on` does.

        settings: the run's own, but for MAY_CHANGE. Raises InputError if more, or the text, is different.
        """
        for name, value in asdict(settings).items():
            if name not in MAY_CHANGE and value != getattr(self.settings, name):
                raise InputError(
                    f"{self.folder} was begun with --{name.replace('_', '-')} {getattr(self.settings, name)}, "
                    f"not {value}: leave it out to go on, or begin another run with --init {self.folder}"
                )
        sha256 = hashlib.sha256(text.encode()).hexdigest()
        if json.loads((self.folder / "run.json").read_text(encoding="utf-8"))["text_sha256"] != sha256:
            raise InputError(
                f"{settings.text} is not the text that {self.folder} was begun with: put the old one back, "
                f"or begin another run with --init {self.folder}"
            )
        state = load_training(self.folder)
        return Position.restored(state), state

    def go_on(self, settings: Settings, text: str, position: Position) -> None:
        """Take up the run at this position, with these settings: rows of losses.csv beyond it are taken out."""
        rows = [row for row in self.losses() if row["step"] < position.step]
        self.settings = settings
        self._write_settings(hashlib.sha256(text.encode()).hexdigest())
        self._write_losses(rows)
        self._val_loss = rows[-1]["val_loss"] if rows else None

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
        self._val_loss = step.evaluation.val_loss

    def losses(self) -> list[dict[str, float]]:
        """The rows of losses.csv; step, epoch and tokens_seen are ints. A row cut short by a kill is left out."""
        with self._losses.open(newline="") as f:
            return [
                {name: int(row[name]) if name in COLUMNS[:3] else float(row[name]) for name in COLUMNS}
                for row in csv.DictReader(f)
                if row[COLUMNS[-1]]
            ]

    def save(self, config: GPTConfig, learner: Learner, position: Position, keep: int = 1) -> None:
        """The checkpoint, at every instant the old one or the new; of the newest `keep` a copy each; and the best.

        checkpoint is the newest; with keep above 1 checkpoint-STEP is the same and the ones before it; best is the
        model of those saved with the lowest validation loss, as of the last evaluation before each. The copies share
        their memory on the disk where the file system can.
        """
        about = {"encoding": self.settings.encoding, "text": self.settings.text, "step": str(position.step)}
        if self._val_loss is not None:
            about["val_loss"] = repr(self._val_loss)
        newest, best = self.folder / "checkpoint", self.folder / "best"
        save_params(config, learner.params(), newest, training=learner.state() | position.state(), about=about)
        with _written(self.folder):
            if self._val_loss is not None and self._val_loss < _val_loss(best):
                _share(newest / MODEL_FILE, best)
            if keep > 1:
                files = sorted(newest.glob("*.safetensors"), key=lambda file: file.name == MODEL_FILE)
                for file in files:  # the model's last, for with it the copy is a checkpoint
                    _share(file, self.folder / f"checkpoint-{position.step:06d}")
                copies = {int(match[1]): each for each in self.folder.iterdir() if (match := COPY.fullmatch(each.name))}
                for step in sorted(copies)[:-keep]:
                    (copies[step] / MODEL_FILE).unlink(missing_ok=True)  # first: what is left is then no checkpoint
                    shutil.rmtree(copies[step])

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


def _share(file: Path, folder: Path) -> None:
    """The file in another folder too: the same one under a second name, or a copy where that cannot be."""
    folder.mkdir(exist_ok=True)
    with replacing(folder / file.name) as beside:
        try:
            os.link(file, beside)
        except OSError:
            shutil.copyfile(file, beside)


def _digits(value: float) -> str:
    return repr(value)  # the shortest digits that give the same float again


def free_folder(settings: Settings) -> Path:
    """runs/MODEL-TEXT-N with the first N that is not taken: where a run goes without --out."""
    stem = f"{settings.model}-{Path(settings.text).stem}"
    number = 1
    while (folder := Path("runs", f"{stem}-{number}")).exists():
        number += 1
    return folder
