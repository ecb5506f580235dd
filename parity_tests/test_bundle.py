"""TensorFlow checkpoints: TensorFlow's own file is read, bundles round-trip, and every false field is a clear error.

judge/bundles.py writes the bundles, with google-crc32c's checksums; TensorFlow wrote tiny_gpt2
(parity_tests/tools/tensorflow_fixture.py).
"""

import json
import math
import re
import tracemalloc
from pathlib import Path

import google_crc32c
import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes

from numpy_gpt.errors import InputError
from numpy_gpt.weights.tensorflow.bundle import read_bundle
from numpy_gpt.weights.tensorflow.crc32c import ROW, crc32c, unmask
from parity_tests.judge.bundles import (
    DTYPES,
    block,
    entry,
    header,
    index,
    mask,
    message,
    table,
    varint,
    with_restarts,
    write,
)

TINY = Path(__file__).parent / "fixtures" / "tiny_gpt2"

DTYPES |= {"bool": 10, "bfloat16": 14, "uint16": 17, "complex128": 18, "float16": 19, "uint32": 22, "uint64": 23}
"""TensorFlow's DataType (types.proto), by NumPy's name or TensorFlow's."""


# -- the checksum


@pytest.mark.parametrize(
    ("data", "want"),
    [
        (bytes(32), 0x8A9136AA),  # these four: RFC 3720, B.4
        (b"\xff" * 32, 0x62A8AB43),
        (bytes(range(32)), 0x46DD794E),
        (bytes(range(31, -1, -1)), 0x113FDB5C),
        (b"123456789", 0xE3069283),  # the check value in Williams' and Cook's catalogues
        (b"", 0),
    ],
    ids=["zeros", "ones", "up", "down", "digits", "empty"],
)
def test_crc32c_of_published_data(data, want):
    assert crc32c(data) == want


@given(st.integers(0, 5000), st.integers(0, 2**32 - 1), st.data())
def test_crc32c_matches_google_and_continues(size, seed, data):
    content = np.random.default_rng(seed).bytes(size)
    want = google_crc32c.value(content)
    assert crc32c(content) == want
    cut = data.draw(st.integers(0, size))
    assert crc32c(content[cut:], crc32c(content[:cut])) == want
    assert crc32c(memoryview(content)[cut:]) == google_crc32c.value(content[cut:])


@pytest.mark.parametrize("size", [4 * ROW + extra for extra in range(-5, 6)] + [12 * ROW, 28 * ROW + 4, 5_000_003])
def test_crc32c_at_row_boundaries(size):
    content = np.random.default_rng(size).integers(0, 256, size, np.uint8)
    assert crc32c(content) == google_crc32c.value(content.tobytes())


def test_crc32c_accepts_arrays_unchanged():
    array = np.arange(24, dtype=np.float64).reshape(4, 6)
    array.flags.writeable = False
    assert crc32c(array) == google_crc32c.value(array.tobytes())
    assert crc32c(array[:0]) == 0
    assert crc32c(np.array(3, np.int64)) == google_crc32c.value(b"\3" + bytes(7))


def test_crc32c_needs_little_memory():
    content = np.zeros(20_000_000, np.uint8)
    crc32c(content)
    tracemalloc.start()
    crc32c(content)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1e6, f"{peak:,} bytes"


@given(st.integers(0, 2**32 - 1))
@example(0)
def test_unmask_inverts_mask(crc):
    assert unmask(mask(crc)) == crc


# -- round trips


@st.composite
def tensors_(draw):
    """name -> (dtype, shape, array): every dtype, scalars, empty axes, names with long or no common prefixes."""
    names = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=9)
    names |= st.builds("model/h{}/{}".format, st.integers(0, 99), st.sampled_from(["w", "b", "w/Adam", "w/Adam_1"]))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    made = {}
    for name in draw(st.lists(names.filter(lambda name: name[0] != "\0"), max_size=40, unique=True)):
        dtype = draw(st.sampled_from(list(DTYPES)))
        shape = draw(st.just(()) | array_shapes(min_dims=1, max_dims=4, min_side=0, max_side=4))
        held = np.dtype("uint16" if dtype == "bfloat16" else dtype)
        numbers = rng.integers(0, 256, math.prod(shape) * held.itemsize, np.uint8)
        made[name] = dtype, shape, (numbers % 2 if dtype == "bool" else numbers).view(held).reshape(shape)
    return made


