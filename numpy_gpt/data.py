"""Text -> sliding windows of token ids -> batches, as the book's data loaders make them."""

import codecs
import hashlib
import io
import math
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import BinaryIO, Protocol, TypeAlias

import numpy as np

from numpy_gpt.encodings.vocabulary import END_OF_TEXT
from numpy_gpt.errors import InputError
from numpy_gpt.io.finding import data_folder_file, find, temporary_files
from numpy_gpt.io.paths import kind_of, refusal
from numpy_gpt.random.keyed_order import KeyedOrder
from numpy_gpt.typing import Array

CORPORA = ("python-manual", "the-verdict")
"""The names of load_text's corpora."""

BLOCK = 2**20
"""Bytes of a file read at a time; a NUL in them, the mark of a binary file, ends the reading."""

LONGEST_PIPE = 2**30
"""The most bytes read from a pipe, which may never end."""

VERDICT_SHA256 = "b41e41a68f0398a3154ae69e2e4c0e2694e17fe0d66730536837f1b01935b31f"
VERDICT_URL = "https://raw.githubusercontent.com/rasbt/LLMs-from-scratch/main/ch02/01_main-chapter-code/the-verdict.txt"


def load_text(name_or_path: str) -> str:
    """The named corpus, or else the UTF-8 text of the file, FIFO or /dev/stdin at that path.

    All newlines become "\\n", as when Python reads text.

    "python-manual": the language reference inside every Python, close to half a million characters; the text differs
    between releases, patch releases included. "the-verdict": the book's story (20,479 characters), from
    $NUMPY_GPT_DATA, else the user's cache, else downloaded into that cache once. To read a file named like a corpus,
    put ./ before its name.

    Raises InputError for a path that is not a file or pipe, a file without text, and a story that cannot be found.
    """
    if name_or_path == "python-manual":
        from pydoc_data.topics import topics

        return "\n".join(topics[topic] for topic in sorted(topics))
    if name_or_path == "the-verdict":
        return the_verdict("choose the text python-manual")
    if kind_of(name_or_path) == "missing":
        raise InputError(
            f"{name_or_path!r} is neither a known text nor a file: "
            f"choose {' or '.join(CORPORA)}, or give the path of a file of UTF-8 text"
        )
    return read_text(name_or_path)


def read_text(path: str) -> str:
    """The UTF-8 text of the file, FIFO or /dev/stdin at path; raises InputError as load_text does."""
    return "".join(text_blocks(path))


def text_blocks(path: str) -> Iterator[str]:
    """The text of read_text, about a mebibyte at a time."""
    return _decoded(_blocks(path), path)


def decode_text(raw: bytes, name: str) -> str:
    """The UTF-8 text in these bytes, all newlines as "\\n". Raises InputError, naming them, if they are no text."""
    return "".join(_decoded([raw], name))


def _decoded(blocks: Iterable[bytes], name: str) -> Iterator[str]:
    """The text in the blocks. Raises InputError, naming it, if they have none."""
    decoder = io.IncrementalNewlineDecoder(codecs.getincrementaldecoder("utf-8")(), translate=True)
    read = 0
    for raw in chain(blocks, [b""]):
        read += len(raw)
        try:
            text = decoder.decode(raw, final=not raw)
        except UnicodeDecodeError as error:
            offset = read - len(error.object) + error.start  # the object begins with the bytes of a cut character
            raise InputError(
                f"{name} is not UTF-8 text (byte {error.object[error.start]:#04x} at offset {offset}): "
                "convert it to UTF-8"
            ) from error
        if b"\0" in raw:
            raise InputError(f"{name} is binary (it contains NUL bytes): give plain UTF-8 text")
        yield text
    if not read:
        raise InputError(f"{name} is empty: give a text")


@contextmanager
def rereadable(name_or_path: str) -> Iterator[str]:
    """A name from which load_text can read the text repeatedly: a pipe's text is put into a temporary file."""
    if name_or_path in CORPORA or kind_of(name_or_path) != "pipe":
        yield name_or_path
        return
    with temporary_files("the text read from a pipe", {"text.txt": load_text(name_or_path).encode()}) as folder:
        yield str(folder / "text.txt")


