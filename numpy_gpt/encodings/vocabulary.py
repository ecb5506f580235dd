"""A vocabulary in GPT-2's format: its files, and the check that they fit together.

encoder.json maps every token to its id, vocab.bpe lists the merges in their order. A vocabulary with more has a third
file, tokens.json: the tokens that were added to it, and whether a text gets a leading space.
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
"""The files of a vocabulary; the third one only where there is something to say in it."""

GPT2_FILES = {
    MERGES: "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
    IDS: "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
}
"""GPT-2's vocabulary: the SHA-256 that tiktoken checks too."""


@dataclass(frozen=True)
class AddedToken:
    """A token that is found in a text before the rest is cut and merged, as transformers does it.

    lstrip, rstrip: it takes the white space before it, after it, along. normalized: it is looked for only in what the
    tokens that are not normalized leave over. special: transformers can leave it out of a decoded text.
    """

    content: str
    id: int
    lstrip: bool = False
    rstrip: bool = False
    normalized: bool = False
    special: bool = True


@dataclass(frozen=True)
class Extras:
    """What tokens.json holds: the added tokens, the one that ends a text, and whether a text gets a leading space."""

    added: tuple[AddedToken, ...] = ()
    end: str | None = None
    add_prefix_space: bool = False

    def to_json(self) -> bytes:
        return json.dumps(asdict(self), indent=1).encode()


def usual_extras(ids: Mapping[str, int]) -> Extras:
    """What a vocabulary without tokens.json has: <|endoftext|>, if it is in encoder.json."""
    if END_OF_TEXT not in ids:
        return Extras()
    return Extras((AddedToken(END_OF_TEXT, ids[END_OF_TEXT]),), END_OF_TEXT)


def parse_extras(files: Mapping[str, bytes], ids: Mapping[str, int]) -> Extras:
    """tokens.json, or what stands for it. Raises KeyError, TypeError or ValueError where it is damaged."""
    if TOKENS not in files:
        return usual_extras(ids)
    values = parse_json(files[TOKENS], max(SMALL, VOCABULARY_TIMES * len(files[TOKENS])))
    added = tuple(AddedToken(**each) for each in values["added"])
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
    """The id of the token that ends a text, in a vocabulary's files."""
    extras = parse_extras(files, parse_ids(files[IDS]))
    return next((token.id for token in extras.added if token.content == extras.end), None)


class Vocabulary(NamedTuple):
    """A vocabulary whose files fit together, as tiktoken takes it."""

    ranks: dict[bytes, int]  # bytes -> id of every token that merging makes
    extras: Extras
    least_size: int  # the ids that encoder.json knows: a model may lack added tokens beyond, which few texts hold


def read_vocabulary(files: Mapping[str, bytes], where: str) -> Vocabulary:
    """The vocabulary in its files, which are found `where`.

    Raises InputError if they are damaged, do not fit together, or are ones that tiktoken would merge differently.
    """
    try:
        ids, merges = parse_ids(files[IDS]), parse_merges(files[MERGES])
        extras = parse_extras(files, ids)
        ranks = _ranks(ids, merges, extras)
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise InputError(f"the vocabulary in {where} is damaged or not in GPT-2's format ({brief(error)})") from error
    except _UnfitError as error:
        raise InputError(f"the vocabulary in {where} {error!s:.500}") from error
    if hashlib.sha256(files[MERGES]).hexdigest() != GPT2_FILES[MERGES]:  # a second of work, known to find nothing there
        _check_merging(merges, where)
    return Vocabulary(ranks, extras, max(ids.values()) + 1)


GONE = -1
"""In `_merged`: a token that has become part of the one before it."""


class _UnfitError(Exception):
    """Why the files of a vocabulary do not fit together."""


def parse_ids(encoder: bytes) -> dict[str, int]:
    """Token -> id of an encoder.json. Raises ValueError or TypeError if an id is not a whole number or is not JSON."""
    ids = parse_json(encoder, max(SMALL, VOCABULARY_TIMES * len(encoder)))
    if not isinstance(ids, dict):
        raise TypeError(f"{IDS} holds no JSON object")
    if wrong := next((token for token, number in ids.items() if type(number) is not int), None):
        raise TypeError(f"the id of {wrong!r} is {ids[wrong]!r}")
    return ids


