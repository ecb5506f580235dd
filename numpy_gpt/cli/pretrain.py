"""The command pretrain, for any backend."""

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import click
import numpy as np

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
)
from numpy_gpt.cli.info import enough_memory
from numpy_gpt.config import GPTConfig
from numpy_gpt.data import CORPORA
from numpy_gpt.runs.pretrain import MakeLearner, defaults_for, pretrain
from numpy_gpt.runs.settings import DECAYS, SIZE_NAMES, SIZES, Settings
from numpy_gpt.runs.texts import text_from
from numpy_gpt.train import Learner
from numpy_gpt.typing import Weights

MODELS = tuple(SIZES)


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
    _setting(
        "accumulate",
        "Split each batch into N parts, to save memory (gradient accumulation).",
        type=AT_LEAST_1,
        metavar="N",
    ),
    _setting("stride", "Tokens from one window's start to the next.", type=AT_LEAST_1, metavar="N"),
    _setting("lr", "Learning rate of AdamW; the peak with warm-up.", type=POSITIVE, metavar="X"),
    _setting("weight_decay", "AdamW's decoupled weight decay.", type=NOT_NEGATIVE, metavar="X"),
    _setting(
        "decay",
        "What decays: all parameters; 2d: embeddings and linear weights, as in nanoGPT; matrices: linear weights.",
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


@click.command("pretrain", short_help="Train a GPT on a text.")
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
