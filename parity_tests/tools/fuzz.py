"""Feeds damaged files by the hundred thousand to every reader, which must give the right answer or one clear error.

A specimen is a folder with a small model in one format, a run or a vocabulary, and kinds of places in its files (for
formats of weights: header, index, data, configuration). A mutant is the specimen with one change in one of these
places: bits or bytes changed, a stretch cut out, doubled, zeroed or exchanged, the file truncated; in JSON, a value
replaced. Where a checksum would reveal the change, it is recomputed every other time, so that the code behind the check
is tested too.

In a run's checkpoint, the values themselves are made hostile: its metadata, and the arrays of its training state.

The reader may use two and a half times the files' size in memory, or its specimen's `floor`, the bytes it allows any
file (a safetensors header 32 MiB, an index 4 MiB, JSON 2 MiB: constants of the readers). It must raise an InputError or
return a model. Each of that model's tensors must be what an independent reader finds in the mutant, or the original's
where the format's checksums guarantee it, and its configuration must be the mutant's. A reader that hangs is stopped
after minutes, where the system has alarms.
"""

import csv
import hashlib
import json
import random
import shutil
import signal
import struct
import tempfile
import time
import tracemalloc
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import numpy as np
from safetensors.numpy import load as load_arrays
from safetensors.numpy import load_file
from safetensors.numpy import save as save_arrays

from numpy_gpt import GPT, GPTConfig, load, save
from numpy_gpt.encodings.vocabulary import AddedToken, Extras
from numpy_gpt.errors import InputError
from numpy_gpt.io.bounded_json import SMALL
from numpy_gpt.runs.batches import Batches
from numpy_gpt.runs.folder import Run, Validation
from numpy_gpt.runs.learner import NumpyLearner
from numpy_gpt.runs.losses import COLUMNS
from numpy_gpt.runs.pretrain import encoding_of
from numpy_gpt.runs.settings import ADDED, Settings, for_tiny
from numpy_gpt.runs.texts import text_of
from numpy_gpt.tokenizer import END_OF_TEXT, GPT2_FILES, get_encoding
from numpy_gpt.train import Position, train
from numpy_gpt.weights.checkpoint import load_params, load_training, read_header
from numpy_gpt.weights.source import open_source
from numpy_gpt.weights.tensorflow.crc32c import crc32c
from numpy_gpt.weights.tensors import CRC32, HEADER, SHA256, seal
from parity_tests.judge.bundles import write as write_bundle
from parity_tests.judge.gpt2_files import gpt2_tensors, huggingface_folder

HANG = 300.0
"""Seconds after which a reader counts as hanging: far more than any answer takes."""

TIMES_THE_FILES = 2.5
OWN = 4096
"""Bytes of a reader's own objects, for any file: paths, stat results, an error and its frames."""

SIZE = {"vocab_size": 150, "n_positions": 40, "n_embd": 32, "n_head": 4, "n_layer": 1}

STRANGE = (
    *(0, 1, -1, 2, 3, 255, 2**16, 2**31, 2**32, 2**53, 2**63, 2**64, 10**30, 1e308, -1e-5, 0.5, float("nan")),
    *(True, False, None, "", "F32", "BF16", "I64", "F4", "../x", "\0", "é" * 9),
    *([], [0], [2**62, 4], [[]], {}, {"a": 1}),
)
"""Replacement values for JSON."""


@dataclass(frozen=True)
class Specimen:
    """A model in one format: its folder, the places in its files, its reader and its judge."""

    folder: Path
    places: dict[str, list[tuple[str, int, int]]]
    """Place -> its stretches: (file, first byte, end)."""
    read: Callable[[Path], object]
    """The reader: returns an answer or raises InputError."""
    check: Callable[[Path, object], None]
    """Raises AssertionError if the answer does not match the mutant in this folder."""
    reseal: Callable[[str, bytearray], None] | None = None
    """Recomputes a file's checksums."""
    edits: Mapping[str, Callable[[random.Random, bytes], tuple[str, bytes]]] = field(default_factory=dict)
    """Place -> function that replaces `mutated` for its files: returns a description and the mutant."""
    floor: int = 0
    """Bytes of memory that its reader allows any file, however short."""


