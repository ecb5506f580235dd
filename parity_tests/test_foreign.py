"""GPT-2 in other programs' files: with shared tensors stored under one name, or without a configuration."""

import json

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from safetensors.torch import save_model

from numpy_gpt import GPT, GPTConfig, load, save
from numpy_gpt.errors import InputError
from numpy_gpt.parameters import parameter_shapes
from numpy_gpt.weights.source import open_source
from parity_tests.judge.foreign import mingpt_state, named, run_torch
from parity_tests.judge.gpt2_files import SIZES, gpt2_logits, gpt2_tensors, huggingface_folder
from parity_tests.judge.weights import TOKENS, check_logits, model_of, run
from torch_gpt.weights import read_pth

CONFIG = GPTConfig(11, 6, 8, 4, 2, qkv_bias=False)


# Shared tensors under one name


HEAD, TABLE = "lm_head.weight", "transformer.wte.weight"
ALIASES = {  # of a tied model: the names in the file, and its metadata
    "the head only named": ({TABLE}, {HEAD: TABLE}),
    "the table only named": ({HEAD}, {TABLE: HEAD}),
    "without a prefix in the file": ({"wte.weight"}, {HEAD: TABLE}),
    "both in the file": ({HEAD, TABLE}, {HEAD: TABLE}),
    "the head alone, nothing said": ({HEAD}, {}),
    "the table alone, nothing said": ({TABLE}, {}),
    "of something else": ({TABLE}, {"transformer.h.0.attn.masked_bias": "transformer.h.1.ln_1.bias", "by": TABLE}),
}


@pytest.mark.parametrize("what", ALIASES)
def test_shared_tensor_under_one_name_is_tied(tmp_path, what):
    names, metadata = ALIASES[what]
    tensors = gpt2_tensors()
    folder = huggingface_folder(tmp_path / "x", tensors)
    rest = {name: array for name, array in named(tensors).items() if name != TABLE}
    kept = rest | dict.fromkeys(names, tensors["wte.weight"])
    save_file(kept, folder / "model.safetensors", {"format": "pt", **metadata})
    for path in (folder, folder / "model.safetensors"):
        model = model_of(path)
        assert model.config.tie_weights
        check_logits(model(TOKENS), gpt2_logits(tensors, SIZES["n_head"], TOKENS))


@pytest.mark.slow
def test_save_models_file_matches_transformers(tmp_path):
    """The library's writer keeps one of the two names; the logits equal transformers'."""
    from transformers import GPT2Config, GPT2LMHeadModel

    theirs = GPT2LMHeadModel(GPT2Config(**SIZES)).eval().double()
    save_model(theirs, str(tmp_path / "model.safetensors"))
    theirs.config.save_pretrained(tmp_path)
    assert len({HEAD, TABLE} & load_file(tmp_path / "model.safetensors").keys()) == 1
    model = model_of(tmp_path)
    assert model.config.tie_weights
    with torch.no_grad():
        check_logits(model(TOKENS), theirs(torch.from_numpy(TOKENS)).logits.numpy())


@pytest.mark.parametrize("where", ["index", "another shard", "as a place too"])
@pytest.mark.parametrize(("kept", "alias"), [(TABLE, HEAD), (HEAD, TABLE)])
def test_shared_tensor_in_shards(tmp_path, where, kept, alias):
    """huggingface_hub keeps the other name in the index, other writers in a shard's metadata."""
    tensors = gpt2_tensors()
    folder = huggingface_folder(tmp_path, tensors, shards=3)
    file = folder / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    place = index["weight_map"].pop(TABLE)
    shard = load_file(folder / place)
    shard[kept] = shard.pop(TABLE)
    save_file(shard, folder / place, {"format": "pt"})
    index["weight_map"][kept] = place
    if where == "another shard":
        other = folder / "model-00003-of-00003.safetensors"
        save_file(load_file(other), other, {alias: kept})
    else:
        index["metadata"][alias] = kept
    if where == "as a place too":
        index["weight_map"][alias] = place
    file.write_text(json.dumps(index))
    model = model_of(folder)
    assert model.config.tie_weights
    check_logits(model(TOKENS), gpt2_logits(tensors, SIZES["n_head"], TOKENS))


