"""Checks of checkpoints and imports against GPT-2's formulas."""

import json
import tempfile
from pathlib import Path

import numpy as np
from click.testing import CliRunner

from numpy_gpt import GPT
from numpy_gpt.cli.main import main
from numpy_gpt.weights.source import open_source
from parity_tests.judge.gpt2_files import SIZES, gpt2_logits, gpt2_tensors, huggingface_folder

FIXTURE = Path(__file__).parents[1] / "fixtures" / "tiny_gpt2"


TOKENS = np.array([[1, 5, 0, 10, 3], [2, 2, 9, 4, 7]])


def model_of(path, dtype=np.float64):
    """The model in another program's folder, converted to dtype."""
    source = open_source(path)
    return GPT.from_params(source.config, {name: tensor.astype(dtype) for name, tensor in source.tensors.items()})


def check_logits(got, want):
    """Assert that logits agree within 1e-12 of the largest logit."""
    error = np.abs(got - want).max() / np.abs(want).max()
    assert error <= 1e-12, f"logits: {error:.2g} of the largest"


def run(*args, code=0):
    result = CliRunner().invoke(main, [str(a) for a in args])
    assert result.exit_code == code, result.output
    return result.output


def openai_tensors():
    """The fixture's variables under Hugging Face's names, read without the index: sorted by name, without gaps."""
    hparams = json.loads((FIXTURE / "hparams.json").read_text())
    size = dict(
        zip(("n_head", "n_layer", "n_embd"), (hparams[k] for k in ("n_head", "n_layer", "n_embd")), strict=True)
    )
    tensors = gpt2_tensors(vocab_size=hparams["n_vocab"], n_positions=hparams["n_ctx"], **size)
    numbers = np.fromfile(FIXTURE / "model.ckpt.data-00000-of-00001", "<f4")

    def variable(name):
        path, kind = name.rsplit(".", 1)
        if path in ("wte", "wpe"):
            return f"model/{path}"
        last = {"weight": "g" if "ln_" in path else "w", "bias": "b"}[kind]
        return "model/" + path.replace("h.", "h", 1).replace(".", "/") + "/" + last

    at = 0
    for name in sorted(tensors, key=variable):
        size = tensors[name].size
        tensors[name] = numbers[at : at + size].reshape(tensors[name].shape)
        at += size
    assert at == numbers.size
    return tensors, hparams["n_head"]


def check_loaded():
    """Assert that a loaded Hugging Face folder gives GPT-2's logits."""
    tensors = gpt2_tensors()
    with tempfile.TemporaryDirectory() as place:
        model = model_of(huggingface_folder(Path(place), tensors))
    check_logits(model(TOKENS), gpt2_logits(tensors, SIZES["n_head"], TOKENS))
