"""Tokenizer folders of every known kind, texts to encode, and transformers' ids for them.

`python -m parity_tests.judge.tokenizers` writes fixtures/tokenizers.json: a vocabulary trained by Hugging Face's
tokenizers on SENTENCES, and transformers' ids of sample texts for every accepted kind. The quick suite compares with
those ids; the slow suite runs transformers itself, on more texts.
"""

import json
import math
import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np

from numpy_gpt.encodings.vocabulary import END_OF_TEXT

FIXTURES = Path(__file__).parents[1] / "fixtures"
JUDGED = FIXTURES / "tokenizers.json"

SENTENCES = (
    "person said he had the lighter letter no light that every reads line of the it's don't we'll I'd they've you're",
    "I'm HELLO Café café naïve Ωμέγα привет мир 漢字 日本語 한국어 שלום مرحبا हिन्दी ไทย Ǆ ſ ß İ 12 3.14 1,000 ½ Ⅷ ٣",
    "x86 snake_case a\u0301 e\u0308 ﬁ ㎏ 🙂 👩\u200d💻 🇩🇪 ❤\ufe0f ... -- !? #version @ $ {} [] <> \\ / | ~ MyNewToken",
    "hello Hello hellohello foobar foo bar",
)
WORDS = " ".join(SENTENCES).split()
SPACES = [
    " ",
    "  ",
    "   ",
    "\n",
    "\n\n",
    "\t",
    " \t ",
    "\r\n",
    "\v",
    "\f",
    "\x1c",
    "\x85",
    "\xa0",
    "\u2003",
    "\u2028",
    "\u3000",
    " \n ",
]
ODD = [
    "\0",
    "\x01",
    "\x1f",
    "\x7f",
    "\x80",
    "\xad",
    "\u200b",
    "\u2060",
    "\ufeff",
    "\ufffd",
    "\uffff",
    "\ufdd0",
    "\ue000",
]
ODD += ["\U0001f9d1", "\U000e0061", "\U0010ffff", "\u0301", "\u0345", "\u180e", "\ufe0f", "\u2019s", "'S", "'"]
TOKENS = [
    END_OF_TEXT,
    "<|endoftext|",
    "<s>",
    "</s>",
    "<pad>",
    "<unk>",
    "<mask>",
    "[PAD]",
    "[first]",
    "[x]",
    "[y]",
    " [x] ",
]
TOKENS += ["MyNewToken_1", "MyNewToken_2", "hello", "foo", "foobar", "  ", "    ", "é", "[z]"]


def texts(count: int, seed: int = 0) -> list[str]:
    """An empty text, then texts of up to 12 pieces: words of many languages, white space, odd characters, tokens."""
    rng = np.random.default_rng(seed)
    pools = [WORDS, SPACES, TOKENS, ODD, [" "]]

    def piece() -> str:
        if rng.random() < 0.05:
            code = int(rng.integers(0x110000))
            return "" if 0xD800 <= code < 0xE000 else chr(code)
        pool = pools[rng.choice(len(pools), p=[0.4, 0.15, 0.2, 0.05, 0.2])]
        return pool[rng.integers(len(pool))]

    return ["", *("".join(piece() for _ in range(rng.integers(1, 13))) for _ in range(count - 1))]


@dataclass(frozen=True)
class Kind:
    """A tokenizer folder: the files' contents by name, the rows of its model, and the expected outcome.

    refused: None where transformers' ids are expected, else text that the error must contain.
    """

    files: dict[str, object]
    vocab_size: int
    refused: str | None = None

    def write(self, folder: Path) -> Path:
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in self.files.items():
            text = content if isinstance(content, str) else json.dumps(content)
            (folder / name).write_text(text, encoding="utf-8", newline="\n")
        return folder


