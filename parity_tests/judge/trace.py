"""Every activation of a model and its gradient, in NumPy and in torch, under one name each and in order of use.

NumPy's are what goes in and out of the operations while the model runs: an operation's output is an activation, and the
upstream gradient its backward is given is that activation's gradient. torch's are taken by hooks. A residual stream is
what a LayerNorm reads; its gradient is that of the branch that was added last.

Attention's scores and probabilities have no place here: numpy_gpt keeps none of them, its backward recomputes them from
the rows' log-sums. They are judged by what they make of the values, att.heads, and by the gradients of q and k.
"""

from contextlib import ExitStack
from typing import NamedTuple
from unittest import mock

import numpy as np
import torch

from numpy_gpt.ops import attention, cross_entropy, dropout, embedding, gelu, layernorm, linear
from numpy_gpt.parameters import QKV
from parity_tests.judge import compare
from parity_tests.judge.compare import check
from torch_gpt.model import Dropout, LayerNorm

OPERATIONS = {  # of numpy_gpt.ops, as the model calls them
    "embedding": embedding,
    "position_embedding": embedding,
    "dropout": dropout,
    "layernorm": layernorm,
    "linear": linear,
    "attention": attention,
    "gelu": gelu,
    "cross_entropy": cross_entropy,
}
BLOCK = (  # an activation of a block, the operation that makes it, those whose backward makes its gradient
    ("norm1", "layernorm", "att.W_query, att.W_key, att.W_value"),
    (", ".join(f"att.{name}" for name in QKV), "linear", "att.heads"),  # one product
    ("att.heads", "attention", "att.out_proj"),
    ("att.out_proj", "linear", "drop_shortcut.1"),
    ("drop_shortcut.1", "dropout", "norm2 and of the shortcut"),
    ("norm2", "layernorm", "ff.layers.0"),
    ("ff.layers.0", "linear", "ff.layers.1"),
    ("ff.layers.1", "gelu", "ff.layers.2"),
    ("ff.layers.2", "linear", "drop_shortcut.2"),
    ("drop_shortcut.2", "dropout", ""),  # what comes after the block
)


class Step(NamedTuple):
    """One operation of the model: the name of what it makes, its kind, and where its gradient comes from."""

    name: str
    operation: str
    consumer: str


class Trace(NamedTuple):
    """Name -> array, in the order of use; gradients in the order in which the backward pass makes them."""

    activations: dict[str, np.ndarray]
    gradients: dict[str, np.ndarray]


def steps(config):
    """Every operation of a pass in order, up to the loss."""
    first = [
        Step("tok_emb", "embedding", "pos_emb"),
        Step("pos_emb", "position_embedding", "drop_emb"),
        Step("drop_emb", "dropout", "trf_blocks.0.norm1 and of the shortcut"),
    ]
    blocks = []
    for i in range(config.n_layers):
        after = "final_norm" if i + 1 == config.n_layers else f"trf_blocks.{i + 1}.norm1 and of the shortcut"
        for name, operation, consumer in BLOCK:
            consumer = f"trf_blocks.{i}.{consumer}" if consumer else after
            blocks.append(Step(f"trf_blocks.{i}.{name}", operation, consumer))
    last = [Step("final_norm", "layernorm", "out_head"), Step("out_head", "linear", "the loss")]
    return first + blocks + last


def merged(a):
    """Heads (B, NH, T, HS) side by side, (B, T, C), as out_proj reads them; anything else as it is."""
    return a.swapaxes(1, 2).reshape(a.shape[0], a.shape[2], -1) if a.ndim == 4 else a


def parts(step):
    """The names of what a step makes: one array, or the queries, keys and values side by side."""
    first, *others = step.name.split(", ")
    prefix = first[: first.index("att.")] if others else ""
    return [first] + [prefix + other for other in others]


def by_name(step, a, tokens):
    """Name -> array (B, T, features) of a step's array, heads merged; the head's has its (B, T) as one axis."""
    a = merged(a).reshape(*tokens.shape, -1)
    return dict(zip(parts(step), np.split(a, len(parts(step)), axis=-1), strict=True))


