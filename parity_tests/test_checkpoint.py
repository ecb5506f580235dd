"""Checkpoints: saves round-trip exactly, and unreadable files raise clear errors."""

import hashlib
import json
import os
import struct
import subprocess
import sys
import tracemalloc
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from safetensors.numpy import load_file, save_file

from numpy_gpt import GPT, AdamW, GPTConfig, load, save
from numpy_gpt.errors import InputError
from numpy_gpt.weights import checkpoint
from numpy_gpt.weights.checkpoint import load_params, load_training, read_header, save_params
from numpy_gpt.weights.tensors import read_tensors, write_tensors
from parity_tests.judge.checkpoints import CONFIG, check_same_bits, check_tied, room_for

configs = st.builds(
    GPTConfig,
    vocab_size=st.integers(1, 20),
    context_length=st.integers(1, 9),
    emb_dim=st.sampled_from([4, 12]),
    n_heads=st.sampled_from([1, 2]),
    n_layers=st.integers(1, 3),
    drop_rate=st.sampled_from([0.0, 0.1, 1.0]),
    qkv_bias=st.booleans(),
    tie_weights=st.booleans(),
)


@given(configs, st.sampled_from([np.float32, np.float64]), st.sampled_from(["run/a", "b.safetensors"]))
def test_save_load_round_trip(tmp_path_factory, config, dtype, where):
    path = tmp_path_factory.mktemp("save") / where
    model = GPT(config, seed=5, dtype=dtype)
    path.parent.mkdir(exist_ok=True)
    save(model, path)
    again = load(path)
    assert again.config == config
    check_same_bits(again.params, model.params)
    tokens = np.zeros((2, config.context_length), int)
    assert np.array_equal(again(tokens), model(tokens))


names = st.text(st.characters(exclude_categories=["Cs"]), max_size=20).filter(lambda name: name != "__metadata__")
dtypes = st.sampled_from(["f2", "f4", "f8", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "?"]).map(np.dtype)
tensors = st.dictionaries(names, dtypes.flatmap(lambda d: arrays(d, array_shapes(min_dims=0, min_side=0))), max_size=5)


@given(tensors, st.dictionaries(st.text(st.characters(exclude_categories=["Cs"]), max_size=9), names, max_size=3))
def test_tensors_round_trip(tmp_path_factory, tensors, metadata):
    """Through our reader and through the safetensors library."""
    for own in ("crc32", "sha256", "__metadata__"):
        metadata.pop(own, None)
    file = tmp_path_factory.mktemp("tensors") / "x.safetensors"
    write_tensors(file, tensors, metadata)
    about, stored = read_tensors(file)
    assert about.items() >= metadata.items()
    assert {n: (t.shape, t.dtype) for n, t in stored.items()} == {n: (a.shape, a.dtype) for n, a in tensors.items()}
    for source in ({n: t.read() for n, t in stored.items()}, load_file(file)):
        check_same_bits(dict(sorted(source.items())), dict(sorted(tensors.items())))


@given(st.integers(0, 2**32 - 1), st.sampled_from([(), (3,), (2, 0), (2, 3)]))
def test_bfloat16_is_widened(tmp_path_factory, bits, shape):
    """bfloat16 is the upper half of a float32 and is read exactly."""
    file = tmp_path_factory.mktemp("bf16") / "x.safetensors"
    values = (np.arange(np.prod(shape, dtype=int), dtype=np.uint32) * 77777 + bits).astype(np.uint32)
    halves = (values >> 16).astype("<u2").tobytes()
    header = {"x": {"dtype": "BF16", "shape": shape, "data_offsets": [0, len(halves)]}}
    text = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + halves)
    _, stored = read_tensors(file)
    got = stored["x"].read()
    assert (got.dtype, got.shape) == (stored["x"].dtype, stored["x"].shape) == (np.float32, shape)
    assert got.tobytes() == (values & 0xFFFF0000).tobytes()


def test_run_folder_loads_its_checkpoint(tmp_path):
    model = GPT(CONFIG)
    save(model, tmp_path / "checkpoint")
    check_same_bits(load(tmp_path).params, model.params)