class Base:
    """A vocabulary and its merges, from which the kinds are built."""

    def __init__(self, ids: dict[str, int], merges: list[list[str]]):
        self.ids, self.merges = ids, merges

    def pair(self) -> dict[str, object]:
        """vocab.json and merges.txt."""
        lines = ["#version: 0.2", *(" ".join(pair) for pair in self.merges), ""]
        return {"vocab.json": self.ids, "merges.txt": "\n".join(lines)}

    def tokenizer(self, added: list[dict] | None = None, **changes: object) -> dict[str, object]:
        """tokenizer.json as transformers writes it; changes under `model` are merged into its model section."""
        more = changes.pop("model", {})
        end = [{**entry(END_OF_TEXT, self.ids[END_OF_TEXT])}] if END_OF_TEXT in self.ids else []
        model = {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": "",
            "end_of_word_suffix": "",
        }
        model |= {"fuse_unk": False, "byte_fallback": False, "ignore_merges": False}
        return {
            "tokenizer.json": {
                "version": "1.0",
                "truncation": None,
                "padding": None,
                "added_tokens": sorted(end + (added or []), key=lambda token: token["id"]),
                "normalizer": None,
                "pre_tokenizer": byte_level(False),
                "post_processor": byte_level(True, trim_offsets=False),
                "decoder": byte_level(True),
                **changes,
                "model": {**model, "vocab": self.ids, "merges": self.merges, **more},
            }
        }


def byte_level(prefix: bool, trim_offsets: bool = True) -> dict[str, object]:
    return {"type": "ByteLevel", "add_prefix_space": prefix, "trim_offsets": trim_offsets, "use_regex": True}


def entry(content: str, number: int, special: bool = True, **flags: bool) -> dict:
    """An added token in tokenizer.json's format."""
    usual = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": not special, "special": special}
    return {"id": number, "content": content, **usual, **flags}


def marked(content: str, **flags: bool) -> dict:
    """A token of a role in tokenizer_config.json's format."""
    usual = {"lstrip": False, "rstrip": False, "normalized": False, "single_word": False}
    return {"__type": "AddedToken", "content": content, **usual, **flags}


def by_id(*entries: dict) -> dict:
    """Added tokens in added_tokens_decoder's format."""
    return {str(token["id"]): {key: value for key, value in token.items() if key != "id"} for token in entries}


def tiny() -> Base:
    """The vocabulary of fixtures/tiny_gpt2: 256 bytes, 30 merges and <|endoftext|>."""
    folder = FIXTURES / "tiny_gpt2"
    lines = (folder / "vocab.bpe").read_text(encoding="utf-8").split("\n")[1:-1]
    return Base(json.loads((folder / "encoder.json").read_text(encoding="utf-8")), [line.split(" ") for line in lines])


def retrained() -> Base:
    """The trained vocabulary: special tokens first, then bytes, then merges."""
    values = json.loads(JUDGED.read_text(encoding="utf-8"))
    return Base(values["ids"], values["merges"])


SPECIALS = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
SEQUENCE_A = {"Sequence": {"id": "A", "type_id": 0}}
FIRST = {"SpecialToken": {"id": END_OF_TEXT, "type_id": 0}}


