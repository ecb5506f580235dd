"""The command tokenize."""

import shlex
from contextlib import ExitStack
from pathlib import Path

import click

from numpy_gpt.cli.flags import AT_LEAST_1, ENCODING_HELP, PATH
from numpy_gpt.console import Report
from numpy_gpt.data import CORPORA, load_text
from numpy_gpt.io.finding import temporary_files
from numpy_gpt.parallel.processes import usable_cores
from numpy_gpt.runs.batches import TRAIN_RATIO
from numpy_gpt.runs.texts import text_files


@click.command("tokenize", short_help="Encode texts once, for pretrain --tokens.")
@click.argument("texts", nargs=-1, required=True, metavar="TEXT...")
@click.option(
    "--encoding",
    default="gpt2",
    show_default=True,
    metavar="NAME|DIR",
    help=f"{ENCODING_HELP} chars: an id for each of the texts' characters.",
)
@click.option("--out", type=PATH, required=True, metavar="DIR", help="The new folder.")
@click.option(
    "--processes",
    type=AT_LEAST_1,
    metavar="N",
    help="Processes that encode, each in 100 to 200 MB of memory.  [default: the usable cores, at most 4]",
)
def tokenize_command(texts: tuple[str, ...], encoding: str, out: Path, processes: int | None) -> None:
    """Encode each TEXT, a file of UTF-8 text or a folder of them, for pretrain --tokens.

    The tokens are those of a run with the same --encoding and these texts as --text: joined by <|endoftext|>, the first
    nine tenths of the characters for training (train.bin), the rest for validation (val.bin). The texts may be larger
    than memory. The .bin files are as nanoGPT's: two bytes a token, or four if the vocabulary has more than 65,535.
    meta.json names the encoding.
    """
    from numpy_gpt.tokens.making import tokenize  # here, since it loads tiktoken

    report = Report()
    with ExitStack() as stack:
        files = text_files(texts)
        for i, name in enumerate(files):
            if name in CORPORA:
                content = {name: load_text(name).encode()}
                files[i] = str(stack.enter_context(temporary_files(f"the text {name}", content)) / name)
        header = tokenize(files, encoding, out, TRAIN_RATIO, processes or min(4, usable_cores()), report.transfer)
    for part, count in header["tokens"].items():
        report.line(f"{part:<6}{count:,} tokens of {header['characters'][part]:,} characters")
    report.line(f"Saved {out}. Train on it: numpy-gpt pretrain --tokens {shlex.quote(str(out))}")
