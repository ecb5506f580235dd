"""Damaged files by the hundred thousand, through every reader of weights: the right answer, or one clear error.

A specimen is a folder of a small model in one format, and four kinds of place in its files: header, index, data,
configuration. A mutant is the specimen with one thing changed in one of these places: bits, bytes, a stretch cut out,
doubled, zeroed or exchanged, the file's end cut off; in JSON, a value put in another's place. Where a checksum would
stop the reader at the door it is, every other time, made right again, so that what lies behind is tried as well.

The reader then has a second and three times the files' size, and answers with an InputError, or with a model: of that
every tensor must be what an independent reader finds in the mutant, or the original's where the format's checksums
promise it, and its configuration what the mutant says.
"""

import hashlib
import json
import random
import shutil
import struct
import tempfile
import time
import tracemalloc
import zlib
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file

from numpy_gpt import GPT, GPTConfig, load, save
from numpy_gpt.errors import InputError
from numpy_gpt.weights.checkpoint import load_training
from numpy_gpt.weights.crc32c import crc32c
from numpy_gpt.weights.source import open_source
from numpy_gpt.weights.tensors import CRC32, SHA256
from parity_tests.gpt2_files import gpt2_tensors, huggingface_folder
from parity_tests.test_bundle import write as write_bundle

PLACES = ("header", "index", "data", "configuration")
SECONDS = 1.0
TIMES_THE_FILES = 3
SIZE = {"vocab_size": 150, "n_positions": 40, "n_embd": 32, "n_head": 4, "n_layer": 1}

STRANGE = (
    *(0, 1, -1, 2, 3, 255, 2**16, 2**31, 2**32, 2**53, 2**63, 2**64, 10**30, 1e308, -1e-5, 0.5, float("nan")),
    *(True, False, None, "", "F32", "BF16", "I64", "F4", "../x", "\0", "é" * 9),
    *([], [0], [2**62, 4], [[]], {}, {"a": 1}),
)
"""Values for a place in JSON that held another."""


@dataclass(frozen=True)
class Specimen:
    """A whole model in a format: its folder, where in it the places lie, and how it is read and judged."""

    folder: Path
    places: dict[str, list[tuple[str, int, int]]]
    """Place -> (file, first byte, end) of its stretches."""
    read: Callable[[Path], object]
    """The reader: an answer, or InputError."""
    check: Callable[[Path, object], None]
    """Raises AssertionError if the answer is not what the mutant in this folder holds."""
    reseal: Callable[[str, bytearray], None] | None = None
    """Makes a file's checksums right again."""


@dataclass
class Findings:
    """What came of the mutants so far."""

    errors: Counter = field(default_factory=Counter)
    loaded: Counter = field(default_factory=Counter)
    slowest: float = 0.0
    """Seconds."""
    largest: float = 0.0
    """Memory over the files' size."""
    faults: list[str] = field(default_factory=list)

    def add(self, other: "Findings") -> None:
        """Enter another's as well."""
        self.errors += other.errors
        self.loaded += other.loaded
        self.slowest, self.largest = max(self.slowest, other.slowest), max(self.largest, other.largest)
        self.faults += other.faults


def fuzz(specimen: Specimen, mutants: int, seed: int, place: Path) -> Findings:
    """Try so many mutants of a specimen, made in the folder `place` from this seed."""
    rng, found = random.Random(seed), Findings()
    shutil.copytree(specimen.folder, place, dirs_exist_ok=True)
    originals = {file.name: file.read_bytes() for file in place.iterdir()}
    tracemalloc.start()
    for number in range(mutants):
        kind = PLACES[number % len(PLACES)]
        name, start, end = rng.choices(specimen.places[kind], [e - s for _, s, e in specimen.places[kind]])[0]
        how, content = mutated(rng, originals[name], start, end)
        if specimen.reseal and rng.random() < 0.5:
            how, content = f"{how}, resealed", bytearray(content)
            specimen.reseal(name, content)
        (place / name).write_bytes(content)
        what = f"mutant {number} of seed {seed}: {name}, {kind}, {how}"
        size = sum(len(originals[each]) for each in originals) - len(originals[name]) + len(content)
        judge(specimen, place, kind, what, max(size, 4096), found)
        (place / name).write_bytes(originals[name])
    tracemalloc.stop()
    return found