@cache
def kinds() -> dict[str, Kind]:
    """All kinds by name."""
    base, own = tiny(), retrained()
    n, end = len(base.ids), entry(END_OF_TEXT, len(base.ids) - 1)
    without_end = Base({token: i for token, i in base.ids.items() if token != END_OF_TEXT}, base.merges)
    specials = [entry(token, i) for i, token in enumerate(SPECIALS)]
    roles = {
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "pad_token": "<pad>",
        "mask_token": "<mask>",
    }
    written = {"tokenizer_class": "PreTrainedTokenizerFast"}
    first = entry("[first]", n)
    swapped = Base(base.ids | {"!": base.ids['"'], '"': base.ids["!"]}, base.merges)
    again = Base(base.ids, [*base.merges, one_token_twice(base)])
    cut = Base({**base.ids, "ab": n, "bc": n + 1, "abc": n + 2}, [*base.merges, ["a", "b"], ["b", "c"], ["a", "bc"]])

    def config(**values: object) -> dict[str, object]:
        return {"tokenizer_config.json": values}

    def refused(files: dict[str, object], names: str, size: int = n) -> Kind:
        return Kind(files, size, names)

    plain: dict[str, Kind] = {
        "vocab.json and merges.txt": Kind(base.pair(), n),
        "vocab.json and merges.txt with CRLF": Kind(
            base.pair() | {"merges.txt": base.pair()["merges.txt"].replace("\n", "\r\n")}, n
        ),
        "tokenizer.json": Kind(base.tokenizer(), n),
        "tokenizer.json, merges as text": Kind(base.tokenizer(model={"merges": [" ".join(m) for m in base.merges]}), n),
        "both": Kind(base.pair() | base.tokenizer(), n),
        "both, disagreeing ids": refused(base.pair() | swapped.tokenizer(), "tokenizer.json and vocab.json"),
        "both, disagreeing merges": refused(
            base.pair() | base.tokenizer(model={"merges": base.merges[:-1]}), "tokenizer.json and merges.txt"
        ),
        "padded": Kind(base.pair(), n + 17),
        "retrained": Kind(own.tokenizer(specials) | config(**written, **roles), len(own.ids)),
        "retrained, GPT2Tokenizer": Kind(own.tokenizer(specials) | config(**roles), len(own.ids)),
        "retrained, nothing named": Kind(own.tokenizer(specials), len(own.ids)),
        "retrained, in two files": Kind(
            own.pair() | config(added_tokens_decoder=by_id(*specials), **roles), len(own.ids)
        ),
        "retrained, special_tokens_map.json": Kind(own.pair() | {"special_tokens_map.json": roles}, len(own.ids)),
        "retrained, undeclared": refused(own.pair(), "'<s>'", len(own.ids)),
        "without <|endoftext|>": Kind(without_end.pair(), n),
        "without <|endoftext|>, and padding": Kind(without_end.pair() | config(pad_token="[PAD]"), n),
        "without <|endoftext|>, said to be": Kind(
            without_end.pair() | config(bos_token=None, eos_token=None, unk_token=None), n - 1
        ),
    }
    prefix = {
        "prefix in tokenizer_config.json": Kind(base.pair() | config(add_prefix_space=True), n),
        "prefix in both": Kind(base.tokenizer(pre_tokenizer=byte_level(True)) | config(add_prefix_space=True), n),
        "prefix in tokenizer.json": refused(base.tokenizer(pre_tokenizer=byte_level(True)), "add_prefix_space"),
        "prefix in tokenizer.json, taken as written": Kind(
            base.tokenizer(pre_tokenizer=byte_level(True)) | config(**written, eos_token=END_OF_TEXT), n
        ),
        "prefix in either, disagreeing": refused(base.tokenizer() | config(add_prefix_space=True), "add_prefix_space"),
        "prefix and added": Kind(
            base.tokenizer([first], pre_tokenizer=byte_level(True)) | config(add_prefix_space=True), n + 1
        ),
    }
    pad, new = entry("[PAD]", n), [entry(f"MyNewToken_{k + 1}", n + k) for k in range(2)]
    ordinary = [entry(t, n + k, special=False) for k, t in enumerate(["hello", "[z]", "Café"])]
    known = [entry(t, base.ids[t], special=False) for t in ("!", "é", "ter", "Ġsaid")]
    strips = [
        entry("[x]", n, lstrip=True),
        entry("[y]", n + 1, rstrip=True),
        entry("[z]", n + 2, lstrip=True, rstrip=True),
    ]
    overlapping = [entry("foo", n), entry("foobar", n + 1, special=False), entry("bar", n + 2, special=False)]
    overlapping += [entry("  ", n + 3, special=False), entry("    ", n + 4, special=False), entry("hellohello", n + 5)]
    overlapping += [entry("hel", n + 6, special=False), entry("hello", n + 7, special=False)]
    added = {
        "added special, embeddings resized": Kind(base.tokenizer([first]), n + 1),
        "added special, embeddings as they were": Kind(base.tokenizer([pad]) | config(pad_token="[PAD]"), n),
        "added ordinary": Kind(base.tokenizer(ordinary), n + 3),
        "added, already in the vocabulary": Kind(base.tokenizer(known), n),
        "added as the book extends it": Kind(base.tokenizer(new), n + 2),
        "added_tokens.json": Kind(
            base.pair() | {"added_tokens.json": {"[PAD]": n, "foo": n + 1}} | config(pad_token="[PAD]"), n + 2
        ),
        "added_tokens_decoder": Kind(base.pair() | config(added_tokens_decoder=by_id(end, pad, *new[1:])), n + 2),
        "added_tokens_decoder and tokenizer.json": Kind(
            base.tokenizer([first]) | config(added_tokens_decoder=by_id(end, first)), n + 1
        ),
        "added, named alone": Kind(
            base.pair() | config(additional_special_tokens=["[first]", "[x]"], pad_token="[PAD]"), n + 3
        ),
        "named twice, one with white space": refused(
            base.pair() | config(pad_token="[PAD]", sep_token=marked("[PAD]", lstrip=True)), "as pad_token"
        ),
        "named otherwise than by default": refused(
            base.pair() | config(eos_token=marked(END_OF_TEXT, rstrip=True)), "as bos_token"
        ),
        "named three times, each with white space": Kind(
            base.pair()
            | config(**dict.fromkeys(("bos_token", "eos_token", "unk_token"), marked(END_OF_TEXT, rstrip=True))),
            n,
        ),
        "named twice, one normalized": Kind(
            base.pair() | config(pad_token=marked("[PAD]", normalized=True), sep_token="[PAD]"), n
        ),
        "named in a role of its own, unmarked": Kind(base.pair() | config(my_token={"content": "[PAD]"}), n),
        "named in roles of their own, and without": Kind(
            base.pair() | config(additional_special_tokens=["[x]"], extra_special_tokens={"my_role": "[y]"}), n + 2
        ),
        "named in no list": refused(base.pair() | config(extra_special_tokens=5), "extra_special_tokens"),
        "named by a lone surrogate": refused(base.pair() | config(pad_token="\ud800"), "cannot be read"),
        "added with an infinite id": refused(base.pair() | {"added_tokens.json": {"[x]": math.inf}}, "cannot be read"),
        "added before what tokenizer.json has": refused(
            base.tokenizer([entry("[y]", n + 1)])
            | config(**written, added_tokens_decoder=by_id(end, entry("[x]", n), entry("[y]", n + 1))),
            "'[x]'",
            n + 2,
        ),
        "added with spaces taken along": Kind(base.tokenizer(strips), n + 3),
        "added, overlapping": Kind(base.tokenizer(overlapping), n + 8),
        "added, a whole word only": refused(base.tokenizer([entry("foo", n, single_word=True)]), "single_word"),
        "added with another id": refused(base.tokenizer([entry("[PAD]", n + 5)]), "has the id", n + 6),
        "added, disagreeing flags": refused(
            base.tokenizer([first]) | config(added_tokens_decoder=by_id(end, first | {"lstrip": True})),
            "disagree",
            n + 1,
        ),
        "added, one file lacks it": refused(
            base.tokenizer([first]) | config(added_tokens_decoder=by_id(end)), "added_tokens_decoder", n + 1
        ),
    }
    steps = {
        name: refused(base.tokenizer(**{step: value}), f"its {step} is")
        for name, step, value in (
            ("Digits", "pre_tokenizer", sequence({"type": "Digits", "individual_digits": True}, byte_level(False))),
            ("null for a pre-tokenizer", "pre_tokenizer", None),
            ("Whitespace", "pre_tokenizer", {"type": "Whitespace"}),
            ("no pattern", "pre_tokenizer", byte_level(False) | {"use_regex": False}),
            ("Lowercase", "normalizer", {"type": "Lowercase"}),
            ("NFC", "normalizer", {"type": "NFC"}),
            ("StripAccents", "normalizer", {"type": "StripAccents"}),
            ("Lowercase in a sequence", "normalizer", {"type": "Sequence", "normalizers": [{"type": "Lowercase"}]}),
            ("a first token", "post_processor", template(FIRST, SEQUENCE_A)),
            ("WordPiece's decoder", "decoder", {"type": "WordPiece", "prefix": "##", "cleanup": True}),
        )
    }  # fmt: skip
    padded = {"strategy": {"Fixed": 1}, "direction": "Right", "pad_to_multiple_of": None}
    padded |= {"pad_id": n, "pad_type_id": 0, "pad_token": "hello"}
    unsaid = base.tokenizer()
    unsaid["tokenizer.json"].pop("pre_tokenizer")
    settings = {
        "padding, taken as written": Kind(base.tokenizer(padding=padded) | config(**written), n + 1),
        "padding": Kind(base.tokenizer(padding=padded), n),
        "no pre-tokenizer": Kind(unsaid, n),
        "no pre-tokenizer, taken as written": refused(unsaid | config(**written), "its pre_tokenizer is missing"),
        "a sequence that is not a list": refused(
            base.tokenizer(pre_tokenizer={"type": "Sequence", "pretokenizers": 5}), "its pre_tokenizer is"),
        "a sequence of one": Kind(base.tokenizer(pre_tokenizer=sequence(byte_level(False))), n),
        "a template that adds nothing": Kind(
            base.tokenizer(post_processor={"type": "TemplateProcessing", "single": [SEQUENCE_A],
                           "pair": [SEQUENCE_A, SEQUENCE_A], "special_tokens": {}}), n),
        "dropout": refused(base.tokenizer(model={"dropout": 0.5}), "dropout"),
        "a suffix": refused(base.tokenizer(model={"end_of_word_suffix": "</w>"}), "end_of_word_suffix"),
        **{f"{key} {value}": refused(base.pair() | config(**{key: value}), key) for key, value in (
            ("add_bos_token", True), ("add_eos_token", True), ("split_special_tokens", True),
            ("add_prefix_space", "yes"),
            ("vocab", {}), ("merges", []), ("tokenizer_class", "BertTokenizer"),
            ("tokenizer_class", "PreTrainedTokenizerFast"))},
    }  # fmt: skip
    merges = {
        "two merges of one token": refused(again.tokenizer(), "several merges for one token"),
        "a merge that never comes": refused(cut.tokenizer(), "'abc'", n + 3),
        "a merge too few": refused(Base(base.ids, base.merges[:-1]).pair(), "no line of vocab.bpe makes"),
        "vocab.json alone": refused({"vocab.json": base.ids}, "merges.txt"),
    }
    return plain | prefix | added | steps | settings | merges


