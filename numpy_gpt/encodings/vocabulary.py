"""A vocabulary in GPT-2's format: its files, and the check that they are consistent.

encoder.json maps every token to its id; vocab.bpe lists the merges in order. A vocabulary with extras has a third
file, tokens.json: the added tokens, and whether a text gets a leading space.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from functools import cache
from heapq import heapify, heappop, heappush
from itertools import pairwise
from typing import NamedTuple

from numpy_gpt.errors import InputError, brief
from numpy_gpt.io.bounded_json import SMALL, VOCABULARY_TIMES, parse_json

END_OF_TEXT = "<|endoftext|>"

IDS, MERGES, TOKENS = "encoder.json", "vocab.bpe", "tokens.json"
"""The files of a vocabulary; the third is optional."""

ONE_CHARACTER = r"(?s:.)"
"""The pattern that splits a text into pieces of one character, for encodings without merges of characters."""

CHARACTERS = "characters.json"
"""The only file of a vocabulary of characters, see encodings/characters.py."""

GPT2_FILES = {
    MERGES: "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
    IDS: "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
}
"""GPT-2's vocabulary: file -> SHA-256, the same that tiktoken checks."""


@dataclass(frozen=True)
class AddedToken:
    """A token recognised in a text before the rest is split and merged, as in transformers.

    lstrip, rstrip: it absorbs the white space before it, after it. normalized: it is searched for only in the text left
    by the tokens that are not normalized. special: transformers can omit it from a decoded text.
    """

    content: str
    id: int
    lstrip: bool = False
    rstrip: bool = False
    normalized: bool = False
    special: bool = True


@dataclass(frozen=True)
class Extras:
    """The content of tokens.json: the added tokens, the end-of-text token, and whether a text gets a leading space."""

    added: tuple[AddedToken, ...] = ()
    end: str | None = None
    add_prefix_space: bool = False

    def to_json(self) -> bytes:
        return json.dumps(asdict(self), indent=1).encode()


def usual_extras(ids: Mapping[str, int]) -> Extras:
    """The extras of a vocabulary without tokens.json: <|endoftext|>, if it is in encoder.json."""
    if END_OF_TEXT not in ids:
        return Extras()
    return Extras((AddedToken(END_OF_TEXT, ids[END_OF_TEXT]),), END_OF_TEXT)


def parse_extras(files: Mapping[str, bytes], ids: Mapping[str, int]) -> Extras:
    """Parse tokens.json, or infer the extras without it. Raises KeyError, TypeError or ValueError if it is damaged."""
    if TOKENS not in files:
        return usual_extras(ids)
    values = parse_json(files[TOKENS], max(SMALL, VOCABULARY_TIMES * len(files[TOKENS])))
    added = tuple(AddedToken(**entry) for entry in values["added"])
    for token in added:
        _check_types(token, {"content": str, "id": int}, bool)
        if not token.content or token.id < 0:
            raise ValueError(f"{token} is not a token")
        token.content.encode()  # a lone surrogate has no bytes
    extras = Extras(added, values["end"], values["add_prefix_space"])
    if type(extras.add_prefix_space) is not bool or extras.end not in {None, *(token.content for token in added)}:
        raise ValueError(f"add_prefix_space {extras.add_prefix_space!r}, end {extras.end!r}")
    return extras


def _check_types(token: AddedToken, types: Mapping[str, type], otherwise: type) -> None:
    for field in fields(token):
        value = getattr(token, field.name)
        if type(value) is not types.get(field.name, otherwise):
            raise TypeError(f"{field.name} is {value!r}")


def end_of(files: Mapping[str, bytes]) -> int | None:
    """The id of a vocabulary's end-of-text token, or None."""
    extras = parse_extras(files, parse_ids(files[IDS]))
    return next((token.id for token in extras.added if token.content == extras.end), None)


class Vocabulary(NamedTuple):
    """A consistent vocabulary in the form that tiktoken takes."""

    ranks: dict[bytes, int]  # bytes -> id of every token that merging can produce
    extras: Extras
    least_size: int  # the number of ids in encoder.json; a model may lack further added tokens, which few texts use


def read_vocabulary(files: Mapping[str, bytes], where: str) -> Vocabulary:
    """Read a vocabulary from its files, found in `where`.

    Raises InputError if they are damaged or inconsistent, or if tiktoken would merge differently.
    """
    try:
        ids, merges = parse_ids(files[IDS]), parse_merges(files[MERGES])
        extras = parse_extras(files, ids)
        ranks = _ranks(ids, merges, extras)
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise InputError(f"the vocabulary in {where} is damaged or not in GPT-2's format ({brief(error)})") from error
    except _UnfitError as error:
        raise InputError(f"the vocabulary in {where} {error!s:.500}") from error
    if hashlib.sha256(files[MERGES]).hexdigest() != GPT2_FILES[MERGES]:  # GPT-2's own is known to pass: saves a second
        _check_merging(merges, where)
    return Vocabulary(ranks, extras, max(ids.values()) + 1)


GONE = -1
"""In `_merged`: a token merged into the one before it."""


class _UnfitError(Exception):
    """Why the files of a vocabulary are inconsistent."""


def parse_ids(encoder: bytes) -> dict[str, int]:
    """Token -> id of an encoder.json. Raises ValueError or TypeError if it is not JSON or an id is not an integer."""
    ids = parse_json(encoder, max(SMALL, VOCABULARY_TIMES * len(encoder)))
    if not isinstance(ids, dict):
        raise TypeError(f"{IDS} is not a JSON object")
    if wrong := next((token for token, number in ids.items() if type(number) is not int), None):
        raise TypeError(f"the id of {wrong!r} is {ids[wrong]!r}")
    return ids


