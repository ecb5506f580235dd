"""Importing and exporting GPT-2: equal logits, equal bits, and a one-line error for unusable input."""

import json
import shutil

import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from numpy_gpt import GPT, GPTConfig, generate, load, save
from numpy_gpt.cli.main import main
from numpy_gpt.errors import InputError
from numpy_gpt.random.generator import Generator
from numpy_gpt.tokenizer import GPT2_FILES, encode, get_encoding, vocabulary_files
from numpy_gpt.weights.huggingface import write_huggingface
from numpy_gpt.weights.source import open_source
from parity_tests.judge import tokenizers as tokenizers_judge
from parity_tests.judge.gpt2_files import SIZES, gpt2_logits, gpt2_tensors, huggingface_folder
from parity_tests.judge.weights import FIXTURE, TOKENS, check_loaded, check_logits, model_of, openai_tensors, run


def test_tensorflow_file_gives_its_logits():
    tensors, n_head = openai_tensors()
    model = model_of(FIXTURE)
    tokens = np.array([[3, 200, 17, 286, 0, 3, 99, 100], [5, 5, 5, 1, 2, 3, 4, 250]])
    check_logits(model(tokens), gpt2_logits(tensors, n_head, tokens))
    assert model.config == GPTConfig(287, 16, 12, 2, 2, drop_rate=0.0, qkv_bias=True, tie_weights=True)
    assert "out_head.weight" not in model.params


def test_loaded_model_gives_gpt2s_logits():
    check_loaded()


@given(
    seed=st.integers(0, 9999),
    tied=st.booleans(),
    prefix=st.sampled_from(["transformer.", ""]),
    shards=st.sampled_from([1, 2, 5]),
    dtype=st.sampled_from([np.float16, np.float32, np.float64]),
    buffers=st.booleans(),
)
def test_huggingface_folders_round_trip(tmp_path_factory, seed, tied, prefix, shards, dtype, buffers):
    """Logits equal GPT-2's for the file's tensors; after export every tensor has its original bytes."""
    place = tmp_path_factory.mktemp("huggingface")
    tensors = gpt2_tensors(seed, dtype, tied)
    masks = {"h.0.attn.bias": np.tri(6, dtype=bool)[None, None], "h.1.attn.masked_bias": np.array(-1e4, dtype)}
    huggingface_folder(place / "theirs", tensors | (masks if buffers else {}), prefix, shards)
    check_logits(model_of(place / "theirs")(TOKENS), gpt2_logits(tensors, SIZES["n_head"], TOKENS))
    run("import", place / "theirs", "--out", place / "ours")
    if dtype != np.float16:
        assert load(place / "ours").config.tie_weights == tied
        run("export", place / "ours", "--out", place / "back")
        back = load_file(place / "back" / "model.safetensors")
        assert {name.removeprefix("transformer."): a.tobytes() for name, a in back.items()} == {
            name: a.tobytes() for name, a in tensors.items()
        }
        assert json.loads((place / "back" / "config.json").read_text()).items() >= {
            **SIZES, "tie_word_embeddings": tied, "dtype": np.dtype(dtype).name
        }.items()  # fmt: skip


@given(
    seed=st.integers(0, 99),
    config=st.builds(
        GPTConfig,
        vocab_size=st.integers(1, 20),
        context_length=st.integers(5, 9),
        emb_dim=st.sampled_from([4, 12]),
        n_heads=st.sampled_from([1, 2]),
        n_layers=st.integers(1, 3),
        drop_rate=st.sampled_from([0.0, 0.1]),
        qkv_bias=st.booleans(),
        tie_weights=st.booleans(),
    ),
)
def test_our_model_round_trips(tmp_path_factory, seed, config):
    """Through Hugging Face's format, with the same bits; missing biases become 0."""
    place = tmp_path_factory.mktemp("out")
    model = GPT(config, seed=seed)
    write_huggingface(config, model.params, place, {})
    again = model_of(place, np.float32)
    assert again.config.to_dict() == config.to_dict() | {"qkv_bias": True}
    for name, array in again.params.items():
        want = model.params.get(name, np.zeros(config.emb_dim, np.float32))
        assert array.tobytes() == want.tobytes(), name


def test_safetensors_file_alone_is_imported(tmp_path):
    folder = huggingface_folder(tmp_path / "x", gpt2_tensors())
    run("import", folder / "model.safetensors", "--out", tmp_path / "ours")
    check_logits(load(tmp_path / "ours", np.float64)(TOKENS), gpt2_logits(gpt2_tensors(), 2, TOKENS))


