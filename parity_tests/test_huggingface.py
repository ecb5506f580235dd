"""A second judge: the same weights in Hugging Face's GPT-2, which shares no code with torch_gpt.

Its layout is OpenAI's: linear weights are (in, out); query, key and value are one matrix, always with a bias.
"""

import json

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from hypothesis import given, settings
from safetensors.numpy import load_file

from numpy_gpt import GPT, GPTConfig, load, save
from numpy_gpt.cli.main import main
from numpy_gpt.tokenizer import encode, get_encoding, vocabulary_files
from parity_tests.judge import compare, strategies
from parity_tests.judge import tokenizers as tokenizers_judge
from parity_tests.judge.compare import check
from parity_tests.judge.gpt2_files import SIZES, gpt2_tensors, huggingface_folder
from parity_tests.judge.models import VARIANTS, check_gradients, check_loss, reject_cancelled
from parity_tests.judge.strategies import ModelCase
from parity_tests.judge.weights import FIXTURE, check_logits, model_of, openai_tensors, run

pytestmark = pytest.mark.slow

BLOCK = {
    "norm1.scale": "ln_1.weight",
    "norm1.shift": "ln_1.bias",
    "att.out_proj.weight": "attn.c_proj.weight",
    "att.out_proj.bias": "attn.c_proj.bias",
    "norm2.scale": "ln_2.weight",
    "norm2.shift": "ln_2.bias",
    "ff.layers.0.weight": "mlp.c_fc.weight",
    "ff.layers.0.bias": "mlp.c_fc.bias",
    "ff.layers.2.weight": "mlp.c_proj.weight",
    "ff.layers.2.bias": "mlp.c_proj.bias",
}
ENDS = {
    "tok_emb.weight": "transformer.wte.weight",
    "pos_emb.weight": "transformer.wpe.weight",
    "final_norm.scale": "transformer.ln_f.weight",
    "final_norm.shift": "transformer.ln_f.bias",
    "out_head.weight": "lm_head.weight",
}


@pytest.fixture(scope="module")
def transformers():
    return pytest.importorskip("transformers", reason="pip install -e '.[huggingface]'")


def view(tensors, name):
    """A view of the part of Hugging Face's tensors that corresponds to our name, (out, in) as in torch's Linear."""
    if name in ENDS:
        return tensors[ENDS[name]]
    _, i, rest = name.split(".", 2)
    if rest in BLOCK:
        part = tensors[f"transformer.h.{i}.{BLOCK[rest]}"]
        return part.T if part.ndim == 2 else part
    _, which, kind = rest.split(".")
    part = tensors[f"transformer.h.{i}.attn.c_attn.{kind}"]
    third = ("W_query", "W_key", "W_value").index(which)
    C = part.shape[-1] // 3
    part = part[..., third * C : (third + 1) * C]
    return part.T if part.ndim == 2 else part


def huggingface_model(transformers, config, params, attention):
    """GPT2LMHeadModel in float64 with these parameters, which must fill everything except missing biases (0)."""
    model = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=config.vocab_size,
            n_positions=config.context_length,
            n_embd=config.emb_dim,
            n_layer=config.n_layers,
            n_head=config.n_heads,
            activation_function="gelu_new",
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            tie_word_embeddings=config.tie_weights,
            bos_token_id=0,
            eos_token_id=0,
            attn_implementation=attention,
        )
    ).double()
    tensors = dict(model.named_parameters())
    with torch.no_grad():
        for name, tensor in tensors.items():
            tensor.fill_(0.0 if name.endswith("c_attn.bias") and not config.qkv_bias else torch.nan)
        for name, array in params.items():
            view(tensors, name).copy_(torch.from_numpy(array.copy()))
    return model


def check_huggingface(transformers, case, attention):
    """Compare logits, loss and every gradient within the model's budget."""
    config, params, (tokens, targets) = case.config, case.params(), case.batch()
    judge = huggingface_model(transformers, config, params, attention)
    want = judge(torch.from_numpy(tokens)).logits
    loss = torch.nn.functional.cross_entropy(want.flatten(0, 1), torch.from_numpy(targets).flatten())
    loss.backward()
    gradients = {name: tensor.grad for name, tensor in judge.named_parameters()}
    want_grads = {name: view(gradients, name).numpy() for name in params}

    model = GPT.from_params(config, params)
    logits, (got, grads) = model(tokens), model.loss_and_grads(tokens, targets)
    want = want.detach().numpy()
    check("logits against Hugging Face", logits, want, float(np.abs(want).max()), compare.MODEL)
    check_loss("loss against Hugging Face", got, loss.item(), want)
    reject_cancelled(case, want, targets, want_grads)
    check_gradients(grads, want_grads)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize(("tied", "bias"), VARIANTS)