@dataclass
class Findings:
    """The results of the mutants so far."""

    errors: Counter = field(default_factory=Counter)
    loaded: Counter = field(default_factory=Counter)
    slowest: float = 0.0
    """Seconds."""
    largest: float = 0.0
    """Peak memory over the files' size."""
    faults: list[str] = field(default_factory=list)

    def add(self, other: "Findings") -> None:
        """Add another's results."""
        self.errors += other.errors
        self.loaded += other.loaded
        self.slowest, self.largest = max(self.slowest, other.slowest), max(self.largest, other.largest)
        self.faults += other.faults


def fuzz(specimen: Specimen, mutants: int, seed: int, place: Path) -> Findings:
    """Try `mutants` mutants of a specimen, made in the folder `place` from this seed."""
    rng, found = random.Random(seed), Findings()
    shutil.copytree(specimen.folder, place, dirs_exist_ok=True)
    files = [file for file in place.rglob("*") if file.is_file()]
    originals = {file.relative_to(place).as_posix(): file.read_bytes() for file in files}
    kinds = list(specimen.places)
    tracemalloc.start()
    for number in range(mutants):
        kind = kinds[number % len(kinds)]
        name, start, end = rng.choices(specimen.places[kind], [e - s for _, s, e in specimen.places[kind]])[0]
        edit = specimen.edits.get(kind)
        how, content = edit(rng, originals[name]) if edit else mutated(rng, originals[name], start, end)
        if not edit and specimen.reseal and rng.random() < 0.5:
            how, content = f"{how}, resealed", bytearray(content)
            specimen.reseal(name, content)
        (place / name).write_bytes(content)
        what = f"mutant {number} of seed {seed}: {name}, {kind}, {how}"
        size = sum(map(len, originals.values())) - len(originals[name]) + len(content)
        judge(specimen, place, kind, what, max(size, 4096), found)
        (place / name).write_bytes(originals[name])
    tracemalloc.stop()
    return found


def judge(specimen: Specimen, place: Path, kind: str, what: str, size: int, found: Findings) -> None:
    """Feed a mutant to the reader, and record the result."""
    tracemalloc.reset_peak()
    before, begin = tracemalloc.get_traced_memory()[0], time.perf_counter()
    try:
        with no_hang():
            answer = specimen.read(place)
    except InputError as error:
        answer = None
        if "\n" in str(error) or len(str(error)) > 2000:
            found.faults.append(f"{what}: the error is not a sentence: {str(error)[:300]!r}")
    except (Exception, HangError) as error:  # a fault
        found.faults.append(f"{what}: {type(error).__name__}: {error}")
        return
    seconds, memory = time.perf_counter() - begin, tracemalloc.get_traced_memory()[1] - before
    found.slowest, found.largest = max(found.slowest, seconds), max(found.largest, memory / size)
    if memory > max(TIMES_THE_FILES * size + OWN, specimen.floor):
        found.faults.append(f"{what}: {memory:,} bytes of memory for files of {size:,}")
    if answer is None:
        found.errors[kind] += 1
        return
    found.loaded[kind] += 1
    try:
        specimen.check(place, answer)
    except Exception as error:  # an independent reader that fails where ours does not is a fault too
        found.faults.append(f"{what}: it loads, but {type(error).__name__}: {error}")


class HangError(BaseException):
    """A reader hangs. Not an Exception, which a reader might catch."""


