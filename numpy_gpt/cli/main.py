"""The command numpy-gpt."""

import os
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import click
import numpy as np

from numpy_gpt.cli.evaluate import evaluate_command
from numpy_gpt.cli.explore import explore_command
from numpy_gpt.cli.flags import (
    AT_LEAST_0,
    AT_LEAST_1,
    BELOW_1,
    ENCODING_HELP,
    FEATURES,
    LAYERS,
    NOT_NEGATIVE,
    PATH,
    POSITIVE,
    PROBABILITY,
    options,
    suggest_ours,
)
from numpy_gpt.cli.generate import generate_command
from numpy_gpt.cli.info import describe, enough_memory
from numpy_gpt.cli.tokenize import tokenize_command
from numpy_gpt.cli.weights import download_command, export_command, import_command
from numpy_gpt.config import GPTConfig
from numpy_gpt.console import Report, printable
from numpy_gpt.data import CORPORA, rereadable
from numpy_gpt.errors import InputError
from numpy_gpt.io.files import disk_fix
from numpy_gpt.io.outermost import INTERRUPTED, outermost, say
from numpy_gpt.runs.pretrain import MakeLearner, defaults_for, pretrain
from numpy_gpt.runs.settings import DECAYS, SIZE_NAMES, SIZES, Settings
from numpy_gpt.runs.texts import text_from
from numpy_gpt.tokenizer import get_encoding
from numpy_gpt.train import Learner
from numpy_gpt.typing import Weights
from numpy_gpt.weights.checkpoint import read_header

MODELS = tuple(SIZES)


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
            except InputError as error:
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


def _default(name: str) -> str:
    """The default as --help shows it, for tiny and for the GPT-2 sizes."""
    tiny, gpt2 = (getattr(defaults_for(model), name) for model in ("tiny", "124M"))
    others = {"tokens": "the text", "stride": "the context length", "max_steps": "all epochs", "clip": "off"}
    words = {None: others.get(name, "the model's" if name in SIZE_NAMES else "none")}
    tiny, gpt2 = (
        " ".join(map(str, value)) if isinstance(value, tuple) else words.get(value, value) for value in (tiny, gpt2)
    )
    return f"  [default: {tiny}]" if tiny == gpt2 else f"  [default: {tiny} for tiny, {gpt2} for a GPT-2 size]"


def _setting(name: str, help_text: str, **kwargs: Any) -> Callable[[Any], Any]:
    """An option for one field of Settings; if omitted, the model's own default applies, as the help states."""
    flag = "--" + name.replace("_", "-")
    if kwargs.get("is_flag"):
        return click.option(flag, name, help=help_text, **kwargs)
    return click.option(flag, name, default=None, help=help_text + _default(name), **kwargs)


TEXT_HELP = (
    f"Text to learn: {' or '.join(CORPORA)}, a file of UTF-8 text, or a folder of them; repeat it for more than one."
)

OWN_SIZE = (
    _setting("n_layers", "Blocks of the model, if not the --model's.", type=LAYERS, metavar="N"),
    _setting("n_heads", "Attention heads of a block; divides --emb-dim.", type=AT_LEAST_1, metavar="N"),
    _setting("emb_dim", "Features of a token.", type=FEATURES, metavar="N"),
)

