"""Console output: lines that read the same in a terminal and in a log, and on a terminal a live progress line."""

import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TextIO, TypeVar, cast

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
    track,
)
from rich.table import Column

from numpy_gpt.io.outermost import Output
from numpy_gpt.train import Step

T = TypeVar("T")


NARROWEST = 20
"""The least width in columns that lines assume."""


def printable(text: str) -> str:
    """The text with middle dots for what a terminal cannot show (control characters, U+FFFD)."""
    return "".join(c if c.isprintable() and c != "\ufffd" else c if c in "\n\t" else "·" for c in text)


def one_line(text: str) -> str:
    """printable, with newlines and tabs as spaces: how the book shows its samples."""
    return printable(text).replace("\n", " ").replace("\t", " ")


def _duration(seconds: float) -> str:
    """H:MM:SS; hours may have any number of digits."""
    minutes, left = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{left:02d}"


def _first_that_fits(width: int, texts: Sequence[str]) -> str:
    """The first text of at most `width` columns, else the last."""
    return next((text for text in texts if len(text) <= width), texts[-1])


class Report:
    """Prints what a command does. `line` may be called at any time; `step` and `seconds` inside `training`.

    If output cannot be written, it is dropped, one line on stderr says so, and the work continues. With `required`
    (output is the command's only purpose) every method raises OutputError instead. Characters that the output's
    encoding lacks are escaped. No progress line is wider than its terminal.
    """

    def __init__(self, required: bool = False) -> None:
        out = sys.stdout if isinstance(sys.stdout, Output) else Output(sys.stdout, required)
        out.required = required
        self.console = Console(file=cast(TextIO, out), highlight=False)
        if self.console.width < NARROWEST:  # some environments set COLUMNS=0
            self.console.width = NARROWEST

    def line(self, text: str = "") -> None:
        """Print one line, not wrapped and not interpreted."""
        self.console.print(text, markup=False, soft_wrap=True)

    def piece(self, text: str) -> None:
        """Write part of a line unchanged, and flush it."""
        self.console.file.write(text)
        self.console.file.flush()

    def track(self, items: Sequence[T], description: str) -> Iterable[T]:
        """The items, with a progress line on a terminal, removed at the end."""
        return track(items, description, console=self.console, transient=True, disable=not self.console.is_terminal)

    @contextmanager
    def transfer(self, name: str, done: int, total: int) -> Iterator[Callable[[int], None]]:
        """Gives a function that shows, on a terminal, how many bytes are done, their speed and the time left."""
        others = 17 + 11 + 7 + self._bar_width + 4  # the widest bytes, speed and time; a space between two columns
        name_column = Column(no_wrap=True, overflow="ellipsis", max_width=max(8, self.console.width - others))
        columns = (
            TextColumn("{task.description}", table_column=name_column),
            self._bar(),
            DownloadColumn(table_column=Column(no_wrap=True)),
            TransferSpeedColumn(table_column=Column(no_wrap=True)),
            TimeRemainingColumn(table_column=Column(no_wrap=True)),
        )
        with self._progress_line(*columns) as progress:
            task = progress.add_task(name, total=total, completed=done)
            yield lambda done: progress.update(task, completed=done)

    @contextmanager
    def status(self) -> Iterator[Callable[[str], None]]:
        """Gives a function that shows, on a terminal, the current activity below the lines."""
        spinner = "line" if self.console.options.ascii_only else "dots"
        with self.console.status("", spinner=spinner) as status:
            yield status.update

    @contextmanager
    def training(self, total_steps: int, first_step: int, first_tokens: int) -> Iterator[None]:
        """Shows progress on a terminal while the block runs."""
        self._total, self._first, self._first_tokens = total_steps, first_step, first_tokens
        self._begin = time.perf_counter()
        columns = (
            self._bar(),
            MofNCompleteColumn(table_column=Column(no_wrap=True)),
            TextColumn("{task.description}"),
            TimeRemainingColumn(table_column=Column(no_wrap=True)),
        )
        self._losses = ""
        with self._progress_line(*columns) as self._progress:
            self._task = self._progress.add_task("", total=total_steps, completed=first_step)
            yield

    @property
    def seconds(self) -> float:
        """Seconds since training began."""
        return max(time.perf_counter() - self._begin, 1e-9)  # a coarse clock may not have advanced

    def step(self, step: Step) -> None:
        """Advances the progress line; an evaluation is printed on its own line."""
        speed = f"{(step.tokens_seen - self._first_tokens) / self.seconds:,.0f} tokens/s"
        if step.evaluation is not None:
            e = step.evaluation
            done, left = step.step + 1 - self._first, self._total - step.step - 1
            remaining = f"{_duration(self.seconds / done * left)} left"
            losses = f"Train loss {e.train_loss:.3f}, Val loss {e.val_loss:.3f}"
            line = f"Ep {step.epoch} (Step {step.step:06d}): {losses}"
            paces = [f"{line}   {speed}, {remaining}", f"{line}  {speed}", f"{line}  {remaining}"] if done > 1 else []
            width = self.console.width if self.console.is_terminal else sys.maxsize  # a log has no edge
            self.line(_first_that_fits(width, [*paces, line]))  # one step is too few for a speed
            self._losses = f" train {e.train_loss:.3f} val {e.val_loss:.3f}"
        loss = f"loss {step.loss:.3f}"
        others = self._bar_width + 2 * len(str(self._total)) + 1 + 7 + 3  # bar, steps, time; spaces between columns
        texts = [f"{loss}{self._losses} {speed}", f"{loss}{self._losses}", f"{loss} {speed}", loss]
        description = _first_that_fits(self.console.width - others, [*texts, ""])
        self._progress.update(self._task, completed=step.step + 1, description=description)

    @property
    def _bar_width(self) -> int:
        return min(24, max(10, self.console.width // 6))

    def _bar(self) -> BarColumn:
        return BarColumn(self._bar_width, table_column=Column(no_wrap=True))

    def _progress_line(self, *columns: ProgressColumn) -> Progress:
        return Progress(*columns, console=self.console, transient=True, disable=not self.console.is_terminal)
