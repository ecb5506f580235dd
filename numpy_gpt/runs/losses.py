"""losses.csv, with one row per evaluation, and its plot."""

import csv
import os
from functools import partial
from pathlib import Path
from typing import Any

from numpy_gpt.errors import InputError, brief
from numpy_gpt.io.bounded_json import SMALL
from numpy_gpt.io.files import replacing, written
from numpy_gpt.io.paths import check_regular
from numpy_gpt.train import Step

COLUMNS = ("step", "epoch", "tokens_seen", "train_loss", "val_loss", "step_loss", "learning_rate", "seconds")
"""Columns of losses.csv: nats per token, epochs counted from 1, seconds since this process started training."""

LINE = 4096
"""Most characters of a line of losses.csv to read at once: ten times the longest line."""

ROW_BYTES = 640
"""Bytes of memory that a parsed row of losses.csv takes."""


class Losses:
    """The table in a run's folder."""

    def __init__(self, run: Path):
        self.file = run / "losses.csv"

    def append(self, step: Step, seconds: float) -> None:
        """Append a row for a step with an evaluation."""
        assert step.evaluation is not None
        e = step.evaluation
        row = (step.step, step.epoch, step.tokens_seen, e.train_loss, e.val_loss, step.loss, step.lr, round(seconds, 3))
        try:
            check_regular(self.file)
            with self.file.open("a", newline="") as f:
                csv.writer(f).writerow(map(_digits, row))
        except FileNotFoundError:  # removed meanwhile: write the header too
            self.write([dict(zip(COLUMNS, row, strict=True))])
        except OSError:  # part of the row may have been written
            before = [old for old in self.read() if old["step"] < step.step]
            self.write([*before, dict(zip(COLUMNS, row, strict=True))])

    def read(self) -> list[dict[str, float]]:
        """The rows of losses.csv; step, epoch and tokens_seen are ints. A row cut short by a kill is left out."""
        try:
            check_regular(self.file)
            with self.file.open(newline="") as f:
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
                f"{self.file} cannot be read as a table of losses ({brief(error)}): restore it, or replace it with "
                f"a file of the one line {','.join(COLUMNS)}"
            ) from error

    def write(self, rows: list[dict[str, float]]) -> None:
        """Replace the table with these rows."""
        with written(self.file), replacing(self.file) as beside, beside.open("w", newline="") as f:
            writer = csv.writer(f)
            writer.writerow(COLUMNS)
            writer.writerows([_digits(row[name]) for name in COLUMNS] for row in rows)

    def plot(self, batches_per_epoch: int) -> Path:
        """Draw losses.png as the book does: both losses against epochs, with tokens seen on the upper axis."""
        from matplotlib.figure import Figure  # without pyplot: no window system, no global state

        rows = self.read()
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
        path = self.file.with_suffix(".png")
        with written(path), replacing(path) as beside:
            figure.savefig(beside, dpi=150)
        return path


def _row(texts: dict[str, str]) -> dict[str, float]:
    """Parse a row of losses.csv. Raises ValueError for an impossible count or extra columns."""
    if len(texts) > len(COLUMNS):
        raise ValueError(f"a row has more than {len(COLUMNS)} columns")
    row: dict[str, float] = {n: int(texts[n]) if n in COLUMNS[:3] else float(texts[n]) for n in COLUMNS}
    if not all(least <= row[name] < 1 << 63 for name, least in zip(COLUMNS[:3], (0, 1, 1), strict=True)):
        raise ValueError(f"it counts {row}")
    return row


def _digits(value: float) -> str:
    return repr(value)  # the shortest digits that round-trip
