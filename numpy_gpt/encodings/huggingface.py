"""Hugging Face's tokenizer files, read and written: vocab.json and merges.txt, tokenizer.json, and their settings.

The files either give the same tokens as in transformers or are refused: ignoring a setting could silently change the
tokens. Source of the rules: transformers' tokenization_gpt2.py, tokenization_utils_base.py and
tokenization_utils_tokenizers.py.
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from itertools import permutations
from pathlib import Path
from typing import Any, NamedTuple

from numpy_gpt.encodings.vocabulary import (
    END_OF_TEXT,
    IDS,
    MERGES,
    TOKENS,
    AddedToken,
    Extras,
    parse_extras,
    parse_ids,
    parse_merges,
    usual_extras,
)
from numpy_gpt.errors import InputError
from numpy_gpt.io.bounded_json import VOCABULARY_TIMES, read_json

VOCABULARY = {IDS: "vocab.json", MERGES: "merges.txt"}
"""OpenAI's names of the vocabulary's two files, also used here -> Hugging Face's."""

CONFIG, TOKENIZER, MAP, ADDED = (
    "tokenizer_config.json",
    "tokenizer.json",
    "special_tokens_map.json",
    "added_tokens.json",
)

REBUILT = (None, "GPT2Tokenizer", "GPT2TokenizerFast")
"""The classes that use only the vocabulary and the added tokens of a tokenizer.json."""

AS_WRITTEN = ("PreTrainedTokenizerFast", "TokenizersBackend")
"""The classes that use a tokenizer.json as written."""

NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")

FIXED: dict[str, tuple[Any, ...]] = {
    "tokenizer_class": (*REBUILT, *AS_WRITTEN),
    "add_prefix_space": (None, False, True),
    "add_bos_token": (None, False),
    "add_eos_token": (None, False),
    "split_special_tokens": (None, False),
    "auto_map": (None,),
    "fast_tokenizer_files": (None, [], [TOKENIZER]),
    "vocab": (None,),
    "merges": (None,),
}
"""Accepted values of the keys in tokenizer_config.json that affect the tokens."""

FIXED_MODEL: dict[str, tuple[Any, ...]] = {
    "type": (None, "BPE"),
    "dropout": (None, 0),
    "continuing_subword_prefix": (None, ""),
    "end_of_word_suffix": (None, ""),
}
"""Accepted values in the model of a tokenizer.json."""

STEPS: dict[str, tuple[str, str, tuple[Any, ...]]] = {
    "normalizer": ("normalizers", "", (None,)),
    "pre_tokenizer": ("pretokenizers", "use_regex", ({"type": "ByteLevel"}, {"type": "ByteLevel", "use_regex": True})),
    "post_processor": (
        "processors",
        "single",
        (
            None,
            {"type": "ByteLevel"},
            {"type": "TemplateProcessing", "single": [{"Sequence": {"id": "A", "type_id": 0}}]},  # adds nothing
        ),
    ),
    "decoder": ("decoders", "", (None, {"type": "ByteLevel"})),
}
"""Steps of a tokenizer.json -> the key of a sequence's parts, the key that matters besides type, accepted values."""

BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False}
"""The pre-tokenizer of a tokenizer.json without one: GPT2Tokenizer's."""

ALONE = "to import the weights alone, move the tokenizer's files out of the folder"

AGREE = "make them agree"

MORE = "more "
"""Prefix of the number of a special token without a role."""

UNNUMBERED = -1


class Declared(NamedTuple):
    """An added token, with the id UNNUMBERED if none is given, and the file that declares it."""

    token: AddedToken
    file: Path


def read_tokenizer(folder: Path) -> dict[str, bytes]:
    """Convert folder's tokenizer files to encoder.json, vocab.bpe and, if needed, tokens.json; empty if it has none.

    Raises InputError, naming the file and the setting, if the tokens would differ from those of transformers.
    """
    tokenizer = _read(folder / TOKENIZER)
    files = _vocabulary(folder, tokenizer)
    theirs = bool(tokenizer) or (folder / VOCABULARY[IDS]).is_file()
    if not files or not (theirs or any((folder / name).is_file() for name in (CONFIG, MAP, ADDED))):
        return files
    config = _read(folder / CONFIG)
    config.setdefault("tokenizer_class", _read(folder / "config.json").get("tokenizer_class"))
    _check(folder / CONFIG, config, FIXED)
    rebuilt = config["tokenizer_class"] in REBUILT
    if not rebuilt and not tokenizer:
        raise InputError(f"{folder / CONFIG}: tokenizer_class is {config['tokenizer_class']}, which needs {TOKENIZER}")
    if not rebuilt and "pre_tokenizer" not in tokenizer:
        raise InputError(f"{folder / TOKENIZER}: its pre_tokenizer is missing, which is not supported: {ALONE}")
    padding = tokenizer.get("padding")
    if not rebuilt and isinstance(padding, dict) and "pad_token" in padding:
        config.setdefault("pad_token", padding["pad_token"])  # transformers adds it as a token
    named = _named(folder, config)
    added = _added(folder, config, tokenizer, rebuilt, named)
    default = Declared(AddedToken(END_OF_TEXT, UNNUMBERED), folder / CONFIG)
    roles = dict.fromkeys(NAMED[:3], default) if rebuilt and theirs else {}
    prefix = _prefix_space(folder, config, tokenizer, rebuilt)
    extras = _extras(added, {**roles, **named}, parse_ids(files[IDS]), prefix)
    return files if extras == usual_extras(parse_ids(files[IDS])) else files | {TOKENS: extras.to_json()}