def test_model_matches_hugging_face(transformers, tied, bias, attention):
    @settings(max_examples=50)
    @given(case=strategies.model_cases(tie_weights=tied, qkv_bias=bias))
    def holds(case):
        check_huggingface(transformers, case, attention)

    holds()


def test_gpt2_124m_matches_hugging_face(transformers):
    config = GPTConfig.gpt2("124M", drop_rate=0.0, qkv_bias=True, tie_weights=True)
    check_huggingface(transformers, ModelCase(config, B=2, T=32, scale=0.02), "sdpa")


def test_hugging_face_loss_matches_shifted_targets(transformers):
    case = ModelCase(GPTConfig(50, 16, 24, 3, 2, 0.0), B=3, T=16)
    judge, (ids, _) = huggingface_model(transformers, case.config, case.params(), "eager"), case.batch()
    want = judge(torch.from_numpy(ids), labels=torch.from_numpy(ids))
    loss = case.model().loss(ids[:, :-1], ids[:, 1:])
    logits = want.logits.detach().numpy().astype(np.float32)  # it computes the loss in float32
    check_loss("Hugging Face's own loss", np.float32(loss), want.loss.item(), logits)


# Files: transformers' writer and reader


def check_both_answer(folder, transformers, tokens):
    """Assert that a folder gives the same logits in transformers and here, in float64."""
    judge = transformers.GPT2LMHeadModel.from_pretrained(folder, dtype=torch.float64).eval()
    with torch.no_grad():
        want = judge(torch.from_numpy(tokens)).logits.numpy()
    check_logits(model_of(folder)(tokens), want)


def tensors_of(folder):
    """Name without the prefix -> bytes, of all tensors in a folder."""
    tensors = {}
    for file in folder.glob("*.safetensors"):
        tensors |= {name.removeprefix("transformer."): a.tobytes() for name, a in load_file(file).items()}
    return tensors


@pytest.mark.parametrize("shards", ["one file", "several"])
@pytest.mark.parametrize(("prefix", "tied"), [("transformer.", True), ("transformer.", False), ("", True)])
def test_transformers_files_round_trip(transformers, tmp_path, tied, shards, prefix):
    """From transformers to us and back: every byte is kept, and all three give the same logits."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 60, "n_positions": 16, "n_embd": 24, "n_layer": 3, "n_head": 3}
    config = transformers.GPT2Config(**sizes, tie_word_embeddings=tied, bos_token_id=0, eos_token_id=0)
    model = transformers.GPT2LMHeadModel(config)
    with torch.no_grad():
        for tensor in model.parameters():
            tensor.normal_(0, 0.3)
    saved = model if prefix else model.transformer  # the bare model has no head to save
    saved.save_pretrained(tmp_path / "theirs", max_shard_size="20KB" if shards == "several" else "1GB")
    assert (len(list((tmp_path / "theirs").glob("*.safetensors"))) > 1) == (shards == "several")
    tokens = np.random.default_rng(0).integers(0, 60, (2, 16))
    run("import", tmp_path / "theirs", "--out", tmp_path / "ours")
    run("export", tmp_path / "ours", "--out", tmp_path / "back")
    assert tensors_of(tmp_path / "back") == tensors_of(tmp_path / "theirs")
    for folder in ("theirs", "back"):
        check_both_answer(tmp_path / folder, transformers, tokens)
    with torch.no_grad():
        want = model.eval().double()(torch.from_numpy(tokens)).logits.numpy()
    check_logits(load(tmp_path / "ours", np.float64)(tokens), want)


def test_tensorflow_file_matches_transformers(transformers, tmp_path):
    """Import OpenAI's format and export Hugging Face's: logits equal transformers' for the original variables."""
    tensors, n_head = openai_tensors()
    config = transformers.GPT2Config(
        vocab_size=287, n_positions=16, n_embd=12, n_layer=2, n_head=n_head, bos_token_id=286, eos_token_id=286
    )
    judge = transformers.GPT2LMHeadModel(config).double().eval()
    state = {f"transformer.{name}": torch.from_numpy(array.astype(np.float64)) for name, array in tensors.items()}
    judge.load_state_dict(state | {"lm_head.weight": state["transformer.wte.weight"]})
    tokens = np.random.default_rng(0).integers(0, 287, (3, 16))
    with torch.no_grad():
        want = judge(torch.from_numpy(tokens)).logits.numpy()
    check_logits(model_of(FIXTURE)(tokens), want)
    run("import", FIXTURE, "--out", tmp_path / "ours")
    run("export", tmp_path / "ours", "--out", tmp_path / "theirs")
    check_both_answer(tmp_path / "theirs", transformers, tokens)
    tokenizer = transformers.GPT2Tokenizer.from_pretrained(tmp_path / "theirs")
    ours = get_encoding(str(tmp_path / "ours"))
    for text in ("A person reads every line.", "  two  blanks\n", "naïve 漢字 <|endoftext|>"):
        assert tokenizer.encode(text) == encode(ours, text).tolist(), text


