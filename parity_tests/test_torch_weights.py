"""torch-gpt import: torch.save files of the book, nanoGPT and transformers, and refusals."""

import json
import re

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from numpy_gpt import GPT, GPTConfig, load
from numpy_gpt.errors import InputError
from parity_tests.judge.gpt2_files import SIZES, gpt2_logits, gpt2_tensors
from parity_tests.judge.weights import TOKENS, check_logits
from torch_gpt.cli import main
from torch_gpt.model import from_params
from torch_gpt.weights import read_pth


def run(file, out, *args, code=0):
    result = CliRunner().invoke(main, ["import", str(file), "--out", str(out), *args])
    assert result.exit_code == code, result.output
    return result.output


def tensors_of(arrays):
    return {name: torch.from_numpy(array.copy()) for name, array in arrays.items()}


@pytest.mark.parametrize("qkv_bias", [False, True])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("inside", [None, "model_state_dict"])
@pytest.mark.parametrize("prefix", ["", "_orig_mod.", "module._orig_mod."])
def test_books_file_is_imported(tmp_path, qkv_bias, tied, inside, prefix):
    """Causal masks in the file are ignored."""
    config = GPTConfig(11, 6, 8, 4, 2, 0.1, qkv_bias=qkv_bias, tie_weights=tied)
    want = GPT(config, seed=3)
    state = from_params(config, want.params).state_dict()
    state |= {f"trf_blocks.{i}.att.mask": torch.ones(6, 6).triu(1) for i in range(2)}
    state = {prefix + name: tensor for name, tensor in state.items()}
    torch.save({inside: state, "optimizer_state_dict": {"step": 1}} if inside else state, tmp_path / "model.pth")
    run(tmp_path / "model.pth", tmp_path / "out", "--n-heads", "4")
    model = load(tmp_path / "out")
    assert model.config == config
    assert {n: a.tobytes() for n, a in model.params.items()} == {n: a.tobytes() for n, a in want.params.items()}


def linear_layout(tensors):
    """The tensors in nanoGPT's layout: torch's (out, in)."""
    return {n: a.T if a.ndim == 2 and n.startswith("h.") else a for n, a in tensors.items()}


@given(seed=st.integers(0, 99), tied=st.booleans(), bias=st.booleans(), compiled=st.booleans())
def test_nanogpt_file_is_imported(tmp_path_factory, seed, tied, bias, compiled):
    """nanoGPT stores model and model_args, transposed linear weights, biases optionally, and even a tied head."""
    place = tmp_path_factory.mktemp("nano")
    tensors = gpt2_tensors(seed, tied=tied)
    if not bias:
        tensors = {n: np.zeros_like(a) if n.endswith("bias") else a for n, a in tensors.items()}
    want = gpt2_logits(tensors, SIZES["n_head"], TOKENS)
    kept = {n: a for n, a in linear_layout(tensors).items() if bias or not n.endswith("bias")}
    state = {f"transformer.{n}" if n != "lm_head.weight" else n: t for n, t in tensors_of(kept).items()}
    state["lm_head.weight"] = state.get("lm_head.weight", state["transformer.wte.weight"])
    args = {"n_layer": 2, "n_head": 2, "n_embd": 8, "block_size": 6, "bias": bias, "vocab_size": 11, "dropout": 0.0}
    whole = {"model": {"_orig_mod." * compiled + n: t for n, t in state.items()}, "model_args": args, "iter_num": 3}
    torch.save(whole, place / "ckpt.pt")
    assert "its GELU is exact" in run(place / "ckpt.pt", place / "out")
    model = load(place / "out", np.float64)
    assert model.config.tie_weights == tied
    check_logits(model(TOKENS), want)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_transformers_bin_is_imported(tmp_path, dtype):
    """Next to a config.json, in GPT-2's layout, also in half precision."""
    state = {f"transformer.{n}": t.to(dtype) for n, t in tensors_of(gpt2_tensors()).items()}
    state["transformer.h.0.attn.bias"] = torch.ones(1, 1, 6, 6).tril().bool()
    state["lm_head.weight"] = state["transformer.wte.weight"]
    torch.save(state, tmp_path / "pytorch_model.bin")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2", **SIZES}))
    run(tmp_path / "pytorch_model.bin", tmp_path / "out")
    rounded = {n: t.to(dtype).double().numpy() for n, t in tensors_of(gpt2_tensors()).items()}
    check_logits(load(tmp_path / "out", np.float64)(TOKENS), gpt2_logits(rounded, 2, TOKENS))


