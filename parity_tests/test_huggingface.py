"""A second judge: the same weights in Hugging Face's GPT-2, which shares no line with torch_gpt.

Its layout is OpenAI's: linear weights are (in, out), query, key and value one matrix, and it always has their bias.
"""

import numpy as np
import pytest
import torch
from hypothesis import given, settings

from numpy_gpt import GPT, GPTConfig
from parity_tests import compare, strategies
from parity_tests.compare import check
from parity_tests.strategies import ModelCase
from parity_tests.test_model import VARIANTS, check_gradients, check_loss, reject_cancelled

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
    """The part of Hugging Face's tensors that is ours of this name, a view, (out, in) as torch's Linear has it."""
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
    """GPT2LMHeadModel in float64 with these parameters; whatever is ours fills all that it has, but for biases of 0."""
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
    """Logits, loss and every gradient within the budget of the whole model."""
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
    check("logits beside Hugging Face", logits, want, float(np.abs(want).max()), compare.MODEL)
    check_loss("loss beside Hugging Face", got, loss.item(), want)
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


def test_its_own_loss_of_a_text_is_ours_of_the_text_and_the_text_one_later(transformers):
    case = ModelCase(GPTConfig(50, 16, 24, 3, 2, 0.0), B=3, T=16)
    judge, (ids, _) = huggingface_model(transformers, case.config, case.params(), "eager"), case.batch()
    want = judge(torch.from_numpy(ids), labels=torch.from_numpy(ids))
    loss = case.model().loss(ids[:, :-1], ids[:, 1:])
    logits = want.logits.detach().numpy().astype(np.float32)  # it takes the loss of these, whatever the model's dtype
    check_loss("Hugging Face's own loss", np.float32(loss), want.loss.item(), logits)
