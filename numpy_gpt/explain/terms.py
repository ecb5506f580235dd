"""The terms of a number: for each kind of operation, those of its output and of its inputs' and parameters' gradients.

A rule returns Terms in float64, computed from the stored arrays. Where parts of a formula cancel, each is a
term of its own, so that the terms' absolute values bound the rounding errors of the stored number.
"""

import difflib
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any, NamedTuple, Protocol

import numpy as np

from numpy_gpt.config import GPTConfig
from numpy_gpt.errors import InputError
from numpy_gpt.explain.operations import Operation, operations
from numpy_gpt.typing import Array, Params

Index = tuple[int, ...]


class Input(NamedTuple):
    """A number that a term depends on: the array's name (or "tokens", "targets"), index, whether it is the gradient."""

    name: str
    index: Index  # type: ignore[assignment]  # in place of tuple.index
    gradient: bool = False

    def __str__(self) -> str:
        return f"{'d ' if self.gradient else ''}{self.name}[{', '.join(map(str, self.index))}]"


@dataclass(frozen=True)
class Term:
    """A product of factors, and the numbers it depends on.

    Factor i is input i, or a function of it, which means[i] names ("x̂ of"); further factors are constants.
    """

    factors: tuple[float, ...]
    inputs: tuple[Input, ...] = ()
    means: tuple[str, ...] = ()

    @property
    def value(self) -> float:
        return math.prod(self.factors)

    @property
    def names(self) -> list[str]:
        """The names of the factors; constants have none."""
        named = self.inputs[: len(self.factors)]
        means = self.means or [""] * len(named)
        return [f"{mean} {name}".strip() for mean, name in zip(means, named, strict=True)]


@dataclass(frozen=True)
class Explanation:
    """How one number is computed. stored: the number; terms: what it is the sum of, the largest first.

    eps, tiny: the relative rounding and the smallest normal number of the pass's dtype.
    """

    what: Input
    stored: float
    terms: tuple[Term, ...]
    eps: float
    tiny: float

    @property
    def sum(self) -> float:
        return _sum(term.value for term in self.terms)

    @property
    def error(self) -> float:
        """|sum − stored| in units of eps · Σ |terms|; 0 if they are equal but for an underflow."""
        off = abs(self.sum - self.stored)
        if self.sum == self.stored or off <= self.tiny:
            return 0.0
        scale = _sum(abs(term.value) for term in self.terms) * self.eps
        return off / scale if scale and math.isfinite(off) and math.isfinite(scale) else math.inf

    def rows(self, most: int = 20) -> list[tuple[str, str, str]]:
        """(inputs, factors, product) of the first `most` terms, as text."""
        shown = [
            (
                ", ".join(term.names) or "constant",
                " × ".join(f"{factor:.6g}" for factor in term.factors),
                f"{term.value:.8g}",
            )
            for term in self.terms[:most]
        ]
        if rest := self.terms[most:]:
            shown.append((f"{len(rest)} smaller terms", "", f"{_sum(term.value for term in rest):.8g}"))
        return shown

    def __str__(self) -> str:
        """A table of the terms, their sum and the stored number."""
        lines = [("terms", "factors", "product"), *self.rows(), ("sum", "", f"{self.sum:.8g}")]
        lines.append((str(self.what), "stored", f"{self.stored:.8g}"))
        widths = [max(len(line[i]) for line in lines) for i in range(3)]
        return "\n".join(f"{a:{widths[0]}}  {b:{widths[1]}}  {c:>{widths[2]}}".rstrip() for a, b, c in lines)

    def _repr_html_(self) -> str:
        """The same table for a notebook."""
        cells = [*self.rows(), ("sum", "", f"{self.sum:.8g}"), (str(self.what), "stored", f"{self.stored:.8g}")]
        body = "".join(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in line)}</tr>" for line in cells)
        return f"<table><tr><th>terms</th><th>factors</th><th>product</th></tr>{body}</table>"