def judge(specimen: Specimen, place: Path, kind: str, what: str, size: int, found: Findings) -> None:
    """Let the reader have a mutant, and enter what came of it."""
    tracemalloc.reset_peak()
    before, begin = tracemalloc.get_traced_memory()[0], time.perf_counter()
    try:
        answer = specimen.read(place)
    except InputError as error:
        answer = None
        if "\n" in str(error) or len(str(error)) > 2000:
            found.faults.append(f"{what}: the error is no sentence: {str(error)[:300]!r}")
    except Exception as error:  # what is looked for
        found.faults.append(f"{what}: {type(error).__name__}: {error}")
        return
    seconds, memory = time.perf_counter() - begin, tracemalloc.get_traced_memory()[1] - before
    found.slowest, found.largest = max(found.slowest, seconds), max(found.largest, memory / size)
    if seconds > SECONDS:
        found.faults.append(f"{what}: {seconds:.1f} seconds")
    if memory > TIMES_THE_FILES * size:
        found.faults.append(f"{what}: {memory:,} bytes of memory for files of {size:,}")
    if answer is None:
        found.errors[kind] += 1
        return
    found.loaded[kind] += 1
    try:
        specimen.check(place, answer)
    except Exception as error:  # an independent reader that fails where ours does not is a finding too
        found.faults.append(f"{what}: it loads, and {type(error).__name__}: {error}")


def mutated(rng: random.Random, content: bytes, start: int, end: int) -> tuple[str, bytes]:
    """What was done, and a copy of content with one thing changed from start to end."""
    at = rng.randrange(start, end)
    length = min(rng.choice((1, 2, 4, 8, 64)), end - at)
    kinds = ["bit", "byte", "bytes", "cut off", "cut out", "doubled", "zeroed", "exchanged", "json", "json"]
    how = rng.choice(kinds)
    if how == "json" and (edited := edited_json(rng, content, start, end)) is not None:
        return "a value of the JSON", edited
    if how == "bit":
        return f"bit of byte {at}", content[:at] + bytes([content[at] ^ 1 << rng.randrange(8)]) + content[at + 1 :]
    if how in ("byte", "json"):
        return f"byte {at}", content[:at] + bytes([rng.randrange(256)]) + content[at + 1 :]
    if how == "bytes":
        return f"{length} bytes at {at}", content[:at] + rng.randbytes(length) + content[at + length :]
    if how == "cut off":
        return f"cut off at {at}", content[:at]
    if how == "cut out":
        return f"{length} bytes cut out at {at}", content[:at] + content[at + length :]
    if how == "doubled":
        return f"{length} bytes doubled at {at}", content[: at + length] + content[at:]
    if how == "zeroed":
        return f"{length} bytes zeroed at {at}", content[:at] + bytes(length) + content[at + length :]
    other = rng.randrange(start, end - length + 1)
    first, second = sorted((min(at, end - length), other))
    middle = content[first + length : max(second, first + length)]
    second = max(second, first + length)
    a, b, rest = content[first : first + length], content[second : second + length], content[second + length :]
    return f"{length} bytes exchanged, {first} and {second}", content[:first] + b + middle + a + rest


def edited_json(rng: random.Random, content: bytes, start: int, end: int) -> bytes | None:
    """Content with a value of the JSON there replaced, renamed, added or dropped; None where there is no JSON object.

    In a safetensors file it is the whole header, whose length is set to fit.
    """
    safetensors = content[8:9] == b"{"
    stop = 8 + int.from_bytes(content[:8], "little") if safetensors else len(content)
    try:
        values = json.loads(content[8:stop] if safetensors else content)
    except ValueError:
        return None
    if not isinstance(values, dict):
        return None
    target, key = values, rng.choice(list(values))
    while isinstance(target[key], (dict, list)) and target[key] and rng.random() < 0.8:
        target = target[key]
        key = rng.choice(list(target)) if isinstance(target, dict) else rng.randrange(len(target))
    if isinstance(target, dict) and rng.random() < 0.3:
        value = target.pop(key)
        if rng.random() < 0.7:
            target[rng.choice([str(key) + "x", "__metadata__", "", *map(str, list(target)[:3])])] = value
    else:
        target[key] = rng.choice(STRANGE)
    text = json.dumps(values).encode()
    return struct.pack("<Q", len(text)) + text + content[stop:] if safetensors else text