@contextmanager
def no_hang() -> Iterator[None]:
    """Raise HangError in the block after HANG seconds. Does nothing on systems without alarms (Windows)."""

    def stop(number, frame):
        raise HangError(f"no answer in {HANG:g} seconds")

    if not hasattr(signal, "setitimer"):
        yield
        return
    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, HANG)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def mutated(rng: random.Random, content: bytes, start: int, end: int) -> tuple[str, bytes]:
    """A description of the change, and a copy of content with one change between start and end."""
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
    """Content with a value of its JSON replaced, renamed, added or dropped; None if it has no JSON object.

    In a safetensors file the JSON is the header, whose length is updated.
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
    """The start and end of each part in content."""
    return [(at, at + len(part)) for part in parts for at in [content.index(part)]]


def safetensors_places(file: Path) -> tuple[int, int]:
    """The ends of the header and of the file, in bytes."""
    with file.open("rb") as f:
        return 8 + int.from_bytes(f.read(8), "little"), file.stat().st_size


def same_arrays(got: dict, want: dict) -> None:
    """Assert that both have the same names and bytes."""
    assert got.keys() == want.keys(), f"tensors {sorted(got.keys() ^ want.keys())[:3]} are missing or unexpected"
    for name in want:
        assert np.asarray(got[name]).tobytes() == np.asarray(want[name]).tobytes(), f"{name} differs"


def checkpoint_specimen(folder: Path) -> Specimen:
    """numpy-gpt's own format: every answer must be the original, unless the checksums were recomputed."""
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
    """Recompute a checkpoint's checksums, if its header can still be parsed."""
    stop = 8 + int.from_bytes(content[:8], "little")
    try:
        header = json.loads(content[8:stop])
        metadata, entries = header["__metadata__"], {n: e for n, e in header.items() if n != "__metadata__"}
        offsets = {n: slice(*(stop + at for at in entry["data_offsets"])) for n, entry in entries.items()}
        metadata.pop(SHA256, None)
        if json.loads(metadata[CRC32]).keys() == entries.keys():  # else the names are the damage: keep it
            metadata[CRC32] = json.dumps({n: zlib.crc32(content[part]) for n, part in offsets.items()})
        sealed = json.dumps([metadata, {n: (e["dtype"], e["shape"]) for n, e in entries.items()}], sort_keys=True)
        metadata[SHA256] = hashlib.sha256(sealed.encode()).hexdigest()
    except (ValueError, KeyError, TypeError, AttributeError):
        return
    text = json.dumps(header).encode()
    content[:stop] = struct.pack("<Q", len(text)) + text


def read_source(place: Path):
    """Configuration and parameters of another program's folder, as `import` reads them."""
    source = open_source(place)
    return source.config, {name: tensor.finite(place, name).read() for name, tensor in source.tensors.items()}


def check_config(config: GPTConfig, values: dict, keys: dict[str, str]) -> None:
    """Assert that a configuration matches the JSON."""
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
"""The other keys of config.json that affect the results. A mutant with other values must not load."""


def huggingface_specimen(folder: Path) -> Specimen:
    """A format without checksums: the answer must match the mutant as read by the format's own library."""
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
        for key, value in SAID.items():  # if left out, the default, as in SAID
            assert values.get(key, value) == config.drop_rate if "pdrop" in key else values.get(key, value) == value, (
                key
            )
        assert config.tie_weights == values.get("tie_word_embeddings", True)
        arrays = {n: a for file in place.glob("model-*.safetensors") for n, a in load_file(file).items()}
        arrays = {name.removeprefix(PREFIX): array for name, array in arrays.items()}
        arrays = {name: array for name, array in arrays.items() if not BUFFERS.fullmatch(name)}
        check_layout(config, params, arrays)

    return Specimen(folder, places, read_source, check)


LAST = {"scale": "weight", "shift": "bias"}
"""The book's last part of a LayerNorm's names -> GPT-2's."""


def check_layout(config: GPTConfig, params: dict, theirs: dict) -> None:
    """Assert that the book's parameters equal GPT-2's tensors, all of them, by an independent copy of the layout."""
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
    assert used | tied_head >= theirs.keys(), f"{sorted(theirs.keys() - used)[:3]} are unused"


def openai_specimen(folder: Path) -> Specimen:
    """OpenAI's format: TensorFlow's checksums guarantee the original's tensors, unless they were recomputed."""
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
    """TensorFlow's masked CRC-32C of content, as stored."""
    crc = crc32c(bytes(content))
    return struct.pack("<I", ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF)


