"""The commands of numpy-gpt that bring weights in and take them out."""

from pathlib import Path

import click

from numpy_gpt.console import Report
from numpy_gpt.errors import InputError
from numpy_gpt.files import new_folder, replacing
from numpy_gpt.pretrain import encoding_of
from numpy_gpt.tokenizer import GPT2_FILES, vocabulary_files
from numpy_gpt.weights.checkpoint import load_params, read_header, save_params
from numpy_gpt.weights.huggingface import write_huggingface
from numpy_gpt.weights.source import Source, open_source

FOLDER = click.Path(path_type=Path)


@click.command("import", short_help="Bring in GPT-2 from OpenAI's or Hugging Face's files.")
@click.argument("source", type=FOLDER)
@click.option("--out", type=FOLDER, required=True, metavar="DIR", help="The checkpoint's new folder.")
def import_command(source: Path, out: Path) -> None:
    """Make a checkpoint of SOURCE, a GPT-2 of somebody else's; TensorFlow and PyTorch are not needed.

    SOURCE is OpenAI's folder (hparams.json and model.ckpt.*), Hugging Face's (config.json and model.safetensors, whole
    or in shards), or a .safetensors file with config.json beside it. A vocabulary that lies there comes along. The
    weights stay as they are: dtype, bits, and the head tied to the token embedding. PyTorch's .pth files come in by
    torch-gpt import.
    """
    bring_in(open_source(source), source, out)


def bring_in(source: Source, path: Path, out: Path) -> None:
    """Write the checkpoint of a source that was found at path, and say what it is."""
    report = Report()
    new_folder(out)
    tensors = {name: tensor.finite(path, name) for name, tensor in source.tensors.items()}
    params = {name: tensors[name].read() for name in report.track(list(tensors), "reading")}
    for name, content in source.vocabulary.items():
        with replacing(out / name) as beside:
            beside.write_bytes(content)
    save_params(source.config, params, out, about={"encoding": "."})
    c = source.config
    total = sum(array.size for array in params.values())
    report.line(f"{source.what}: {total:,} parameters, {c.n_layers} layers × {c.emb_dim}, context {c.context_length}")
    if missing := GPT2_FILES.keys() - source.vocabulary.keys():
        report.line(
            f"{path} has no {' and no '.join(sorted(missing))}: put them into {out}, or generate with --encoding"
        )
    report.line(f"Saved {out}. Try: numpy-gpt generate {out} 'Every effort moves you'")


@click.command("export", short_help="Write a checkpoint for other programs.")
@click.argument("checkpoint", type=FOLDER)
@click.option("--format", "kind", type=click.Choice(["huggingface"]), default="huggingface", show_default=True)
@click.option("--out", type=FOLDER, required=True, metavar="DIR", help="The new folder.")
def export_command(checkpoint: Path, kind: str, out: Path) -> None:
    """Write CHECKPOINT as a folder that transformers opens: GPT2LMHeadModel.from_pretrained(DIR).

    The logits are the same. Where the checkpoint's encoding has a vocabulary, it comes along.
    """
    report = Report()
    header = read_header(checkpoint)
    config, tensors = load_params(checkpoint)
    new_folder(out)
    params = {name: tensors[name].read() for name in report.track(list(tensors), "reading")}
    try:
        encoding = encoding_of(header)
        words = vocabulary_files(encoding)
        missing = f"the encoding {encoding} has no files that transformers reads" if not words else ""
    except InputError as error:
        words, missing = {}, str(error)
    write_huggingface(config, params, out, words)
    if missing:
        report.line(f"without a tokenizer: {missing}")
    report.line(f"Saved {out}. In Python: transformers.GPT2LMHeadModel.from_pretrained({str(out)!r})")