def _blocks(path: str) -> Iterator[bytes]:
    """The bytes of a file or, once, of a pipe, BLOCK at a time; of a binary file possibly only the beginning."""
    kind = kind_of(path)
    if kind == "missing":
        raise InputError(f"{path} does not exist: give the path of a file of UTF-8 text")
    if kind == "folder":
        raise InputError(f"{path} is a folder: give one file of UTF-8 text")
    if kind == "other":
        raise InputError(f"{path} is a device: give a file or a pipe of UTF-8 text")
    try:
        with open(path, "rb") as file:
            yield from _open_blocks(file, path, os.fstat(file.fileno()).st_size)
    except OSError as error:
        raise InputError(refusal(path, error)) from error


def read_open(file: BinaryIO, name: str) -> bytes:
    """The bytes of an open file of unknown size, of which a binary one may be cut short."""
    return b"".join(_open_blocks(file, name, 0))


def _open_blocks(file: BinaryIO, name: str, size: int) -> Iterator[bytes]:
    """The bytes of an open file, up to a block with a NUL in it. size 0: unknown, as of pipes and in /proc."""
    left = size or LONGEST_PIPE  # it may grow without end
    while raw := file.read(min(BLOCK, left)):
        left -= len(raw)
        yield raw
        if b"\0" in raw:
            return
    if not size and not left and file.read(1):
        raise InputError(f"{name} gives more than {LONGEST_PIPE:,} bytes: save them as a file, or send fewer")


def sha256(text: str) -> str:
    """The checksum that identifies a text."""
    return hashlib.sha256(text.encode()).hexdigest()


def split_text(text: str, ratio: float = 0.9) -> tuple[str, str]:
    """(training text, validation text): the first int(ratio * characters), as in the book, and the rest.

    Where that would cut through an <|endoftext|>, the split is before it. Raises InputError unless 0 <= ratio <= 1.
    """
    if not 0 <= ratio <= 1:
        raise InputError(f"the training share of the text must be from 0 to 1, not {ratio!r}")
    split = before_separator(text, int(ratio * len(text)))
    return text[:split], text[split:]


def before_separator(text: str, place: int) -> int:
    """The place in the text, or if it lies inside an <|endoftext|>, the beginning of that."""
    n = len(END_OF_TEXT)
    start = text.rfind(END_OF_TEXT, max(0, place - n + 1), place + n - 1)
    return place if start < 0 else start


def sliding_windows(ids: Array, max_length: int, stride: int) -> tuple[Array, Array]:
    """Windows of max_length (T) tokens, one every `stride` tokens, and the same windows one token later.

    ids (n,) -> inputs (N, T), targets (N, T) int64: inputs[k] = ids[k*stride :][:T], targets[k] starts one id later,
    and N = ceil((n - T) / stride): as in the book's GPTDatasetV1, a window needs its last target too. Both are
    read-only views of ids: with stride 1, copies would take 2 T times its memory.

    Raises InputError like window_count.
    """
    window_count(len(ids), max_length, stride)
    ids = np.asarray(ids, dtype=np.int64)
    windows = np.lib.stride_tricks.sliding_window_view(ids, max_length + 1)[::stride]  # (N, T + 1)
    return windows[:, :-1], windows[:, 1:]