def tokenizer_files(vocabulary: Mapping[str, bytes], context_length: int) -> dict[str, bytes]:
    """The files with which GPT2Tokenizer gives the same tokens as the encoding of a vocabulary's files."""
    extras = parse_extras(vocabulary, parse_ids(vocabulary[IDS]))
    flags = ("content", "lstrip", "rstrip", "normalized", "special")
    config = {
        "tokenizer_class": "GPT2Tokenizer",
        "model_max_length": context_length,
        "add_prefix_space": extras.add_prefix_space,
        "added_tokens_decoder": {
            str(token.id): {flag: getattr(token, flag) for flag in flags} | {"single_word": False}
            for token in extras.added
        },
        **dict.fromkeys(NAMED[:3], extras.end),
    }
    named = {theirs: vocabulary[ours] for ours, theirs in VOCABULARY.items()}
    return named | {CONFIG: json.dumps(config, indent=2).encode()}


def _read(file: Path) -> dict[str, Any]:
    return read_json(file, VOCABULARY_TIMES) if file.is_file() else {}


def _check(file: Path, values: Mapping[str, Any], fixed: Mapping[str, tuple[Any, ...]]) -> None:
    for key, choices in fixed.items():
        if values.get(key) not in choices:
            raise InputError(f"{file}: {key} is {values[key]!r}, which is not supported: {ALONE}")


def _vocabulary(folder: Path, tokenizer: Mapping[str, Any]) -> dict[str, bytes]:
    """The two files, under OpenAI's names, read under either name or from tokenizer.json."""
    found: dict[str, bytes] = {}
    for ours, theirs in VOCABULARY.items():
        files = [folder / name for name in (theirs, ours) if (folder / name).is_file()]
        if len({file.read_bytes() for file in files}) > 1:
            raise InputError(f"{files[0]} and {files[1]} should be the same file but differ: remove the wrong one")
        if files:
            found[ours] = files[0].read_bytes()
    if not tokenizer:
        if len(found) == 1:
            present, missing = ("vocab.json", "merges.txt") if IDS in found else ("merges.txt", "vocab.json")
            raise InputError(f"{folder} has {present}, but not the {missing} that belongs to it: put it there; {ALONE}")
        return found
    made = _from_tokenizer(folder / TOKENIZER, tokenizer)
    for name, parse in ((IDS, parse_ids), (MERGES, parse_merges)):
        try:
            agree = name not in found or parse(found[name]) == parse(made[name])
        except (ValueError, TypeError, RecursionError):
            agree = False
        if not agree:
            raise InputError(f"{folder / TOKENIZER} and {VOCABULARY[name]} next to it disagree: remove the wrong one")
    return made | found


