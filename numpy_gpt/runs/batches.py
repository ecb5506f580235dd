"""A run's text, its tokens, and the training and validation loaders."""

import hashlib
import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from numpy_gpt.data import Loader, Windows, sha256, sliding_windows, split_text
from numpy_gpt.encodings.vocabulary import CHARACTERS
from numpy_gpt.errors import InputError
from numpy_gpt.runs.settings import Settings
from numpy_gpt.runs.texts import in_words, load_texts, to_metadata
from numpy_gpt.tokenizer import (
    CHARS,
    ENCODINGS,
    encode,
    get_encoding,
    vocabulary_files,
    vocabulary_sha256,
)
from numpy_gpt.tokens.file import TokenFile
from numpy_gpt.tokens.folder import Track, open_tokens
from numpy_gpt.train import Learner, epoch_order
from numpy_gpt.typing import Array

if TYPE_CHECKING:
    import tiktoken

TRAIN_RATIO = 0.9
"""Share of the text's characters used for training, as in the book; the rest is for validation."""


class Batches:
    """A run's text or tokens, and its loaders.

    text: "" if the run learns tokens. about: what a checkpoint's metadata says of them. vocabulary: the files, by name,
    of an encoding without a built-in name.
    """

    def __init__(self, settings: Settings, track: Track = iter):
        """Read the text, or check the tokens. track: shows the progress of that.

        Raises InputError if they cannot be read, or if either part is too short for one window.
        """
        self.encoding: tiktoken.Encoding
        self.text = "" if settings.tokens is not None else load_texts(settings.text)
        if settings.encoding == CHARS:
            from numpy_gpt.encodings.characters import CharacterEncoding, characters_file  # loads tiktoken

            self.vocabulary = {CHARACTERS: characters_file([self.text])}
            self.encoding = CharacterEncoding(self.vocabulary[CHARACTERS], in_words(settings.text))
        else:
            self.encoding = get_encoding(settings.encoding)
            self.vocabulary = {} if settings.encoding in ENCODINGS else vocabulary_files(settings.encoding)
        self.vocabulary_sha256 = vocabulary_sha256(self.vocabulary) if self.vocabulary else None
        parts: Sequence[Array | TokenFile]
        if settings.tokens is None:
            name, content = in_words(settings.text), self.text.encode()
            self.about = {"text": to_metadata(settings.text), "text_sha256": sha256(self.text)}
            arrays = [encode(self.encoding, part) for part in split_text(self.text, TRAIN_RATIO)]
            parts, self.largest_id = arrays, max(int(ids.max(initial=-1)) for ids in arrays)
        else:
            tokens = open_tokens(Path(settings.tokens), settings.encoding, track)
            name, content = settings.tokens, tokens.sha256.encode()
            self.about = {"tokens": settings.tokens, "tokens_sha256": tokens.sha256}
            parts, self.largest_id = [tokens.train, tokens.val], tokens.largest_id
        self.sha256 = hashlib.sha256(b"\0".join([content, *self.vocabulary.values()])).hexdigest()
        self.tokens = sum(len(part) for part in parts)
        T, stride = settings.context_length, settings.stride or settings.context_length
        windows: list[tuple[Windows, Windows]] = []
        for use, part in zip(("training", "validation"), parts, strict=True):
            try:
                windows.append(
                    part.windows(T, stride) if isinstance(part, TokenFile) else sliding_windows(part, T, stride)
                )
            except InputError as error:
                raise InputError(f"the {use} part of {name}: {error}") from error
        self._train, self._val = windows
        self._batch_size = settings.batch_size
        self.windows = self._train[0].shape[0]
        self.batches_per_epoch = len(Loader(*self._train, settings.batch_size, drop_last=True))
        self.train_tokens = self.batches_per_epoch * settings.batch_size * T
        self.val_tokens = math.prod(self._val[0].shape)

    def loaders(self, learner: Learner) -> tuple[Loader, Loader]:
        """The training (shuffled, last batch dropped) and validation (neither) loaders, on the learner's stream."""
        train = Loader(*self._train, self._batch_size, drop_last=True, begin_epoch=partial(epoch_order, learner))
        val = Loader(*self._val, self._batch_size, drop_last=False, begin_epoch=learner.file_order)
        return train, val