def test_dtype_defaults_to_the_files(tmp_path):
    save(GPT(CONFIG, dtype=np.float64), tmp_path)
    assert load(tmp_path).dtype == np.float64
    model = load(tmp_path, dtype=np.float32)
    assert {p.dtype for p in model.params.values()} == {np.dtype(np.float32)}


def test_transposed_parameter_is_stored_in_logical_order(tmp_path):
    model = GPT(CONFIG)
    name = "trf_blocks.1.ff.layers.0.weight"
    model.params[name] = np.asfortranarray(model.params[name])
    save(model, tmp_path)
    assert np.array_equal(load(tmp_path).params[name], model.params[name])


def test_tied_model_stays_tied():
    check_tied()


def test_saved_model_and_optimiser_continue_exactly(tmp_path):
    rng = np.random.default_rng(0)
    batches = [rng.integers(0, 11, (2, 3, 6)) for _ in range(6)]

    def steps(model, optimizer, batches):
        for x, y in batches:
            optimizer.step(model.loss_and_grads(x, y)[1])

    model = GPT(CONFIG)
    optimizer = AdamW(model.params, lr=0.01)
    steps(model, optimizer, batches[:3])
    save(model, tmp_path, training=optimizer.state())
    steps(model, optimizer, batches[3:])

    again = load(tmp_path)
    optimizer = AdamW(again.params, lr=0.01)
    optimizer.restore(load_training(tmp_path))
    steps(again, optimizer, batches[3:])
    check_same_bits(again.params, model.params)


def test_saving_without_optimiser_removes_old_training_state(tmp_path):
    model = GPT(CONFIG)
    save(model, tmp_path, training=AdamW(model.params).state())
    save(model, tmp_path)
    with pytest.raises(InputError, match="no training state"):
        load_training(tmp_path)


def test_optimiser_state_must_fit():
    model = GPT(CONFIG)
    other = AdamW(GPT(GPTConfig(**CONFIG.to_dict() | {"emb_dim": 4})).params)
    with pytest.raises(InputError, match=r"no m\.tok_emb\.weight of shape \(11, 8\)"):
        AdamW(model.params).restore(other.state())


def test_header_is_read_without_tensors(tmp_path):
    save(GPT(CONFIG), tmp_path, about={"encoding": "bytes"})
    header = read_header(tmp_path)
    assert header.config == CONFIG
    assert header.about["encoding"] == "bytes"
    assert header.tensors["pos_emb.weight"].shape == (6, 8)
    assert {tensor.dtype for tensor in header.tensors.values()} == {np.dtype(np.float32)}


def test_failed_save_leaves_the_old_file(tmp_path, monkeypatch):
    model = GPT(CONFIG)
    save(model, tmp_path)
    before = (tmp_path / "model.safetensors").read_bytes()

    def full_disk(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full_disk)
    model.params["tok_emb.weight"] += 1
    with pytest.raises(InputError, match="No space left on device"):
        save(model, tmp_path)
    assert (tmp_path / "model.safetensors").read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["model.safetensors"]


@pytest.mark.parametrize("training", [None, {"t": np.zeros(4000)}])
def test_full_disk_leaves_the_old_checkpoint(tmp_path, training):
    """The safetensors library writes the file, and its error is not an OSError."""
    old = GPT(CONFIG)
    save(old, tmp_path, training={"t": np.ones(3)})
    left = sorted(p.name for p in tmp_path.iterdir())
    with room_for(3000), pytest.raises(InputError, match=r"cannot save to .*(large|space)"):
        save(GPT(CONFIG, seed=9), tmp_path, training=training)
    check_same_bits(load(tmp_path).params, old.params)
    assert np.array_equal(load_training(tmp_path)["t"], np.ones(3))
    assert sorted(p.name for p in tmp_path.iterdir()) == left