def test_huggingface_hub_shards_are_read(tmp_path):
    """Shards written by huggingface_hub."""
    from huggingface_hub import save_torch_state_dict

    tensors = {name: torch.from_numpy(array) for name, array in named(gpt2_tensors()).items()}
    huggingface_folder(tmp_path, gpt2_tensors())
    (tmp_path / "model.safetensors").unlink()
    save_torch_state_dict(tensors | {HEAD: tensors[TABLE]}, tmp_path, max_shard_size=2000)
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    check_logits(model_of(tmp_path)(TOKENS), gpt2_logits(gpt2_tensors(), SIZES["n_head"], TOKENS))


def test_alias_in_an_untied_model_is_a_copy(tmp_path):
    tensors = gpt2_tensors()
    folder = huggingface_folder(tmp_path / "x", tensors, tie_word_embeddings=False)
    save_file(named(tensors), folder / "model.safetensors", {HEAD: TABLE})
    model = model_of(folder)
    assert not model.config.tie_weights
    check_logits(model(TOKENS), gpt2_logits(tensors, SIZES["n_head"], TOKENS))
    save_file(named(tensors), folder / "model.safetensors", {"format": "pt"})  # the head is missing
    with pytest.raises(InputError, match=r"has no tensor lm_head\.weight"):
        open_source(folder)


@pytest.mark.parametrize("metadata", [{HEAD: "gone.weight"}, {TABLE: HEAD}, {TABLE: HEAD, HEAD: TABLE}])
def test_alias_of_a_missing_tensor_is_named(tmp_path, metadata):
    tensors = named(gpt2_tensors())
    if TABLE in metadata:
        del tensors[TABLE]
    folder = huggingface_folder(tmp_path / "x", gpt2_tensors())
    save_file(tensors, folder / "model.safetensors", metadata)
    with pytest.raises(InputError, match=r"says that .*weight is .*weight, but has neither"):
        open_source(folder)


# Without a configuration


def books_arrays(config, seed=3):
    arrays = {name: array.copy() for name, array in GPT(config, seed=seed).params.items()}
    T = config.context_length
    return arrays | {f"trf_blocks.{i}.att.mask": np.triu(np.ones((T, T), np.float32), 1) for i in range(2)}


@pytest.mark.parametrize("qkv_bias", [False, True])
@pytest.mark.parametrize("kind", ["untied", "tied", "head given twice", "head an alias", "table an alias"])
@pytest.mark.parametrize("prefix", ["", "_orig_mod.", "model."])
def test_books_safetensors_is_imported(tmp_path, qkv_bias, kind, prefix):
    config = GPTConfig(11, 6, 8, 4, 2, qkv_bias=qkv_bias, tie_weights=kind != "untied")
    want, arrays, metadata = GPT(config, seed=3), books_arrays(config), {}
    if kind == "head given twice":
        arrays["out_head.weight"] = arrays["tok_emb.weight"].copy()
    elif kind == "head an alias":
        metadata = {prefix + "out_head.weight": prefix + "tok_emb.weight"}
    elif kind == "table an alias":
        arrays["out_head.weight"] = arrays.pop("tok_emb.weight")
        metadata = {prefix + "tok_emb.weight": prefix + "out_head.weight"}
    file = tmp_path / "gpt2-small.safetensors"
    save_file({prefix + name: array for name, array in arrays.items()}, file, metadata or None)
    assert "the book's GPT" in run("import", file, "--out", tmp_path / "out", "--n-heads", 4)
    model = load(tmp_path / "out")
    assert model.config == config
    assert {n: a.tobytes() for n, a in model.params.items()} == {n: a.tobytes() for n, a in want.params.items()}