@given(tensors_(), st.integers(1, 4), st.booleans(), st.integers(1, 16), st.integers(1, 12))
def test_bundles_round_trip(tmp_path_factory, made, shards, big_endian, interval, keys_a_block):
    order = ">" if big_endian else "<"
    raw = {name: (d, shape, a.astype(a.dtype.newbyteorder(order)).tobytes()) for name, (d, shape, a) in made.items()}
    prefix = write(tmp_path_factory.mktemp("bundle"), raw, shards, int(big_endian), interval, keys_a_block)
    bundle = read_bundle(prefix)
    assert list(bundle) == sorted(made, key=str.encode)
    for name, (dtype, shape, array) in made.items():
        if dtype == "bfloat16":  # a float32 is the bfloat16 followed by two zero bytes
            pairs = [(0, int(upper)) for upper in array.reshape(-1)]
            array = np.array(pairs, "<u2").reshape(-1).view("<f4").reshape(shape)
        stored, got = bundle[name], bundle[name].read()
        assert isinstance(got, np.ndarray), name
        assert got.dtype == stored.dtype == array.dtype, name
        assert got.shape == stored.shape == shape, name
        assert got.tobytes() == array.tobytes(), name
        got[...] = 0  # every read returns a new array
        assert stored.read().tobytes() == array.tobytes(), name


def test_growing_names_with_restarts_are_read(tmp_path):
    tensors = {"a" * k: ("uint8", (1,), bytes([k])) for k in range(1, 200)}
    bundle = read_bundle(write(tmp_path, tensors))
    assert [stored.read().item() for stored in bundle.values()] == list(range(1, 200))


def shapes_of_tiny():
    """Names and shapes of OpenAI's graph, at the fixture's sizes."""
    sizes = json.loads((TINY / "hparams.json").read_text())
    C = sizes["n_embd"]
    shapes = {"wpe": (sizes["n_ctx"], C), "wte": (sizes["n_vocab"], C), "ln_f/g": (C,), "ln_f/b": (C,)}
    for i in range(sizes["n_layer"]):
        shapes |= {f"h{i}/{norm}/{part}": (C,) for norm in ("ln_1", "ln_2") for part in "gb"}
        for layer, n, m in (("attn/c_attn", 1, 3), ("attn/c_proj", 1, 1), ("mlp/c_fc", 1, 4), ("mlp/c_proj", 4, 1)):
            shapes |= {f"h{i}/{layer}/w": (1, n * C, m * C), f"h{i}/{layer}/b": (m * C,)}
    return {f"model/{name}": shape for name, shape in shapes.items()}


def test_tensorflows_file_is_read():
    bundle = read_bundle(TINY / "model.ckpt")
    shapes = shapes_of_tiny()
    assert {name: stored.shape for name, stored in bundle.items()} == shapes
    # TensorFlow stores the tensors contiguously, in order of their names
    flat = np.fromfile(TINY / "model.ckpt.data-00000-of-00001", "<f4")
    for name in sorted(shapes):
        numbers, flat = np.split(flat, [math.prod(shapes[name])])
        got = bundle[name].read()
        assert got.dtype == bundle[name].dtype == np.float32
        assert np.array_equal(got, numbers.reshape(shapes[name])), name
        around = 1 if name.endswith("/g") else 0
        assert 0.05 < np.sqrt(np.mean((got - around) ** 2)) < 0.6, f"{name} is not as the script drew it"
    assert flat.size == 0


def test_fixture_vocabulary_is_in_release_format():
    from tiktoken.load import data_gym_to_mergeable_bpe_ranks

    ranks = data_gym_to_mergeable_bpe_ranks(str(TINY / "vocab.bpe"), str(TINY / "encoder.json"))
    assert len(ranks) + 1 == json.loads((TINY / "hparams.json").read_text())["n_vocab"]
    assert json.loads((TINY / "encoder.json").read_text())["<|endoftext|>"] == len(ranks)
    assert {bytes([b]) for b in range(256)} < set(ranks)


