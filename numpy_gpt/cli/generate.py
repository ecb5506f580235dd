"""The command generate, for any backend."""

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from numpy_gpt.cli.flags import AT_LEAST_0, AT_LEAST_1, ENCODING, NOT_NEGATIVE, PATH, SEED, SHARE, options
from numpy_gpt.cli.info import enough_memory
from numpy_gpt.cli.prompts import lines, one_prompt
from numpy_gpt.cli.stops import before_stop
from numpy_gpt.cli.texts import as_typed, exists, fitting_encoding
from numpy_gpt.console import Report, printable
from numpy_gpt.errors import InputError
from numpy_gpt.io.outermost import say
from numpy_gpt.model import checked_ids
from numpy_gpt.tokenizer import encode, end_id, stream_decode
from numpy_gpt.typing import Array
from numpy_gpt.weights.checkpoint import load, read_header

SEPARATOR = "---------------"
"""The line between two continuations; nanoGPT's."""

generate_options = options(
    click.argument("checkpoint"),  # a path, unless swapped with the prompt
    click.argument("prompt", required=False),
    click.option(
        "--prompt-file",
        type=PATH,
        metavar="FILE",
        help="Read the prompt from FILE, UTF-8 text, without the newline at its end.",
    ),
    click.option(
        "--interactive",
        is_flag=True,
        help="Continue each line of standard input, until Ctrl-D, and print the continuation only.",
    ),
    click.option(
        "--max-new-tokens", type=AT_LEAST_0, default=100, show_default=True, metavar="N", help="Tokens to add."
    ),
    click.option(
        "--temperature",
        type=NOT_NEGATIVE,
        default=0.0,
        show_default=True,
        metavar="X",
        help="0: always the likeliest token. Higher: more variety.",
    ),
    click.option("--top-k", type=AT_LEAST_1, metavar="N", help="Draw only from the N likeliest tokens."),
    click.option(
        "--top-p",
        type=SHARE,
        metavar="X",
        help="Draw from the fewest tokens whose probabilities sum to at least X.",
    ),
    click.option(
        "--num-samples",
        type=AT_LEAST_1,
        default=1,
        show_default=True,
        metavar="N",
        help="Continuations, drawn one after another from the same random stream.",
    ),
    click.option(
        "--stop",
        multiple=True,
        metavar="TEXT",
        help="End before the first occurrence of TEXT, which is not printed; may be repeated.",
    ),
    click.option("--seed", type=SEED, default=123, show_default=True, metavar="N", help="Seed of the draws."),
    ENCODING,
)
"""The arguments and flags that the generate commands of all backends share."""


@dataclass(frozen=True)
class Decoding:
    """How a continuation is decoded; numpy_gpt.decoding.generate explains each setting."""

    max_new_tokens: int
    temperature: float
    top_k: int | None
    top_p: float | None
    seed: int
    eos_id: int | None
    n_vocab: int


Continue = Callable[[Array], Iterator[int]]
"""Prompt ids (T,) -> new ids one by one; all calls draw from the one random stream of the seed."""


def run_generate(
    load_continue: Callable[[Path, Decoding], Continue],
    checkpoint: str,
    prompt: str | None,
    prompt_file: Path | None,
    interactive: bool,
    max_new_tokens: int,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    num_samples: int,
    stop: tuple[str, ...],
    seed: int,
    encoding: str | None,
) -> None:
    """Run generate with click's flags. load_continue loads a checkpoint's model, and seeds its random stream."""
    if temperature == 0 and (top_k is not None or top_p is not None):
        raise InputError("--top-k and --top-p limit which tokens are drawn: give a --temperature above 0 with them")
    if temperature == 0 and num_samples > 1:
        raise InputError("at temperature 0 all samples are the same: give a --temperature above 0 with --num-samples")
    stops = tuple(as_typed(text, "--stop") for text in stop)
    if "" in stops:
        raise InputError("--stop is empty: give the text to stop at")
    if sum((prompt is not None, prompt_file is not None, interactive)) != 1:
        raise click.UsageError("give exactly one of PROMPT (- for standard input), --prompt-file FILE, --interactive")
    if prompt is not None and exists(prompt) and not exists(checkpoint):
        raise InputError(f"the prompt and the checkpoint are swapped: give {prompt} first, then the prompt")
    header = read_header(checkpoint)
    words, T = fitting_encoding(header, encoding), header.config.context_length
    report = Report(required=True)
    marker = "> " if interactive and sys.stdin and sys.stdin.isatty() and sys.stdout.isatty() else ""
    prompts = lines(report, marker) if interactive else iter([one_prompt(prompt, prompt_file)])
    with enough_memory(header.config, 4, "generating"):
        decoding = Decoding(max_new_tokens, temperature, top_k, top_p, seed, end_id(words), words.n_vocab)
        new_ids = load_continue(Path(checkpoint), decoding)
        for number, text in enumerate(prompts):
            try:
                ids = checked_ids("the prompt", encode(words, text)[None], header.config.vocab_size)[0]
            except InputError as error:
                if not marker:
                    raise
                say(f"Error: {error}")  # on a terminal the user can try again
                continue
            if len(ids) > T:
                say(f"the prompt has {len(ids):,} tokens; the model sees only the last {T:,}, its context length")
            for sample in range(num_samples):
                if sample or (number and not marker):
                    report.line(SEPARATOR)
                if not interactive:
                    report.piece(printable(text))
                for piece in before_stop(stream_decode(words, new_ids(ids)), stops):
                    report.piece(printable(piece))
                report.line()


@click.command("generate", short_help="Continue a prompt.")
@generate_options
def generate_command(**flags: Any) -> None:
    """Continue PROMPT with the model in CHECKPOINT; tokens appear as they are generated.

    PROMPT - is all of standard input, without the newline at its end. With --interactive, blank lines are skipped, all
    lines draw from the one random stream, and unless on a terminal a line of dashes separates their continuations.

    Ends after --max-new-tokens, before a --stop text, or at the token <|endoftext|>. --top-k, --top-p
    and --num-samples need a --temperature above 0.
    """
    from numpy_gpt.decoding import Sampling, stream
    from numpy_gpt.random.generator import Generator

    def load_continue(checkpoint: Path, d: Decoding) -> Continue:
        model = load(checkpoint)
        sampling = Sampling(d.temperature, d.top_k, d.top_p, d.eos_id, Generator(d.seed), d.n_vocab)
        return lambda ids: (int(column[0]) for column in stream(model, ids[None], d.max_new_tokens, sampling))

    run_generate(load_continue, **flags)