def test_failed_saves_leave_no_files(tmp_path):
    """The training file is written, but the model does not fit: repeated failures must not accumulate files."""
    old = GPT(CONFIG)
    save(old, tmp_path, training={"t": np.ones(3)})
    left = sorted(p.name for p in tmp_path.iterdir())
    size = (tmp_path / "model.safetensors").stat().st_size
    for k in range(4):
        with room_for(size - 100), pytest.raises(InputError, match="cannot save to"):
            save(GPT(CONFIG, seed=9), tmp_path, training={"t": np.array([k])})
    assert sorted(p.name for p in tmp_path.iterdir()) == left
    assert np.array_equal(load_training(tmp_path)["t"], np.ones(3))


def rename_then_fail(monkeypatch, error):
    """Make the folder's flush fail after the model's file has been renamed."""
    real = checkpoint.write_tensors

    def failing(file, tensors, metadata):
        real(file, tensors, metadata)
        if file.name == "model.safetensors":
            raise error

    monkeypatch.setattr(checkpoint, "write_tensors", failing)


@pytest.mark.parametrize("error", [OSError(5, "Input/output error"), KeyboardInterrupt(), MemoryError()])
def test_failure_after_rename_leaves_the_new_checkpoint(tmp_path, monkeypatch, error):
    save(GPT(CONFIG, 1), tmp_path, training={"t": np.ones(3)})
    with monkeypatch.context() as patch:
        rename_then_fail(patch, error)
        with pytest.raises((InputError, KeyboardInterrupt, MemoryError)):
            save(GPT(CONFIG, 2), tmp_path, training={"t": np.zeros(3)})
    check_same_bits(load(tmp_path).params, GPT(CONFIG, 2).params)
    assert np.array_equal(load_training(tmp_path)["t"], np.zeros(3))
    assert len(list(tmp_path.iterdir())) == 2


def test_cleanup_keeps_training_state_of_unreadable_model(tmp_path, monkeypatch):
    """The cleanup deletes nothing if it cannot read the model file."""
    save(GPT(CONFIG, 1), tmp_path, training={"t": np.ones(3)})

    def unreadable(file):
        raise InputError(f"{file} cannot be read")

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "read_tensors", unreadable)
        save(GPT(CONFIG, 2), tmp_path, training={"t": np.zeros(3)})
    assert len(list(tmp_path.glob("training-*"))) == 2
    assert np.array_equal(load_training(tmp_path)["t"], np.zeros(3))
    save(GPT(CONFIG, 3), tmp_path, training={"t": np.zeros(4)})
    assert len(list(tmp_path.iterdir())) == 2


def test_concurrent_save_keeps_the_others_training_state(tmp_path, monkeypatch):
    """Another process saves into the folder between the writes of a training state and of its model."""
    save(GPT(CONFIG, 1), tmp_path, training={"t": np.ones(3)})
    real = checkpoint.write_tensors

    def interrupted(file, tensors, metadata):
        if file.name == "model.safetensors":
            monkeypatch.setattr(checkpoint, "write_tensors", real)
            save(GPT(CONFIG, 3), tmp_path, training={"t": np.full(3, 3.0)})
        real(file, tensors, metadata)

    monkeypatch.setattr(checkpoint, "write_tensors", interrupted)
    save(GPT(CONFIG, 2), tmp_path, training={"t": np.full(3, 2.0)})
    check_same_bits(load(tmp_path).params, GPT(CONFIG, 2).params)
    assert np.array_equal(load_training(tmp_path)["t"], np.full(3, 2.0))
    assert len(list(tmp_path.iterdir())) == 2


def test_other_dtypes_and_shapes_are_not_saved(tmp_path):
    params = GPT(CONFIG).params
    for change in (
        {"pos_emb.weight": np.zeros((6, 8))},
        {"pos_emb.weight": np.zeros((6, 9), np.float32)},
        {"x": np.zeros(1)},
    ):
        with pytest.raises(InputError, match=r"nothing was saved: parameter (pos_emb\.weight|x) "):
            save_params(CONFIG, params | change, tmp_path)
    assert not list(tmp_path.iterdir())


WRITER = """
import sys
from numpy_gpt import GPT, save
from parity_tests.judge.checkpoints import CONFIG
model = GPT(CONFIG, int(sys.argv[2]))
for _ in range(60):
    save(model, sys.argv[1])
"""


