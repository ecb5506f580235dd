"""The commands of python -m benchmarks."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from benchmarks.compare import BASELINE, compare, other_machine, read
from benchmarks.contenders.agreement import DisagreementError
from benchmarks.environment import removed
from benchmarks.machine import details
from benchmarks.measure import decode, forward, load, memory, nanogpt, operations, scaling, step, streams
from benchmarks.results import Report, as_document, draw, write_json
from benchmarks.settings import Settings, gpus_here
from numpy_gpt.cli.flags import AT_LEAST_1, NOT_NEGATIVE, PATH, Place
from numpy_gpt.cli.main import Commands
from numpy_gpt.errors import InputError
from numpy_gpt.io.outermost import optional_output

OUT = Path("benchmark-results")

MEASUREMENTS: dict[str, tuple[Callable[[Settings, Report], None], str]] = {
    "step": (step.run, "A training step: the book's job, a long window, a small model."),
    "forward": (forward.run, "The forward pass alone."),
    "decode": (decode.run, "Greedy decoding: tokens per second, and the share of the memory's rate."),
    "ops": (operations.run, "Each operation separately, forward and backward."),
    "scaling": (scaling.run, "The step as T, B and the number of cores grow."),
    "load": (load.run, "Loading a checkpoint: seconds and peak memory, compared with safetensors' loader."),
    "nanogpt": (nanogpt.run, "nanoGPT's example for a CPU, to its end, beside a model equal to nanoGPT's."),
    "memory": (memory.run, "Peak memory of a step, and of attention as T grows, each in its own process."),
}


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
def main() -> None:
    """The same work in NumPy and in PyTorch, timed in turn on one machine: ratios, with each side's error.

    Close other programs first: with the cores busy elsewhere, the ratios are unreliable.
    """


def _options(command: Callable[..., Any]) -> Callable[..., Any]:
    for option in (
        click.option(
            "--out",
            type=Place(file_okay=False, path_type=Path),
            default=OUT,
            show_default=True,
            help="Folder for JSON and PNG.",
        ),
        click.option(
            "--compile", "compiled", is_flag=True, help="Also time the tuned model under torch.compile on the CPU."
        ),
        click.option(
            "--runs",
            type=AT_LEAST_1,
            help="Timed rounds (decode and scaling: at most 3).  [default: 9, quick: 2]",
        ),
        click.option("--quick", is_flag=True, help="A two-layer model, to check in a minute that everything works."),
    ):
        command = option(command)
    return command


def _measure(names: list[str], quick: bool, runs: int | None, compiled: bool, out: Path) -> None:
    optional_output()  # the figures are in the JSON file
    report = Report()
    machine = details()
    report.line(machine["line"])
    if taken := removed():
        report.line(f"removed from the environment because it slows NumPy's BLAS: {taken}")
    if (machine["load"] or 0) > 0.5:
        report.remark(f"other programs are running (load {machine['load']:.1f}): the ratios will be noisy")
    if machine["gpu"] and not machine["gpu_peaks"]:
        report.line(f"no MFU: the peak of {machine['gpu']} is not in benchmarks/cards.py")
    settings = Settings(quick, runs or (2 if quick else 9), compiled, *gpus_here(report.remark))
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"the folder {out} cannot be created ({error.strerror}): choose another with --out") from error
    try:
        for name in names:
            MEASUREMENTS[name][0](settings, report)
    except DisagreementError as error:
        report.remark(f"Error: not timed, because the results disagree: {error}")
        raise SystemExit(1) from error
    command = " ".join([names[0] if len(names) == 1 else "all", *(["--quick"] if quick else [])])
    options = " ".join([f"--runs {settings.runs}", *(["--compile"] if compiled else [])])
    document = as_document(f"{command} {options}", machine, report.rows)
    file = out / command.replace(" --", "-")
    write_json(file.with_suffix(".json"), document)
    draw(file.with_suffix(".png"), report.rows, machine["line"])
    report.line(f"\n{file}.json, {file}.png")
    if not sys.stdout.isatty():  # for programs
        click.echo(json.dumps(document, ensure_ascii=False))


def _add(name: str, names: list[str], summary: str) -> None:
    @main.command(name, help=summary, short_help=summary)
    @_options
    def command(**options: Any) -> None:
        _measure(names, **options)


for _name, (_, _summary) in MEASUREMENTS.items():
    _add(_name, [_name], _summary)
_add("all", list(MEASUREMENTS), "All of the above, into one file.")
main.add_command(streams.main, "streams")


@main.command("compare", short_help="The regression guard: compare a new run with the committed one.")
@click.argument("new", type=PATH)
@click.option("--baseline", type=PATH, default=BASELINE, help="[default: benchmarks/cpu.json]")
@click.option(
    "--tolerance",
    type=NOT_NEGATIVE,
    default=0.15,
    show_default=True,
    metavar="X",
    help="Share by which a ratio may worsen.",
)
def compare_command(new: Path, baseline: Path, tolerance: float) -> None:
    """Compare every ratio of the baseline with that of NEW, a JSON file of these benchmarks.

    Exit code 1 if a ratio is worse by more than the tolerance and beyond both spreads, or missing although the same
    command was run.
    """
    before, now = read(baseline), read(new)
    for name, document in (("before", before), ("now", now)):
        click.echo(f"{name:<6}  {document['machine']['line']}")
    changes = compare(before, now, tolerance)
    if difference := other_machine(before, now):
        click.echo(f"different machines, which may explain a changed ratio: {difference}")
    for change in changes:
        click.echo(f"{'WORSE' if change.worse else '-' if change.now is None else 'ok':<6}  {change}")
    worse = [change for change in changes if change.worse]
    compared = sum(change.worse or change.now is not None for change in changes)
    click.echo(f"{len(worse)} of {compared} ratios are worse or missing" if worse else f"all {compared} held")
    if worse:
        raise SystemExit(1)