@pytest.mark.parametrize(("width", "heads"), [(768, 12), (1024, 16), (1280, 20), (1600, 25)])
def test_heads_are_inferred_from_gpt2_widths_and_reported(tmp_path, width, heads):
    config = GPTConfig(3, 2, width, heads, 1, qkv_bias=True)
    save_file({n: np.zeros(a, np.float32) for n, a in parameter_shapes(config).items()}, tmp_path / "x.safetensors")
    tensors = gpt2_tensors(vocab_size=3, n_positions=2, n_embd=width, n_layer=1)
    save_file(named(tensors), tmp_path / "model.safetensors")
    for name in ("x", "model"):
        source = open_source(tmp_path / f"{name}.safetensors")
        assert source.config.n_heads == heads
        assert source.config.context_length == 2
        assert f"with the {heads} heads of GPT-2" in source.what
        assert open_source(tmp_path / f"{name}.safetensors", 4).config.n_heads == 4


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("prefix", ["transformer.", ""])
@pytest.mark.parametrize("layout", ["GPT-2's", "torch's"])
def test_single_huggingface_file_is_imported(tmp_path, tied, prefix, layout):
    tensors = gpt2_tensors(tied=tied)
    turned = {n: a.T.copy() if layout != "GPT-2's" and a.ndim == 2 and n[0] == "h" else a for n, a in tensors.items()}
    turned["h.0.attn.bias"] = np.tri(6, dtype=np.float32)[None, None]
    file = tmp_path / "model.safetensors"
    save_file({n if n == HEAD else prefix + n: a for n, a in turned.items()}, file, {"format": "pt"})
    message = run("import", file, "--out", tmp_path / "out", code=2)
    assert "does not give the number of heads for its 8 features: pass --n-heads" in message
    assert "or put the model's config.json next to it" in message
    assert not (tmp_path / "out").exists()
    run("import", file, "--out", tmp_path / "out", "--n-heads", SIZES["n_head"])
    model = load(tmp_path / "out", np.float64)
    assert model.config.tie_weights == tied
    check_logits(model(TOKENS), gpt2_logits(tensors, SIZES["n_head"], TOKENS))


def test_contradicting_heads_are_refused(tmp_path):
    folder = huggingface_folder(tmp_path, gpt2_tensors())
    for path in (folder, folder / "model.safetensors"):
        assert open_source(path, 2).config.n_heads == 2
        with pytest.raises(InputError, match=r"has 4 heads, but .* says 2"):
            open_source(path, 4)


def test_partial_and_foreign_files_are_named(tmp_path):
    folder = huggingface_folder(tmp_path / "x", gpt2_tensors(), shards=2)
    for name in ("model-00001-of-00002.safetensors", "model.safetensors.index.json", "config.json"):
        with pytest.raises(InputError, match=f"is one file of several: give their folder, {folder}"):
            open_source(folder / name)
    arrays = books_arrays(CONFIG)
    save_file({n: a for n, a in arrays.items() if n != "trf_blocks.1.norm1.scale"}, tmp_path / "y.safetensors")
    assert "norm1.scale is missing" in run("import", tmp_path / "y.safetensors", "--n-heads", 4, "--out", "o", code=2)
    save_file({"x": np.ones(3)}, tmp_path / "z.safetensors")
    with pytest.raises(InputError, match="is not a GPT-2"):
        open_source(tmp_path / "z.safetensors")
    (tmp_path / "w").mkdir()
    save_file({"x": np.ones(3)}, tmp_path / "w" / "only.safetensors")
    with pytest.raises(InputError, match=r"nor config\.json .*: give its file, .*only\.safetensors"):
        open_source(tmp_path / "w")
    save(GPT(CONFIG), tmp_path / "ours.safetensors")
    with pytest.raises(InputError, match="is already a numpy-gpt checkpoint"):
        open_source(tmp_path / "ours.safetensors")