def spans(content: bytes, *parts: bytes) -> list[tuple[int, int]]:
    """Where each part lies in content."""
    return [(at, at + len(part)) for part in parts for at in [content.index(part)]]


def safetensors_places(file: Path) -> tuple[int, int]:
    """The header's end, and the file's."""
    with file.open("rb") as f:
        return 8 + int.from_bytes(f.read(8), "little"), file.stat().st_size


def same_arrays(got: dict, want: dict) -> None:
    """Assert that they have the same names and bytes."""
    assert got.keys() == want.keys(), f"tensors {sorted(got.keys() ^ want.keys())[:3]} are missing or more"
    for name in want:
        assert np.asarray(got[name]).tobytes() == np.asarray(want[name]).tobytes(), f"{name} is another"


def checkpoint_specimen(folder: Path) -> Specimen:
    """numpy-gpt's own: every answer must be the original, unless the checksums were made right again."""
    config = GPTConfig(SIZE["vocab_size"], SIZE["n_positions"], SIZE["n_embd"], SIZE["n_head"], 1, 0.1)
    model = GPT(config, seed=1)
    training = {"t": np.array([7]), "m": np.random.default_rng(0).random((64, 32))}
    save(model, folder, training=training, about={"encoding": "bytes"})
    (state,) = folder.glob("training-*")
    content = (folder / "model.safetensors").read_bytes()
    end, size = safetensors_places(folder / "model.safetensors")
    state_end, state_size = safetensors_places(state)
    text = content[8:end].decode()
    at = 8 + text.index('"config"')
    seal = json.loads(text)["__metadata__"][SHA256]
    entries = 8 + text.index('"tok_emb.weight":{')
    places = {
        "header": [("model.safetensors", 0, 8), ("model.safetensors", 8, end), (state.name, 0, state_end)],
        "index": [("model.safetensors", min(entries, end - 200), end)],
        "data": [("model.safetensors", end, size), (state.name, state_end, state_size)],
        "configuration": [("model.safetensors", at, at + len(json.dumps(config.to_dict())) + 20)],
    }

    def read(place):
        again = load(place)
        return again.config, again.params, load_training(place)

    def check(place, answer):
        file = place / "model.safetensors"
        about = json.loads(file.read_bytes()[8 : safetensors_places(file)[0]])["__metadata__"]
        original = about[SHA256] == seal
        want = config.to_dict() if original else json.loads(about["config"])
        assert answer[0].to_dict() == want, f"the configuration is {answer[0]}, not {want}"
        same_arrays(answer[1], model.params if original else load_file(file))
        same_arrays(answer[2], training)

    return Specimen(folder, places, read, check, reseal_safetensors)


def reseal_safetensors(name: str, content: bytearray) -> None:
    """Make a checkpoint's checksums right for what it holds now, if its header is still one."""
    stop = 8 + int.from_bytes(content[:8], "little")
    try:
        header = json.loads(content[8:stop])
        metadata, whole = header["__metadata__"], {n: e for n, e in header.items() if n != "__metadata__"}
        offsets = {n: slice(*(stop + at for at in entry["data_offsets"])) for n, entry in whole.items()}
        metadata.pop(SHA256, None)
        if json.loads(metadata[CRC32]).keys() == whole.keys():  # else that is the damage
            metadata[CRC32] = json.dumps({n: zlib.crc32(content[part]) for n, part in offsets.items()})
        said = json.dumps([metadata, {n: (e["dtype"], e["shape"]) for n, e in whole.items()}], sort_keys=True)
        metadata[SHA256] = hashlib.sha256(said.encode()).hexdigest()
    except (ValueError, KeyError, TypeError, AttributeError):
        return
    text = json.dumps(header).encode()
    content[:stop] = struct.pack("<Q", len(text)) + text


