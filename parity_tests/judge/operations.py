"""The operations under test: inputs, numpy_gpt's results, torch's results, and the scale of their rounding.

test_operations.py, the museum and the check of a student's own functions all use check_operation; report.py measures
through the same table. numpy_gpt's functions are looked up in their modules at every call, so a patched function is
the one judged.
"""

import importlib
import math
from collections.abc import Callable, Iterable
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
from hypothesis.strategies import SearchStrategy

from numpy_gpt.ops import attention, cross_entropy, dropout, embedding, gelu, layernorm, linear
from parity_tests.judge import compare, strategies
from parity_tests.judge.compare import check, check_exact


class Operation(NamedTuple):
    """How to run one operation on both sides. Inputs go by name; d + output is the upstream gradient."""

    cases: Callable[[str], SearchStrategy]
    """dtype -> a strategy that draws cases."""
    inputs: Callable[[Any], dict[str, Any]]
    """A case -> the arguments by name."""
    forward: Callable[[dict[str, Any]], tuple[dict[str, Any], Any]]
    """Inputs -> numpy_gpt's outputs by name, and the cache."""
    backward: Callable[[dict[str, Any], Any], dict[str, Any]]
    """Inputs and the cache -> numpy_gpt's gradients by name."""
    torchs: Callable[[dict[str, Any]], Iterable[tuple[str, torch.Tensor]]]
    """Inputs as tensors -> (name, output) of each of torch's implementations."""
    leaves: tuple[str, ...]
    """The inputs that have a gradient, d + name."""
    scales: Callable[..., dict[str, Any]]
    """Inputs by name -> S of every tensor; None: the bits must match."""
    modules: tuple[str, ...]
    """The functions of numpy_gpt.ops under test, as module.function."""
    output: str = "y"


@contextmanager
def unchanged(operation, inputs):
    """Fail if an operation writes into one of its arguments."""
    before = {name: a.tobytes() for name, a in inputs.items() if isinstance(a, np.ndarray)}
    yield
    for name, bits in before.items():
        assert inputs[name].tobytes() == bits, f"{operation} wrote into its argument {name}"


def _linear_inputs(case):
    s, n = case.source(), case.shape
    inputs = {"x": s.x(n["B"], n["T"], n["I"]), "w": s.normal(n["O"], n["I"]), "dy": s.upstream(n["B"], n["T"], n["O"])}
    return inputs | {"b": s.normal(n["O"]) if case.options.get("bias", True) else None}


def _linear_forward(i):
    y, cache = linear.linear_forward(i["x"], i["w"], i["b"])
    return {"y": y}, cache


def _linear_backward(i, cache):
    dx, dw, db = linear.linear_backward(i["dy"], cache)
    return {"dx": dx, "dw": dw} | ({} if i["b"] is None and db is None else {"db": db})


def _layernorm_inputs(case):
    s, n = case.source(), case.shape
    shape = (n["B"], n["T"], n["C"])
    return {"x": s.x(*shape), "scale": s.gain(n["C"]), "shift": s.normal(n["C"]), "dy": s.upstream(*shape)}


def _layernorm_forward(i):
    y, cache = layernorm.layernorm_forward(i["x"], i["scale"], i["shift"])
    return {"y": y}, cache


def _layernorm_backward(i, cache):
    return dict(zip(("dx", "dscale", "dshift"), layernorm.layernorm_backward(i["dy"], cache), strict=True))


def _gelu_inputs(case):
    s, n = case.source(), case.shape
    return {"x": s.x(n["B"], n["T"], n["C"]), "dy": s.upstream(n["B"], n["T"], n["C"])}


def _gelu_forward(i):
    y, cache = gelu.gelu_forward(i["x"])
    return {"y": y}, cache


def _dropout_inputs(case):
    """keep: which elements torch keeps after manual_seed of the case's seed."""
    s, n, rate = case.source(), case.shape, case.options.get("rate", 0.0)
    x, dy = s.x(n["B"], n["T"], n["C"]), s.upstream(n["B"], n["T"], n["C"])
    keep = _torchs_factors(torch.from_numpy(np.ones_like(x, order="C")), rate, case.seed).numpy() != 0
    return {"x": x, "keep": keep, "rate": rate, "seed": case.seed, "dy": dy}


def _torchs_factors(x, rate, seed):
    torch.manual_seed(seed)
    return F.dropout(x, rate)


def _dropout_forward(i):
    mask = dropout.dropout_mask(i["keep"], i["rate"], i["x"].dtype)
    with unchanged("dropout", {"mask": mask}):
        y, cache = dropout.dropout_forward(i["x"], mask)
    return {"mask": mask, "y": y}, cache


