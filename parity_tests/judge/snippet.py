"""A failing case as stand-alone Python that the student can run without the suite."""

import numpy as np

CALLS = {  # how an operation is called; arguments are named as in operations.py
    "linear": ("y, cache = {linear_forward}(x, w, b)", "dx, dw, db = {linear_backward}(dy, cache)"),
    "layernorm": (
        "y, cache = {layernorm_forward}(x, scale, shift)",
        "dx, dscale, dshift = {layernorm_backward}(dy, cache)",
    ),
    "gelu": ("y, cache = {gelu_forward}(x)", "dx = {gelu_backward}(dy, cache)"),
    "dropout": (
        "mask = {dropout_mask}(keep, rate, x.dtype)",
        "y, cache = {dropout_forward}(x, mask)",
        "dx = {dropout_backward}(dy, cache)",
    ),
    "embedding": ("y, cache = {embedding_forward}(ids, w)", "dw = {embedding_backward}(dy, cache)"),
    "position_embedding": (
        "y, cache = {position_embedding_forward}(x, w, start)",
        "dx, dw = {position_embedding_backward}(dy, cache)",
    ),
    "attention": (
        "y, cache = {attention_forward}(q, k, v, mask)",
        "dq, dk, dv = {attention_backward}(dy, cache)",
    ),
    "cross_entropy": (
        "loss, cache = {cross_entropy_forward}(logits, targets)",
        "dlogits = {cross_entropy_backward}(dloss, cache)",
    ),
}
LAYOUTS = {  # memory layout of strategies.py -> a line that converts an array to it
    "transposed": "{0} = np.asfortranarray({0})",
    "gaps": "{0} = np.repeat({0}, 2, axis=-1)[..., ::2]",
    "reversed": "{0} = {0}[..., ::-1].copy()[..., ::-1]",
    "read-only": "{0}.setflags(write=False)",
}


def snippet(operation, case, wrong, own, path):
    """Lines that call the student's functions on this case, ours for missing ones, and print the wrong tensor.

    own: the names of the functions in the file at path. wrong: the failure message, which begins with the tensor.
    """
    from parity_tests.judge.operations import OPERATIONS

    modules = {name: module for module, name in (path.split(".") for path in OPERATIONS[operation].modules)}
    called = {name: f"mine.{name}" if name in own else f"{module}.{name}" for name, module in modules.items()}
    ours = sorted({module for name, module in modules.items() if name not in own})
    lines = ["import importlib, sys", "import numpy as np"]
    lines += [f"from numpy_gpt.ops import {', '.join(ours)}"] if ours else []
    lines += [f"sys.path.insert(0, {str(path.parent.resolve())!r})", f"mine = importlib.import_module({path.stem!r})"]
    for name, value in OPERATIONS[operation].inputs(case).items():
        lines += _assignment(name, value, case.layout)
    for line in CALLS[operation]:
        lines.append(line.format(**called))
        returned = line.partition(" = ")[0].split(", ")
        if (tensor := _tensor(wrong)) in returned:
            return "\n".join([*lines, f"print({tensor})  # {wrong}"])
    return "\n".join([*lines, f"# {wrong}"])


def _tensor(wrong):
    return wrong.partition(":")[0].partition("[")[0]


def _assignment(name, value, layout):
    if not isinstance(value, np.ndarray):
        return [f"{name} = {value!r}"]
    lines = [f"{name} = np.array({value.tolist()}, np.{value.dtype.name})"]
    plain = value.flags.c_contiguous and value.flags.writeable
    return lines if plain else [*lines, LAYOUTS[layout].format(name)]
