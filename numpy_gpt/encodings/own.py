"""The encoding of a vocabulary in a folder: tiktoken's, with the added tokens and the leading space of transformers."""

import re
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any

import tiktoken

from numpy_gpt.encodings.vocabulary import AddedToken, Vocabulary, read_vocabulary

PIECES = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
"""GPT-2's pattern for splitting a text before merging; merges never cross pieces (encoder.py of its release)."""

WHITE_SPACE = frozenset("\t\n\v\f\r \x85\xa0\u1680\u2028\u2029\u202f\u205f\u3000").union(
    map(chr, range(0x2000, 0x200B))
)
"""Unicode's White_Space, which added tokens strip; str.isspace accepts four more."""


def own_encoding(files: Mapping[str, bytes], where: str) -> "OwnEncoding":
    """The encoding of a vocabulary's files, named `where`. Raises InputError as read_vocabulary does."""
    return _own_encoding(tuple(sorted(files.items())), where)


@lru_cache(maxsize=4)
def _own_encoding(files: tuple[tuple[str, bytes], ...], where: str) -> "OwnEncoding":
    return OwnEncoding(where, read_vocabulary(dict(files), where))


class OwnEncoding(tiktoken.Encoding):
    """tiktoken's encoding, with a search for added tokens first.

    end_id: the id of the end-of-text token, or None. least_vocab_size: the number of ids a model must know.
    added: the added tokens. add_prefix_space: whether a text gets a leading space.
    """

    def __init__(self, name: str, vocabulary: Vocabulary):
        ranks, extras, self.least_vocab_size = vocabulary
        made = set(ranks.values())
        special = {token.content: token.id for token in extras.added if token.id not in made}
        super().__init__(name, pat_str=PIECES, mergeable_ranks=ranks, special_tokens=special)
        self.end_id = next((token.id for token in extras.added if token.content == extras.end), None)
        self.added, self.add_prefix_space = extras.added, extras.add_prefix_space
        self._prefix = " " if extras.add_prefix_space else ""
        groups = [[token for token in extras.added if token.normalized == late] for late in (False, True)]
        self._searches = [_Search(group) for group in groups if group]

    def encode(self, text: str, **special: Any) -> list[int]:
        """The ids of a text; with allowed_special="all", added tokens are recognised, else tiktoken decides."""
        if special.get("allowed_special") != "all":
            return super().encode(text, **special)
        parts: list[str | int] = [text] if text else []
        for search in self._searches:
            parts = [found for part in parts for found in (search.split(part) if isinstance(part, str) else [part])]
        ids: list[int] = []
        for part in parts:
            ids.extend([part] if isinstance(part, int) else self.encode_ordinary(part))
        return ids

    def encode_ordinary(self, text: str) -> list[int]:
        """The ids of a text, without recognising added tokens."""
        return super().encode_ordinary(text if text.startswith(" ") or not text else self._prefix + text)


class _Search:
    """Finds added tokens in a text, from left to right, the longest at each position."""

    def __init__(self, tokens: Sequence[AddedToken]):
        self._tokens: Mapping[str, AddedToken] = {token.content: token for token in tokens}
        longest_first = sorted(self._tokens, key=len, reverse=True)
        self._pattern = re.compile("|".join(map(re.escape, longest_first)))

    def split(self, text: str) -> Iterator[str | int]:
        """The text in order: the ids of the tokens found, and the text between them."""
        done = 0
        for match in self._pattern.finditer(text):
            token = self._tokens[match[0]]
            start, stop = match.span()
            while token.lstrip and start > done and text[start - 1] in WHITE_SPACE:
                start -= 1
            while token.rstrip and stop < len(text) and text[stop] in WHITE_SPACE:
                stop += 1
            if start > done:
                yield text[done:start]
            yield token.id
            done = stop
        if done < len(text):
            yield text[done:]