def reseal_table(content: bytearray) -> None:
    """Recompute the checksums of an index's blocks, as far as its handles can be followed."""

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
    if offset + size <= footer:  # the index block's one entry: the data block's handle
        _, at = number(offset)
        own, at = number(at)
        _, at = number(at)
        first, at = number(at + own)
        length, at = number(at)
        reseal(first, length)
        reseal(offset, size)


STRINGS = ("", "\0", "../..", "/", "/dev/zero", "x" * 5000, "NaN", "-inf", "1e999", "-1", "0x7", "\u0667", "9" * 5000)
"""Hostile values for a checkpoint's metadata."""

NUMBERS = (0, 1, -1, 2**31, 2**53, 2**62, 2**63 - 1, -(2**63), 1e300, 1e-40, float("nan"), float("inf"), -0.5)
"""Hostile values for an array's element."""

STEPS = 3


def run_specimen(folder: Path) -> Specimen:
    """A run to resume: values made hostile under valid checksums, and run.json and losses.csv damaged.

    The resumed state must match the mutant, and be one that a run on this text can reach.
    """
    (folder / "text.txt").write_text("What is taken up again is what was there. " * 12)
    settings = replace(for_tiny, text=str(folder / "text.txt"), context_length=8, batch_size=4, max_steps=10)
    batches, config = Batches(settings), GPTConfig(257, 8, 8, 2, 1, 0.0)
    learner, position = NumpyLearner(config, settings, 10), Position()
    with Run.create(folder / "run", settings, batches) as run:
        for step in train(learner, *batches.loaders(learner), STEPS, 1, 1, position):
            run.losses.append(step, 0.5)
        run.save(config, learner, position, batches, Validation(2.0, 1), keep=2)
    checkpoint = "run/checkpoint"
    (state,) = (folder / checkpoint).glob("training-*")
    files = {"metadata": f"{checkpoint}/model.safetensors", "state": f"{checkpoint}/{state.name}"}
    files |= {"run.json": "run/run.json", "losses.csv": "run/losses.csv"}
    places = {place: [(name, 0, (folder / name).stat().st_size)] for place, name in files.items()}

    def read(place):
        with tempfile.TemporaryDirectory(dir=place.parent) as copy:  # resuming writes
            run = shutil.copytree(place / "run", Path(copy, "run"))
            name_the_state(run / "checkpoint", state.name)
            return resumed(run, batches)

    def check(place, answer):
        settings, position, learner, rows = answer
        said = json.loads((place / "run" / "run.json").read_text())["settings"]
        added = json.loads(json.dumps({name: asdict(Settings())[name] for name in ADDED}))  # earlier releases lack them
        assert json.loads(json.dumps(asdict(settings))) == added | said
        assert all(type(getattr(settings, name)) is not bool for name in ("epochs", "batch_size", "seed", "lr"))
        assert 0 < settings.lr < float("inf"), f"the learning rate is {settings.lr}"
        assert min(settings.batch_size, settings.eval_freq, settings.eval_iter) >= 1
        held = load_file(place / "run" / "checkpoint" / state.name)
        got = learner.state() | position.state()
        assert got.keys() == held.keys() - ({"loop.order"} if position.order is None else set())
        for name, array in got.items():
            assert np.array_equal(array, held[name]), f"{name} differs"
            assert np.isfinite(array).all(), f"{name} is not finite"
        assert position.step == position.epoch * batches.batches_per_epoch + position.batch
        assert position.batch < batches.batches_per_epoch
        with (place / "run" / "losses.csv").open(newline="") as f:
            table = [cells for cells in list(csv.reader(f))[1:] if len(cells) == len(COLUMNS) and cells[-1]]
        assert [list(map(float, row.values())) for row in rows] == [list(map(float, cells)) for cells in table] or any(
            "nan" in cell for cells in table for cell in cells
        )

    edits = {"metadata": hostile_metadata, "state": hostile_state}
    return Specimen(folder, places, read, check, reseal_run, edits, floor=HEADER)


