"""The results: rows with ratios, as tables for people, JSON for programs, and a plot."""

import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from itertools import count
from pathlib import Path
from typing import Any, Literal

from rich.box import SIMPLE
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from benchmarks.timing import Spread

FORMATS = {  # a figure's column heading -> its format
    "tokens/s": ",.0f",
    "MFU": ".1%",
    "GFLOP/s": ",.0f",
    "GB/s": ".1f",
    "of products": ".0%",
    "of streaming": ".0%",
    "of memory": ".0%",
    "grad error": ".1e",
    "loss error": ".1e",
    "logit error": ".1e",
    "apart": ".1e",
    "val loss": ".4f",
    "GPU GB": ".2f",
    "peak GB": ".2f",
    "before GB": ".2f",
    "bytes/token": ",.0f",
    "peak, in files": ".2f",
}


WIDE = 30
"""The largest factor between two bars at which the shorter can still be read on a linear axis."""


@dataclass(frozen=True)
class Limits:
    """The required and the hoped-for limit of a ratio: upper limits, or lower ones if better is "higher"."""

    asked: float | None = None
    goal: float | None = None
    better: Literal["lower", "higher"] = "lower"


@dataclass(frozen=True)
class Ratio:
    """value: the ratio of the medians; pairs: the spread of the ratios round by round, if there are rounds."""

    value: float
    pairs: Spread | None = None
    limits: Limits = Limits()

    @property
    def verdict(self) -> str:
        """The strictest limit that the value meets: "goal" or "asked"; else "missed", or "" if there is no limit."""
        for name in ("goal", "asked"):
            limit = getattr(self.limits, name)
            if limit is not None and (self.value <= limit if self.limits.better == "lower" else self.value >= limit):
                return name
        return "missed" if self.limits.asked is not None else ""


@dataclass(frozen=True)
class Row:
    """One contender in one case. ratios: of its seconds (or bytes) to others', by the ratio's name."""

    case: str
    backend: str
    seconds: Spread | None = None
    figures: dict[str, float] = field(default_factory=dict)
    ratios: dict[str, Ratio] = field(default_factory=dict)
    note: str = ""

    def as_json(self) -> dict[str, Any]:
        """The row as in the file: "name" is the case; each ratio comes with its limits and verdict."""
        ratios = {
            name: {"ratio": r.value, "pairs": r.pairs and asdict(r.pairs), **asdict(r.limits), "verdict": r.verdict}
            for name, r in self.ratios.items()
        }
        seconds = self.seconds and asdict(self.seconds)
        named = {"name": self.case, "backend": self.backend, "seconds": seconds}
        return named | {"figures": self.figures, "ratios": ratios, "note": self.note}