def _sum(numbers: Iterable[float]) -> float:
    """The sum, rounded once; NaN for opposite infinities, and where a partial sum overflows."""
    try:
        return math.fsum(numbers)
    except (ValueError, OverflowError):
        return math.nan


class Pass(Protocol):
    """What the terms are made of: the attributes of a Trace."""

    config: GPTConfig
    tokens: Array
    targets: Array | None
    replaced: frozenset[str]
    params: Params
    values: Params
    grads: Params
    masks: Params
    caches: dict[str, Any]
    loss: Any


def explain(t: Pass, name: str, index: Sequence[int], gradient: bool = False) -> Explanation:
    """The terms of values[name][index] or, with gradient, of grads[name][index]; name may be a parameter's or "loss".

    Raises InputError for an unknown name, an index outside the array, and a gradient of a pass without targets.
    """
    known = [*t.values, *t.params, *(["loss"] if t.loss is not None else [])]
    if not isinstance(name, str) or name not in known:
        if isinstance(name, str) and name == "loss":
            raise InputError("explain: without targets there is no loss and no gradient: give trace the targets")
        near = difflib.get_close_matches(str(name), known, 3, 0)
        raise InputError(f"explain: there is no {name!r}; the nearest names are {', '.join(near)}")
    if gradient and t.loss is None:
        raise InputError("explain: without targets there is no loss and no gradient: give trace the targets")
    rules = _Rules(t)
    array = rules.array(name)
    given = index.tolist() if isinstance(index, np.ndarray) else index
    at = tuple(given) if isinstance(given, Sequence) else (given,)
    if len(at) != array.ndim or not all(isinstance(i, int | np.integer) and not isinstance(i, bool) for i in at):
        raise InputError(f"explain: {name} has shape {array.shape}, so index is {array.ndim} whole numbers, not {at}")
    if not all(-n <= i < n for i, n in zip(at, array.shape, strict=True)):
        raise InputError(f"explain: index {at} is outside {name}, which has shape {array.shape}")
    at = tuple(int(i) % n for i, n in zip(at, array.shape, strict=True))
    what = Input(name, at, gradient)
    stored = 1.0 if what == ("loss", (), True) else float((t.grads[name] if gradient else array)[at])
    terms = sorted(rules.gradient(what) if gradient else rules.value(what), key=lambda term: -abs(term.value))
    info = np.finfo(t.values["logits"].dtype)
    return Explanation(what, stored, tuple(terms), float(info.eps), float(info.tiny))