def resumed(run: Path, batches: Batches):
    """The state that `pretrain --resume` restores; also reads what `evaluate` and `info` need of the checkpoint."""
    opened = Run.open(run)
    config, params = load_params(opened.to_resume)
    header = read_header(run)
    encoding, (_, text) = get_encoding(encoding_of(header)), text_of(header)
    assert encoding.n_vocab
    assert text
    position, state = opened.saved_state(opened.settings, batches.sha256)
    position.check_fits(batches.windows, batches.batches_per_epoch)
    learner = NumpyLearner(config, opened.settings, 10, params)
    learner.restore(state)
    rows = opened.losses.read()
    opened.best_batches(5)
    opened.resume(opened.settings, batches.sha256, position, 2)
    return opened.settings, position, learner, rows


def name_the_state(folder: Path, name: str) -> None:
    """Rename a checkpoint's training state to match its seal, and update the name in the model's file."""
    content = (folder / name).read_bytes()
    header = header_of(content)
    new = f"training-{header['__metadata__'][SHA256][:16]}.safetensors"
    if new == name:
        return
    (folder / name).rename(folder / new)
    model = bytearray((folder / "model.safetensors").read_bytes())
    with_header(model, {**header_of(model), "__metadata__": header_of(model)["__metadata__"] | {"training": new}})
    reseal_safetensors("", model)
    (folder / "model.safetensors").write_bytes(model)


def header_of(content: bytes) -> dict:
    return json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])


def with_header(content: bytearray, header: dict) -> None:
    """Replace a safetensors file's header."""
    text = json.dumps(header).encode()
    content[: 8 + int.from_bytes(content[:8], "little")] = struct.pack("<Q", len(text)) + text


def hostile_metadata(rng: random.Random, content: bytes) -> tuple[str, bytes]:
    """Replace a value of a checkpoint's metadata, or of its configuration, under a valid seal."""
    header, out = header_of(content), bytearray(content)
    about = header["__metadata__"]
    key = rng.choice([key for key in about if key not in (SHA256, CRC32)])
    if key == "config" and rng.random() < 0.8:
        values = json.loads(about[key])
        inner = rng.choice(list(values))
        values[inner] = value = rng.choice(STRANGE)
        about[key], key = json.dumps(values), f"{key}.{inner}"
    else:
        about[key] = value = rng.choice(STRINGS)
    with_header(out, header)
    reseal_safetensors("", out)
    return f"{key} made {str(value)[:40]!r}", bytes(out)


def hostile_state(rng: random.Random, content: bytes) -> tuple[str, bytes]:
    """Change an array's value, shape or dtype in a training state, or drop it, under valid checksums."""
    arrays = load_arrays(content)
    name = rng.choice(sorted(arrays, key=lambda name: name.startswith("optimizer.m"))[:4] + list(arrays))
    array, how = arrays[name], rng.choice(("value", "value", "value", "dtype", "shape", "cut", "missing"))
    if how == "value":
        value = rng.choice(NUMBERS)
        if array.dtype.kind != "f":
            limits = np.iinfo(array.dtype)
            value = int(min(max(value, limits.min), limits.max)) if value == value else rng.randrange(100)
        with np.errstate(over="ignore"):
            array.reshape(-1)[rng.randrange(array.size)] = value
        how = f"value {value}"
    elif how == "dtype":
        arrays[name] = array.astype(rng.choice((np.float64, np.int64, np.uint8, np.bool_)))
    elif how == "shape":
        arrays[name] = array[None]
    elif how == "cut":
        arrays[name] = array[: rng.randrange(len(array))]
    else:
        del arrays[name]
    about = {"format": "numpy-gpt training", "version": "1"}
    return f"{name}: {how}", save_arrays(arrays, seal(arrays, about))


def reseal_run(name: str, content: bytearray) -> None:
    """Recompute the SHA-256 of a run.json, if it is still JSON; losses.csv has none."""
    try:
        values = json.loads(content)
        sealed = json.dumps([values["settings"], values["text_sha256"]], sort_keys=True)
    except (ValueError, KeyError, TypeError):
        return
    content[:] = json.dumps(values | {"sha256": hashlib.sha256(sealed.encode()).hexdigest()}).encode()


