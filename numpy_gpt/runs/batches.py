"""A run's text, its tokens, and the training and validation loaders."""

import hashlib
from functools import partial
from typing import TYPE_CHECKING

from numpy_gpt.data import Loader, sha256, sliding_windows, split_text
from numpy_gpt.encodings.vocabulary import CHARACTERS
from numpy_gpt.errors import InputError
from numpy_gpt.runs.settings import Settings
from numpy_gpt.runs.texts import in_words, load_texts
from numpy_gpt.tokenizer import (
    CHARS,
    ENCODINGS,
    encode,
    get_encoding,
    vocabulary_files,
    vocabulary_sha256,
)
from numpy_gpt.train import Learner, epoch_order

if TYPE_CHECKING:
    import tiktoken

TRAIN_RATIO = 0.9
"""Share of the text's characters used for training, as in the book; the rest is for validation."""


class Batches:
    """A run's text, tokens and loaders. vocabulary: the files, by name, of an encoding without a built-in name."""

    def __init__(self, settings: Settings):
        """Read the text. Raises InputError if it cannot be read, or if either part is too short for one window."""
        self.encoding: tiktoken.Encoding
        if settings.encoding == CHARS:
            from numpy_gpt.encodings.characters import CharacterEncoding, characters_file  # loads tiktoken

            self.text = load_texts(settings.text)
            self.vocabulary = {CHARACTERS: characters_file([self.text])}
            self.encoding = CharacterEncoding(self.vocabulary[CHARACTERS], in_words(settings.text))
        else:
            self.encoding = get_encoding(settings.encoding)
            self.text = load_texts(settings.text)
            self.vocabulary = {} if settings.encoding in ENCODINGS else vocabulary_files(settings.encoding)
        self.sha256 = hashlib.sha256(b"\0".join([self.text.encode(), *self.vocabulary.values()])).hexdigest()
        self.text_sha256 = sha256(self.text)
        self.vocabulary_sha256 = vocabulary_sha256(self.vocabulary) if self.vocabulary else None
        parts = [encode(self.encoding, part) for part in split_text(self.text, TRAIN_RATIO)]
        self.tokens = sum(len(part) for part in parts)
        T = settings.context_length
        windows = []
        for name, part in zip(("training", "validation"), parts, strict=True):
            try:
                windows.append(sliding_windows(part, T, settings.stride or T))
            except InputError as error:
                raise InputError(f"the {name} part of {in_words(settings.text)}: {error}") from error
        self._train, self._val = windows
        self._batch_size = settings.batch_size
        self.windows = len(self._train[0])
        self.batches_per_epoch = len(Loader(*self._train, settings.batch_size, drop_last=True))
        self.train_tokens = self.batches_per_epoch * settings.batch_size * T
        self.val_tokens = self._val[0].size

    def loaders(self, learner: Learner) -> tuple[Loader, Loader]:
        """The training (shuffled, last batch dropped) and validation (neither) loaders, on the learner's stream."""
        train = Loader(*self._train, self._batch_size, drop_last=True, begin_epoch=partial(epoch_order, learner))
        val = Loader(*self._val, self._batch_size, drop_last=False, begin_epoch=learner.file_order)
        return train, val