def read_source(place: Path):
    """Configuration and all parameters of a folder of somebody else's, as `import` reads them."""
    source = open_source(place)
    return source.config, {name: tensor.finite(place, name).read() for name, tensor in source.tensors.items()}


def check_config(config: GPTConfig, values: dict, keys: dict[str, str]) -> None:
    """Assert that a configuration is what the JSON says."""
    for ours, theirs in keys.items():
        assert getattr(config, ours) == values[theirs], f"{ours} is {getattr(config, ours)}, not {values[theirs]}"


SAID = {
    "activation_function": "gelu_new",
    "layer_norm_epsilon": 1e-5,
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "add_cross_attention": False,
    "n_inner": None,
    "embd_pdrop": 0.1,
    "attn_pdrop": 0.1,
    "resid_pdrop": 0.1,
}
"""Of config.json, beside the sizes: what changes the numbers. A mutant that says otherwise must not load."""


def huggingface_specimen(folder: Path) -> Specimen:
    """Without checksums: the answer must be what the mutant says, by the format's own library."""
    from numpy_gpt.weights.huggingface import BUFFERS, KEYS, PREFIX

    tensors = gpt2_tensors(1, tied=False, **SIZE)
    huggingface_folder(folder, tensors, shards=2, **SIZE, **SAID)
    shards = sorted(folder.glob("model-*.safetensors"))
    ends = {shard.name: safetensors_places(shard) for shard in shards}
    index = folder / "model.safetensors.index.json"
    places = {
        "header": [stretch for name, (end, _) in ends.items() for stretch in ((name, 0, 8), (name, 8, end))],
        "index": [(index.name, 0, index.stat().st_size)],
        "data": [(name, end, size) for name, (end, size) in ends.items()],
        "configuration": [("config.json", 0, (folder / "config.json").stat().st_size)],
    }

    def check(place, answer):
        config, params = answer
        values = json.loads((place / "config.json").read_text())
        check_config(config, values, KEYS)
        for key, value in SAID.items():  # left out, it is at its default, which SAID has
            assert values.get(key, value) == config.drop_rate if "pdrop" in key else values.get(key, value) == value, (
                key
            )
        assert config.tie_weights == values.get("tie_word_embeddings", True)
        whole = {n: a for file in place.glob("model-*.safetensors") for n, a in load_file(file).items()}
        whole = {name.removeprefix(PREFIX): array for name, array in whole.items()}
        whole = {name: array for name, array in whole.items() if not BUFFERS.fullmatch(name)}
        check_layout(config, params, whole)

    return Specimen(folder, places, read_source, check)


LAST = {"scale": "weight", "shift": "bias"}
"""The book's last part of a LayerNorm's names -> GPT-2's."""


def check_layout(config: GPTConfig, params: dict, theirs: dict) -> None:
    """Assert that the book's parameters are GPT-2's tensors, all of them, by a layout written down here once more."""
    used = set()
    for name, array in params.items():
        parts = name.split(".")
        third = None
        if parts[0] == "trf_blocks":
            i, kind = parts[1], parts[-1]
            inner = {"norm1": "ln_1", "norm2": "ln_2", "out_proj": "attn.c_proj", "0": "mlp.c_fc", "2": "mlp.c_proj"}
            third = {"W_query": 0, "W_key": 1, "W_value": 2}.get(parts[-2])
            where = "attn.c_attn" if third is not None else inner[parts[-2]]
            other = f"h.{i}.{where}.{LAST.get(kind, kind)}"
        else:
            ends = {"tok_emb": "wte", "pos_emb": "wpe", "out_head": "lm_head", "final_norm": "ln_f"}
            other = f"{ends[parts[0]]}.{LAST.get(parts[1], parts[1])}"
        want = theirs[other]
        used.add(other)
        if third is not None:
            C = config.emb_dim
            want = want[..., third * C : (third + 1) * C]
        if want.ndim == 2 and parts[0] == "trf_blocks":
            want = want.T
        assert array.shape == want.shape, f"{name} has shape {array.shape}, {other} {want.shape}"
        assert array.tobytes() == np.ascontiguousarray(want).tobytes(), f"{name} is not {other}"
    tied_head = {"lm_head.weight"} if config.tie_weights else set()
    assert used | tied_head >= theirs.keys(), f"{sorted(theirs.keys() - used)[:3]} are of no use"