def parse_merges(bpe: bytes) -> list[tuple[str, str]]:
    """The merges of a vocab.bpe, in order. Raises ValueError for a line that is not two tokens."""
    lines = [
        line for line in bpe.decode().replace("\r\n", "\n").split("\n") if line and not line.startswith("#version")
    ]
    pairs = [tuple(line.split(" ")) for line in lines]
    if wrong := next((line for line, pair in zip(lines, pairs, strict=True) if len(pair) != 2), None):
        raise ValueError(f"{wrong!r} is not two tokens")
    return pairs  # type: ignore[return-value]  # all have length 2


def _ranks(ids: Mapping[str, int], merges: list[tuple[str, str]], extras: Extras) -> dict[bytes, int]:
    """Bytes -> id of all tokens that merging can produce. Raises _UnfitError, or KeyError for an unknown letter."""
    letters = _byte_of_letter()
    if missing := [letter for letter in letters if letter not in ids]:
        raise _UnfitError(
            f"is damaged, or not byte-level like GPT-2's: {IDS} has no token for {len(missing)} of the 256 bytes"
        )
    added = {token.content: token.id for token in extras.added}
    made = [*letters, *(first + second for first, second in merges)]
    if unknown := next((token for token in made if token not in ids), None):
        raise _UnfitError(f"is damaged: its {IDS} and {MERGES} do not match ({unknown!r} has no id)")
    explained = added.keys() | set(made)
    if stray := next((token for token in ids if token not in explained), None):
        raise _UnfitError(
            f"has a token {stray!r} (id {ids[stray]}) in {IDS} that no line of {MERGES} makes: it is damaged, or the "
            "token was added and must be named in added_tokens.json, tokenizer.json or special_tokens_map.json"
        )
    all_ids = {**ids, **added}
    if sorted(all_ids.values()) != list(range(len(all_ids))) or any(ids.get(t, i) != i for t, i in added.items()):
        raise _UnfitError(f"is damaged: its ids are not 0 to {len(all_ids) - 1}, each once")
    by_merge = [ids[token] for token in made[len(letters) :]]
    if len(set(by_merge)) < len(by_merge):
        twice = Counter(made).most_common(1)[0][0]
        raise _UnfitError(f"has several merges for one token, {twice!r}, in {MERGES}: it cannot be used here")
    if by_merge != sorted(by_merge):
        raise _UnfitError(f"is damaged: its {IDS} and {MERGES} do not match (they differ in the order of the merges)")
    return {bytes(letters[letter] for letter in token): ids[token] for token in made}


def _check_merging(merges: list[tuple[str, str]], where: str) -> None:
    """Raise InputError unless tiktoken merges every text as GPT-2 does.

    tiktoken merges two neighbours if together they form a token, the lowest id first; GPT-2 only if they are a listed
    pair, the earliest first. The two agree if GPT-2's rule makes every token from its own bytes, its parts being listed
    before it. For if tiktoken merged another pair into a token, that token's bytes would have been merged as they are
    on their own, which ends with the listed pair.
    """
    numbers = {**_byte_of_letter()}  # token -> number, larger for later merges
    pairs: dict[tuple[int, int], int] = {}
    for first, second in merges:
        if first not in numbers or second not in numbers:
            raise _unlike(first + second, where)
        numbers[first + second] = pairs[numbers[first], numbers[second]] = len(numbers)
    for first, second in merges:
        token = first + second
        if _merged([numbers[letter] for letter in token], pairs) != [numbers[token]]:
            raise _unlike(token, where)


def _unlike(token: str, where: str) -> InputError:
    return InputError(
        f"the vocabulary in {where} cannot be used here: its {MERGES} does not make the token {token!r:.80} from its "
        "own bytes, but tiktoken would"
    )


def _merged(tokens: list[int], pairs: Mapping[tuple[int, int], int]) -> list[int]:
    """The tokens after repeatedly merging the earliest listed pair, the leftmost of equals, until none is left.

    pairs: two tokens -> their merge, numbered in order of the merges. Takes n log n steps: a token may be as long as
    the file.
    """
    tokens, end = tokens.copy(), len(tokens)
    before, after = list(range(-1, end - 1)), list(range(1, end + 1))
    waiting = [(pairs[pair], at) for at, pair in enumerate(pairwise(tokens)) if pair in pairs]
    heapify(waiting)
    while waiting:
        made, at = heappop(waiting)
        behind = after[at]
        if behind == end or pairs.get((tokens[at], tokens[behind])) != made:
            continue  # stale: one of the two was merged since
        tokens[at], tokens[behind] = made, GONE
        after[at] = after[behind]
        if after[at] < end:
            before[after[at]] = at
        for left in (before[at], at):
            if left >= 0 and after[left] < end and (pair := (tokens[left], tokens[after[left]])) in pairs:
                heappush(waiting, (pairs[pair], left))
    return [token for token in tokens if token != GONE]


@cache
def _byte_of_letter() -> dict[str, int]:
    """Letter -> byte of GPT-2's byte encoding: visible Latin-1 characters as themselves, the others from U+0100."""
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [octet for octet in range(256) if octet not in visible]
    return {chr(octet): octet for octet in visible} | {chr(256 + k): octet for k, octet in enumerate(others)}
