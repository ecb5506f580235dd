"""The command evaluate, for any backend."""

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import click
import numpy as np

from numpy_gpt.cli.flags import AT_LEAST_1, ENCODING, PATH, options
from numpy_gpt.cli.info import enough_memory
from numpy_gpt.cli.texts import fitting_encoding
from numpy_gpt.console import Report
from numpy_gpt.data import split_text
from numpy_gpt.errors import InputError
from numpy_gpt.model import checked_ids
from numpy_gpt.runs.batches import TRAIN_RATIO
from numpy_gpt.runs.evaluation import Loss, mean_loss
from numpy_gpt.runs.pretrain import encoding_of
from numpy_gpt.runs.texts import in_words, load_texts, text_of
from numpy_gpt.runs.token_folders import tokens_of
from numpy_gpt.tokenizer import encode
from numpy_gpt.tokens.file import TokenFile
from numpy_gpt.typing import Array
from numpy_gpt.weights.checkpoint import load, read_header

evaluate_options = options(
    click.argument("checkpoint", type=PATH),
    click.option(
        "--text",
        multiple=True,
        metavar="NAME|FILE|DIR",
        help="Text to evaluate on; repeat it for more than one.  [default: the run's own validation part]",
    ),
    click.option("--batch-size", type=AT_LEAST_1, default=8, show_default=True, metavar="N", help="Windows at a time."),
    ENCODING,
)
"""The arguments and flags that the evaluate commands of all backends share."""


def run_evaluate(
    load_loss: Callable[[Path], Loss], checkpoint: Path, text: tuple[str, ...], batch_size: int, encoding: str | None
) -> None:
    """Run evaluate with click's flags. load_loss loads a checkpoint's model and returns its loss function."""
    header = read_header(checkpoint)
    tokens, T = fitting_encoding(header, encoding), header.config.context_length
    report = Report(required=True)
    ids: Array | TokenFile
    if text:
        name, ids = in_words(text), encode(tokens, load_texts(text))
    elif "tokens" in header.about:
        track = partial(report.track, description="checking the tokens")
        learned = tokens_of(header, encoding or encoding_of(header), track)
        name, ids = str(learned.val.path), learned.val
    else:
        name, content = text_of(header)
        ids = encode(tokens, split_text(content, TRAIN_RATIO)[1])
        name = f"the last {1 - TRAIN_RATIO:.0%} of {name}"
    if len(ids) < 2:
        raise InputError(f"{name} is too short to evaluate: it has {len(ids)} tokens, but 2 are needed")
    if isinstance(ids, np.ndarray):
        checked_ids("tokens", ids[None], header.config.vocab_size)
    with enough_memory(header.config, 4, "evaluating the model"):
        loss = mean_loss(load_loss(checkpoint), ids, T, batch_size, partial(report.track, description="evaluating"))
    report.line(f"text        {name}")
    report.line(f"tokens      {len(ids) - 1:,} ({tokens.name}), all but the first")
    report.line(f"loss        {loss:.4f} nats/token, the mean over all of them")
    report.line(f"perplexity  {_perplexity(loss):.4f}")


def _perplexity(loss: float) -> float:
    """exp(loss), or infinity where that overflows a float (above 709 nats)."""
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf


@click.command("evaluate", short_help="Loss and perplexity on a text.")
@evaluate_options
def evaluate_command(**flags: Any) -> None:
    """Loss (nats per token) and perplexity of CHECKPOINT on a text, over all its tokens but the first.

    The text is cut into consecutive windows of the context length; the last one may be shorter.
    """
    run_evaluate(lambda checkpoint: load(checkpoint).loss, **flags)