def template(*single: dict) -> dict:
    return {"type": "TemplateProcessing", "single": list(single), "pair": [], "special_tokens": {}}


def sequence(*parts: dict) -> dict:
    return {"type": "Sequence", "pretokenizers": list(parts)}


def one_token_twice(base: Base) -> list[str]:
    """A pair missing from the merges that makes the same token as another pair."""
    made = {"".join(pair) for pair in base.merges}
    for token in made:
        for at in range(1, len(token)):
            pair = [token[:at], token[at:]]
            if pair not in base.merges and all(part in base.ids for part in pair):
                return pair
    raise ValueError("no token has another pair")


def judge(folder: Path, cases: list[str]) -> list[list[int]]:
    """transformers' ids of each text, using the tokenizer it loads from the folder."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    return [tokenizer.encode(text) for text in cases]


def train() -> dict[str, object]:
    """A vocabulary of 400 tokens, trained by Hugging Face's tokenizers on our texts."""
    from tokenizers import Tokenizer
    from tokenizers.models import BPE
    from tokenizers.pre_tokenizers import ByteLevel
    from tokenizers.trainers import BpeTrainer

    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
    trainer = BpeTrainer(
        vocab_size=400, special_tokens=SPECIALS, initial_alphabet=ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(texts(2000, seed=1), trainer)
    model = json.loads(tokenizer.to_str())["model"]
    return {"ids": model["vocab"], "merges": model["merges"]}


def main() -> None:
    values = train()
    JUDGED.write_text(json.dumps(values))
    cases = texts(30, seed=2)
    judged = {}
    for name, kind in kinds().items():
        if not kind.refused:
            with tempfile.TemporaryDirectory() as place:
                (kind.write(Path(place)) / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
                judged[name] = judge(Path(place), cases)
    rows = ",\n".join(f"{json.dumps(name)}: {json.dumps(ids, separators=(',', ':'))}" for name, ids in judged.items())
    whole = json.dumps(values | {"texts": cases})
    JUDGED.write_text(f'{whole[:-1]}, "judged": {{\n{rows}\n}}}}\n')


if __name__ == "__main__":
    main()
