"""The encoding of a text's own characters: an id for each, in the order of their code points, as in nanoGPT."""

import json
from collections.abc import Iterable
from typing import Any

import tiktoken

from numpy_gpt.encodings.vocabulary import CHARACTERS, END_OF_TEXT, ONE_CHARACTER
from numpy_gpt.errors import InputError
from numpy_gpt.io.bounded_json import SMALL, VOCABULARY_TIMES, parse_json


def characters_file(texts: Iterable[str]) -> bytes:
    """characters.json for texts: a JSON list of their characters, then of <|endoftext|> if one of them has it."""
    characters, ends = set[str](), False
    for text in texts:
        characters.update(text.replace(END_OF_TEXT, ""))
        ends |= END_OF_TEXT in text
    return (json.dumps(sorted(characters) + [END_OF_TEXT] * ends, ensure_ascii=False) + "\n").encode()


class CharacterEncoding(tiktoken.Encoding):
    """One token for each character of a vocabulary, and for <|endoftext|> if it is in there."""

    def __init__(self, content: bytes, where: str):
        """content: the file's, in the folder `where`. Raises InputError if it is damaged."""
        try:
            tokens = parse_json(content, max(SMALL, VOCABULARY_TIMES * len(content)))
            characters = tokens[:-1] if tokens[-1] == END_OF_TEXT else tokens
            ranks = {character.encode(): i for i, character in enumerate(characters)}
            if len(ranks) != len(characters) or not all(len(character) == 1 for character in characters):
                raise ValueError("it is not a list of different characters")
            if not ranks:
                raise ValueError("it has no characters")
        except (ValueError, TypeError, AttributeError, LookupError, RecursionError) as error:
            raise InputError(f"{where} has no usable {CHARACTERS} ({error!s:.200}): restore it") from error
        special = {END_OF_TEXT: len(ranks)} if len(tokens) > len(ranks) else {}
        super().__init__("chars", pat_str=ONE_CHARACTER, mergeable_ranks=ranks, special_tokens=special)
        self._known = frozenset(characters)

    def encode(self, text: str, **special: Any) -> list[int]:
        """The ids of a text. Raises InputError naming a character that the vocabulary lacks."""
        others = text.replace(END_OF_TEXT, "") if self._special_tokens else text
        if unknown := set(others) - self._known:  # tiktoken would panic
            character = min(unknown)
            raise InputError(
                f"{character!r} (U+{ord(character):04X}) is not among the {len(self._known)} characters of this "
                "vocabulary, those of the text it was made from: leave it out, or choose another --encoding"
            )
        return super().encode(text, **special)