SETTINGS = (
    click.option("--text", multiple=True, metavar="NAME|FILE|DIR", help=TEXT_HELP + _default("text")),
    _setting("tokens", "Tokens to learn instead of a text: tokenize's folder, or nanoGPT's.", type=PATH, metavar="DIR"),
    _setting("encoding", f"{ENCODING_HELP} chars: an id for each of the text's characters.", metavar="NAME|DIR"),
    click.option("--model", type=click.Choice(MODELS), default=None, help="Size of the model.  [default: tiny]"),
    *OWN_SIZE,
    _setting("context_length", "Longest window of tokens.", type=AT_LEAST_1, metavar="N"),
    _setting("epochs", "Passes over the training text.", type=AT_LEAST_0, metavar="N"),
    _setting("max_steps", "Stop after this many steps.", type=AT_LEAST_0, metavar="N"),
    _setting("batch_size", "Windows in a batch.", type=AT_LEAST_1, metavar="N"),
    _setting("accumulate", "Compute a batch in N parts, in the memory of one.", type=AT_LEAST_1, metavar="N"),
    _setting("stride", "Tokens from one window's start to the next.", type=AT_LEAST_1, metavar="N"),
    _setting("lr", "Learning rate of AdamW; the peak with warm-up.", type=POSITIVE, metavar="X"),
    _setting("weight_decay", "AdamW's decoupled weight decay.", type=NOT_NEGATIVE, metavar="X"),
    _setting(
        "decay",
        "What decays: all parameters; 2d: those of two dimensions, as nanoGPT; matrices: the linear layers' weights.",
        type=click.Choice(DECAYS),
    ),
    _setting("betas", "AdamW's β₁ and β₂, for example 0.9 0.99.", type=BELOW_1, nargs=2, metavar="X X"),
    _setting(
        "warmup_steps", "Linear warm-up, then cosine decay to a tenth; 0: constant.", type=AT_LEAST_0, metavar="N"
    ),
    _setting("clip", "Largest global norm of the gradients.", type=POSITIVE, metavar="X"),
    _setting("drop_rate", "Probability that dropout zeroes an element.", type=PROBABILITY, metavar="X"),
    _setting("tie_weights", "Use the token embedding as output head too.", is_flag=True),
    _setting("qkv_bias", "Give the query, key and value projections a bias.", is_flag=True),
    _setting("seed", "Seed of the one random stream: weights, order of batches, dropout.", type=int, metavar="N"),
    _setting("eval_freq", "Steps from one evaluation to the next.", type=AT_LEAST_1, metavar="N"),
    _setting("eval_iter", "Batches of each text per evaluation.", type=AT_LEAST_1, metavar="N"),
    _setting("prompt", "Beginning of the sample after each epoch.", metavar="TEXT"),
)

FILES = (
    click.option("--out", type=PATH, default=None, metavar="DIR", help="The run's new folder.  [default: runs/…]"),
    click.option(
        "--resume",
        type=PATH,
        default=None,
        metavar="DIR",
        help="Continue the run in this folder with its settings, or from an earlier save, DIR/checkpoint-STEP.",
    ),
    click.option(
        "--init",
        type=PATH,
        default=None,
        metavar="CHECKPOINT",
        help="Start from these weights instead of random ones.",
    ),
    click.option(
        "--save-freq",
        type=AT_LEAST_1,
        default=None,
        metavar="N",
        help="Save at the start and every N steps; repeat it with --resume.  [default: at the end]",
    ),
    click.option(
        "--keep",
        type=AT_LEAST_1,
        default=1,
        show_default=True,
        metavar="N",
        help="Keep copies of the last N saves as checkpoint-STEP; read-only copies are never removed.",
    ),
)


pretrain_options = options(*SETTINGS, *FILES)
"""The flags that the pretrain commands of all backends share."""


def run_pretrain(make_learner: MakeLearner, backend: str, flags: dict[str, Any], processes: int = 1) -> None:
    """Run pretrain with click's flags; after a signal, exit with 128 + its number (130 for Ctrl-C)."""
    files = {name: flags.pop(name) for name in ("out", "resume", "init", "save_freq", "keep")}
    text = flags.pop("text")
    given = {name: value for name, value in flags.items() if value is not None and value is not False}
    if text:
        given["text"] = text_from(text)
    with ExitStack() as stack:

        def make(config: GPTConfig, settings: Settings, total_steps: int, params: Weights | None) -> Learner:
            stack.enter_context(enough_memory(config, 16, "training"))
            return make_learner(config, settings, total_steps, params)

        if received := pretrain(given, make, backend, processes=processes, **files):
            raise SystemExit(128 + received)


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(package_name="numpy-gpt")
def main() -> None:
    """A GPT-2 with every forward and backward line in NumPy: pretrain, evaluate, sample, inspect.

    CHECKPOINT is a run's folder, a checkpoint folder or a .safetensors file.
    """


@main.command("pretrain", short_help="Train a GPT on a text.")
@pretrain_options
def pretrain_command(**flags: Any) -> None:
    """Train a GPT on a text, with NumPy alone.

    Without flags, the tiny model learns the bytes of Python's language reference, offline, in about a minute. With
    --model 124M it is the book's run (chapter 5); add --text the-verdict for the book's story.

    The run's folder gets losses.csv, losses.png, the checkpoint, and best: the saved model with the lowest validation
    loss. Ctrl-C stops between two steps and saves first.
    """
    from numpy_gpt.runs.learner import NumpyLearner

    run_pretrain(NumpyLearner, f"numpy-gpt · NumPy {np.__version__} · float32", flags)


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
    *(tokenize_command, evaluate_command, generate_command, explore_command),
    *(download_command, import_command, export_command),
):
    main.add_command(command)
