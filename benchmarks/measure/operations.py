"""Each operation separately, forward and backward, at the shapes of the book's job: where a step's time goes.

Each time comes with the rate of what limits the operation. For products these are multiply-adds (GFLOP/s; in attention
those of visible pairs). For all others they are the bytes that both passes must at least move (GB/s, and as a share of
the rate at which all cores sum a long array).
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from benchmarks.contenders.agreement import DisagreementError
from benchmarks.jobs import BOOK, QUICK_BOOK, Job
from benchmarks.measure.ceilings import LongArray
from benchmarks.results import Ratio, Report, Row
from benchmarks.settings import Settings
from benchmarks.timing import WARM_UPS, Contender, Spread, interleaved, ratio
from numpy_gpt import AdamW
from numpy_gpt.ops import attention, cross_entropy, embedding, gelu, layernorm, linear
from numpy_gpt.typing import Array

NUMPY, TORCH = "NumPy", "PyTorch"


class Operation(NamedTuple):
    """ours() and theirs() run forward and backward once and return the arrays that must agree, by name.

    flops: of both passes, if products limit the operation; else bytes: the least that both passes read and write.
    """

    name: str
    ours: Callable[[], dict[str, Array]]
    theirs: Callable[[], dict[str, torch.Tensor]]
    flops: int = 0
    bytes: int = 0


def operations(job: Job) -> Iterator[Operation]:
    """Every operation with work to do, on random inputs and upstream gradients."""
    rng = np.random.default_rng(0)
    C, V, B, T, NH = job.config.emb_dim, job.config.vocab_size, job.B, job.T, job.config.n_heads

    def array(*shape: int) -> Array:
        return rng.standard_normal(shape, np.float32)

    x, dy = array(B, T, C), array(B, T, C)
    w, b, dy4 = array(4 * C, C), array(4 * C), array(B, T, 4 * C)
    yield _operation(
        f"linear, {C} → {4 * C}",
        linear.linear_forward,
        linear.linear_backward,
        F.linear,
        {"x": x, "w": w, "b": b},
        dy4,
    )._replace(flops=3 * 2 * x.size * 4 * C)
    scale, shift = array(C), array(C)
    yield _operation(
        f"layernorm, {C}",
        layernorm.layernorm_forward,
        layernorm.layernorm_backward,
        lambda x, scale, shift: F.layer_norm(x, (C,), scale, shift),
        {"x": x, "scale": scale, "shift": shift},
        dy,
    )
    yield _operation(
        f"gelu, {4 * C}",
        gelu.gelu_forward,
        lambda dy, cache: (gelu.gelu_backward(dy, cache),),
        lambda x: F.gelu(x, approximate="tanh"),
        {"x": array(B, T, 4 * C)},
        dy4,
    )
    q, k, v, dheads = (array(B, NH, T, C // NH) for _ in range(4))
    yield _operation(
        f"attention, {NH} heads",
        attention.attention_forward,
        attention.attention_backward,
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True),
        {"q": q, "k": k, "v": v},
        dheads,
    )._replace(flops=6 * 2 * C * B * T * (T + 1) // 2)
    ids = rng.integers(V, size=(B, T))
    yield _operation(
        f"embedding, {V}",
        lambda w: embedding.embedding_forward(ids, w),
        lambda dy, cache: (embedding.embedding_backward(dy, cache),),
        lambda w: F.embedding(torch.from_numpy(ids), w),
        {"w": array(V, C)},
        dy,
    )._replace(bytes=4 * (3 * dy.size + V * C))  # rows of w, y, rows of dy; all of dw
    yield _operation(
        f"cross entropy, {V}",
        lambda logits: cross_entropy.cross_entropy_forward(logits, ids),
        lambda dloss, cache: (cross_entropy.cross_entropy_backward(float(dloss), cache),),
        lambda logits: F.cross_entropy(logits.flatten(0, 1), torch.from_numpy(ids).flatten()),
        {"logits": array(B, T, V)},
        np.float32(0.7),
    )
    yield _adamw(array(V, C), array(V, C))


def _operation(
    name: str,
    forward: Callable[..., tuple[Array, object]],
    backward: Callable[..., tuple[Array, ...]],
    theirs: Callable[..., torch.Tensor],
    inputs: dict[str, Array],
    dy: Array,
) -> Operation:
    tensors = {key: torch.from_numpy(value.copy()).requires_grad_() for key, value in inputs.items()}
    upstream = torch.from_numpy(np.array(dy))

    def ours() -> dict[str, Array]:
        y, cache = forward(*inputs.values())
        return {"y": y} | {f"d{key}": grad for key, grad in zip(inputs, backward(dy, cache), strict=True)}

    def torchs() -> dict[str, torch.Tensor]:
        y = theirs(*tensors.values())
        grads = torch.autograd.grad(y, list(tensors.values()), upstream)
        return {"y": y.detach()} | {f"d{key}": grad for key, grad in zip(inputs, grads, strict=True)}

    arrays = sum(array.nbytes for array in inputs.values())
    return Operation(name, ours, torchs, bytes=3 * arrays + 2 * dy.nbytes)  # inputs in both passes, gradients; y, dy


def _adamw(p: Array, g: Array) -> Operation:
    """AdamW on one matrix of the head's size, with no gradient 0; torch's is the fused one."""
    params, parameter = {"p": p.copy()}, torch.nn.Parameter(torch.from_numpy(p.copy()))
    ours = AdamW(params, lr=4e-4, weight_decay=0.1)
    theirs = torch.optim.AdamW([parameter], lr=4e-4, weight_decay=0.1, fused=True)
    parameter.grad = torch.from_numpy(g.copy())

    def step() -> dict[str, Array]:
        ours.step({"p": g})
        return params

    def torch_step() -> dict[str, torch.Tensor]:
        theirs.step()
        return {"p": parameter.detach()}

    return Operation(
        f"AdamW, {p.shape[0]} × {p.shape[1]}", step, torch_step, bytes=7 * p.nbytes
    )  # read g; read and write p, m, v


def run(settings: Settings, report: Report) -> None:
    """The book's shapes."""
    measure(QUICK_BOOK if settings.quick else BOOK, settings, report)