class Code:
    """A pickle that would create a file if executed."""

    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return open, (str(self.file), "w")


def test_code_is_refused(tmp_path):
    torch.save({"model": Code(tmp_path / "made")}, tmp_path / "x.pth")
    assert "holds more than data" in run(tmp_path / "x.pth", tmp_path / "out", code=2)
    assert not (tmp_path / "made").exists()


def test_non_gpt2_files_are_named(tmp_path):
    file = tmp_path / "x.pth"
    with pytest.raises(InputError, match="does not exist"):
        read_pth(file)
    for content in (b"", b"text", b"PK\x03\x04" + b"\0" * 40, b"\x80\x02."):
        file.write_bytes(content)
        with pytest.raises(InputError, match="cannot be read as PyTorch weights"):
            read_pth(file)
    for content in ([1, 2], {}, {"model": {}}, torch.ones(3)):
        torch.save(content, file)
        with pytest.raises(InputError, match="has no state_dict"):
            read_pth(file)
    torch.save({"x": torch.ones(3)}, file)
    with pytest.raises(InputError, match=r"is not a GPT-2: it has no wte\.weight or wpe\.weight"):
        read_pth(file)
    torch.save(tensors_of(gpt2_tensors()), file)
    with pytest.raises(InputError, match="does not give the number of heads for its 8 features: pass --n-heads"):
        read_pth(file)
    with pytest.raises(InputError, match="emb_dim 8 does not divide into 3 heads"):
        read_pth(file, 3)
    state = from_params(GPTConfig(11, 6, 8, 4, 2), GPT(GPTConfig(11, 6, 8, 4, 2)).params).state_dict()
    del state["trf_blocks.1.norm1.scale"]
    torch.save(state, file)
    assert "trf_blocks.1.norm1.scale is missing" in run(file, tmp_path / "out", "--n-heads", "4", code=2)
    state["trf_blocks.1.norm1.scale"] = torch.ones(8, dtype=torch.int64)
    torch.save(state, file)
    assert "norm1.scale is int64" in run(file, tmp_path / "out", "--n-heads", "4", code=2)
    assert not (tmp_path / "out").exists()


def test_shared_head_stays_tied(tmp_path):
    config = GPTConfig(11, 6, 8, 4, 2, tie_weights=True)
    state = from_params(config, GPT(config).params).state_dict()
    torch.save(state | {"out_head.weight": state["tok_emb.weight"]}, tmp_path / "model.pth")
    run(tmp_path / "model.pth", tmp_path / "out", "--n-heads", "4")
    assert load(tmp_path / "out").config == config


def test_contradicting_head_counts_are_refused(tmp_path):
    torch.save({f"transformer.{n}": t for n, t in tensors_of(gpt2_tensors()).items()}, tmp_path / "pytorch_model.bin")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2", **SIZES}))
    message = run(tmp_path / "pytorch_model.bin", tmp_path / "out", "--n-heads", "4", code=2)
    assert "has 4 heads, but config.json next to it says 2" in message