def numpy_trace(model, tokens, targets, rng=None):
    """The trace of model.loss_and_grads. Fails if the operations are not those of `steps`, or not undone in reverse."""
    made, undone, order = [], [], steps(model.config) + [Step("loss", "cross_entropy", "")]

    def watched(operation, module):
        forward, backward = (getattr(module, f"{operation}_{way}") for way in ("forward", "backward"))

        def recording_forward(x, *args, **kwargs):
            before = np.array(x)  # the loss is taken in the logits' own memory
            y, cache = forward(x, *args, **kwargs)
            made.append((operation, before, np.array(y)))
            return y, cache

        def recording_backward(dy, *args, **kwargs):
            undone.append((operation, np.array(dy)))
            return backward(dy, *args, **kwargs)

        yield f"{operation}_forward", recording_forward
        yield f"{operation}_backward", recording_backward

    with ExitStack() as stack:
        for operation, module in OPERATIONS.items():
            for name, function in watched(operation, module):
                stack.enter_context(mock.patch.object(module, name, function))
        model.loss_and_grads(tokens, targets, rng)

    assert [operation for operation, *_ in made] == [step.operation for step in order], "the operations of a pass"
    activations = {}
    for step, (operation, x, y) in zip(order, made, strict=True):
        if operation == "layernorm":
            activations[f"{step.name}, what it reads"] = x
        activations |= {"loss": y} if step.name == "loss" else by_name(step, y, tokens)
    assert [operation for operation, _ in undone] == [step.operation for step in order[::-1]], "the backward pass"
    gradients = {}
    for step, (_, dy) in zip(order[-2::-1], undone[1:], strict=True):  # the loss has no gradient to be compared
        gradients |= by_name(step, dy, tokens)
    return Trace(activations, gradients)


def torch_trace(reference, tokens, targets, factors=None):
    """The same of a torch_gpt model with plain attention; factors: dropout's, in order of use, or None."""
    kept, with_gradient, names = {}, [], {module: name for name, module in reference.named_modules()}

    def keep(name, tensor):
        tensor.retain_grad()
        with_gradient.append(name)
        kept[name] = tensor

    def after(module, args, y):
        name = names[module]
        if name.endswith("drop_shortcut"):
            name += ".2" if f"{name}.1" in kept else ".1"
        keep(name, y)

    def before(module, args):
        name = names[module]
        if isinstance(module, LayerNorm):
            kept[f"{name}, what it reads"] = args[0]
        elif name == "drop_emb":
            keep("pos_emb", args[0])
        elif name.endswith("out_proj"):
            keep(name.replace("out_proj", "heads"), args[0])

    watched = [
        module
        for module, name in names.items()
        if isinstance(module, torch.nn.Linear | torch.nn.GELU | LayerNorm | Dropout) or name == "tok_emb"
        if not name.endswith(("att.dropout", "out_head"))
    ]
    hooks = [module.register_forward_hook(after) for module in watched]
    hooks += [module.register_forward_pre_hook(before) for module in watched]
    hooks.append(reference.register_forward_hook(lambda module, args, logits: keep("out_head", logits)))
    reference.train(factors is not None)
    reference.use_masks(None if factors is None else [torch.from_numpy(factor) for factor in factors])
    kept["loss"] = reference.loss(torch.from_numpy(tokens), torch.from_numpy(targets))
    kept["loss"].backward()
    reference.use_masks(None)
    for hook in hooks:
        hook.remove()
    activations = {name: tensor.detach().numpy() for name, tensor in kept.items()}
    gradients = {name: kept[name].grad.numpy() for name in with_gradient}
    return Trace(activations, gradients)


def check_traces(config, got, want):
    """Every activation in the order of the pass, then every gradient in the order of the backward pass.

    The first that diverges is the one named, with the operation that made it. The scale is the largest activation, and
    for gradients the largest activation's gradient, as for the whole model.
    """
    assert got.activations.keys() == want.activations.keys(), "names of the activations"
    assert got.gradients.keys() == want.gradients.keys(), "names of the activations' gradients"
    largest = max(float(np.abs(a).max()) for a in want.activations.values())
    for name, activation in got.activations.items():
        check(f"{name}", activation, want.activations[name], largest, compare.MODEL)
    G = max(float(np.abs(g).max()) for g in want.gradients.values())
    consumers = {name: step.consumer for step in steps(config) for name in parts(step)}
    for name, gradient in got.gradients.items():
        try:
            check(f"d {name}", gradient, want.gradients[name], G, compare.MODEL)
        except AssertionError as error:
            raise AssertionError(f"{error}, made by the backward of {consumers[name]}") from None