def openai_specimen(folder: Path) -> Specimen:
    """TensorFlow's checksums promise the original's tensors, unless they are made right again for what was changed."""
    from numpy_gpt.weights.openai import KEYS

    variables = {}
    for name, array in gpt2_tensors(1, **SIZE).items():
        path, _, kind = name.replace("h.0.", "h0.").replace(".", "/").rpartition("/")
        last = "" if path in ("wte", "wpe") else {"weight": "/g" if "ln_" in path else "/w", "bias": "/b"}[kind]
        shape = (1, *array.shape) if last == "/w" else array.shape
        variables[f"model/{path}{last}"] = ("float32", shape, array.tobytes())
    for file in (prefix := write_bundle(folder, variables)).parent.iterdir():
        file.rename(file.with_name(file.name.replace(prefix.name, "model.ckpt", 1)))
    hparams = dict(zip(KEYS.values(), SIZE.values(), strict=True))  # both in GPTConfig's order
    (folder / "hparams.json").write_text(json.dumps(hparams))
    index, data = "model.ckpt.index", "model.ckpt.data-00000-of-00001"
    size = (folder / index).stat().st_size
    places = {
        "header": [(index, 0, 24), (index, size - 48, size)],
        "index": [(index, 24, size - 48)],
        "data": [(data, 0, (folder / data).stat().st_size)],
        "configuration": [("hparams.json", 0, (folder / "hparams.json").stat().st_size)],
    }
    _, params = read_source(folder)
    table = gpt2_tensors(1, **SIZE)
    check_layout(GPTConfig(*(SIZE[k] for k in SIZE), qkv_bias=True, tie_weights=True), params, table)

    def check(place, answer):
        check_config(answer[0], json.loads((place / "hparams.json").read_text()), KEYS)
        same_arrays(answer[1], params)

    def reseal(name, content):
        if name == index:
            reseal_table(content)

    return Specimen(folder, places, read_source, check, reseal)


def masked(content: bytes) -> bytes:
    """TensorFlow's masked CRC-32C of it, as it is stored."""
    crc = crc32c(bytes(content))
    return struct.pack("<I", ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF)


def reseal_table(content: bytearray) -> None:
    """Make the checksums of an index's blocks right for what is in them now, as far as its handles can be followed."""

    def number(at):
        value = shift = 0
        while at < len(content) and shift < 70:
            value |= (content[at] & 0x7F) << shift
            at, shift = at + 1, shift + 7
            if content[at - 1] < 0x80:
                break
        return value, at

    def reseal(offset, size):
        if offset + size + 5 <= len(content) - 48:
            content[offset + size + 1 : offset + size + 5] = masked(content[offset : offset + size + 1])

    footer = len(content) - 48
    if footer < 0:
        return
    offset, at = number(footer)
    size, at = number(at)
    reseal(offset, size)
    offset, at = number(at)
    size, at = number(at)
    if offset + size <= footer:  # the one entry of the index block: the handle of the block with the data
        _, at = number(offset)
        own, at = number(at)
        _, at = number(at)
        first, at = number(at + own)
        length, at = number(at)
        reseal(first, length)
        reseal(offset, size)


def fuzz_part(reader: str, mutants: int, seed: int) -> Findings:
    """`fuzz` with a specimen and a place of its own, for a process of its own."""
    place = Path("/dev/shm") if Path("/dev/shm").is_dir() else None
    with tempfile.TemporaryDirectory(dir=place) as folder:
        (original := Path(folder, "original")).mkdir()
        return fuzz(SPECIMENS[reader](original), mutants, seed, Path(folder, "mutant"))


SPECIMENS = {"checkpoint": checkpoint_specimen, "openai": openai_specimen, "huggingface": huggingface_specimen}
"""Reader -> what makes its specimen in a folder."""