def test_tensors_numpy_lacks_are_named(tmp_path):
    state = {f"transformer.{n}": t for n, t in tensors_of(gpt2_tensors()).items()}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2", **SIZES}))
    for change in (lambda t: t.to_sparse(), lambda t: t.to("meta"), lambda t: t.to(torch.float8_e4m3fn)):
        file = tmp_path / "pytorch_model.bin"
        torch.save(state | {"transformer.wpe.weight": change(state["transformer.wpe.weight"])}, file)
        message = run(file, tmp_path / "out", code=2)
        assert re.search(r"wpe\.weight is torch\.\w+, torch\.\w+.*, which NumPy lacks", message), message
        assert not (tmp_path / "out").exists()


def books_state():
    config = GPTConfig(11, 6, 8, 4, 2)
    return dict(from_params(config, GPT(config, seed=3).params).state_dict())


@pytest.mark.filterwarnings("ignore::UserWarning")  # torch warns of nested and of quantised tensors
def test_negated_and_expanded_tensors(tmp_path):
    """Lazily negated tensors are read with their sign; expanded ones of any size are refused if needed."""
    state, file = books_state(), tmp_path / "x.pth"
    name = "trf_blocks.0.att.W_key.weight"
    torch.save(state | {name: torch._neg_view(state[name])}, file)
    assert read_pth(file, 4).tensors[name].read().tobytes() == (-state[name]).numpy().tobytes()
    for dtype in (torch.float32, torch.bfloat16, torch.int8):
        for shape in ((8, 8), (1 << 19, 1 << 18)):
            torch.save(state | {name: torch.ones(1, dtype=dtype).expand(shape)}, file)
            assert file.stat().st_size < 30_000
            assert "W_key.weight" in run(file, tmp_path / "out", "--n-heads", "4", code=2)
    nested = torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])
    for strange in (nested, torch.quantize_per_tensor(torch.ones(8, 8), 0.1, 0, torch.qint8), torch.ones(8, 8) + 1j):
        torch.save(state | {name: strange}, file)
        assert "W_key.weight" in run(file, tmp_path / "out", "--n-heads", "4", code=2)
        assert not (tmp_path / "out").exists()
    mask = {"trf_blocks.0.att.mask": torch.ones(1).expand(1 << 19, 1 << 18)}
    torch.save(state | mask, file)  # not needed, so accepted
    run(file, tmp_path / "out", "--n-heads", "4")


def test_shared_tensors_are_imported_unless_far_larger_than_the_file(tmp_path):
    config, file = GPTConfig(11, 6, 64, 4, 40), tmp_path / "x.pth"
    state = dict(from_params(config, GPT(config, seed=3).params).state_dict())
    shared = {
        n: state[n.replace(f"blocks.{n.split('.')[1]}.", "blocks.0.", 1)] if "blocks" in n else state[n] for n in state
    }
    torch.save(shared, file)
    assert "share numbers in a file of" in run(file, tmp_path / "out", "--n-heads", "4", code=2)
    few = {n: t for n, t in shared.items() if "blocks" not in n or int(n.split(".")[1]) < 2}
    torch.save(few, file)
    run(file, tmp_path / "out", "--n-heads", "4")
    got = load(tmp_path / "out").params
    assert all(got[n].tobytes() == few[n].numpy().tobytes() for n in few)


@pytest.mark.parametrize("field", ["a folder", "larger than the file"])
def test_archive_with_false_member_headers_is_refused(tmp_path, field):
    file = tmp_path / "model.pth"
    torch.save({"wte.weight": torch.ones(16, 16)}, file)
    content = bytearray(file.read_bytes())
    at = content.rindex(b"/data/0", 0, content.rindex(b"PK\x05\x06")) - len(b"model") - 46
    assert content[at : at + 4] == b"PK\x01\x02"
    if field == "a folder":
        content[at + 38] |= 0x10
    else:
        content[at + 24 : at + 28] = (1 << 31).to_bytes(4, "little")
    file.write_bytes(content)
    with pytest.raises(InputError, match=r"members (marked as folders|that claim to be larger)"):
        read_pth(file, 1)