def test_two_writers_never_leave_a_partial_file(tmp_path):
    """Two processes save as fast as they can; every load meanwhile returns one of the two models."""
    tables = [GPT(CONFIG, seed).params["tok_emb.weight"].tobytes() for seed in (1, 2)]
    save(GPT(CONFIG, 1), tmp_path)
    writers = [subprocess.Popen([sys.executable, "-c", WRITER, tmp_path, str(seed)]) for seed in (1, 2)]
    seen = set()
    while any(writer.poll() is None for writer in writers):
        try:
            seen.add(tables.index(load(tmp_path).params["tok_emb.weight"].tobytes()))
        except InputError as error:
            if "was replaced while it was being read" not in str(error):
                raise
    assert [writer.returncode for writer in writers] == [0, 0]
    assert seen == {0, 1}
    assert [p.name for p in tmp_path.iterdir()] == ["model.safetensors"]


@pytest.mark.parametrize("about", [{"step": 3}, {"x": "\udcff"}, {"numpy-gpt.sha256": "x"}, {"config": "{}"}])
def test_invalid_metadata_is_refused_before_writing(tmp_path, about):
    with pytest.raises(InputError, match=r"cannot be stored|is a reserved name"):
        save(GPT(CONFIG), tmp_path, about=about)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("sums", [None, "x", "[]", "{}", "[" * 20_000, '{"tok_emb.weight": 1}', "all true"])
def test_invalid_checksums_are_refused(tmp_path, sums):
    """With a valid checksum of the header, as a deliberate forgery would have."""
    save(GPT(CONFIG), tmp_path)
    file = tmp_path / "model.safetensors"
    content = file.read_bytes()
    stop = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:stop])
    metadata = header.pop("__metadata__")
    del metadata["numpy-gpt.sha256"], metadata["numpy-gpt.crc32"]
    if sums is not None:
        metadata["numpy-gpt.crc32"] = json.dumps(dict.fromkeys(header, True)) if sums == "all true" else sums
    said = json.dumps([metadata, {n: (e["dtype"], e["shape"]) for n, e in header.items()}], sort_keys=True)
    metadata["numpy-gpt.sha256"] = hashlib.sha256(said.encode()).hexdigest()
    text = json.dumps(header | {"__metadata__": metadata}).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + content[stop:])
    with pytest.raises(InputError, match="has a checksum of its header but not of every tensor"):
        load(file)


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_all_nan_table_needs_bounded_memory(tmp_path, dtype):
    file = tmp_path / "x.safetensors"
    write_tensors(file, {"x": np.full((2000, 500), np.nan, dtype)}, {})
    _, tensors = read_tensors(file)
    tracemalloc.start()
    with pytest.raises(InputError, match=r"x\[0, 0\] is NaN"):
        tensors["x"].astype(np.float32).finite(file, "x").read()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak <= 3.1 * file.stat().st_size


def damaged(tmp_path, change):
    save(GPT(CONFIG), tmp_path)
    file = tmp_path / "model.safetensors"
    file.write_bytes(change(file.read_bytes()))
    return file


@pytest.mark.parametrize(
    "change",
    [lambda b: b[:-1], lambda b: b[:100], lambda b: b[:4], lambda b: b"", lambda b: b"\xff" * 8 + b[8:]],
    ids=["a byte short", "cut in the header", "cut in the length", "empty", "a header longer than the file"],
)
def test_damaged_files_are_named(tmp_path, change):
    file = damaged(tmp_path, change)
    with pytest.raises(InputError, match="cannot be read as a safetensors file") as error:
        load(file)
    assert str(file) in str(error.value)


ABOUT = {"format": "numpy-gpt", "version": "1"}