def test_tied_head_must_equal_the_table(tmp_path):
    """Old files contain both, equal; a differing head is an error, since transformers would drop it."""
    tensors = gpt2_tensors()
    both = tensors | {"lm_head.weight": tensors["wte.weight"]}
    model = model_of(huggingface_folder(tmp_path / "equal", both, tie_word_embeddings=True))
    assert "out_head.weight" not in model.params
    assert model.config.tie_weights
    other = tensors | {"lm_head.weight": tensors["wte.weight"] + np.float32(1)}
    with pytest.raises(InputError, match=r"lm_head.weight differs from wte.weight, but .* tied"):
        open_source(huggingface_folder(tmp_path / "other", other, tie_word_embeddings=True))


def without(name):
    return lambda tensors: {n: a for n, a in tensors.items() if n != name}


BAD_TENSORS = {
    "missing": (without("h.1.ln_2.bias"), r"has no tensor h\.1\.ln_2\.bias"),
    "extra": (
        lambda t: t | {"h.2.ln_1.weight": np.ones(8)},
        r"has a tensor h\.2\.ln_1\.weight, which a GPT-2 .* lacks",
    ),
    "a shape": (lambda t: t | {"wpe.weight": np.ones((5, 8), "f4")}, r"wpe\.weight has shape \(5, 8\), .* \(6, 8\)"),
    "turned": (lambda t: t | {"h.0.mlp.c_fc.weight": np.ones((32, 8), "f4")}, r"h\.0\.mlp\.c_fc\.weight has shape"),
    "NaN": (lambda t: t | {"ln_f.bias": np.full(8, np.nan, "f4")}, r"final_norm\.shift\[0\] is NaN or infinite"),
}


@pytest.mark.parametrize("what", BAD_TENSORS)
def test_mismatched_tensors_are_named(tmp_path, what):
    change, message = BAD_TENSORS[what]
    folder = huggingface_folder(tmp_path / "bad", change(gpt2_tensors()))
    result = CliRunner().invoke(main, ["import", str(folder), "--out", str(tmp_path / "out")])
    assert result.exit_code == 2
    with pytest.raises(AssertionError, match=message):
        raise AssertionError(result.output)
    assert not list((tmp_path / "out").glob("*")), "something was written"


def test_two_models_in_one_file_are_refused(tmp_path):
    """With and without the prefix: transformers would mix them."""
    tensors = gpt2_tensors()
    both = tensors | {f"transformer.{name}": array + 1 for name, array in tensors.items()}
    with pytest.raises(InputError, match=r"has (\S+) twice, also as transformer\.\1: it holds more"):
        open_source(huggingface_folder(tmp_path, both, prefix=""))


@pytest.mark.parametrize("model", [None, [], {"vocab": {}}, {"vocab": {}, "merges": [1]}, {"merges": [["\ud800"]]}])
def test_invalid_tokenizer_is_named(tmp_path, model):
    folder = huggingface_folder(tmp_path, gpt2_tensors())
    (folder / "tokenizer.json").write_text(json.dumps({"model": model}))
    with pytest.raises(InputError, match=r"tokenizer\.json has no vocabulary in GPT-2's format"):
        open_source(folder)


def test_wrong_or_changed_vocabulary_is_refused(tmp_path):
    folder = shutil.copytree(FIXTURE, tmp_path / "x")
    (folder / "vocab.bpe").write_text("damaged", encoding="utf-8")
    assert "is damaged" in run("import", folder, "--out", tmp_path / "damaged", code=2)
    assert not (tmp_path / "damaged").exists()
    run("import", FIXTURE, "--out", tmp_path / "good")
    ids = json.loads((FIXTURE / "encoder.json").read_text(encoding="utf-8"))
    ids["r"], ids["s"] = ids["s"], ids["r"]
    (tmp_path / "good" / "encoder.json").write_text(json.dumps(ids), encoding="utf-8")
    assert "is not the one that" in run("generate", tmp_path / "good", "A", code=2)