def vocabulary_specimen(folder: Path) -> Specimen:
    """A vocabulary: its encoding must give the same tokens as the tokenizers library with the same files."""
    from tokenizers import ByteLevelBPETokenizer

    fixture = Path(__file__).parents[1] / "fixtures" / "tiny_gpt2"
    for name in GPT2_FILES:
        shutil.copy(fixture / name, folder)
    ids = json.loads((folder / "encoder.json").read_text(encoding="utf-8"))
    added = (AddedToken(END_OF_TEXT, ids[END_OF_TEXT]), AddedToken("<pad>", len(ids), lstrip=True))
    (folder / "tokens.json").write_bytes(Extras(added, END_OF_TEXT).to_json())
    places = {
        name: [(name, 0, (folder / name).stat().st_size)] for name in ("encoder.json", "vocab.bpe", "tokens.json")
    }
    text = "The tokens of these files, and 12 others; there is\n  another\u00e9."

    def check(place, encoding):
        got = encoding.encode_ordinary(text)
        known = json.loads((place / "encoder.json").read_text(encoding="utf-8"))
        lines = (place / "vocab.bpe").read_text(encoding="utf-8").replace("\r\n", "\n").split("\n")
        merges = [tuple(line.split(" ")) for line in lines if line and not line.startswith("#version")]
        prefix = (
            json.loads((place / "tokens.json").read_text())["add_prefix_space"]
            if (place / "tokens.json").exists()
            else False
        )
        judge = ByteLevelBPETokenizer(known, merges, add_prefix_space=prefix)
        assert got == judge.encode(text).ids, f"other tokens: {got}"
        assert encoding.decode(got).strip() == text.strip()

    return Specimen(folder, places, lambda place: get_encoding(str(place)), check, floor=SMALL)


def pth_specimen(folder: Path) -> Specimen:
    """The book's model by torch.save: the answer must have the numbers that torch itself reads from the mutant."""
    import torch

    from torch_gpt.weights import read_pth

    config = GPTConfig(SIZE["vocab_size"], SIZE["n_positions"], 64, 1, 1, 0.1)
    params = {name: torch.from_numpy(array) for name, array in GPT(config, seed=1).params.items()}
    torch.save(params, file := folder / "model.pth")
    with zipfile.ZipFile(file) as archive:
        members = {member.filename.partition("/")[2]: member for member in archive.infolist()}
        pickle, last = members["data.pkl"], archive.start_dir
    size, start = file.stat().st_size, pickle.header_offset
    places = {
        "header": [(file.name, start, start + 64)],
        "index": [(file.name, last, size)],
        "data": [(file.name, start + pickle.file_size + 128, last)],
        "configuration": [(file.name, start + 64, start + 64 + pickle.file_size)],
    }

    def read(place):
        source = read_pth(place / file.name, 1)
        return source.config, {name: tensor.finite(place, name).read() for name, tensor in source.tensors.items()}

    def check(place, answer):
        tensors = torch.load(place / file.name, map_location="cpu", weights_only=True)  # from any device
        for name, array in answer[1].items():
            want = tensors[name].resolve_neg().numpy()
            assert array.shape == want.shape, f"{name} has another shape"
            assert array.tobytes() == want.tobytes(), f"{name} differs"

    return Specimen(folder, places, read, check)


def fuzz_part(reader: str, mutants: int, seed: int) -> Findings:
    """Run `fuzz` with its own specimen and folder, for use in a separate process."""
    place = Path("/dev/shm") if Path("/dev/shm").is_dir() else None
    with tempfile.TemporaryDirectory(dir=place) as folder:
        (original := Path(folder, "original")).mkdir()
        return fuzz(SPECIMENS[reader](original), mutants, seed, Path(folder, "mutant"))


SPECIMENS = {
    "checkpoint": checkpoint_specimen,
    "openai": openai_specimen,
    "huggingface": huggingface_specimen,
    "run": run_specimen,
    "pth": pth_specimen,
    "vocabulary": vocabulary_specimen,
}
"""Reader -> function that makes its specimen in a folder."""