def with_config(tmp_path, **changes):
    model = GPT(CONFIG)
    file = tmp_path / "changed.safetensors"
    write_tensors(file, model.params, ABOUT | {"config": json.dumps(CONFIG.to_dict() | changes)})
    return file


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vocab_size": 12}, r"tok_emb.weight has shape \(11, 8\), the configuration needs \(12, 8\)"),
        ({"n_layers": 3}, r"trf_blocks\.2\..* is missing"),
        ({"n_layers": 10**12}, r"trf_blocks\.2\..* is missing"),
        ({"n_layers": 1}, r"trf_blocks\.1\..* is not one of this configuration"),
        ({"tie_weights": True}, "out_head.weight is not one of this configuration"),
        ({"n_heads": 3}, "emb_dim 8 does not divide into 3 heads"),
        ({"surprise": 1}, "surprise missing or unknown"),
    ],
)
def test_mismatched_configuration_is_named(tmp_path, changes, message):
    with pytest.raises(InputError, match=message):
        load(with_config(tmp_path, **changes))


def test_other_files_and_places_are_named(tmp_path):
    foreign = tmp_path / "foreign.safetensors"
    write_tensors(foreign, {"x": np.zeros(3)}, {})
    with pytest.raises(InputError, match="no usable GPT configuration inside"):
        load(foreign)
    with pytest.raises(InputError, match="does not exist"):
        load(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="has no checkpoint in it"):
        load(tmp_path / "empty")
    half = tmp_path / "half.safetensors"
    params = {name: p.astype(np.float16) for name, p in GPT(CONFIG).params.items()}
    write_tensors(half, params, ABOUT | {"config": json.dumps(CONFIG.to_dict())})
    with pytest.raises(InputError, match=r"holds float16: load it with dtype=np\.float32"):
        load(half)
    assert load(half, dtype=np.float32).dtype == np.float32
    with pytest.raises(InputError, match="give a folder to save the training state"):
        save(GPT(CONFIG), tmp_path / "x.safetensors", training={"t": np.array([1])})
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot save to"):
        save(GPT(CONFIG), tmp_path / "file" / "below")


def test_other_version_or_missing_checksum_is_refused(tmp_path):
    file = tmp_path / "x.safetensors"
    about = ABOUT | {"config": json.dumps(CONFIG.to_dict())}
    write_tensors(file, GPT(CONFIG).params, about | {"version": "2"})
    with pytest.raises(InputError, match="uses format 2; this release reads format 1: update numpy-gpt"):
        load(file)
    save_file(GPT(CONFIG).params, file, about)
    with pytest.raises(InputError, match="lacks the checksum"):
        load(file)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", ["tok_emb.weight", "trf_blocks.1.att.W_key.weight"])
def test_nonfinite_weights_are_named(tmp_path, name, value):
    """By load, and by save before it touches the existing files."""
    model = GPT(CONFIG)
    old = {n: p.copy() for n, p in model.params.items()}
    save(model, tmp_path, training={"t": np.ones(3)})
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    model.params[name][5, 2] = value
    with pytest.raises(InputError, match=rf"nothing was saved: {name}\[5, 2\] is NaN or infinite"):
        save(model, tmp_path, training={"t": np.zeros(3)})
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before
    check_same_bits(load(tmp_path).params, old)
    file = tmp_path / "model.safetensors"
    write_tensors(file, model.params, ABOUT | {"config": json.dumps(CONFIG.to_dict())})
    with pytest.raises(InputError, match=rf"{name}\[5, 2\] is NaN or infinite: go back"):
        load(tmp_path)


def test_every_byte_of_a_file_matters(tmp_path):
    """Change each byte in turn: an error, or (where JSON is unaffected) the identical model."""
    config = GPTConfig(vocab_size=2, context_length=1, emb_dim=2, n_heads=1, n_layers=1, tie_weights=True)
    model = GPT(config)
    save(model, tmp_path)
    file = tmp_path / "model.safetensors"
    whole = file.read_bytes()
    loaded = 0
    for at in range(len(whole)):
        file.write_bytes(whole[:at] + bytes([whole[at] ^ (1 << at % 8)]) + whole[at + 1 :])
        with suppress(InputError):
            again = load(tmp_path)
            loaded += 1
            assert again.config == config
            check_same_bits(again.params, model.params)
    assert loaded < 0.02 * len(whole)