def agreement(operation: Operation) -> float:
    """Largest difference between the two, as a share of the largest value. Raises DisagreementError above 2^16 eps."""
    ours, theirs, worst = operation.ours(), operation.theirs(), 0.0
    for name, want in theirs.items():
        error = float(np.abs(ours[name] - want.numpy()).max() / np.abs(want.numpy()).max())
        if not error <= 2**16 * 2.0**-23:
            raise DisagreementError(
                f"{operation.name}: NumPy's and PyTorch's {name} differ by {error:.1e} of the largest"
            )
        worst = max(worst, error)
    return worst


def measure(job: Job, settings: Settings, report: Report) -> None:
    """Add two rows per operation to the report, as one case, and a row for the memory's rate."""
    case, rows = f"operations, forward and backward, {job}", []
    long_array = LongArray(0.1 if settings.quick else 1.0)
    reading = Spread.of(interleaved({"": Contender(lambda i: long_array.read())}, settings.runs)[""])
    memory = long_array.bytes / reading.median  # bytes/s
    for operation in operations(job):
        error = agreement(operation)
        works = {NUMPY: operation.ours, TORCH: operation.theirs}
        contenders = {name: Contender(lambda i, work=work: work()) for name, work in works.items()}
        with report.progress(operation.name, (WARM_UPS + settings.runs) * len(works)) as tick:
            times = interleaved(contenders, settings.runs, tick)
        for name, each in times.items():
            spread = Spread.of(each)
            if operation.flops:
                figures = {"GFLOP/s": operation.flops / spread.median / 1e9}
            else:
                rate = operation.bytes / spread.median
                figures = {"GB/s": rate / 1e9, "of memory": rate / memory}
            ratios = {}
            if name == NUMPY:
                figures["apart"] = error
                ratios = {f"{operation.name}: NumPy / PyTorch": Ratio(*ratio(times, NUMPY, TORCH))}
            rows.append(Row(case, f"{operation.name}: {name}", spread, figures, ratios))
    rows.append(Row(case, "sum of a long array", reading, {"GB/s": memory / 1e9, "of memory": 1.0}))
    report.add(rows, "random inputs; for dropout's masks see `python -m benchmarks streams`")
