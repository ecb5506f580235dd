"""Wrong file formats: every reader recognises them by content, and never mistakes a damaged file for one."""

import bz2
import gzip
import io
import lzma
import pickle
import re
import shutil
import tarfile
import zipfile

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from numpy_gpt import GPT, load
from numpy_gpt.errors import InputError
from numpy_gpt.io.bounded_json import read_json
from numpy_gpt.weights.source import open_source
from parity_tests.judge.foreign import mingpt_state, named, run_torch
from parity_tests.judge.gpt2_files import gpt2_logits, gpt2_tensors
from parity_tests.judge.weights import FIXTURE, TOKENS, check_logits
from torch_gpt.weights import read_pth


def archive(kind):
    made = io.BytesIO()
    if kind == "tar":
        with tarfile.open(fileobj=made, mode="w") as tar:
            tar.addfile(tarfile.TarInfo("model.safetensors"))
    else:
        with zipfile.ZipFile(made, "w") as zipped:
            zipped.writestr("model/", b"")
            zipped.writestr("model/config.json", b"{}")
    return made.getvalue()


def numpys(write):
    made = io.BytesIO()
    write(made)
    return made.getvalue()


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 548105171\n"
FILES = {  # beginnings from each format's specification, or written by its library
    "empty": (b"", "it is empty"),
    "llm.c": (np.array([20240326, 3, 1024, 50257] + [0] * 252, "<i4").tobytes(), "it is a file of llm.c"),
    "llm.c's state": (np.array([20240327, 1] + [0] * 254, "<i4").tobytes(), "it is a file of llm.c"),
    "GGUF": (b"GGUF\x03\0\0\0\x94\0\0\0\0\0\0\0", "it is GGUF"),
    "npy": (numpys(lambda f: np.save(f, np.ones(3))), "it is one NumPy array"),
    "npz": (numpys(lambda f: np.savez(f, a=np.ones(3))), r"it is an \.npz"),
    "ONNX": (b"\x08\x08\x12\x07pytorch\x1a\x052.1.0:\xff\x01", "it is ONNX"),
    "SavedModel": (b"\x08\x01\x12\xd2\xb5\x04\n\x10\n\x05Const\x12\0", "it is a TensorFlow SavedModel"),
    "graph": (b"\n\x3a\n\x05input\x12\x0bPlaceholder*\x0b\n\x05dtype\x12\x020\x03", "it is a TensorFlow graph"),
    "TFLite": (b"\x1c\0\0\0TFL3\x14\0\x20\0", "it is TensorFlow Lite"),
    "HDF5": (b"\x89HDF\r\n\x1a\n\0\0\0\0\0\x08\x08\0", "it is HDF5"),
    "Flax": (b"\x81\xabtransformer\x84\xa1h\x8c", "it is MessagePack"),
    "LFS": (LFS, "it is a Git LFS pointer .* git lfs pull"),
    "web page": (b"\xef\xbb\xbf\n<!DOCTYPE html>\n<html>", "it is a web page"),
    "server's error": (b"<?xml version='1.0'?><Error><Code>AccessDenied</Code></Error>", "a server's error"),
    "short answer": (b"Entry not found", "it is a text that starts with 'Entry not found'"),
    "gzip": (gzip.compress(b"{}" * 99), "it is compressed by gzip: unpack it"),
    "xz": (lzma.compress(b"{}" * 99), "it is compressed by xz"),
    "bzip2": (bz2.compress(b"{}" * 99), "it is compressed by bzip2"),
    "zip": (archive("zip"), "it is a zip archive: unpack it"),
    "tar": (archive("tar"), "it is a tar archive: unpack it"),
    "pickle": (pickle.dumps({"wte.weight": np.ones(2)}, 4), "it is a pickle, which may run code"),
    "zeros": (bytes(5000), "it starts with zeros"),
}


@pytest.mark.parametrize("what", FILES)
def test_file_format_is_named(tmp_path, what):
    content, words = FILES[what]
    for name in ("model.safetensors", "model.bin", "model"):
        file = tmp_path / name
        file.write_bytes(content)
        for refuse in (open_source, load, read_pth):
            with pytest.raises(InputError, match=words) as error:
                refuse(file)
            assert str(file) in str(error.value)
            assert "pickle" not in str(error.value) or what == "pickle"