class Report:
    """Prints tables on stdout as soon as they are ready and progress on stderr; keeps every row."""

    def __init__(self) -> None:
        terminal = Console(highlight=False)
        self.console = terminal if terminal.is_terminal else Console(highlight=False, width=110)
        self._errors = Console(stderr=True, highlight=False)
        self.rows: list[Row] = []

    def line(self, text: str = "") -> None:
        self.console.print(text, markup=False, soft_wrap=True)

    def remark(self, text: str) -> None:
        """Print a line on stderr."""
        self._errors.print(text, markup=False, soft_wrap=True)

    @contextmanager
    def progress(self, what: str, total: int) -> Iterator[Any]:
        """Gives tick(name), to call when name starts and the one before it is done."""
        columns = (BarColumn(bar_width=20), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
        with Progress(*columns, console=self._errors, transient=True, disable=not self._errors.is_terminal) as bar:
            task, begun = bar.add_task(what, total=total), count()

            def tick(name: str) -> None:
                bar.update(task, completed=next(begun), description=f"{what}: {name}")

            yield tick

    def add(self, rows: Iterable[Row], remark: str = "") -> None:
        """Keep the rows of one case, and print its tables."""
        rows = list(rows)
        self.rows += rows
        self.line()
        self.line(rows[0].case)
        if remark:
            self.line(remark)
        for on_gpu in (False, True):  # their figures differ, and all columns side by side would not fit
            if group := [row for row in rows if not row.note and is_on_gpu(row.backend) == on_gpu]:
                self.console.print(times_table(group))
        for note in dict.fromkeys(row.note for row in rows if row.note):
            names = "; ".join(row.backend for row in rows if row.note == note)
            self.console.print(f"{note}: {names}", markup=False)
        if any(row.ratios for row in rows):
            self.console.print(ratios_table(rows))


def times_table(rows: list[Row]) -> Table:
    """The contenders, their times, and every figure that any row has."""
    columns = [name for name in FORMATS if any(name in row.figures for row in rows)]
    timed = any(row.seconds for row in rows)
    table = Table(
        "", *(["median", "range"] if timed else []), *columns, box=SIMPLE, collapse_padding=True, pad_edge=False
    )
    for column in table.columns[1:]:
        column.justify = "right"
    for column in table.columns[:3]:
        column.no_wrap = True
    for row in rows:
        cells = []
        if timed:
            s = row.seconds
            cells = list(duration(s)) if s else ["", ""]
        cells += [f"{row.figures[name]:{FORMATS[name]}}" if name in row.figures else "" for name in columns]
        table.add_row(row.backend, *cells)
    return table


def ratios_table(rows: list[Row]) -> Table:
    """The ratios with their pairs and limits."""
    table = Table("ratio", "of medians", "of pairs (middle half)", "asked", "goal", "", box=SIMPLE, pad_edge=False)
    for column in table.columns[1:]:
        column.justify = "right"
    for column in table.columns[:2]:
        column.no_wrap = True
    for row in rows:
        for name, r in row.ratios.items():
            sign = "≤" if r.limits.better == "lower" else "≥"
            limits = [f"{sign} {limit:.3g}" if limit is not None else "" for limit in (r.limits.asked, r.limits.goal)]
            pairs = f"{r.pairs.median:.3f} ({r.pairs.q1:.3f}–{r.pairs.q3:.3f})" if r.pairs else ""
            style = {"missed": "red", "asked": "yellow", "goal": "green"}.get(r.verdict)
            table.add_row(name, f"{r.value:.3f}", pairs, *limits, r.verdict, style=style)
    return table


def is_on_gpu(contender: str) -> bool:
    """Whether the contender's name ends with a GPU and a precision."""
    return any(f", {device} " in contender for device in ("cuda", "mps"))


def colour(contender: str) -> str:
    """Blue for NumPy, orange for PyTorch on the CPU, green on a GPU, grey for ceilings."""
    if "products" in contender or "vector" in contender or "sum" in contender:
        return "0.7"
    return "C2" if is_on_gpu(contender) else "C1" if "PyTorch" in contender else "C0"


def duration(spread: Spread) -> tuple[str, str]:
    """The median with its unit, and the range in the same unit."""
    factor, unit = (1, "s") if spread.median >= 1 else (1000, "ms")
    median, low, high = (
        f"{value * factor:.0f}" if value * factor >= 100 else f"{value * factor:.3g}"
        for value in (spread.median, spread.min, spread.max)
    )
    return f"{median} {unit}", f"{low}–{high}"


def as_document(command: str, machine: dict[str, Any], rows: list[Row]) -> dict[str, Any]:
    """The JSON file's content, also printed as the last line if stdout is not a terminal."""
    return {"machine": machine, "command": command, "rows": [row.as_json() for row in rows]}


def write_json(path: Path, document: dict[str, Any]) -> None:
    """Write one row per line, so that a changed figure changes one line."""
    head = {key: value for key, value in document.items() if key != "rows"}
    rows = ",\n".join(json.dumps(row, ensure_ascii=False) for row in document["rows"])
    text = json.dumps(head, indent=1, ensure_ascii=False).removesuffix("\n}")
    path.write_text(f'{text},\n "rows": [\n{rows}\n]}}\n', encoding="utf-8")


def draw(path: Path, rows: list[Row], machine: str) -> None:
    """Draw one panel per case: the medians as bars with their ranges, or peak memory if nothing was timed.

    Values that differ by a factor above WIDE are on a logarithmic axis.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    cases: dict[str, list[Row]] = {}
    for row in rows:
        if row.seconds or "peak GB" in row.figures:
            cases.setdefault(row.case, []).append(row)
    columns = 1 if len(cases) < 4 else 2
    counts = [len(case_rows) for case_rows in cases.values()]
    heights = [1 + 0.3 * max(counts[i : i + columns]) for i in range(0, len(cases), columns)]
    figure = Figure(figsize=(9 * columns, 0.6 + sum(heights)), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(len(heights), columns, squeeze=False, height_ratios=heights).flat
    for axes in panels[len(cases) :]:
        axes.remove()
    for axes, (case, case_rows) in zip(panels, cases.items(), strict=False):
        axes.set_title(case, loc="left", fontsize=9)
        timed = [row for row in case_rows if row.seconds]
        shown = timed or case_rows
        values = [row.seconds.median if row.seconds else row.figures["peak GB"] for row in shown]
        names = [row.backend for row in shown]
        axes.barh(names, values, color=[colour(name) for name in names], height=0.7)
        ends = [row.seconds.max for row in timed] or values
        if timed:
            ranges = [(row.seconds.median - row.seconds.min, row.seconds.max - row.seconds.median) for row in timed]
            axes.errorbar(values, names, xerr=list(zip(*ranges, strict=True)), fmt="none", ecolor="0.2", capsize=2)
        labels = [label(row) for row in shown]
        for end, name, text in zip(ends, names, labels, strict=True):
            axes.annotate(text, (end, name), (4, 0), textcoords="offset points", va="center", fontsize=8)
        axes.set_xlabel("seconds, median and range" if timed else "peak memory, GB", fontsize=8)
        most, room = max(ends), [0.02 * len(text) for text in labels]  # a label's share of the axis
        if max(values) > WIDE * min(values):
            least = min(values) / 3
            axes.set_xscale("log")
            axes.xaxis.set_major_formatter("{x:g}")
            axes.set_xlim(least, max(x * (most / least) ** share for x, share in zip(ends, room, strict=True)))
        else:
            axes.set_xlim(right=max(x + share * most for x, share in zip(ends, room, strict=True)))
        axes.invert_yaxis()
        axes.tick_params(labelsize=8)
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(machine, fontsize=7, wrap=True)
    figure.savefig(path, dpi=130)


def label(row: Row) -> str:
    """A bar's label: the median or the memory, the error (the gradients' or the logits'), and the MFU."""
    parts = [duration(row.seconds)[0] if row.seconds else f"{row.figures['peak GB']:.3g} GB"]
    parts += [f"error {row.figures[name]:.1e}" for name in ("grad error", "logit error") if name in row.figures]
    return ", ".join(parts + ([f"MFU {row.figures['MFU']:.1%}"] if "MFU" in row.figures else []))
