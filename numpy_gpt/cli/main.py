"""The command numpy-gpt."""

import os
from contextlib import ExitStack
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import click

from numpy_gpt.cli.evaluate import evaluate_command
from numpy_gpt.cli.explore import explore_command
from numpy_gpt.cli.flags import (
    PATH,
    options,
    suggest_ours,
)
from numpy_gpt.cli.generate import generate_command
from numpy_gpt.cli.info import describe
from numpy_gpt.cli.pretrain import MODELS, OWN_SIZE, pretrain_command
from numpy_gpt.cli.tokenize import tokenize_command
from numpy_gpt.cli.weights import download_command, export_command, import_command
from numpy_gpt.console import Report, printable
from numpy_gpt.data import rereadable
from numpy_gpt.errors import InputError, LostProcessError
from numpy_gpt.io.files import disk_fix
from numpy_gpt.io.outermost import INTERRUPTED, outermost, say
from numpy_gpt.runs.pretrain import defaults_for
from numpy_gpt.tokenizer import get_encoding
from numpy_gpt.weights.checkpoint import read_header


class Commands(click.Group):
    """A command group that reports errors in one sentence: exit code 2 for unusable input, 130 for Ctrl-C.

    With args None (the process's own arguments) it also runs inside `outermost`; a test that passes args sees every
    other exception.
    """

    def main(self, args: Any = None, prog_name: str | None = None, **extra: Any) -> Any:  # type: ignore[override]
        if not extra.pop("standalone_mode", True):  # the caller wants click's exceptions and the command's result
            return super().main(args, prog_name, standalone_mode=False, **extra)
        with outermost() if args is None else ExitStack():
            try:
                code: Any = super().main(args, prog_name, standalone_mode=False, **extra)
                raise SystemExit(code if isinstance(code, int) else 0)
            except (click.Abort, KeyboardInterrupt) as error:  # while arguments are read: click would exit with 1
                if isinstance(error.__cause__, EOFError):  # an unexpected error, which click takes for an end of input
                    raise error.__cause__ from None
                raise SystemExit(_interrupted()) from error
            except click.ClickException as error:
                if isinstance(error, click.NoSuchOption):
                    error = suggest_ours(error)
                error.show()
                raise SystemExit(error.exit_code) from error
            except (InputError, LostProcessError) as error:
                say(f"Error: {error}")
                raise SystemExit(error.exit_code) from error
            except OSError as error:
                if error.filename is None:  # not about a file
                    raise
                say(f"Error: {os.fsdecode(error.filename)} cannot be used ({error.strerror}): {disk_fix(error)}")
                raise SystemExit(2) from error
            except MemoryError as error:
                say(f"Error: too little memory is available to this process: {str(error) or 'free some'}")
                raise SystemExit(2) from error

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as error:  # click would print an empty line first
            raise SystemExit(_interrupted()) from error

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.params.append(_debug())

    def add_command(self, cmd: click.Command, name: str | None = None) -> None:
        if not any(param.name == "debug" for param in cmd.params):
            cmd.params.append(_debug())
        super().add_command(cmd, name)


def _interrupted() -> int:
    say("interrupted")
    return INTERRUPTED


def _debug() -> click.Option:
    """The option --debug, before or after a command's name; `outermost` looks for it in the process's arguments."""
    help_text = "Print the traceback of an unexpected error instead of writing it to a file."
    return click.Option(["--debug"], is_flag=True, expose_value=False, help=help_text)


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(package_name="numpy-gpt")
def main() -> None:
    """A GPT-2 with every forward and backward line in NumPy: pretrain, evaluate, sample, inspect.

    CHECKPOINT is a run's folder, a checkpoint folder or a .safetensors file.
    """


@main.command(short_help="Parameters, memory and FLOPs of a model.")
@click.argument("checkpoint", type=PATH, required=False)
@click.option("--model", type=click.Choice(MODELS), help="A size by name, instead of a checkpoint.")
@options(*OWN_SIZE)
def info(checkpoint: Path | None, model: str | None, **own_size: Any) -> None:
    """Parameter names and shapes, totals, memory and FLOPs per token of CHECKPOINT or of a size.

    A checkpoint's tensors are not read, so this is quick for any size. All blocks have the same shapes, shown once.
    """
    sized = model is not None or any(own_size.values())
    if (checkpoint is None) != sized:
        raise click.UsageError("give either a CHECKPOINT or a size: --model NAME, --n-layers, --n-heads, --emb-dim")
    report = Report(required=True)
    if checkpoint is not None:
        describe(report.console, read_header(checkpoint).config)
    else:
        settings = replace(defaults_for(model or "tiny"), **own_size)
        words = get_encoding("bytes").n_vocab if settings.model == "tiny" else 50257
        describe(report.console, settings.config(words))


@main.command(short_help="The book's chapter 5, figure by figure.")
@click.option(
    "--text", default="the-verdict", show_default=True, metavar="FILE", help="The chapter's story, if it is a file."
)
@click.option("--quick", is_flag=True, help="Stop before the ten epochs: half a minute.")
@click.option("--no-torch", is_flag=True, help="Do not run torch even if installed: half the time and memory.")
def chapter5(text: str, quick: bool, no_torch: bool) -> None:
    """Reproduce the book's chapter 5 with NumPy alone, from the seed to the last sample, next to the printed figures.

    If PyTorch is installed, its figures are shown too. The ten epochs take NumPy five to ten minutes on two cores and
    4 GB of memory; PyTorch needs as much again.

    Exit code 1 if any figure is off.
    """
    from numpy_gpt.book.chapter5 import figures
    from numpy_gpt.random.generator import PLATFORMS

    report = Report(required=True)
    count, off = 0, dict[str, int]()
    with_torch = not no_torch and find_spec("torch") is not None
    with report.status() as progress, rereadable(text) as story:
        for figure in figures(story, quick, with_torch, progress):
            printed, count = figure.printed, count + 1
            report.line(f"{printed.where}  {printed.what}")
            report.line(f"    printed  {printable(printed.text)}")
            for side, value in figure.found.items():
                report.line(f"    {side:<7}  {printable(printed.show(value))}")
            note = f" ({printed.note})" if printed.note else ""
            report.line(f"    {' and '.join(figure.off)} OFF{note}" if figure.off else f"    agrees{note}")
            for side in figure.off:
                off[side] = off.get(side, 0) + 1
    report.line()
    sums = ", ".join(f"{number} of {count} in {side}" for side, number in off.items())
    report.line(f"figures off: {sums}" if off else f"every figure agrees ({count} of {count})")
    report.line()
    report.line(PLATFORMS)
    if off:
        raise SystemExit(1)


for command in (
    *(pretrain_command, tokenize_command, evaluate_command, generate_command, explore_command),
    *(download_command, import_command, export_command),
):
    main.add_command(command)