# -- unusable entries do not prevent reading the others


NUMBERS = np.array([1, 2], "<f4").tobytes()
GOOD = entry(crc=google_crc32c.value(NUMBERS))


def index_of(*items, data=NUMBERS):
    """The files of a bundle with a valid header, these items and this data."""
    return index(block([(b"", header()), *items])) | {"m.data-00000-of-00001": data}


def put(folder, files):
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return folder / "m"


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (entry(dtype=7, shape=(), size=0, offset=8), "other has TensorFlow's dtype 7, which NumPy lacks"),
        (entry(dtype=20, size=0, offset=8), "other has TensorFlow's dtype 20"),
        (entry(dtype=0, size=0, offset=8), "other has TensorFlow's dtype 0"),
        (entry(shape=(10, 4), size=0, more=[(7, b"")]), "other is saved in slices"),
    ],
    ids=["a string", "a resource", "no dtype", "slices"],
)
def test_unreadable_tensor_raises_on_read(tmp_path, other, message):
    bundle = read_bundle(put(tmp_path, index_of((b"\0\xff", GOOD), (b"good", GOOD), (b"other", other))))
    assert list(bundle) == ["good", "other"]  # not the slice, whose key is not text
    assert bundle["good"].read().tolist() == [1, 2]
    with pytest.raises(InputError, match=message) as error:
        bundle["other"].read()
    assert "save the model again" in str(error.value)


def test_unknown_fields_are_skipped_and_last_duplicate_wins(tmp_path):
    strange = message((1, 3), (99, 2**62), (98, b"abc"), (97, [5])) + varint(96 << 3 | 1) + b"\x0f" * 8 + GOOD
    assert read_bundle(put(tmp_path, index_of((b"a", strange))))["a"].read().tolist() == [1, 2]


def test_any_nonzero_byte_is_true(tmp_path):
    octets = bytes([0, 1, 2, 255])
    odd = entry(dtype=10, shape=(4,), size=4, crc=google_crc32c.value(octets))
    got = read_bundle(put(tmp_path, index_of((b"a", odd), data=octets)))["a"].read()
    assert got.tobytes() == b"\0\1\1\1"


# -- false fields


def one(key, value, shared=0, own=None, size=None):
    """One entry of a block; own and size: the lengths declared."""
    own, size = len(key) if own is None else own, len(value) if size is None else size
    return varint(shared) + varint(own) + varint(size) + key + value


def lying_block(*entries, restarts=(0,)):
    return index(with_restarts(one(b"", header()) + b"".join(entries), restarts))


HEADED = block([(b"", header()), (b"a", GOOD)])
HUGE = 2**62
MINUS_1 = 2**64 - 1
"""−1 as a stored varint."""

