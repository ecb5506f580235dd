"""OpenAI's GPT-2 files: their addresses, hashes and lengths, and their download."""

from pathlib import Path
from typing import TYPE_CHECKING

from numpy_gpt.config import GPTConfig
from numpy_gpt.errors import InputError
from numpy_gpt.io.files import disk_fix
from numpy_gpt.parameters import parameter_count
from numpy_gpt.tokenizer import GPT2_FILES
from numpy_gpt.weights.transfer import Remote, fetch

if TYPE_CHECKING:
    from numpy_gpt.console import Report

ADDRESSES = (
    "https://openaipublic.blob.core.windows.net/gpt-2/models/",  # OpenAI's
    "https://f001.backblazeb2.com/file/LLMs-from-scratch/gpt2/",  # the book's copy
)
"""Tried in this order for SIZE/FILE."""

DATA_FILE = "model.ckpt.data-00000-of-00001"

MODEL_FILES = ("hparams.json", "model.ckpt.index", DATA_FILE)
"""A size's own files; the vocabulary, GPT2_FILES, is the same for all sizes."""

SHA256 = {
    "124M/hparams.json": "d9d56e4121c427164e0c55c6f03c08e1daf9002b9b672825112d19097b680318",
    "124M/model.ckpt.index": "71916f763f9746f9b2a06b12d91996cf1084ae008d0424543d39391c5f2dc687",
    "124M/model.ckpt.data-00000-of-00001": "2060c885360cc0cf41d7a6dbc4d24b5127aae20260c8b5ae521b5a6578407118",
}
"""OpenAI published none; these are in public repositories. Those of the other sizes are unknown."""


def fetch_gpt2(size: str, folder: Path, report: "Report") -> None:
    """Download the five files of GPT-2 `size` ("124M", "355M", "774M" or "1558M") into `folder`.

    124M and the vocabulary are verified by SHA-256. For the other sizes, the data must have 4 bytes per parameter and
    the two small files the length that the server announces; import verifies their content by CRC-32C.

    Raises InputError, which names the file and what was wrong with each address or with the folder. The bytes received
    stay, and the next call resumes from them, even after Ctrl-C.
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
        report.line(f"stopped: the partial download stays in {folder}; run the same command to resume it")
        raise


def check_gpt2(size: str, folder: Path) -> None:
    """Raise InputError unless `folder` has the files of GPT-2 `size`, as far as they can be verified.

    Verifies them as fetch_gpt2 does, except that small files without a known SHA-256 need only be non-empty. The
    vocabulary may be missing.
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
            raise InputError(f"{path} {fault}: give a folder with all files of GPT-2 {size}, or omit --from")


def _files(size: str) -> list[Remote]:
    config = GPTConfig.gpt2(size, qkv_bias=True, tie_weights=True)
    known = SHA256 | {f"{size}/{name}": sha256 for name, sha256 in GPT2_FILES.items()}
    # the data file is just the parameters in float32: 497,759,232 bytes for 124M
    lengths = {DATA_FILE: 4 * parameter_count(config)}
    return [
        Remote(
            name,
            tuple(f"{address}{size}/{name}" for address in ADDRESSES),
            known.get(f"{size}/{name}"),
            lengths.get(name),
        )
        for name in (*MODEL_FILES, *GPT2_FILES)
    ]