BAD_CONFIG = {
    "another activation": ({"activation_function": "gelu"}, "activation_function is 'gelu', but only 'gelu_new'"),
    "another epsilon": ({"layer_norm_epsilon": 1e-6}, "layer_norm_epsilon is 1e-06"),
    "scaled by layer": ({"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx is True"),
    "another model": ({"model_type": "llama"}, "model_type is 'llama'"),
    "a wide feed-forward": ({"n_inner": 64}, "n_inner is 64"),
    "three dropouts": ({"embd_pdrop": 0.2}, "differ, but only one dropout rate is supported"),
    "heads": ({"n_head": 3}, "emb_dim 8 does not divide into 3 heads"),
    "a number as text": ({"n_layer": "2"}, "n_layers must be a whole number"),
    "layers without end": ({"n_layer": 10**15}, r"has no tensor h\.2\."),
    "a width without end": ({"n_embd": 10**15, "n_head": 1}, r"expects \(11, 1000000000000000\)"),
    "tied as text": ({"tie_word_embeddings": "yes"}, "tie_weights must be True or False"),
    "a list": ({"model_type": [1]}, r"model_type is \[1\]"),
}


@pytest.mark.parametrize("what", BAD_CONFIG)
def test_config_of_another_model_is_named(tmp_path, what):
    changes, message = BAD_CONFIG[what]
    with pytest.raises(InputError, match=message):
        open_source(huggingface_folder(tmp_path, gpt2_tensors(), **changes))


def test_missing_and_non_gpt2_files_are_named(tmp_path):
    with pytest.raises(InputError, match="does not exist"):
        open_source(tmp_path / "nowhere")
    with pytest.raises(InputError, match=r"has neither hparams\.json and model\.ckpt\.index .* nor config\.json"):
        open_source(tmp_path)
    pickle = tmp_path / "x.pth"
    pickle.write_bytes(b"\x80\x02.")
    with pytest.raises(InputError, match=r"is a PyTorch pickle, .* torch-gpt import"):
        open_source(pickle)
    (tmp_path / "config.json").write_text(json.dumps(SIZES))
    with pytest.raises(InputError, match=r"neither model\.safetensors nor model\.safetensors\.index\.json: put"):
        open_source(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(InputError, match=r"torch-gpt import .*pytorch_model\.bin --out DIR reads its weights"):
        open_source(tmp_path)
    save_file({"x": np.ones(1)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(InputError, match="has no vocab_size, n_positions, n_embd, n_head, n_layer"):
        open_source(tmp_path)
    for text in ("", "[1]", "{", "[" * 100_000, "\x00"):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(InputError, match=r"config\.json (cannot be used as JSON|is not a JSON object)"):
            open_source(tmp_path)
    for name in ("model.ckpt.index", "hparams.json"):
        shutil.copy(FIXTURE / name, tmp_path)
        with pytest.raises(InputError, match=r"hparams\.json cannot be read|data-00000-of-00001 does not exist"):
            open_source(tmp_path)


BAD_INDEX = {
    "climbs out": ({"wte.weight": "../model.safetensors"}, r"names '\.\./model\.safetensors'"),
    "an absolute path": ({"wte.weight": "/etc/x.safetensors"}, "names '/etc/x.safetensors'"),
    "a missing shard": ({"wte.weight": "none.safetensors"}, r"none\.safetensors cannot be read"),
    "the wrong shard": ({"transformer.wte.weight": "model-00002-of-00002.safetensors"}, "says is not there|says it is"),
    "a tensor too many": ({"transformer.more": "model-00001-of-00002.safetensors"}, r"transformer\.more is not in"),
    "no name": ({"transformer.wte.weight": 3}, "has no weight_map of names"),
}


@pytest.mark.parametrize("what", BAD_INDEX)
def test_false_index_is_named(tmp_path, what):
    changes, message = BAD_INDEX[what]
    folder = huggingface_folder(tmp_path, gpt2_tensors(), shards=2)
    file = folder / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    index["weight_map"] |= changes
    file.write_text(json.dumps(index))
    with pytest.raises(InputError, match=message):
        open_source(folder)


@pytest.mark.parametrize("key", ["n_vocab", "n_ctx", "n_embd", "n_head", "n_layer"])
@pytest.mark.parametrize("value", [None, 0, 5, -1, 1.5, "12", 10**12])
def test_false_hparams_are_refused(tmp_path, key, value):
    folder = shutil.copytree(FIXTURE, tmp_path / "x")
    values = json.loads((folder / "hparams.json").read_text())
    values[key] = value
    if value is None:
        del values[key]
    (folder / "hparams.json").write_text(json.dumps(values))
    with pytest.raises(InputError, match=r"hparams\.json|model\.ckpt\.index"):
        open_source(folder)


def test_head_count_of_a_released_size_is_checked(tmp_path):
    """The head count is the only number that no tensor's shape can contradict."""
    hparams = {"n_vocab": 50257, "n_ctx": 1024, "n_embd": 768, "n_head": 16, "n_layer": 12}
    folder = shutil.copytree(FIXTURE, tmp_path / "x")
    (folder / "hparams.json").write_text(json.dumps(hparams))
    with pytest.raises(InputError, match="n_head is 16, but 12 in GPT-2 124M"):
        open_source(folder)


# The commands, and the vocabulary


def test_imported_folder_generates_with_its_vocabulary(tmp_path):
    out = run("import", FIXTURE, "--out", tmp_path / "gpt2")
    assert "7,428 parameters" in out
    assert f"numpy-gpt generate {tmp_path / 'gpt2'}" in out
    prompt = "A person reads"
    shown = run("generate", tmp_path / "gpt2", prompt, "--max-new-tokens", 12)
    encoding = get_encoding(str(tmp_path / "gpt2"))
    ids = encode(encoding, prompt)
    assert len(ids) < len(prompt), "nothing was merged"
    want = generate(load(tmp_path / "gpt2"), ids[None], 12, eos_id=286)[0]
    assert shown == encoding.decode(want[want != 286].tolist()).replace("\ufffd", "·") + "\n"
    text = tmp_path / "text.txt"
    text.write_text("A person reads every line of it.")
    assert "tokens" in run("evaluate", tmp_path / "gpt2", "--text", text)
    run("pretrain", "--init", tmp_path / "gpt2", "--text", text_of_words(tmp_path), "--max-steps", 2, "--out",
        tmp_path / "run", "--batch-size", 2)  # fmt: skip
    assert run("generate", tmp_path / "run", prompt, "--max-new-tokens", 3).startswith(prompt)


def test_every_command_keeps_the_tokenizer(tmp_path):
    """Added tokens and the leading space survive a run from the checkpoint, an export and another import."""
    kind = tokenizers_judge.kinds()["prefix and added"]
    folder = huggingface_folder(tmp_path / "theirs", gpt2_tensors(vocab_size=288), vocab_size=288)
    kind.write(folder)
    run("import", folder, "--out", tmp_path / "ours")
    text = tmp_path / "text.txt"
    text.write_text("said the light[first]said " * 40)
    run("pretrain", "--init", tmp_path / "ours", "--text", text, "--max-steps", 1, "--batch-size", 2, "--out",
        tmp_path / "run")  # fmt: skip
    run("pretrain", "--encoding", tmp_path / "ours", "--text", text, "--max-steps", 1, "--context-length", 8, "--out",
        tmp_path / "new")  # fmt: skip
    run("export", tmp_path / "run", "--out", tmp_path / "back")
    run("import", tmp_path / "back", "--out", tmp_path / "again")
    places = [tmp_path / "ours", tmp_path / "run" / "vocabulary", tmp_path / "new" / "vocabulary", tmp_path / "again"]
    for place in places:
        ids = encode(get_encoding(str(place)), "said[first]said")
        assert ids.tolist() == [283, 287, 283], place  # transformers' ids: a space before each part
    runs = (tmp_path / "run", tmp_path / "again")
    evaluated = [run("evaluate", place, "--text", text).split("loss")[1] for place in runs]
    assert evaluated[0] == evaluated[1]
    (tmp_path / "again" / "tokens.json").unlink()
    assert "is not the one that" in run("generate", tmp_path / "again", "said", code=2)


def test_padding_ids_are_never_drawn(tmp_path):
    """The ids beyond the encoding's are by far the likeliest, yet none is drawn."""
    tensors = gpt2_tensors(vocab_size=300, tied=False)
    tensors["ln_f.bias"][:] = 10
    tensors["lm_head.weight"][287:] = 10
    folder = huggingface_folder(tmp_path / "theirs", tensors, vocab_size=300)
    tokenizers_judge.kinds()["padded"].write(folder)
    run("import", folder, "--out", tmp_path / "ours")
    model, prompt = load(tmp_path / "ours"), np.array([[1, 2], [3, 4]])
    assert (generate(model, prompt, 20) >= 287).any()
    for temperature in (0.0, 1.0, 100.0):
        ids = generate(model, prompt, 20, temperature, rng=Generator(1), n_vocab=287)
        assert (ids < 287).all()
        run("generate", tmp_path / "ours", "said", "--temperature", temperature, "--max-new-tokens", 20)
    with pytest.raises(InputError, match="n_vocab must be at least 1"):
        generate(model, prompt, 1, n_vocab=0)


def test_added_tokens_beyond_the_model_are_refused_only_in_text(tmp_path):
    kind = tokenizers_judge.kinds()["added special, embeddings as they were"]
    kind.write(huggingface_folder(tmp_path / "theirs", gpt2_tensors(vocab_size=287), vocab_size=287))
    assert "Try: numpy-gpt generate" in run("import", tmp_path / "theirs", "--out", tmp_path / "ours")
    assert run("generate", tmp_path / "ours", "said", "--max-new-tokens", 3).startswith("said")
    assert "287" in run("generate", tmp_path / "ours", "said[PAD]", code=2)


def test_bytes_model_keeps_its_encoding_and_notes_zero_biases(tmp_path):
    save(GPT(GPTConfig(257, 16, 8, 2, 1), seed=1), tmp_path / "mine", about={"encoding": "bytes"})
    assert "biases of 0 for query, key and value" in run("export", tmp_path / "mine", "--out", tmp_path / "out")
    assert "Try: numpy-gpt generate" in run("import", tmp_path / "out", "--out", tmp_path / "back")
    want = run("generate", tmp_path / "mine", "A", "--max-new-tokens", 5)
    assert run("generate", tmp_path / "back", "A", "--max-new-tokens", 5) == want
    save(GPT(GPTConfig(257, 16, 8, 2, 1, qkv_bias=True)), tmp_path / "biased", about={"encoding": "bytes"})
    assert "biases" not in run("export", tmp_path / "biased", "--out", tmp_path / "out2")


@pytest.mark.parametrize(("size", "likely"), [(257, "bytes"), (50257, "gpt2"), (50304, "gpt2"), (300, "")])
def test_import_without_vocabulary_suggests_an_encoding(tmp_path, size, likely):
    folder = huggingface_folder(tmp_path / "x", gpt2_tensors(vocab_size=size), vocab_size=size)
    out = " ".join(run("import", folder, "--out", tmp_path / "out").split())
    assert "has no vocab.bpe and no encoder.json" in out
    assert ("by its size" in out) == bool(likely)
    assert f"--encoding{likely and f' {likely}, likely by its size,'}" in out


def text_of_words(place):
    file = place / "words.txt"
    file.write_text("every person reads a line of it, and the next one. " * 60)
    return file


def test_generate_names_the_missing_vocabulary(tmp_path):
    folder = shutil.copytree(FIXTURE, tmp_path / "bare")
    for name in GPT2_FILES:
        (folder / name).unlink()
    assert "has no vocab.bpe and no encoder.json" in run("import", folder, "--out", tmp_path / "out")
    assert "has no vocab.bpe and no encoder.json" in run("generate", tmp_path / "out", "x", code=2)
    assert run("generate", tmp_path / "out", "x", "--encoding", "bytes", "--max-new-tokens", 2).startswith("x")
    shutil.copy(FIXTURE / "encoder.json", tmp_path / "out")
    assert "has no vocab.bpe, needed" in run("generate", tmp_path / "out", "x", code=2)


def test_nothing_is_overwritten(tmp_path):
    save(GPT(GPTConfig(5, 4, 4, 1, 1)), tmp_path / "mine")
    before = (tmp_path / "mine" / "model.safetensors").read_bytes()
    for command in (["import", FIXTURE], ["export", tmp_path / "mine"]):
        assert "exists and is not empty: choose another --out" in run(*command, "--out", tmp_path / "mine", code=2)
    assert (tmp_path / "mine" / "model.safetensors").read_bytes() == before


@pytest.fixture(scope="session")
def gpt2_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vocabulary")
    for name, content in vocabulary_files("gpt2").items():
        (folder / name).write_bytes(content)
    return folder


def test_gpt2_vocabulary_folder_equals_gpt2(gpt2_folder):
    ours, want = get_encoding(str(gpt2_folder)), get_encoding("gpt2")
    assert ours._mergeable_ranks == want._mergeable_ranks
    assert ours._special_tokens == want._special_tokens


@given(st.text())
def test_folder_vocabulary_encodes_like_gpt2(gpt2_folder_encoding, text):
    assert gpt2_folder_encoding.encode_ordinary(text) == get_encoding("gpt2").encode_ordinary(text)


@pytest.fixture(scope="session")
def gpt2_folder_encoding(gpt2_folder):
    return get_encoding(str(gpt2_folder))


def edited(name, old, new):
    """A function that changes one file of the fixture's vocabulary."""

    def edit(folder):
        text = (folder / name).read_text(encoding="utf-8")
        assert old in text
        (folder / name).write_text(text.replace(old, new, 1), encoding="utf-8")

    return edit


BAD_VOCABULARIES = {
    "an id twice": edited("encoder.json", '"!": 0', '"!": 1'),
    "an id left out": edited("encoder.json", "286", "287"),
    "a token renamed": edited("encoder.json", '"!"', '"!!"'),
    "a letter that is no byte": edited("encoder.json", '"!"', '"漢"'),
    "an id that is a fraction": edited("encoder.json", '"!": 0', '"!": 0.0'),
    "an id that is no number": edited("encoder.json", '"!": 0', '"!": false'),
    "an id as text": edited("encoder.json", '"!": 0', '"!": "0"'),
    "no JSON": edited("encoder.json", "{", ""),
    "a merge changed": edited("vocab.bpe", "e", "x"),
    "a merge of three": edited("vocab.bpe", "\n", "\na b c\n"),
    "merges in another order": lambda folder: (folder / "vocab.bpe").write_text(
        "\n".join(sorted((folder / "vocab.bpe").read_text(encoding="utf-8").split("\n"))), encoding="utf-8"
    ),
    "no UTF-8": lambda folder: (folder / "vocab.bpe").write_bytes(b"\xff\xfe"),
}


@pytest.mark.parametrize("what", BAD_VOCABULARIES)
def test_damaged_vocabulary_is_named(tmp_path, what):
    folder = shutil.copytree(FIXTURE, tmp_path / "x")
    BAD_VOCABULARIES[what](folder)
    with pytest.raises(InputError, match=r"vocabulary in .* is damaged|encoder\.json cannot be used as JSON"):
        get_encoding(str(folder))


def test_vocabulary_in_tokenizer_json_is_imported(tmp_path):
    folder = huggingface_folder(tmp_path / "x", gpt2_tensors(**{k: v for k, v in SIZES.items() if k != "vocab_size"}))
    ids = json.loads((FIXTURE / "encoder.json").read_text(encoding="utf-8"))
    merges = (FIXTURE / "vocab.bpe").read_text(encoding="utf-8").split("\n")[1:-1]
    for form in (merges, [merge.split(" ") for merge in merges]):  # the old and the new format
        (folder / "tokenizer.json").write_text(json.dumps({"model": {"type": "BPE", "vocab": ids, "merges": form}}))
        vocabulary = open_source(folder).vocabulary
        assert json.loads(vocabulary["encoder.json"]) == ids
        assert vocabulary["vocab.bpe"].decode().split("\n")[1:-1] == merges


def test_downloaded_files_become_a_checkpoint(tmp_path, monkeypatch):
    """The fixture stands for the released files; `download` itself is tested in test_download.py."""
    asked = []
    monkeypatch.setattr("pooch.os_cache", lambda name: tmp_path / "cache" / name)

    def fetch(size, folder, report):
        asked.append(size)
        shutil.copytree(FIXTURE, folder)

    monkeypatch.setattr("numpy_gpt.weights.download.fetch_gpt2", fetch)
    monkeypatch.chdir(tmp_path)
    assert "Saved gpt2-355M" in run("download", "355M")
    assert asked == ["355M"]
    assert load(tmp_path / "gpt2-355M").config.emb_dim == 12
    message = run("download", "355M", "--from", FIXTURE, "--out", tmp_path / "other", code=2)
    assert "model.ckpt.data-00000-of-00001" in message
    assert run("download", "355M", code=2) == "Error: gpt2-355M exists and is not empty: choose another --out\n"


def test_full_disk_leaves_no_checkpoint(tmp_path, monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    for command in (["import", FIXTURE], ["export", FIXTURE]):
        if command[0] == "export":
            monkeypatch.undo()
            save(GPT(GPTConfig(5, 4, 4, 1, 1)), tmp_path / "mine")
            command[1] = tmp_path / "mine"
            monkeypatch.setattr("os.fsync", full)
        out = tmp_path / command[0]
        assert "No space left on device" in run(*command, "--out", out, code=2)
        assert not out.exists()