FALSE_FIELDS = {
    "an empty index": ({"m.index": b""}, "does not end like TensorFlow's index files"),
    "another kind of file": ({"m.index": b"PK" * 99}, "does not end like TensorFlow's index files"),
    "no block": (index(), "no header"),
    "an empty block": (index(block([])), "no header"),
    "no header": (index(block([(b"a", GOOD)])), "no header"),
    "no shards": (index(block([(b"", header(0)), (b"a", GOOD)])), "no header"),
    "a number of shards below 0": (index(block([(b"", header(MINUS_1))])), "negative or 2"),
    "shards without end": (index(block([(b"", header(HUGE)), (b"a", GOOD)])), f"of-{HUGE} does not exist"),
    "an unknown order": (index(block([(b"", header(1, 2))])), "no header"),
    "a later format": (index(block([(b"", header(1, 0, 2))])), "requires a newer reader"),
    "a header of other types": (index(block([(b"", message((1, b"x")))])), "field 1 is written in another way"),
    "Snappy": (index(HEADED, kind=1), "compressed with Snappy.*save it again"),
    "an unknown compression": (index(HEADED, kind=2), "compressed in an unknown way"),
    "a block twice": (index(HEADED, handles=[(0, len(HEADED))] * 2), "overlaps the previous one"),
    "a block beyond the file": (index(HEADED, handles=[(0, HUGE)]), "reaches beyond its end"),
    "a block far beyond": (index(HEADED, handles=[(HUGE, HUGE)]), "reaches beyond its end"),
    "a block before the file": (index(HEADED, handles=[(MINUS_1, 5)]), "negative or 2"),
    "a block elsewhere": (index(HEADED, handles=[(1, len(HEADED))]), "checksum of its block at 1 is wrong"),
    "a block of 3 bytes": (index(b"\1\0\0"), "of 3 bytes cannot have 1 restarts"),
    "no restarts": (lying_block(restarts=()), "cannot have 0 restarts"),
    "restarts longer than the block": (index(bytes(8) + b"\3\0\0\0"), "of 12 bytes cannot have 3 restarts"),
    "restarts without end": (index(bytes(8) + b"\xff" * 4), "cannot have 4294967295 restarts"),
    "more shared than there is": (lying_block(one(b"a", GOOD, shared=1)), "shares 1 bytes with one of 0"),
    "shared without end": (lying_block(one(b"a", GOOD, shared=HUGE)), f"shares {HUGE} bytes"),
    "a key beyond the block": (lying_block(one(b"a", GOOD, own=len(GOOD) + 2)), "reaches beyond its block"),
    "a value beyond the block": (lying_block(one(b"a", GOOD, size=HUGE)), "reaches beyond its block"),
    "a length cut short": (lying_block(b"\0\x80"), "cut short or too long"),
    "a length of 11 bytes": (lying_block(b"\x80" * 10 + b"\1" * 99), "cut short or too long"),
    "keys that grow": (lying_block(*(one(b"a", b"", shared=k) for k in range(20_000))), "share more than TensorFlow's"),
    "keys twice": (index_of((b"a", GOOD), (b"a", GOOD)), "b'a' is repeated or out of order"),
    "keys out of order": (index_of((b"b", GOOD), (b"a", GOOD)), "b'a' is repeated or out of order"),
    "keys out of order over blocks": (index(HEADED, HEADED), "b'' is repeated or out of order"),
    "two headers": (index_of((b"", header())), "b'' is repeated"),
    "a key that is no text": (index_of((b"a\xff", GOOD)), "not UTF-8"),
    "a shard too many": (index_of((b"a", entry(shard=1))), "a is in shard 1 of 1"),
    "a shard below 0": (index_of((b"a", entry(shard=MINUS_1))), "negative or 2"),
    "an offset below 0": (index_of((b"a", entry(offset=MINUS_1))), "negative or 2"),
    "an offset beyond the data": (index_of((b"a", entry(offset=1))), "has 8 bytes, but a would end at 9:"),
    "an offset far beyond": (index_of((b"a", entry(offset=2**63 - 1))), f"but a would end at {2**63 + 7}:"),
    "a size beyond the data": (index_of((b"a", entry(shape=(HUGE // 16,), size=HUGE // 4))), f"end at {HUGE // 4}:"),
    "a size below 0": (index_of((b"a", entry(size=MINUS_1))), "negative or 2"),
    "a size that overflows": (index_of((b"a", entry(shape=(2**32, 2**30), size=0))), "too long"),
    "a shape for another size": (index_of((b"a", entry(shape=(3,)))), r"shape \(3,\), 4 bytes per number, has 8 bytes"),
    "an axis below 0": (index_of((b"a", entry(shape=(MINUS_1,)))), "negative or 2"),
    "a long axis beside an empty one": (index_of((b"a", entry(shape=(0, HUGE, HUGE), size=0))), "too long"),
    "65 axes": (index_of((b"a", entry(shape=(1,) * 65, size=4))), "more than 64 axes"),
    "100,000 axes": (index_of((b"a", entry(shape=(0,) * 100_000, size=0))), "more than 64 axes"),
    "no shape": (index_of((b"a", message((2, message((3, 1)))))), "or an unknown number"),
    "a shape that is no message": (index_of((b"a", message((2, b"\x0f")))), "written in an unknown way"),
    "a field beyond its message": (index_of((b"a", b"\x12\x7f")), "reaches beyond its end"),
    "a tensor over another": (index_of((b"a", GOOD), (b"b", entry(offset=4)), data=bytes(12)), "b overlaps another"),
    "one tensor twice": (index_of((b"a", GOOD), (b"b", GOOD)), "b overlaps another"),
}

SLACK = 24 * ROW + 100_000
"""Bytes allowed beyond 3 × the files: the checksum's scratch for one row, and 30 entries with their readers."""


@pytest.fixture(scope="module", autouse=True)
def tables_of_zeros():
    """Build the checksum's tables first: they are made once per process, not per file."""
    crc32c(bytes(8 * ROW))


def attempt(prefix):
    """All tensors of a bundle, or its InputError. Any other error or too much memory fails the test."""
    total = sum(file.stat().st_size for file in prefix.parent.iterdir())
    tracemalloc.start()
    try:
        result = {name: stored.read() for name, stored in read_bundle(prefix).items()}
    except InputError as error:
        result = error
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 3 * total + SLACK, f"{peak:,} bytes for {total:,}"
    return result


@pytest.mark.parametrize(("files", "message"), FALSE_FIELDS.values(), ids=FALSE_FIELDS)
def test_false_fields_are_named(tmp_path, files, message):
    result = attempt(put(tmp_path, {"m.data-00000-of-00001": NUMBERS} | files))
    assert isinstance(result, InputError), result
    assert re.search(message, str(result)), result
    assert str(tmp_path / "m.") in str(result)
    assert re.search("download it|save it again", str(result)), f"no fix: {result}"


@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "bool"])
@pytest.mark.parametrize("big_endian", [0, 1])
def test_large_tensor_needs_at_most_three_times_its_bytes(tmp_path, dtype, big_endian):
    size = 2_000_000
    count = size // {"bfloat16": 2, "float32": 4, "bool": 1}[dtype]
    prefix = write(tmp_path, {"a": (dtype, (count,), bytes(size))}, 1, big_endian)
    assert not attempt(prefix)["a"].any()


def copy_of_tiny(folder):
    return put(folder, {file.name.replace("model.ckpt", "m"): file.read_bytes() for file in TINY.glob("model.ckpt.*")})


def test_data_truncated_after_opening_fails_its_checksum(tmp_path):
    half = entry(crc=google_crc32c.value(NUMBERS[:4]))
    stored = read_bundle(put(tmp_path, index_of((b"a", half))))["a"]
    (tmp_path / "m.data-00000-of-00001").write_bytes(NUMBERS[:4])
    with pytest.raises(InputError, match="the checksum of a is wrong"):
        stored.read()


def raiser(error):
    def call(*_):
        raise error

    return call


def test_missing_and_changed_files_are_named(tmp_path, monkeypatch):
    prefix = copy_of_tiny(tmp_path)
    data, index = tmp_path / "m.data-00000-of-00001", tmp_path / "m.index"
    content = data.read_bytes()
    bundle = read_bundle(prefix)
    name, stored = list(bundle.items())[-1]
    for wrong in (content[:-1], content[:-1] + bytes([content[-1] ^ 1])):
        data.write_bytes(wrong)
        with pytest.raises(InputError, match=f"{data} is damaged: the checksum of {name} is wrong: download it again"):
            stored.read()
    assert next(iter(bundle.values())).read().size, "the first tensor is intact"
    data.write_bytes(content[:-1])
    with pytest.raises(InputError, match=f"{data} has 29711 bytes, but {name} would end at 29712: download it again"):
        read_bundle(prefix)
    data.unlink()
    with pytest.raises(InputError, match=f"{name} cannot be read from {data} .*No such file"):
        stored.read()
    with pytest.raises(InputError, match=f"{data} does not exist, but {index} needs it"):
        read_bundle(prefix)
    data.write_bytes(content)
    for error in (OSError(5, "no reason"), MemoryError("no reason")):
        with monkeypatch.context() as patch:
            patch.setattr(Path, "read_bytes", raiser(error))
            with pytest.raises(InputError, match=f"{index} cannot be read .*no reason"):
                read_bundle(prefix)
        with monkeypatch.context() as patch:
            patch.setattr(np, "fromfile", raiser(error))
            with pytest.raises(InputError, match=f"{name} cannot be read from {data} .*no reason"):
                stored.read()
    assert stored.read().shape == stored.shape
    index.unlink()
    with pytest.raises(InputError, match=f"{index} does not exist: give the prefix"):
        read_bundle(prefix)
    with pytest.raises(InputError, match="does not exist"):
        read_bundle(Path())


def mutated(content, rng):
    """One to three changes: a bit flipped; bytes overwritten, truncated, deleted or inserted; the start repeated."""
    changed = bytearray(content)
    for _ in range(rng.integers(1, 4)):
        at, length = int(rng.integers(0, len(changed) + 1)), int(rng.integers(1, 20))
        kind = rng.integers(0, 6)
        if kind == 0 and at < len(changed):
            changed[at] ^= 1 << int(rng.integers(0, 8))
        elif kind == 1:
            changed[at : at + length] = [b"\0", b"\xff", b"\x80", b"\1"][rng.integers(0, 4)] * length
        elif kind == 2:
            del changed[at:]
        elif kind == 3:
            del changed[at : at + length]
        elif kind == 4:
            changed[at:at] = rng.bytes(length)
        else:
            changed[at:at] = changed[:length]
    return bytes(changed)


@pytest.mark.parametrize(("file", "count"), [("m.index", 1500), ("m.data-00000-of-00001", 300)])
def test_damaged_bundle_is_identical_or_refused(tmp_path, file, count):
    prefix = copy_of_tiny(tmp_path)
    want, content = attempt(prefix), (tmp_path / file).read_bytes()
    refused = 0
    for seed in range(count):
        (tmp_path / file).write_bytes(mutated(content, np.random.default_rng(seed)))
        got = attempt(prefix)
        if isinstance(got, InputError):
            refused += 1
            continue
        assert list(got) == list(want), f"seed {seed}"
        assert all(np.array_equal(got[name], want[name]) for name in want), f"seed {seed}"
    assert refused > 0.8 * count  # the rest hit the footer's padding or bytes after the last tensor, or changed nothing


def test_every_byte_of_the_index_is_checked(tmp_path):
    """Flip one bit of each byte in turn, except in the last 48, which contain padding."""
    prefix = copy_of_tiny(tmp_path)
    whole = (tmp_path / "m.index").read_bytes()
    for at in range(len(whole) - 48):
        changed = bytearray(whole)
        changed[at] ^= 1 << at % 8
        (tmp_path / "m.index").write_bytes(changed)
        with pytest.raises(InputError, match=r"the checksum of its block at \d+ is wrong\): it is damaged"):
            read_bundle(prefix)


def test_damage_under_valid_checksums_is_read_or_refused(tmp_path):
    """The block is rebuilt with a valid checksum after the damage, so the damage reaches the parser."""
    prefix = copy_of_tiny(tmp_path)
    file = tmp_path / "m.index"
    low, high = file.read_bytes()[-48:-46]  # the varint offset of the metaindex block, where the block before it ends
    block_ = file.read_bytes()[: (low & 127) + (high << 7) - 5]
    entries = block_[: -4 * (1 + int.from_bytes(block_[-4:], "little"))]
    file.write_bytes(table([with_restarts(entries, [0])]))
    assert list(attempt(prefix)) == list(attempt(TINY / "model.ckpt")), "the entries were not cut out well"
    answers = set()
    for seed in range(700):
        file.write_bytes(table([with_restarts(mutated(entries, np.random.default_rng(seed)), [0])]))
        got = attempt(prefix)
        answers.add(re.sub(r"\(.*? of|[\d,]+|'.*'|model/\S*", "_", str(got)) if isinstance(got, InputError) else "read")
    assert len(answers) > 10, answers