class _Rules:
    """The terms of each kind of operation, for one pass."""

    def __init__(self, t: Pass):
        self.t = t
        self.operations = operations(t.config)

    def array(self, name: str) -> Array:
        if name == "loss":
            return np.asarray(self.t.loss)
        return self.t.values[name] if name in self.t.values else self.t.params[name]

    def at(self, name: str, index: Index, gradient: bool = False) -> tuple[float, Input]:
        """A number and its name."""
        array = self.t.grads[name] if gradient else self.array(name)
        return float(array[index]), Input(name, index, gradient)

    def term(self, *parts: tuple[float, Input] | float) -> Term:
        """The product of numbers, with their names, and of constants."""
        named = [part for part in parts if isinstance(part, tuple)]
        constants = [part for part in parts if not isinstance(part, tuple)]
        return Term((*(number for number, _ in named), *constants), tuple(name for _, name in named))

    def value(self, what: Input) -> list[Term]:
        if what.name in self.t.params or what.name in self.t.replaced:
            return [Term((float(self.array(what.name)[what.index]),))]  # nothing made it
        operation = next(each for each in self.operations if each.output == what.name)
        rule: Callable[[Operation, Index], Iterable[Term]] = getattr(self, f"{operation.kind}_value")
        return list(rule(operation, what.index))

    def gradient(self, what: Input) -> list[Term]:
        """The sum over all operations that read the array, but for those whose output was replaced."""
        if what.name == "loss":
            return [Term((1.0,))]
        found: list[Term] = []
        for operation in self.operations:
            if operation.output in self.t.replaced:
                continue
            names = operation.parameters if what.name in self.t.params else operation.inputs
            for i, name in enumerate(names):
                if name == what.name:
                    kind = "parameter" if what.name in self.t.params else "input"
                    rule: Callable[[Operation, Index, int], Iterable[Term]]
                    rule = getattr(self, f"{operation.kind}_{kind}")
                    found += rule(operation, what.index, i)
        return found

    def mask(self, name: str, index: Index) -> float:
        """Dropout's factor there; 1 without dropout."""
        return float(self.t.masks[name][index]) if name in self.t.masks else 1.0

    # y = table[tokens]

    def embedding_value(self, op: Operation, index: Index) -> Iterable[Term]:
        b, t, c = index
        token = int(self.t.tokens[b, t])
        number, name = self.at(op.parameters[0], (token, c))
        yield Term((number,), (name, Input("tokens", (b, t))))

    def embedding_parameter(self, op: Operation, index: Index, _: int) -> Iterable[Term]:
        token, c = index
        for b, t in np.argwhere(self.t.tokens == token).tolist():
            yield self.term(self.at(op.output, (b, t, c), True))

    # y = table[:T]

    def position_value(self, op: Operation, index: Index) -> Iterable[Term]:
        yield self.term(self.at(op.parameters[0], index))

    def position_parameter(self, op: Operation, index: Index, _: int) -> Iterable[Term]:
        if index[0] < self.t.tokens.shape[1]:
            yield self.term(self.at(op.output, index, True))

    # emb = dropout(tok_emb + pos_emb)

    def sum_value(self, op: Operation, index: Index) -> Iterable[Term]:
        mask = self.mask(op.output, index)
        yield self.term(self.at(op.inputs[0], index), mask)
        yield self.term(self.at(op.inputs[1], index[1:]), mask)

    def sum_input(self, op: Operation, index: Index, i: int) -> Iterable[Term]:
        for at in [index] if i == 0 else [(b, *index) for b in range(len(self.t.tokens))]:
            yield self.term(self.at(op.output, at, True), self.mask(op.output, at))

    # y = x: the stream, under the name that its next reader gives it

    def same_value(self, op: Operation, index: Index) -> Iterable[Term]:
        yield self.term(self.at(op.inputs[0], index))

    def same_input(self, op: Operation, index: Index, _: int) -> Iterable[Term]:
        yield self.term(self.at(op.output, index, True))

    # y = x̂ · scale + shift,  x̂ = (x − mean(x)) · rstd

    def layernorm_value(self, op: Operation, index: Index) -> Iterable[Term]:
        *bt, c = index
        _, rstd = self.t.caches[op.output]
        r, C = float(rstd[(*bt, 0)]), self.t.config.emb_dim
        scale = self.at(op.parameters[0], (c,))
        yield self.term(self.at(op.inputs[0], index), scale, r)
        for j in range(C):
            yield self.term(self.at(op.inputs[0], (*bt, j)), scale, -r / C)  # the mean's share
        yield self.term(self.at(op.parameters[1], (c,)))

    def layernorm_input(self, op: Operation, index: Index, _: int) -> Iterable[Term]:
        """dx = rstd · (g − mean(g) − x̂ · mean(g · x̂)),  g = dy · scale."""
        *bt, c = index
        x_hat, rstd = self.t.caches[op.output]
        row, r, C = x_hat[tuple(bt)].astype(float), float(rstd[(*bt, 0)]), self.t.config.emb_dim
        for j in range(C):
            g = self.at(op.output, (*bt, j), True), self.at(op.parameters[0], (j,))
            if j == c:
                yield self.term(*g, r)
            yield self.term(*g, -r / C)  # along 1
            yield self.term(*g, -r * row[c] * row[j] / C)  # along x̂

    def layernorm_parameter(self, op: Operation, index: Index, i: int) -> Iterable[Term]:
        x_hat, _ = self.t.caches[op.output]
        for b, t in np.ndindex(self.t.tokens.shape):
            dy = self.at(op.output, (b, t, *index), True)
            if i == 0:  # dscale = Σ dy · x̂
                x = Input(op.inputs[0], (b, t, *index))
                yield Term((dy[0], float(x_hat[(b, t, *index)])), (dy[1], x), ("", "x̂ of"))
            else:
                yield self.term(dy)

    # y = x @ wᵀ + b; queries, keys and values as heads (B, NH, T, HS), the rest (B, T, O)

    def _heads(self, name: str) -> bool:
        return name.endswith((".att.q", ".att.k", ".att.v"))

    def _flat(self, name: str, index: Index) -> Index:
        """(b, h, t, d) of heads as (b, t, o)."""
        if not self._heads(name):
            return index
        b, h, t, d = index
        return b, t, h * self.t.config.head_size + d

    def _split(self, name: str, b: int, t: int, o: int) -> Index:
        """The inverse of _flat."""
        return (b, o // self.t.config.head_size, t, o % self.t.config.head_size) if self._heads(name) else (b, t, o)

    def linear_value(self, op: Operation, index: Index) -> Iterable[Term]:
        b, t, o = self._flat(op.output, index)
        for i in range(self.array(op.parameters[0]).shape[1]):
            yield self.term(self.at(op.inputs[0], (b, t, i)), self.at(op.parameters[0], (o, i)))
        for bias in op.parameters[1:]:
            yield self.term(self.at(bias, (o,)))

    def linear_input(self, op: Operation, index: Index, _: int) -> Iterable[Term]:
        b, t, i = index
        for o in range(self.array(op.parameters[0]).shape[0]):
            yield self.term(
                self.at(op.output, self._split(op.output, b, t, o), True), self.at(op.parameters[0], (o, i))
            )

    def linear_parameter(self, op: Operation, index: Index, which: int) -> Iterable[Term]:
        for b, t in np.ndindex(self.t.tokens.shape):
            dy = self.at(op.output, self._split(op.output, b, t, index[0]), True)
            yield self.term(dy, self.at(op.inputs[0], (b, t, index[1]))) if which == 0 else self.term(dy)

    # s = q @ kᵀ / √HS; −inf in the future

    def scores_value(self, op: Operation, index: Index) -> Iterable[Term]:
        b, h, t, s = index
        if s > t:
            yield Term((-math.inf,))
            return
        HS = self.t.config.head_size
        for d in range(HS):
            yield self.term(self.at(op.inputs[0], (b, h, t, d)), self.at(op.inputs[1], (b, h, s, d)), HS**-0.5)

    def scores_input(self, op: Operation, index: Index, i: int) -> Iterable[Term]:
        b, h, row, d = index
        T = self.t.tokens.shape[1]
        for t, s in ((row, s) for s in range(row + 1)) if i == 0 else ((t, row) for t in range(row, T)):
            other = self.at(op.inputs[1 - i], (b, h, s if i == 0 else t, d))
            yield self.term(self.at(op.output, (b, h, t, s), True), other, self.t.config.head_size**-0.5)

    # p = softmax(s): exp(s − max) / Σ exp(s − max)

    def softmax_value(self, op: Operation, index: Index) -> Iterable[Term]:
        score, name = self.at(op.inputs[0], index)
        largest, total = (float(a[(*index[:3], 0)]) for a in self.t.caches[op.output])
        seen = self.t.tokens.shape[1] if op.inputs[0] in self.t.replaced else index[2] + 1  # the future is masked
        row = [Input(op.inputs[0], (*index[:3], s)) for s in range(seen) if s != index[3]]
        p = math.exp(score - largest) / total if score <= largest else math.nan  # NaN: of a pass that overflowed
        yield Term((p,), (name, *row), ("exp(s − log Σ exp) of",))

    def softmax_input(self, op: Operation, index: Index, _: int) -> Iterable[Term]:
        """ds = p · (dp − Σ dp · p)."""
        p = self.at(op.output, index)
        if p[0] == 0:
            return
        yield self.term(self.at(op.output, index, True), p)
        for k in range(self.t.tokens.shape[1]):
            other = self.at(op.output, (*index[:3], k))
            if other[0] != 0:
                yield self.term(self.at(op.output, (*index[:3], k), True), p, other, -1.0)

    # heads = dropout(p) @ v, side by side

    def mix_value(self, op: Operation, index: Index) -> Iterable[Term]:
        b, t, c = index
        h, d = divmod(c, self.t.config.head_size)
        for s in range(self.t.tokens.shape[1]):
            p = self.at(op.inputs[0], (b, h, t, s))
            if p[0] != 0:
                yield self.term(p, self.at(op.inputs[1], (b, h, s, d)), self.mask(op.inputs[0], (b, h, t, s)))

    def mix_input(self, op: Operation, index: Index, i: int) -> Iterable[Term]:
        HS = self.t.config.head_size
        if i == 0:
            b, h, t, s = index
            for d in range(HS):
                dy = self.at(op.output, (b, t, h * HS + d), True)
                yield self.term(dy, self.at(op.inputs[1], (b, h, s, d)), self.mask(op.inputs[0], index))
            return
        b, h, s, d = index
        for t in range(self.t.tokens.shape[1]):
            p = self.at(op.inputs[0], (b, h, t, s))
            if p[0] != 0:
                dy = self.at(op.output, (b, t, h * HS + d), True)
                yield self.term(dy, p, self.mask(op.inputs[0], (b, h, t, s)))

    # y = ½ x + ½ x tanh u

    def gelu_value(self, op: Operation, index: Index) -> Iterable[Term]:
        x = self.at(op.inputs[0], index)
        yield self.term(x, 0.5)
        yield self.term(x, 0.5, math.tanh(math.sqrt(2 / math.pi) * (x[0] + 0.044715 * x[0] * x[0] * x[0])))

    def gelu_input(self, op: Operation, index: Index, _: int) -> Iterable[Term]:
        dy, name = self.at(op.output, index, True)
        slope = float(self.t.caches[op.output][index])
        yield Term((dy, slope), (name, Input(op.inputs[0], index)), ("", "slope at"))

    # y = x + dropout(branch)

    def residual_value(self, op: Operation, index: Index) -> Iterable[Term]:
        yield self.term(self.at(op.inputs[0], index))
        yield self.term(self.at(op.inputs[1], index), self.mask(op.inputs[1], index))

    def residual_input(self, op: Operation, index: Index, i: int) -> Iterable[Term]:
        yield self.term(self.at(op.output, index, True), *([] if i == 0 else [self.mask(op.inputs[1], index)]))

    # loss = mean of log Σ exp z − z[target]

    def cross_entropy_value(self, op: Operation, index: Index) -> Iterable[Term]:
        assert self.t.targets is not None
        logits, N = self.t.values["logits"], self.t.targets.size
        for b, t in np.ndindex(self.t.targets.shape):
            row = logits[b, t].astype(float)
            likeliest = int(row.argmax())
            lse = float(row[likeliest] + np.log(np.exp(row - row[likeliest]).sum()))
            yield Term((lse, 1 / N), (Input("logits", (b, t, likeliest)),), ("log Σ exp of the row of",))
            yield self.term(self.at("logits", (b, t, int(self.t.targets[b, t]))), -1 / N)

    def cross_entropy_input(self, op: Operation, index: Index, _: int) -> Iterable[Term]:
        """dz = (softmax(z) − [target]) / N."""
        assert self.t.targets is not None
        b, t, v = index
        row = self.t.values["logits"][b, t].astype(float)
        p, N = float(np.exp(row[v] - row.max()) / np.exp(row - row.max()).sum()), self.t.targets.size
        yield Term((p, 1 / N), (Input("logits", index), Input("loss", (), True)), ("softmax at", "1/N of"))
        if v == self.t.targets[b, t]:
            yield Term((1.0, -1 / N), (Input("loss", (), True), Input("targets", (b, t))), ("", "−1/N at"))
