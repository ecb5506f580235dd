"""What a run shows: lines that read the same in a terminal and in a log, and on a terminal a live progress line."""

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import TypeVar

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
    track,
)

from numpy_gpt.train import Step

T = TypeVar("T")


def printable(text: str) -> str:
    """The text with what a terminal would not show as itself (control characters, lone U+FFFD bytes) as middle dots."""
    return "".join(c if c.isprintable() and c != "\ufffd" else c if c in "\n\t" else "·" for c in text)


def one_line(text: str) -> str:
    """printable, with newlines and tabs as spaces: how the book shows its samples."""
    return printable(text).replace("\n", " ").replace("\t", " ")


class Report:
    """Prints a training run. `line` may be called at any time; the rest inside `training`."""

    def __init__(self) -> None:
        self.console = Console(highlight=False)

    def line(self, text: str = "") -> None:
        """One line, not wrapped and not interpreted."""
        self.console.print(text, markup=False, soft_wrap=True)

    def track(self, items: Sequence[T], description: str) -> Iterable[T]:
        """The items, with a progress line that goes away at the end, if the output is a terminal."""
        return track(items, description, console=self.console, transient=True, disable=not self.console.is_terminal)

    @contextmanager
    def transfer(self, name: str, done: int, total: int) -> Iterator[Callable[[int], None]]:
        """Gives a function that shows how many bytes are done, their speed and the time left, if on a terminal."""
        columns = (
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            DownloadColumn(),
            TransferSpeedColumn(),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=self.console, transient=True, disable=not self.console.is_terminal) as progress:
            task = progress.add_task(name, total=total, completed=done)
            yield lambda done: progress.update(task, completed=done)

    @contextmanager
    def status(self) -> Iterator[Callable[[str], None]]:
        """Gives a function that shows what is going on, below the lines, if the output is a terminal."""
        with self.console.status("") as status:
            yield status.update

    @contextmanager
    def training(self, total_steps: int, first_step: int, first_tokens: int) -> Iterator[None]:
        """Shows progress while the block runs, if the output is a terminal."""
        self._total, self._first, self._first_tokens = total_steps, first_step, first_tokens
        self._begin = time.perf_counter()
        columns = (
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.description}"),
            TimeRemainingColumn(),
        )
        self._losses = ""
        with Progress(
            *columns, console=self.console, transient=True, disable=not self.console.is_terminal
        ) as self._progress:
            self._task = self._progress.add_task("", total=total_steps, completed=first_step)
            yield

    @property
    def seconds(self) -> float:
        """Since training began."""
        return time.perf_counter() - self._begin

    def step(self, step: Step) -> None:
        """Moves the progress line on; an evaluation is printed as a line of its own."""
        speed = (step.tokens_seen - self._first_tokens) / self.seconds
        if step.evaluation is not None:
            e = step.evaluation
            done, left = step.step + 1 - self._first, self._total - step.step - 1
            remaining = timedelta(seconds=round(self.seconds / done * left))
            pace = f"   {speed:,.0f} tokens/s, {remaining} left" if done > 1 else ""  # one step says too little
            losses = f"Train loss {e.train_loss:.3f}, Val loss {e.val_loss:.3f}"
            self.line(f"Ep {step.epoch} (Step {step.step:06d}): {losses}{pace}")
            self._losses = f"train {e.train_loss:.3f} val {e.val_loss:.3f} "
        description = f"loss {step.loss:.3f} {self._losses}{speed:,.0f} tokens/s"
        self._progress.update(self._task, completed=step.step + 1, description=description)
