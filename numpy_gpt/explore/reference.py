"""PyTorch's values and gradients of the same pass, in a process of its own: numpy_gpt does not import torch."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

from numpy_gpt.errors import InputError
from numpy_gpt.explore.payload import Page
from numpy_gpt.typing import Params


def torch_is_here() -> bool:
    """Whether PyTorch and torch_gpt are installed."""
    return find_spec("torch") is not None and find_spec("torch_gpt") is not None


Stamp = tuple[int, int, int]


def stamp_of(file: Path) -> Stamp:
    """What changes when another file takes this one's place, or other content its own."""
    found = file.stat()
    return found.st_ino, found.st_size, found.st_mtime_ns


def torch_arrays(checkpoint: Path, stamp: Stamp, page: Page, check_cancelled: Callable[[], None]) -> dict[str, Params]:
    """group -> name -> array of `torch-gpt explore`, which reads the checkpoint's file again.

    check_cancelled is called now and then; it raises to cancel. Raises InputError if PyTorch fails, and if the file
    no longer has this stamp: a run in training has saved other weights.
    """
    from safetensors.numpy import load

    command = [
        sys.executable,
        "-P",
        "-m",
        "torch_gpt",
        "explore",
        str(checkpoint),
        "--parent",
        str(os.getpid()),
        "--debug",
    ]
    ids = json.dumps([page.ids.tokens.tolist(), page.ids.targets.tolist()]).encode()
    with subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,  # a Ctrl-C is for this process, which ends the other
    ) as process:
        try:
            sending: bytes | None = ids
            while True:
                check_cancelled()
                try:
                    answer, said = process.communicate(sending, 0.1)
                    break
                except subprocess.TimeoutExpired:
                    sending = None  # communicate keeps what is left to send
        finally:
            process.kill()
    if not checkpoint.is_file() or stamp_of(checkpoint) != stamp:
        raise InputError(f"{checkpoint} has changed since the page was opened: start numpy-gpt explore again")
    if process.returncode:
        lines = said.decode(errors="replace").split("\n")
        why = next((line for line in reversed(lines) if line.strip()), f"exit code {process.returncode}")
        raise InputError(f"PyTorch could not run this pass: {why.strip():.300}")
    found: dict[str, Params] = {}
    for key, array in load(answer).items():
        group, _, name = key.partition("/")
        found.setdefault(group, {})[name] = array
    return found
