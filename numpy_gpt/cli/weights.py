"""The commands import, download and export."""

import shlex
from pathlib import Path
from typing import TYPE_CHECKING

import click

from numpy_gpt.cli.flags import AT_LEAST_1
from numpy_gpt.cli.flags import PATH as FOLDER
from numpy_gpt.cli.info import enough_memory
from numpy_gpt.config import GPT2_SIZES
from numpy_gpt.console import Report
from numpy_gpt.encodings.vocabulary import CHARACTERS
from numpy_gpt.errors import InputError
from numpy_gpt.io.folders import check_free, new_folder
from numpy_gpt.parameters import parameter_count
from numpy_gpt.runs.pretrain import encoding_of
from numpy_gpt.tokenizer import ENCODINGS, GPT2_FILES, least_vocab_size, vocabulary_files
from numpy_gpt.weights.checkpoint import load_params, read_header
from numpy_gpt.weights.huggingface import write_huggingface
from numpy_gpt.weights.importing import import_weights
from numpy_gpt.weights.source import Source, open_source

if TYPE_CHECKING:
    import tiktoken


@click.command("import", short_help="Bring in GPT-2 from OpenAI's or Hugging Face's files.")
@click.argument("source", type=FOLDER)
@click.option("--out", type=FOLDER, required=True, metavar="DIR", help="The checkpoint's new folder.")
@click.option("--n-heads", type=AT_LEAST_1, metavar="N", help="Number of heads, if only the tensors are given.")
def import_command(source: Path, out: Path, n_heads: int | None) -> None:
    """Make a checkpoint of SOURCE, a GPT-2 in another format, without TensorFlow or PyTorch.

    SOURCE is OpenAI's folder (hparams.json and model.ckpt.*), Hugging Face's (config.json and model.safetensors, in
    one file or in shards), or one .safetensors file, Hugging Face's or with the names of the book's GPTModel; without a
    config.json beside it, the width decides the number of heads. A vocabulary found there is copied. The weights
    keep their bits (half precision is widened to float32), and a head tied to the token embedding stays so. For
    PyTorch's .pth files use torch-gpt import.
    """
    bring_in(open_source(source, n_heads), source, out)


def bring_in(source: Source, path: Path, out: Path) -> None:
    """Write the checkpoint of the source found at path, and report what it is."""
    report, c = Report(), source.config
    with enough_memory(c, 4, "importing it"):
        encoding = import_weights(source, path, out, report)
    total = parameter_count(c)
    report.line(
        f"{source.what}: {total:,} parameters, {c.n_layers} layers × {c.emb_dim}, {c.n_heads} heads, "
        f"context {c.context_length}"
    )
    if unfit := _unfit(encoding, c.vocab_size, out):
        report.line(f"note: its {c.vocab_size:,} tokens have no text yet: {unfit}")
        report.line(f"Saved {out}")
    else:
        report.line(f"Saved {out}. Try: numpy-gpt generate {shlex.quote(str(out))} 'Every effort moves you'")


def _unfit(encoding: "tiktoken.Encoding | None", vocab_size: int, out: Path) -> str:
    """Why the model's tokens cannot be decoded with the encoding imported, or "" if they can."""
    if encoding is None:
        files = f"{out} has no {' and no '.join(GPT2_FILES)}"
        likely = "bytes" if vocab_size == 257 else "gpt2" if 50257 <= vocab_size <= 50304 else ""  # padded to 50304
        named = f"--encoding {likely}, likely by its size," if likely else "--encoding"
        return f"{files}: put them there, or give each command {named} if it was trained with that"
    if least_vocab_size(encoding) <= vocab_size:
        return ""
    return f"the vocabulary beside it has {encoding.n_vocab:,}, so it is another model's: import it with its own"


@click.command("download", short_help="Fetch OpenAI's GPT-2 and make a checkpoint of it.")
@click.argument("size", type=click.Choice(list(GPT2_SIZES)))
@click.option("--out", type=FOLDER, metavar="DIR", help="The checkpoint's new folder.  [default: gpt2-SIZE]")
@click.option("--from", "there", type=FOLDER, metavar="DIR", help="Use the released files in this folder: no network.")
def download_command(size: str, out: Path | None, there: Path | None) -> None:
    """Fetch the released files of GPT-2 SIZE into the user's cache, verify them, and make a checkpoint of them.

    124M is half a gigabyte, 1558M six, and the checkpoint as much again. The same command resumes a transfer that
    broke off or was stopped by Ctrl-C.
    """
    import pooch  # type: ignore[import-untyped]  # here, since it takes longer to import than all of numpy_gpt

    from numpy_gpt.weights.download import check_gpt2, fetch_gpt2

    out = out or Path(f"gpt2-{size}")
    folder = there or Path(pooch.os_cache("numpy-gpt"), f"gpt2-{size}")
    try:
        check_free(out)  # before half a gigabyte is on its way
        if there:
            check_gpt2(size, folder)
        else:
            fetch_gpt2(size, folder, Report())
        bring_in(open_source(folder), folder, out)
    except KeyboardInterrupt:
        raise SystemExit(130) from None


@click.command("export", short_help="Write a checkpoint for other programs.")
@click.argument("checkpoint", type=FOLDER)
@click.option("--format", "kind", type=click.Choice(["huggingface"]), default="huggingface", show_default=True)
@click.option("--out", type=FOLDER, required=True, metavar="DIR", help="The new folder.")
def export_command(checkpoint: Path, kind: str, out: Path) -> None:
    """Write CHECKPOINT as a folder that transformers opens: GPT2LMHeadModel.from_pretrained(DIR).

    The logits are the same. The checkpoint's vocabulary is copied, or its encoding's name written;
    numpy-gpt import reads both back.
    """
    report = Report()
    header = read_header(checkpoint)
    config, tensors = load_params(checkpoint)
    encoding, words, missing = None, dict[str, bytes](), ""
    try:
        encoding = encoding_of(header)
        words = vocabulary_files(encoding)
        if not words or CHARACTERS in words:
            words, missing = {}, f"transformers reads no files of the encoding; here, use --encoding {encoding}"
    except InputError as error:
        missing = str(error)
    with new_folder(out) as folder, enough_memory(config, 4, "exporting it"):
        params = {name: tensors[name].read() for name in report.track(list(tensors), "reading")}
        write_huggingface(config, params, folder, words, encoding if encoding in ENCODINGS else None)
    if not config.qkv_bias:
        report.line("with biases of 0 for query, key and value: the format has no GPT-2 without them")
    if missing:
        report.line(f"without a tokenizer: {missing}")
    report.line(f"Saved {out}. In Python: transformers.GPT2LMHeadModel.from_pretrained({str(out)!r})")