@pytest.mark.parametrize("qkv_bias", [True, False])
@pytest.mark.parametrize("tied", [True, False])
def test_our_model_opens_in_transformers(transformers, tmp_path, qkv_bias, tied):
    config = GPTConfig(61, 16, 24, 3, 2, 0.1, qkv_bias=qkv_bias, tie_weights=tied)
    model = GPT(config, seed=4, dtype=np.float64)
    save(model, tmp_path / "ours", about={"encoding": "bytes"})
    assert "without a tokenizer" in run("export", tmp_path / "ours", "--out", tmp_path / "theirs")
    judge = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "theirs", dtype=torch.float64).eval()
    tokens = np.random.default_rng(0).integers(0, 61, (2, 16))
    with torch.no_grad():
        check_logits(model(tokens), judge(torch.from_numpy(tokens)).logits.numpy())
    assert judge.config.resid_pdrop == judge.config.attn_pdrop == judge.config.embd_pdrop == 0.1
    assert (judge.lm_head.weight is judge.transformer.wte.weight) == tied


# Tokenizers


def imported(kind, place):
    """Import a Hugging Face folder with this tokenizer and random weights."""
    tensors = gpt2_tensors(**SIZES | {"vocab_size": kind.vocab_size})
    huggingface_folder(place / "theirs", tensors, vocab_size=kind.vocab_size)
    kind.write(place / "theirs")
    return CliRunner().invoke(main, ["import", str(place / "theirs"), "--out", str(place / "ours")])


@pytest.mark.parametrize("name", tokenizers_judge.kinds())
def test_2000_texts_match_transformers_or_import_is_refused(transformers, tmp_path, name):
    """Our ids after the import and transformers' ids after the export both match."""
    kind, cases = tokenizers_judge.kinds()[name], tokenizers_judge.texts(2000)
    result = imported(kind, tmp_path)
    assert result.exit_code == (2 if kind.refused else 0), result.output
    if kind.refused:
        assert kind.refused in result.output
        assert not (tmp_path / "ours").exists()
        return
    run("export", tmp_path / "ours", "--out", tmp_path / "back")
    encoding = get_encoding(str(tmp_path / "ours"))
    ours = [encode(encoding, text).tolist() for text in cases]
    assert ours == tokenizers_judge.judge(tmp_path / "theirs", cases)
    assert ours == tokenizers_judge.judge(tmp_path / "back", cases)


def test_judged_ids_are_up_to_date(transformers, tmp_path):
    """The quick suite's fixture is up to date."""
    known = json.loads(tokenizers_judge.JUDGED.read_text(encoding="utf-8"))
    for number, (name, ids) in enumerate(known["judged"].items()):
        folder = tokenizers_judge.kinds()[name].write(tmp_path / str(number))
        (folder / "config.json").write_text('{"model_type": "gpt2"}')
        assert tokenizers_judge.judge(folder, known["texts"]) == ids, name


@pytest.mark.parametrize("way", ["as it is", "with a prefix space", "extended and resized", "retrained"])
def test_gpt2_tokenizer_saved_by_transformers_is_imported(transformers, tmp_path, way):
    """GPT-2's vocabulary, written by transformers."""
    files = vocabulary_files("gpt2")
    for ours, theirs in (("encoder.json", "vocab.json"), ("vocab.bpe", "merges.txt")):
        (tmp_path / theirs).write_bytes(files[ours])
    tokenizer = transformers.GPT2TokenizerFast.from_pretrained(tmp_path, add_prefix_space=way == "with a prefix space")
    cases = tokenizers_judge.texts(2000)
    if way == "extended and resized":
        tokenizer.add_tokens(["MyNewToken_1", "MyNewToken_2"])
        tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    elif way == "retrained":
        tokenizer = tokenizer.train_new_from_iterator(tokenizers_judge.texts(3000, seed=5), 700, show_progress=False)
    sizes = {"vocab_size": len(tokenizer), "n_positions": 8, "n_embd": 8, "n_layer": 1, "n_head": 1}
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, bos_token_id=0, eos_token_id=0))
    model.resize_token_embeddings(len(tokenizer))
    model.save_pretrained(tmp_path / "theirs")
    tokenizer.save_pretrained(tmp_path / "theirs")
    run("import", tmp_path / "theirs", "--out", tmp_path / "ours")
    encoding = get_encoding(str(tmp_path / "ours"))
    assert [encode(encoding, text).tolist() for text in cases] == [tokenizer.encode(text) for text in cases]