def parse_merges(bpe: bytes) -> list[tuple[str, str]]:
    """The merges of a vocab.bpe, in their order. Raises ValueError for a line that is not two tokens."""
    lines = [
        line for line in bpe.decode().replace("\r\n", "\n").split("\n") if line and not line.startswith("#version")
    ]
    pairs = [tuple(line.split(" ")) for line in lines]
    if wrong := next((line for line, pair in zip(lines, pairs, strict=True) if len(pair) != 2), None):
        raise ValueError(f"{wrong!r} is not two tokens")
    return pairs  # type: ignore[return-value]  # all of two


def _ranks(ids: Mapping[str, int], merges: list[tuple[str, str]], extras: Extras) -> dict[bytes, int]:
    """Bytes -> id of all tokens that merging makes. Raises _UnfitError, or KeyError for a letter that is no byte."""
    letters = _byte_of_letter()
    if missing := [letter for letter in letters if letter not in ids]:
        raise _UnfitError(
            f"is damaged, or not of bytes as GPT-2's is: {IDS} has no token for {len(missing)} of the 256"
        )
    added = {token.content: token.id for token in extras.added}
    made = [*letters, *(first + second for first, second in merges)]
    if unknown := next((token for token in made if token not in ids), None):
        raise _UnfitError(f"is damaged: its {IDS} and {MERGES} do not fit together ({unknown!r} has no id)")
    explained = added.keys() | set(made)
    if stray := next((token for token in ids if token not in explained), None):
        raise _UnfitError(
            f"has a token {stray!r} (id {ids[stray]}) in {IDS} that no line of {MERGES} makes: it is damaged, or the "
            "token was added and has to be named in added_tokens.json, tokenizer.json or special_tokens_map.json"
        )
    all_ids = {**ids, **added}
    if sorted(all_ids.values()) != list(range(len(all_ids))) or any(ids.get(t, i) != i for t, i in added.items()):
        raise _UnfitError(f"is damaged: its ids are not 0 to {len(all_ids) - 1}, each once")
    by_merge = [ids[token] for token in made[len(letters) :]]
    if len(set(by_merge)) < len(by_merge):
        twice = Counter(made).most_common(1)[0][0]
        raise _UnfitError(f"has several merges that make one token, {twice!r}, in {MERGES}: it cannot be used here")
    if by_merge != sorted(by_merge):
        raise _UnfitError(
            f"is damaged: its {IDS} and {MERGES} do not fit together (they differ in the order of the merges)"
        )
    return {bytes(letters[letter] for letter in token): ids[token] for token in made}


def _check_merging(merges: list[tuple[str, str]], where: str) -> None:
    """Raise InputError unless tiktoken merges every text as GPT-2 does.

    tiktoken merges two neighbours if together they are a token, the one with the lowest id first; GPT-2 only if they
    are a pair of the list, the earliest first. The two are the same if every token comes of its own bytes in GPT-2's
    way, its parts before it: where tiktoken would merge another pair to a token, that token's bytes would lie as they
    do when they are merged alone, and there it is the pair of the list that is left at the end.
    """
    numbers = {**_byte_of_letter()}  # of each token; the later it is made, the larger
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
        f"the vocabulary in {where} cannot be used here: its {MERGES} does not make the token {token!r:.80} of its own "
        "bytes, and tiktoken would"
    )


def _merged(tokens: list[int], pairs: Mapping[tuple[int, int], int]) -> list[int]:
    """What is left of tokens when the earliest pair is merged, of several the leftmost, as long as there is one.

    pairs: two tokens -> the one that they make, whose number is the larger the later. Takes n log n steps: a token may
    be as long as the file.
    """
    tokens, end = tokens.copy(), len(tokens)
    before, after = list(range(-1, end - 1)), list(range(1, end + 1))
    waiting = [(pairs[pair], at) for at, pair in enumerate(pairwise(tokens)) if pair in pairs]
    heapify(waiting)
    while waiting:
        made, at = heappop(waiting)
        behind = after[at]
        if behind == end or pairs.get((tokens[at], tokens[behind])) != made:
            continue  # one of the two has been merged since
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
    """How GPT-2 writes bytes: one that is a visible character of Latin-1 as that, the others as U+0100 and on."""
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [octet for octet in range(256) if octet not in visible]
    return {chr(octet): octet for octet in visible} | {chr(256 + k): octet for k, octet in enumerate(others)}
