"""The files OpenAI released GPT-2 in: where they are, what is known of them, and how they get here."""

import math
from pathlib import Path
from typing import TYPE_CHECKING

from numpy_gpt.config import GPTConfig
from numpy_gpt.errors import InputError
from numpy_gpt.files import disk_fix
from numpy_gpt.parameters import parameter_shapes
from numpy_gpt.tokenizer import GPT2_FILES
from numpy_gpt.weights.transfer import Remote, fetch

if TYPE_CHECKING:
    from numpy_gpt.console import Report

ADDRESSES = (
    "https://openaipublic.blob.core.windows.net/gpt-2/models/",  # OpenAI's
    "https://f001.backblazeb2.com/file/LLMs-from-scratch/gpt2/",  # the book's copy
)
"""Asked in this order for SIZE/FILE."""

DATA_FILE = "model.ckpt.data-00000-of-00001"

MODEL_FILES = ("hparams.json", "model.ckpt.index", DATA_FILE)
"""Without the vocabulary, GPT2_FILES, which is the same for all sizes."""

SHA256 = {
    "124M/hparams.json": "d9d56e4121c427164e0c55c6f03c08e1daf9002b9b672825112d19097b680318",
    "124M/model.ckpt.index": "71916f763f9746f9b2a06b12d91996cf1084ae008d0424543d39391c5f2dc687",
    "124M/model.ckpt.data-00000-of-00001": "2060c885360cc0cf41d7a6dbc4d24b5127aae20260c8b5ae521b5a6578407118",
}
"""OpenAI published none; these stand in public repositories. Those of the other sizes are not known."""


def fetch_gpt2(size: str, folder: Path, report: "Report") -> None:
    """Bring the five files of GPT-2 `size` ("124M", "355M", "774M" or "1558M") into `folder`.

    124M and the vocabulary are verified by SHA-256. Of the other sizes the data must have 4 bytes a parameter, and
    the two small files the length that the server announces; what is inside is checked by its own crc32c at import.

    Raises InputError, which names the file and what was wrong with each address or with the folder. What had come by
    then stays beside the files, and the next call continues from it, after a Ctrl-C too.
    """
    files = _files(size)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for file in files:
            fetch(file, folder, report)
    except OSError as error:
        raise InputError(
            f"{error.filename or folder} cannot be written ({error.strerror or error}): {disk_fix(error)}, or use "
            "--from DIR with files that you already have"
        ) from error
    except KeyboardInterrupt:
        report.line(f"stopped: what has come stays in {folder}, and the same command continues from it")
        raise


def check_gpt2(size: str, folder: Path) -> None:
    """Raise InputError unless `folder` holds the files of GPT-2 `size`, whole and right as far as is known.

    As fetch_gpt2 verifies them, except that of the small files without a SHA-256 it is only known that they are not
    empty. The vocabulary may be missing.
    """
    for file in _files(size):
        path = folder / file.name
        try:
            fault = file.fault(path)
        except FileNotFoundError:
            fault = None if file.name in GPT2_FILES else "does not exist"
        except OSError as error:
            fault = f"cannot be read ({error.strerror})"
        if fault:
            raise InputError(f"{path} {fault}: give a folder with all files of GPT-2 {size}, or leave --from out")


def _files(size: str) -> list[Remote]:
    config = GPTConfig.gpt2(size, qkv_bias=True, tie_weights=True)
    known = SHA256 | {f"{size}/{name}": sha256 for name, sha256 in GPT2_FILES.items()}
    # The data is the parameters in float32 and nothing else: 497,759,232 bytes for 124M.
    lengths = {DATA_FILE: 4 * sum(math.prod(shape) for shape in parameter_shapes(config).values())}
    return [
        Remote(
            name,
            tuple(f"{address}{size}/{name}" for address in ADDRESSES),
            known.get(f"{size}/{name}"),
            lengths.get(name),
        )
        for name in (*MODEL_FILES, *GPT2_FILES)
    ]