def _embedding_inputs(case):
    s, n = case.source(), case.shape
    ids, w, dy = s.ids(n["V"], n["B"], n["T"]), s.normal(n["V"], n["C"]), s.upstream(n["B"], n["T"], n["C"])
    ids = strategies.arrange(ids, "C" if case.layout == "gaps" else case.layout)  # the gaps are filled with NaN
    return {"ids": ids, "w": w, "dy": dy}


def _embedding_forward(i):
    y, cache = embedding.embedding_forward(i["ids"], i["w"])
    return {"y": y}, cache


def _position_embedding_inputs(case):
    s, n = case.source(), case.shape
    x, w = s.x(n["B"], n["T"], n["C"]), s.normal(n["start"] + n["T"] + n["rest"], n["C"])
    return {"x": x, "w": w, "start": n["start"], "dy": s.upstream(n["B"], n["T"], n["C"])}


def _position_embedding_forward(i):
    y, cache = embedding.position_embedding_forward(i["x"], i["w"], i["start"])
    return {"y": y}, cache


def _position_embedding_backward(i, cache):
    return dict(zip(("dx", "dw"), embedding.position_embedding_backward(i["dy"], cache), strict=True))


def _position_embedding_torchs(i):
    T = i["x"].shape[1]
    yield "embedding", i["x"] + F.embedding(torch.arange(i["start"], i["start"] + T), i["w"])


def _attention_inputs(case):
    s, n, rate = case.source(), case.shape, case.options.get("rate")
    B, NH, T, HS = n["B"], n["NH"], n["T"], n["HS"]
    S = n["past"] + T
    q, k, v = s.x(B, NH, T, HS), s.normal(B, NH, S, HS), s.normal(B, NH, S, HS)
    dy = s.upstream(B, NH, T, HS)
    return {"q": q, "k": k, "v": v, "mask": None if rate is None else s.factors(rate, B, NH, T, S), "dy": dy}


def _attention_forward(i):
    y, cache = attention.attention_forward(i["q"], i["k"], i["v"], i["mask"])
    return {"y": y}, cache


def _attention_backward(i, cache):
    return dict(zip(("dq", "dk", "dv"), attention.attention_backward(i["dy"], cache), strict=True))


def _attention_torchs(i):
    """The formula in torch's basic operations; without a mask, torch's fused kernel too."""
    q, k, v, mask = i["q"], i["k"], i["v"], i["mask"]
    T, S = q.shape[-2], k.shape[-2]
    seen = torch.ones(T, S, dtype=torch.bool).tril(S - T)
    scores = (q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])).masked_fill(~seen, -torch.inf)
    probs = torch.softmax(scores, dim=-1)
    yield "plain", (probs if mask is None else probs * mask) @ v
    if mask is None:
        yield "sdpa", F.scaled_dot_product_attention(q, k, v, attn_mask=seen)
        if T == S:
            yield "sdpa, causal", F.scaled_dot_product_attention(q, k, v, is_causal=True)


def _cross_entropy_inputs(case):
    s, n = case.source(), case.shape
    logits, targets = s.x(n["B"], n["T"], n["V"]), s.ids(n["V"], n["B"], n["T"])
    return {"logits": logits, "targets": targets, "dloss": float(s.upstream(1)[0])}  # the loss is a scalar


def _cross_entropy_forward(i):
    loss, cache = cross_entropy.cross_entropy_forward(i["logits"], i["targets"])
    return {"loss": loss}, cache