@pytest.mark.parametrize("what", ["LFS", "web page", "gzip", "zip", "empty"])
def test_config_format_is_named(tmp_path, what):
    content, words = FILES[what]
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(InputError, match=rf"config\.json cannot be used as JSON: {words}"):
        read_json(tmp_path / "config.json")
    with pytest.raises(InputError, match=words):
        open_source(tmp_path)


@pytest.mark.parametrize("name", ["model.ckpt.index", "model.ckpt.data-00000-of-00001", "hparams.json"])
@pytest.mark.parametrize("what", ["LFS", "web page", "gzip"])
def test_openai_file_format_is_named(tmp_path, name, what):
    folder = shutil.copytree(FIXTURE, tmp_path / "x")
    content, words = FILES[what]
    (folder / name).write_bytes(content)
    with pytest.raises(InputError, match=words) as error:
        open_source(folder)
    assert str(folder / name) in str(error.value)


def test_content_decides_not_the_name(tmp_path):
    """A .bin with safetensors is imported; for a .safetensors with a pickle the error names the right command."""
    safe, pickled, old, script = (tmp_path / name for name in ("a.bin", "b.safetensors", "c.safetensors", "d.pt"))
    save_file(named(gpt2_tensors()), tmp_path / "x.safetensors")
    (tmp_path / "x.safetensors").rename(safe)
    source = open_source(safe, 2)
    model = GPT.from_params(source.config, {n: t.astype(np.float64) for n, t in source.tensors.items()})
    check_logits(model(TOKENS), gpt2_logits(gpt2_tensors(), 2, TOKENS))
    assert read_pth(safe, 2).config == source.config
    with pytest.raises(InputError, match=r"is a folder: give a file that .* use numpy-gpt import"):
        read_pth(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(InputError, match=r"is a folder: .*, for example .*pytorch_model\.bin; for"):
        read_pth(tmp_path)
    state = mingpt_state(gpt2_tensors())
    torch.save(state, pickled)
    torch.save(state, old, _use_new_zipfile_serialization=False)
    with zipfile.ZipFile(script, "w") as zipped:  # TorchScript's layout
        for name in ("data/0", "data.pkl", "code/__torch__/torch/nn/modules/linear.py", "constants.pkl"):
            zipped.writestr(f"archive/{name}", b"\x80\x02.")
    for file in (pickled, old, script):
        words = f"it is a PyTorch pickle, .* torch-gpt import {re.escape(str(file))} --out DIR"
        with pytest.raises(InputError, match=words):
            open_source(file)
        with pytest.raises(InputError, match=words):
            load(file)
    for file in (pickled, old):
        run_torch("import", file, "--n-heads", 2, "--out", tmp_path / f"{file.stem}-out")


def test_damage_is_not_mistaken_for_another_format(tmp_path):
    """A truncated safetensors file is called damaged."""
    save_file(named(gpt2_tensors()), tmp_path / "x.safetensors")
    whole = (tmp_path / "x.safetensors").read_bytes()
    for end in (9, 20, 100, 1000, len(whole) - 1):
        (tmp_path / "x.safetensors").write_bytes(whole[:end])
        with pytest.raises(InputError, match=r"cannot be read as a safetensors file \("):
            open_source(tmp_path / "x.safetensors")


@pytest.mark.parametrize("content", [b"GGUF\x03\0\0\0\x94\0\0\0\0\0\0\0", b"It was a dark and stormy night.\n"])
def test_load_errors_do_not_suggest_foreign_folders(tmp_path, content):
    """load() needs no OpenAI folder, and config.json is not a .safetensors file: the advice must differ."""
    (tmp_path / "model.safetensors").write_bytes(content)
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(
        InputError, match=r": it is .*: give a safetensors file, or put an undamaged copy in its place$"
    ):
        load(tmp_path)
    if content.startswith(b"GGUF"):
        with pytest.raises(InputError, match=r"llama\.cpp's format: put the right file in its place$"):
            read_json(tmp_path / "config.json")