def window_count(tokens: int, max_length: int, stride: int) -> int:
    """The number of windows of max_length (T) tokens, one every `stride` tokens: ceil((tokens - T) / stride).

    Raises InputError if max_length or stride is below 1, or there are too few tokens for one window.
    """
    for name, value in (("max_length", max_length), ("stride", stride)):
        if value < 1:
            raise InputError(f"{name} must be at least 1, not {value}")
    if tokens <= max_length:
        raise InputError(
            f"the text is too short: it has {tokens} tokens, and one window takes {max_length + 1} "
            f"(a context of {max_length} and the next token): choose a shorter --context-length or a longer text"
        )
    return -(-(tokens - max_length) // stride)


Order: TypeAlias = Array | KeyedOrder
"""The order of an epoch's windows: a permutation of their numbers, whose slices are arrays."""


class Windows(Protocol):
    """Windows of token ids, (N, T): an array, or rows that are read from a file when they are used."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    def __getitem__(self, rows: Array, /) -> Array:
        """The windows with these numbers: int64 (B, T), a copy."""


def file_order(windows: int) -> None:
    """The begin_epoch of a Loader that does not shuffle."""


class Loader:
    """Batches of windows, epoch after epoch, like torch's DataLoader in the book.

    inputs, targets (N, T). drop_last omits a last batch with fewer than batch_size (B) windows. begin_epoch is
    called with N at the start of each iteration and returns the order of the windows, (N,) ints, or None for file
    order. It is the only source of randomness, so any generator can drive it.

    len(loader) is the number of batches in an epoch, loader.tokens the number of tokens in them, loader.windows is N.

    Raises InputError if batch_size is below 1, or if an epoch would have no batch.
    """

    def __init__(
        self,
        inputs: Windows,
        targets: Windows,
        batch_size: int,
        drop_last: bool,
        begin_epoch: Callable[[int], Order | None] = file_order,
    ) -> None:
        if inputs.shape != targets.shape:
            raise ValueError(f"Loader: inputs are {inputs.shape}, targets {targets.shape}; their shapes must be equal")
        if batch_size < 1:
            raise InputError(f"batch_size must be at least 1, not {batch_size}")
        windows, T = inputs.shape
        self.windows = windows
        self.inputs = inputs
        self.targets = targets
        self.batch_size = batch_size
        self.begin_epoch = begin_epoch
        used: int = windows - windows % batch_size if drop_last else windows
        if used == 0:
            raise InputError(
                f"the text gives no batch: it has {windows} windows, and a batch takes {batch_size}: "
                "choose a smaller --batch-size, a shorter --context-length or a longer text"
            )
        self.tokens = used * T
        self._used = used

    def __len__(self) -> int:
        return -(-self._used // self.batch_size)

    def __iter__(self) -> Iterator[tuple[Array, Array]]:
        """One epoch of (x (B, T), y (B, T)), int64 copies. begin_epoch is called immediately."""
        return self.batches(self.begin_epoch(self.windows))

    def batches(self, order: Order | None, start: int = 0) -> Iterator[tuple[Array, Array]]:
        """The epoch in this order (None: file order), from batch number `start` on.

        A run that saves the order and the number of batches used can resume from them.
        Raises InputError if the order does not fit the number of windows, or the epoch has no batch number `start`.
        """
        windows = self.windows
        fits = order is None or order.shape == (windows,)
        if isinstance(order, np.ndarray):
            fits = fits and not ((order < 0) | (order >= windows)).any()
        if not fits or not 0 <= start <= len(self):
            raise InputError(
                f"batch {start} of an order of {windows if order is None else math.prod(order.shape)} windows does not "
                f"fit this text, which has {windows} windows in {len(self)} batches: resume with the text, context and "
                "batch size that the run began with"
            )
        chosen = (slice(i, min(i + self.batch_size, self._used)) for i in range(0, self._used, self.batch_size)[start:])
        rows = (np.arange(at.start, at.stop) if order is None else order[at] for at in chosen)
        return ((self.inputs[batch], self.targets[batch]) for batch in rows)


def the_verdict(otherwise: str) -> str:
    """The book's story, as load_text finds it; `otherwise` ends the InputError's message if it cannot be found."""
    import pooch  # type: ignore[import-untyped]  # here, so that `import numpy_gpt` stays light

    cached = Path(pooch.os_cache("numpy-gpt"), "the-verdict.txt")
    content = find(
        "the-verdict.txt",
        VERDICT_SHA256,
        [data_folder_file("the-verdict.txt"), cached],
        VERDICT_URL,
        cached,
        f"connect to the network once, put the file into $NUMPY_GPT_DATA, or {otherwise}",
    )
    return content.decode("utf-8")