def _from_tokenizer(file: Path, tokenizer: Mapping[str, Any]) -> dict[str, bytes]:
    """The two files from a tokenizer.json. Raises InputError if it processes text differently from GPT-2's."""
    try:
        model = tokenizer["model"]
        pairs = [merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"]]
        if wrong := next((pair for pair in pairs if len(pair) != 2 or pair[0].startswith("#version")), None):
            raise ValueError(f"the merge {wrong!r}")
        lines = "\n".join(["#version: 0.2", *(" ".join(pair) for pair in pairs), ""])
        made = {IDS: json.dumps(model["vocab"]).encode(), MERGES: lines.encode()}
        parse_ids(made[IDS])
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise InputError(f"{file} has no vocabulary in GPT-2's format ({error!r}): remove it, or replace it") from error
    _check(file, model, FIXED_MODEL)
    for step, (_, matters, choices) in STEPS.items():
        value = _step(tokenizer, step)
        seen = {key: value[key] for key in ("type", matters) if key in value} if isinstance(value, dict) else value
        if seen not in choices:
            raise InputError(f"{file}: its {step} is {_short(value)}, which is not supported: {ALONE}")
    return made


def _step(tokenizer: Mapping[str, Any], step: str) -> Any:
    """A step of a tokenizer.json, unwrapped from sequences of one step."""
    value, parts = tokenizer.get(step, BYTE_LEVEL if step == "pre_tokenizer" else None), STEPS[step][0]
    while isinstance(value, dict) and value.get("type") == "Sequence":
        sequence = value.get(parts) or []
        if not isinstance(sequence, list) or len(sequence) > 1:
            break
        value = sequence[0] if sequence else None
    return value


def _short(value: Any) -> str:
    """A value in one short line."""
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 120 else text[:119] + "…"


def _prefix_space(folder: Path, config: Mapping[str, Any], tokenizer: Mapping[str, Any], rebuilt: bool) -> bool:
    """Whether a text gets a leading space. Raises InputError if the two files that set it disagree."""
    asked = config.get("add_prefix_space")
    if not tokenizer:
        return bool(asked)
    written = _step(tokenizer, "pre_tokenizer").get("add_prefix_space")
    if type(written) is not bool or written != (written if asked is None and not rebuilt else bool(asked)):
        raise InputError(
            f"add_prefix_space is {written!r} in {folder / TOKENIZER} but {bool(asked)} in {CONFIG} next to it, which "
            "releases of transformers read differently: make them agree"
        )
    return written


def _named(folder: Path, config: Mapping[str, Any]) -> dict[str, Declared | None]:
    """Role -> special token named in the settings; None for a role set to null."""
    places = [(folder / CONFIG, config)]
    if "added_tokens_decoder" not in config:  # with it, transformers ignores the map
        places.append((folder / MAP, _read(folder / MAP)))
    named: dict[str, Declared | None] = {}
    more: list[Declared] = []
    for file, values in places:
        for key, value in values.items():
            if key in ("extra_special_tokens", "additional_special_tokens"):
                if not isinstance(value, dict | list | None):
                    raise InputError(f"{file}: {key} is {_short(value)}, which is not a list of tokens: correct it")
                own = value if isinstance(value, dict) else {}  # its keys are further roles
                named |= {
                    role: Declared(_token(file, entry, UNNUMBERED, special=True), file) for role, entry in own.items()
                }
                listed = value if isinstance(value, list) else []
                more += [Declared(_token(file, entry, UNNUMBERED, special=True), file) for entry in listed]
            elif key.endswith("_token") and not isinstance(value, bool):
                if file.name == CONFIG and key not in NAMED and isinstance(value, dict) and "__type" not in value:
                    continue  # transformers does not read it as a token
                named[key] = None if value is None else Declared(_token(file, value, UNNUMBERED, special=True), file)
    ordered = {key: named[key] for key in (*NAMED, *named) if key in named}
    return ordered | {f"{MORE}{n}": declared for n, declared in enumerate(more)}


def _token(file: Path, value: Any, number: Any, special: bool | None = None) -> AddedToken:
    """Parse a token from a file: its text, or its text and flags."""
    try:
        entry: dict[str, Any] = {"content": value} if isinstance(value, str) else dict(value)
        is_special = entry.get("special", False) if special is None else special
        flags = {flag: entry.get(flag, False) for flag in ("lstrip", "rstrip", "single_word")}
        flags = flags | {"normalized": entry.get("normalized", not is_special), "special": is_special}
        content, number = entry["content"], int(number)
        if not all(type(flag) is bool for flag in flags.values()) or not isinstance(content, str):
            raise TypeError(f"{value!r} is not a token")
        content.encode()  # a lone surrogate has no bytes
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise InputError(
            f"{file} has an added token that cannot be read ({error!r}): remove it, or correct it"
        ) from error
    if flags.pop("single_word"):
        raise InputError(f"{file}: single_word is true for the token {content!r}, which is not supported: {ALONE}")
    return AddedToken(content, number, **flags)


def _added(
    folder: Path,
    config: Mapping[str, Any],
    tokenizer: Mapping[str, Any],
    rebuilt: bool,
    named: Mapping[str, Declared | None],
) -> dict[str, Declared]:
    """Text -> token for those added with an id. Raises InputError if the files disagree."""
    declared = _declared(folder, config, tokenizer, named)
    apart = _apart({token.content for token, _ in declared})
    complete = "added_tokens_decoder" in config  # then transformers reads no other file, except TOKENIZER if AS_WRITTEN
    added: dict[str, Declared] = {}
    for token, file in declared:
        before = added.get(token.content)
        if before is None and complete and file.name != CONFIG:
            raise InputError(f"{file} adds {token.content!r}, but added_tokens_decoder in {CONFIG} does not: {AGREE}")
        if before and not (before.token.id == token.id and (file.name == ADDED or _alike(token, before.token, apart))):
            raise InputError(
                f"{file} and {before.file.name} next to it disagree about the token {token.content!r}: {AGREE}"
            )
        if before is None or (file.name == TOKENIZER and not rebuilt):
            added[token.content] = Declared(token, file)
    written = [token.id for token, file in added.values() if file.name == TOKENIZER]
    for token, file in added.values():
        if not rebuilt and file.name != TOKENIZER and token.id < max(written, default=0):  # it would come last
            raise InputError(f"{file} adds {token.content!r}, but {TOKENIZER} next to it does not: {AGREE}")
    return added


def _declared(
    folder: Path, config: Mapping[str, Any], tokenizer: Mapping[str, Any], named: Mapping[str, Declared | None]
) -> list[Declared]:
    """The added tokens in the three files; the last file has no flags, so the first two take precedence."""
    usual = [declared for key, declared in named.items() if key in NAMED or key.startswith(MORE)]
    specials = {declared.token.content for declared in usual if declared}
    try:
        sources = {
            CONFIG: [(value, number) for number, value in (config.get("added_tokens_decoder") or {}).items()],
            TOKENIZER: [(value, value["id"]) for value in tokenizer.get("added_tokens") or []],
            ADDED: [({"content": t, "special": t in specials}, number) for t, number in _read(folder / ADDED).items()],
        }
    except (AttributeError, KeyError, TypeError) as error:
        raise InputError(f"{folder}: its added tokens cannot be read ({error!r}): {ALONE}") from error
    tokens = {name: [_token(folder / name, *entry) for entry in entries] for name, entries in sources.items()}
    if (numbers := [token.id for token in tokens[TOKENIZER]]) != sorted(numbers):
        raise InputError(f"{folder / TOKENIZER}: its added_tokens are not in the order of their ids: sort them")
    return [Declared(token, folder / name) for name, declared in tokens.items() for token in declared]


def _alike(a: AddedToken, b: AddedToken, apart: bool) -> bool:
    """Whether two entries of a token match the same text; if apart, the search order (normalized) does not matter."""
    return replace(a, special=b.special, normalized=b.normalized if apart else a.normalized) == b


def _apart(tokens: Iterable[str]) -> bool:
    """Whether no two tokens can overlap in a text, so that the order of searching for them does not matter."""
    pairs = permutations(tokens, 2)
    return not any(a in b or any(a.endswith(b[:size]) for size in range(1, len(b))) for a, b in pairs)


def _extras(
    added: dict[str, Declared], named: Mapping[str, Declared | None], ids: Mapping[str, int], prefix: bool
) -> Extras:
    """The complete Extras: named tokens are special, new ones follow the others, and all get their ids."""
    filled = {role: declared for role, declared in named.items() if declared and declared.token.content}
    apart = _apart({*added, *(declared.token.content for declared in filled.values())})
    roles: dict[str, str] = {}  # text -> first role, of tokens that are only named
    for role, declared in filled.items():
        token, file = added.get(declared.token.content, declared)
        first = roles.get(token.content) if token.content in added else roles.setdefault(token.content, role)
        if first and not _alike(declared.token, token, apart):
            one, other = (name.replace(MORE, "additional token ") for name in (first, role))
            raise InputError(
                f"{declared.file}: the token {token.content!r} strips white space or is normalized differently as "
                f"{other} than as {one}: {AGREE}, or declare it in added_tokens_decoder"
            )
        added[token.content] = Declared(replace(token, special=True), file)
    numbered = list(_numbered(added.values(), ids))
    if len({token.normalized for token in numbered}) == 1:  # then there is one search, whatever the flag
        numbered = [replace(token, normalized=False) for token in numbered]
    _check_white_space(added.values())
    eos = named.get("eos_token")
    end = eos.token.content if eos else END_OF_TEXT if END_OF_TEXT in added else None
    return Extras(tuple(numbered), end, prefix)


def _check_white_space(added: Iterable[Declared]) -> None:
    """Raise InputError if a token could strip the start of another: tokenizers itself may fail on these."""
    strips = next((declared for declared in added if declared.token.rstrip), None)
    blank = next((declared for declared in added if declared.token.content[0].isspace()), None)
    if strips and blank:
        raise InputError(
            f"{strips.file}: rstrip is true for the token {strips.token.content!r}, which is not supported together "
            f"with {blank.token.content!r}, a token that starts with white space: {ALONE}"
        )


def _numbered(added: Iterable[Declared], ids: Mapping[str, int]) -> Iterator[AddedToken]:
    """The tokens with the ids that transformers assigns: the vocabulary's, else the next free one."""
    free = len(ids)
    for token, file in sorted(added, key=lambda entry: (entry.token.id == UNNUMBERED, entry.token.id)):
        number = ids.get(token.content, free)
        free = max(free, number + 1)
        if token.id not in (UNNUMBERED, number):
            raise InputError(
                f"{file}: the added token {token.content!r} has the id {token.id}, but transformers assigns {number}, "
                "counting on from the vocabulary: change it to that"
            )
        yield replace(token, id=number)