def test_pickle_is_refused(tmp_path):
    import torch

    torch.save({"x": torch.ones(2)}, tmp_path / "model.safetensors")
    with pytest.raises(InputError, match="cannot be read as a safetensors file"):
        load(tmp_path)


def test_file_replaced_while_reading_is_an_error(tmp_path):
    save(GPT(CONFIG), tmp_path)
    _, params = load_params(tmp_path)
    save(GPT(CONFIG, seed=1), tmp_path)
    with pytest.raises(InputError, match="was replaced while it was being read"):
        params["tok_emb.weight"].read()
    _, params = load_params(tmp_path)
    os.truncate(tmp_path / "model.safetensors", 4000)
    with pytest.raises(InputError, match="was replaced while it was being read"):
        GPT.from_params(CONFIG, params)


@pytest.mark.parametrize("name", ["../training-0123456789abcdef.safetensors", "/etc/passwd", "model.safetensors", ""])
def test_training_file_name_cannot_leave_the_folder(tmp_path, name):
    about = ABOUT | {"config": json.dumps(CONFIG.to_dict()), "training": name}
    write_tensors(tmp_path / "model.safetensors", GPT(CONFIG).params, about)
    with pytest.raises(InputError, match="training state, is missing"):
        load_training(tmp_path)


def test_training_state_of_another_save_is_refused(tmp_path):
    for seed in (1, 2):
        model = GPT(CONFIG, seed)
        save(model, tmp_path / str(seed), training={"t": np.array([seed])})
    (first,), (second,) = (list((tmp_path / name).glob("training-*")) for name in "12")
    second.replace(first)
    with pytest.raises(InputError, match="is another checkpoint's training state"):
        load_training(tmp_path / "1")


class Cut(BaseException):
    """Simulates the end of the process."""


CALLS = [
    *((os, name) for name in ("open", "fsync", "replace", "rename", "unlink", "mkdir", "rmdir")),
    *((Path, name) for name in ("replace", "unlink")),
]


def test_interrupted_save_leaves_one_complete_checkpoint(tmp_path, monkeypatch):
    """End the process at the first, second, third … disk call: the old model and state remain, or the new ones."""
    old, new = GPT(CONFIG, 1), GPT(CONFIG, 2)
    seen = set()
    for last in range(100):
        place = tmp_path / str(last)
        save(old, place, training={"step": np.array([1])})
        left = [last]

        def cutting(real, left):
            def call(*args, **kwargs):
                if left[0] == 0:
                    raise Cut
                left[0] -= 1
                return real(*args, **kwargs)

            return call

        with monkeypatch.context() as patch:
            for owner, name in CALLS:
                patch.setattr(owner, name, cutting(getattr(owner, name), left))
            try:
                save(new, place, training={"step": np.array([2])})
                ended = False
            except Cut:
                ended = True
        step = int(load_training(place)["step"][0])
        check_same_bits(load(place).params, (old if step == 1 else new).params)
        seen.add((step, ended))
        if not ended:
            break
    assert seen == {(1, True), (2, True), (2, False)}, seen
    assert len(list(place.iterdir())) == 2, "files left behind by a save"


def test_300_layers_and_training_state_round_trip(tmp_path):
    model = GPT(GPTConfig(5, 2, 2, 1, 300, 0.0, True), seed=1)
    training = {f"optimizer.{moment}.{name}": array for moment in "mv" for name, array in model.params.items()}
    save(model, tmp_path, training=training)
    check_same_bits(load(tmp_path).params, model.params)
    check_same_bits(dict(sorted(load_training(tmp_path).items())), dict(sorted(training.items())))


def test_unreadably_many_tensors_are_not_written(tmp_path):
    file = tmp_path / "a.safetensors"
    write_tensors(file, {"a": np.ones(3)}, {})
    before = file.read_bytes()
    with pytest.raises(InputError, match=r"is not written, since it could not be read again .* 40,000 tensors"):
        write_tensors(file, {str(k): np.zeros(0, np.float32) for k in range(40_000)}, {})
    assert file.read_bytes() == before
    assert list(tmp_path.iterdir()) == [file]