OPERATIONS = {
    "linear": Operation(
        strategies.linear_cases,
        _linear_inputs,
        _linear_forward,
        _linear_backward,
        lambda i: [("linear", F.linear(i["x"], i["w"], i["b"]))],
        ("x", "w", "b"),
        compare.linear_scales,
        ("linear.linear_forward", "linear.linear_backward"),
    ),
    "layernorm": Operation(
        strategies.layernorm_cases,
        _layernorm_inputs,
        _layernorm_forward,
        _layernorm_backward,
        lambda i: [("layer_norm", F.layer_norm(i["x"], i["x"].shape[-1:], i["scale"], i["shift"], eps=1e-5))],
        ("x", "scale", "shift"),
        compare.layernorm_scales,
        ("layernorm.layernorm_forward", "layernorm.layernorm_backward"),
    ),
    "gelu": Operation(
        strategies.gelu_cases,
        _gelu_inputs,
        _gelu_forward,
        lambda i, cache: {"dx": gelu.gelu_backward(i["dy"], cache)},
        lambda i: [("gelu", F.gelu(i["x"], approximate="tanh"))],
        ("x",),
        compare.gelu_scales,
        ("gelu.gelu_forward", "gelu.gelu_backward"),
    ),
    "dropout": Operation(
        strategies.dropout_cases,
        _dropout_inputs,
        _dropout_forward,
        lambda i, cache: {"dx": dropout.dropout_backward(i["dy"], cache)},
        lambda i: [("dropout", _torchs_factors(i["x"], i["rate"], i["seed"]))],
        ("x",),
        lambda **_: {"mask": None, "y": None, "dx": None},
        ("dropout.dropout_mask", "dropout.dropout_forward", "dropout.dropout_backward"),
    ),
    "embedding": Operation(
        strategies.embedding_cases,
        _embedding_inputs,
        _embedding_forward,
        lambda i, cache: {"dw": embedding.embedding_backward(i["dy"], cache)},
        lambda i: [("embedding", F.embedding(i["ids"], i["w"]))],
        ("w",),
        compare.embedding_scales,
        ("embedding.embedding_forward", "embedding.embedding_backward"),
    ),
    "position_embedding": Operation(
        strategies.position_embedding_cases,
        _position_embedding_inputs,
        _position_embedding_forward,
        _position_embedding_backward,
        _position_embedding_torchs,
        ("x", "w"),
        compare.position_embedding_scales,
        ("embedding.position_embedding_forward", "embedding.position_embedding_backward"),
    ),
    "attention": Operation(
        strategies.attention_cases,
        _attention_inputs,
        _attention_forward,
        _attention_backward,
        _attention_torchs,
        ("q", "k", "v"),
        compare.attention_scales,
        ("attention.attention_forward", "attention.attention_backward"),
    ),
    "cross_entropy": Operation(
        strategies.cross_entropy_cases,
        _cross_entropy_inputs,
        _cross_entropy_forward,
        lambda i, cache: {"dlogits": cross_entropy.cross_entropy_backward(i["dloss"], cache)},
        lambda i: [("cross_entropy", F.cross_entropy(i["logits"].flatten(0, 1), i["targets"].flatten()))],
        ("logits",),
        compare.cross_entropy_scales,
        ("cross_entropy.cross_entropy_forward", "cross_entropy.cross_entropy_backward"),
        output="loss",
    ),
}


def names():
    """Function name -> (its module in numpy_gpt.ops, its operation)."""
    found = {}
    for operation, entry in OPERATIONS.items():
        for function in entry.modules:
            module, name = function.split(".")
            found[name] = (importlib.import_module(f"numpy_gpt.ops.{module}"), operation)
    return found


@contextmanager
def in_place(functions):
    """Replace functions of numpy_gpt.ops, by name, within the block."""
    with ExitStack() as stack:
        for name, function in functions.items():
            stack.enter_context(mock.patch.object(names()[name][0], name, function))
        yield


def our_answer(operation, inputs):
    """numpy_gpt's outputs and gradients by name. Fails if an argument is written into."""
    entry = OPERATIONS[operation]
    with unchanged(operation, inputs):
        outputs, cache = entry.forward(inputs)
        return outputs | entry.backward(inputs, cache)


def torch_answers(operation, inputs, dtype=torch.float64):
    """torch implementation -> its output and autograd's gradients by name, computed in this dtype.

    Dropout's factors depend on the dtype they are divided in, so dropout is computed in the inputs' dtype.
    """
    entry = OPERATIONS[operation]
    tensors = {}
    for name, value in inputs.items():
        if isinstance(value, np.ndarray):
            tensors[name] = torch.from_numpy(np.array(value, order="C"))
            if operation != "dropout" and tensors[name].is_floating_point():
                tensors[name] = tensors[name].to(dtype)
        else:
            tensors[name] = torch.tensor(value, dtype=dtype) if name == "dloss" else value
    leaves = {name: tensors[name].requires_grad_() for name in entry.leaves if tensors[name] is not None}
    answers = {}
    for name, y in entry.torchs(tensors):
        grads = torch.autograd.grad(y, list(leaves.values()), tensors[f"d{entry.output}"], retain_graph=True)
        answer = {entry.output: y} | {f"d{leaf}": grad for leaf, grad in zip(leaves, grads, strict=True)}
        if operation == "dropout":
            answer = {"mask": _torchs_factors(torch.ones_like(y), tensors["rate"], tensors["seed"])} | answer
        answers[name] = {tensor: value.detach().numpy() for tensor, value in answer.items()}
    return answers


def check_tensor(name, got, want, scale):
    """Run check, or check_exact if the scale is None."""
    __tracebackhide__ = True
    if scale is None:
        check_exact(name, got, want)
    else:
        check(name, got, want, scale)


def check_operation(operation, case):
    """Compare every output and gradient of one case with every torch implementation, computed in float64."""
    __tracebackhide__ = True
    inputs = OPERATIONS[operation].inputs(case)
    got, scales = our_answer(operation, inputs), OPERATIONS[operation].scales(**inputs)
    dtype = inputs[OPERATIONS[operation].leaves[0]].dtype
    for want in torch_answers(operation, inputs).values():
        assert got.keys() == want.keys() == scales.keys(), f"{operation}: {list(got)}, {list(want)}, {list(scales)}"
        for tensor, answer in want.items():
            check_tensor(f"{operation}.{tensor}", got[tensor], answer.astype(dtype), scales[tensor])