def test_error_names_the_import_command(tmp_path):
    book, lone, other = (tmp_path / f"{name}.safetensors" for name in ("book", "lone", "other"))
    save_file(books_arrays(CONFIG), book)
    save_file(named(gpt2_tensors()), lone)
    save_file({"x": np.ones(3)}, other)
    whole = huggingface_folder(tmp_path / "whole", gpt2_tensors())
    shards = huggingface_folder(tmp_path / "shards", gpt2_tensors(), shards=2)
    for path in (book, lone, whole, shards):
        for command in (["generate", path, "x"], ["info", path], ["evaluate", path]):
            assert f"numpy-gpt import {path} --out DIR" in run(*command, code=2), command
        with pytest.raises(InputError, match=f"numpy-gpt import {path} --out DIR"):
            load(path)
    with pytest.raises(InputError, match="not a numpy-gpt checkpoint, nor a GPT-2"):
        load(other)
    torch.save({"x": torch.ones(2)}, tmp_path / "m.pth")
    assert f"torch-gpt import {tmp_path / 'm.pth'} --out DIR" in run("generate", tmp_path / "m.pth", "x", code=2)


# minGPT, Lightning


def test_mingpt_file_is_imported(tmp_path):
    """Its GELU is GPT-2's, so no warning appears. Its config.json gives the heads, or only the size's name."""
    tensors, file = gpt2_tensors(tied=False), tmp_path / "model.pt"
    torch.save(mingpt_state(tensors), file)
    shown = run_torch("import", file, "--out", tmp_path / "a", "--n-heads", 2)
    assert shown.startswith("minGPT's GPT: ")
    check_logits(load(tmp_path / "a", np.float64)(TOKENS), gpt2_logits(tensors, 2, TOKENS))
    theirs = {"system": {"seed": 1}, "model": {"model_type": None, "n_head": 2, "n_embd": 8}, "trainer": {}}
    (tmp_path / "config.json").write_text(json.dumps(theirs))
    assert read_pth(file).config.n_heads == 2
    theirs["model"] = {"model_type": "gpt-micro", "n_head": None}
    (tmp_path / "config.json").write_text(json.dumps(theirs))
    assert read_pth(file).config.n_heads == 4
    (tmp_path / "config.json").unlink()
    numbers = {name: tensor.numpy() for name, tensor in mingpt_state(tensors).items()}
    save_file(numbers, tmp_path / "model.safetensors")
    assert open_source(tmp_path / "model.safetensors", 2).what == "minGPT's GPT"


def test_ambiguous_nanogpt_or_mingpt_is_named_as_such(tmp_path):
    """A tied state_dict without masks could be either; without biases it is nanoGPT's."""
    state = {n: t for n, t in mingpt_state(gpt2_tensors()).items() if not n.endswith("attn.bias")}
    torch.save(state, tmp_path / "x.pt")
    assert read_pth(tmp_path / "x.pt", 2).what.startswith("nanoGPT's or minGPT's GPT (nanoGPT's GELU is exact")
    torch.save({n: t for n, t in state.items() if not n.endswith("bias")}, tmp_path / "x.pt")
    assert read_pth(tmp_path / "x.pt", 2).what.startswith("nanoGPT's GPT (its GELU is exact")


def test_lightning_checkpoint_is_imported(tmp_path):
    tensors = gpt2_tensors(tied=False)
    state = {f"model.{name}": tensor for name, tensor in mingpt_state(tensors).items()}
    whole = {"epoch": 1, "pytorch-lightning_version": "2.5.0", "state_dict": state, "hyper_parameters": {"lr": 1.0}}
    torch.save(whole, tmp_path / "last.ckpt")
    assert f"torch-gpt import {tmp_path / 'last.ckpt'}" in run("import", tmp_path / "last.ckpt", "--out", "o", code=2)
    run_torch("import", tmp_path / "last.ckpt", "--out", tmp_path / "out", "--n-heads", 2)
    check_logits(load(tmp_path / "out", np.float64)(TOKENS), gpt2_logits(tensors, 2, TOKENS))
