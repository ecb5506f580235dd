"""For each kind of operation: its formulas as MathML, and the source lines that compute it, with marks."""

import ast
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from numpy_gpt.explain.operations import Operation

PACKAGE = Path(__file__).parent.parent

Marks = dict[int, tuple[str, ...]]


class Lines(NamedTuple):
    """Functions of a file, from the first to the last, and text that finds lines in them.

    output: in the lines that make the output. inputs, parameters: position -> in those that make its gradient.
    A text is in one line of the functions only.
    """

    file: str
    functions: tuple[str, ...]
    output: tuple[str, ...]
    inputs: Marks
    parameters: Marks


class Formula(NamedTuple):
    """A kind's title, a sentence for each direction, and LaTeX, in which dx is ∂loss/∂x."""

    title: str
    says: str
    says_backward: str
    forward: str
    backward: str


FORMULAS = {
    "embedding": Formula(
        "Token embedding",
        "Each token's row of the table.",
        "Each position's gradient is added to its token's row; a repeated token's gradients add up there.",
        r"y_{t} = W_{\text{token}_t}",
        r"dW_{v} = \sum_{t \,:\, \text{token}_t = v} dy_{t}",
    ),
    "position": Formula(
        "Position embedding",
        "Each position's row of the table, whatever token stands there.",
        "Each position's row gets the gradient of that position.",
        r"y_{t} = W_{t}",
        r"dW_{t} = dy_{t}",
    ),
    "sum": Formula(
        "Sum of the embeddings",
        "The token's embedding plus its position's: the start of the residual stream.",
        "Both summands get the sum's gradient; the positions' adds up over the texts.",
        r"y = \text{tok} + \text{pos}",
        r"d\text{tok} = dy, \qquad d\text{pos} = \sum_{b} dy_{b}",
    ),
    "same": Formula(
        "Residual stream",
        "The block's input: the previous step's output, unchanged.",
        "The gradient passes unchanged.",
        r"y = x",
        r"dx = dy",
    ),
    "layernorm": Formula(
        "LayerNorm",
        "Each token's features, brought to mean 0 and variance 1, then scaled and shifted as learned.",
        "A token's mean and length have no effect on the output: these two parts of the gradient are removed.",
        r"y = \hat{x} \cdot \text{scale} + \text{shift}, \qquad "
        r"\hat{x} = \frac{x - \text{mean}(x)}{\sigma}, \qquad \sigma = \sqrt{\text{var}(x) + 10^{-5}}",
        r"dx = \frac{1}{\sigma} \left( g - \text{mean}(g) - \hat{x} \cdot \text{mean}(g \cdot \hat{x}) \right), \quad "
        r"g = dy \cdot \text{scale}; \qquad d\text{scale} = \sum_{t} dy_{t} \cdot \hat{x}_{t}, \quad "
        r"d\text{shift} = \sum_{t} dy_{t}",
    ),
    "linear": Formula(
        "Linear layer",
        "Each output is a weighted sum of all input features.",
        "The input's gradient sums over all outputs that read it; a weight's sums over all tokens.",
        r"y_{to} = \sum_{i} x_{ti} \, W_{oi} + b_{o}",
        r"dx_{ti} = \sum_{o} dy_{to} \, W_{oi}, \qquad dW_{oi} = \sum_{t} dy_{to} \, x_{ti}, \qquad "
        r"db_{o} = \sum_{t} dy_{to}",
    ),
    "linear:unbiased": Formula(
        "Linear layer",
        "Each output is a weighted sum of all input features.",
        "The input's gradient sums over all outputs that read it; a weight's sums over all tokens.",
        r"y_{to} = \sum_{i} x_{ti} \, W_{oi}",
        r"dx_{ti} = \sum_{o} dy_{to} \, W_{oi}, \qquad dW_{oi} = \sum_{t} dy_{to} \, x_{ti}",
    ),
    "scores": Formula(
        "Attention scores",
        "How well each query matches each key up to its own position; the future is excluded.",
        "A query's gradient sums over the keys it looked at, a key's over the queries that looked at it.",
        r"s_{ts} = \frac{1}{\sqrt{HS}} \sum_{d} q_{td} \, k_{sd} \;\; (s \le t), \qquad s_{ts} = -\infty \;\; (s > t)",
        r"dq_{td} = \frac{1}{\sqrt{HS}} \sum_{s} ds_{ts} \, k_{sd}, \qquad "
        r"dk_{sd} = \frac{1}{\sqrt{HS}} \sum_{t} ds_{ts} \, q_{td}",
    ),
    "softmax": Formula(
        "Softmax",
        "Scores become weights: positive, 0 in the future, and 1 in all for each query.",
        "Only differences between the gradients of a query's weights matter, since the weights add up to 1.",
        r"p_{ts} = \frac{e^{s_{ts}}}{\sum_{k} e^{s_{tk}}}",
        r"ds_{ts} = p_{ts} \left( dp_{ts} - \sum_{k} dp_{tk} \, p_{tk} \right)",
    ),
    "mix": Formula(
        "Weighted mean of the values",
        "Each query's mean of the values up to its own position, weighted by its attention.",
        "A weight's gradient is output's gradient · value; a value's sums over the queries that looked at it.",
        r"y_{td} = \sum_{s} p_{ts} \, v_{sd}",
        r"dp_{ts} = \sum_{d} dy_{td} \, v_{sd}, \qquad dv_{sd} = \sum_{t} p_{ts} \, dy_{td}",
    ),
    "gelu": Formula(
        "GELU",
        "Lets large numbers pass and turns negative ones nearly to 0, smoothly.",
        "The gradient is multiplied by the slope at the input.",
        r"y = \frac{1}{2} x \left( 1 + \tanh u \right), \qquad "
        r"u = \sqrt{\frac{2}{\pi}} \left( x + 0.044715 \, x^{3} \right)",
        r"dx = dy \left( \frac{1}{2} (1 + \tanh u) + \frac{1}{2} x \, (1 - \tanh^{2} u) \, u' \right), \qquad "
        r"u' = \sqrt{\frac{2}{\pi}} \left( 1 + 3 \cdot 0.044715 \, x^{2} \right)",
    ),
    "residual": Formula(
        "Residual connection",
        "The branch's result is added to the stream.",
        "The gradient takes both paths unchanged: along the stream, and into the branch.",
        r"y = x + \text{branch}",
        r"dx = dy, \qquad d\text{branch} = dy",
    ),
    "cross_entropy": Formula(
        "Cross-entropy",
        "The mean surprise, in nats, at the tokens that really follow.",
        "The softmax of each position's logits, less 1 at the true next token, divided by the number of positions.",
        r"\text{loss} = \frac{1}{N} \sum_{t} \left( \log \sum_{v} e^{z_{tv}} - z_{t, \text{target}_t} \right)",
        r"dz_{tv} = \frac{1}{N} \left( \text{softmax}(z_{t})_{v} - [\, v = \text{target}_t \,] \right)",
    ),
}

PLAIN, BLOCK = "plain.py", "block.py"
_ATTENTION = ("attention_forward", "attention_backward")
_POSITION = ("position_embedding_forward", "position_embedding_backward")
_BLOCK = ("block_forward", "block_backward")
_ROWS = "dw[start : start + dy.shape[1]] = dy.sum(axis=0)"

LINES: dict[str, tuple[Lines, Lines]] = {  # kind -> in the textbook, and in what the model runs
    "embedding": (
        Lines(PLAIN, ("embedding_forward", "embedding_backward"), ("return w[ids]",), {}, {0: ("np.add.at(dw, ids",)}),
        Lines(
            "ops/embedding.py",
            ("embedding_forward", "embedding_backward"),
            ("return w[ids]",),
            {},
            {0: ("dw[rows] += np.add.reduceat",)},
        ),
    ),
    "position": (
        Lines(PLAIN, _POSITION, ("return x + w[start",), {}, {0: (_ROWS,)}),
        Lines("ops/embedding.py", _POSITION, ("return x + w[start",), {}, {0: (_ROWS,)}),
    ),
    "sum": (
        Lines(PLAIN, _POSITION, ("return x + w[start",), {0: ("return dy, dw",), 1: (_ROWS,)}, {}),
        Lines("ops/embedding.py", _POSITION, ("return x + w[start",), {0: ("return dy, dw",), 1: (_ROWS,)}, {}),
    ),
    "same": (
        Lines(PLAIN, _BLOCK, ("def block_forward(x: Array",), {0: ("return dmid + dh, g",)}, {}),
        Lines(BLOCK, _BLOCK, ("x: Array, p: Params, n_heads",), {0: ("dx += dmid",)}, {}),
    ),
    "layernorm": (
        Lines(
            PLAIN,
            ("layernorm_forward", "layernorm_backward"),
            ("return x_hat * scale + shift",),
            {0: ("dx = rstd * (g",)},
            {0: ("dscale = rows(",), 1: ("dshift = rows(",)},
        ),
        Lines(
            "ops/layernorm.py",
            ("layernorm_forward", "layernorm_backward"),
            ("np.multiply(x_hat, scale, out=y)", "y += shift"),
            {0: ("g -= _mean(g)", "g -= along", "g *= rstd")},
            {0: ("dscale, dshift = (",), 1: ("dscale, dshift = (",)},
        ),
    ),
    "linear": (
        Lines(
            PLAIN,
            ("linear_forward", "linear_backward"),
            ("y = x @ w.T  #", "return y if b is None"),
            {0: ("dx = dy @ w",)},
            {0: ("dw = rows(dy).T",), 1: ("db = None if",)},
        ),
        Lines(
            "ops/linear.py",
            ("linear_forward", "linear_backward"),
            ("y = matmul(", "y += b"),
            {0: ("Product(dy2, w, out=dx)",)},
            {0: ("Product(dy2.T, x2",), 1: ("partial(sum_rows, dy2, db)",)},
        ),
    ),
    "scores": (
        Lines(
            PLAIN,
            _ATTENTION,
            ("s = np.where(future",),
            {0: ("dqk = ds /", "return dqk @ k"), 1: ("dqk = ds /", "return dqk @ k")},
            {},
        ),
        Lines(
            "ops/attention.py",
            (*_ATTENTION, "_scores"),
            ("s: Array = product(", "np.copyto(s[..., -R:]"),
            {0: ("ds *= scale", "dq[:, heads, rows] = product("), 1: ("ds *= scale", "dk[:, heads, seen] += product(")},
            {},
        ),
    ),
    "softmax": (
        Lines(PLAIN, _ATTENTION, ("e = np.exp(s", "p = e / e.sum("), {0: ("ds = p * (dp",)}, {}),
        Lines(
            "ops/attention.py",
            _ATTENTION,
            ("e = np.exp(s, out=s)", "total = e.sum("),
            {0: ("ds = np.subtract(dp", "ds *= p")},
            {},
        ),
    ),
    "mix": (
        Lines(PLAIN, _ATTENTION, ("return a @ v",), {0: ("dp = dropout_backward(",), 1: ("dv = a.mT @ dy",)}, {}),
        Lines(
            "ops/attention.py",
            _ATTENTION,
            ("y[:, heads, rows] = product(e",),
            {0: ("dp = product(dyr",), 1: ("product(p.mT, dyr)", "product((p * factors).mT")},
            {},
        ),
    ),
    "gelu": (
        Lines(PLAIN, ("gelu_forward", "gelu_backward"), ("return 0.5 * x *",), {0: ("dx: Array = dy * (",)}, {}),
        Lines(
            "ops/gelu.py",
            ("gelu_forward", "gelu_backward"),
            ("np.multiply(x, sigma, out=y)",),
            {0: ("return dy * cache",)},
            {},
        ),
    ),
    "residual": (
        Lines(
            PLAIN,
            _BLOCK,
            (" mid = x + h  #",),
            {0: ("return dmid + dh, g",), 1: ("dh = dropout_backward(dmid",)},
            {},
        ),
        Lines(BLOCK, _BLOCK, ("mid = x + a",), {0: ("dx += dmid",), 1: ("da = dropout.dropout_backward(dmid",)}, {}),
    ),
    "residual:post": (
        Lines(
            PLAIN,
            _BLOCK,
            ("return mid + h",),
            {0: ("dmid = dy + dh",), 1: ("dh = dropout_backward(dy, c_drop2)",)},
            {},
        ),
        Lines(BLOCK, _BLOCK, ("return mid + m",), {0: ("dmid += dy",), 1: ("dm = dropout.dropout_backward(dy",)}, {}),
    ),
    "cross_entropy": (
        Lines(
            PLAIN,
            ("cross_entropy_forward", "cross_entropy_backward"),
            ("return -log_p[",),
            {0: ("dz[np.arange(", "dlogits: Array =")},
            {},
        ),
        Lines(
            "ops/cross_entropy.py",
            ("cross_entropy_forward", "cross_entropy_backward"),
            ("loss[...] = np.log(total)", "return loss.mean()"),
            {0: ("np.multiply(e, (share", "dlogits[np.arange(")},
            {},
        ),
    ),
}


def source_key(operation: Operation) -> str:
    """The key in `sources` of the lines that compute an operation's output."""
    return "residual:post" if operation.output.endswith("resid_post") else operation.kind


@cache
def formulas() -> dict[str, dict[str, str]]:
    """kind -> title, says, and forward and backward as MathML."""
    from latex2mathml.converter import convert

    return {
        kind: {
            "title": f.title,
            "says": f.says,
            "saysBackward": f.says_backward,
            "forward": convert(f.forward, display="block"),
            "backward": convert(f.backward, display="block"),
        }
        for kind, f in FORMULAS.items()
    }


@cache
def sources() -> dict[str, dict[str, Any]]:
    """Key of source_key -> the listing in plain.py and the one in ops/ (for the stream, block.py)."""
    return {kind: {"plain": listing(plain), "ops": listing(ops)} for kind, (plain, ops) in LINES.items()}


def listing(lines: Lines) -> dict[str, Any]:
    """The functions' lines as coloured HTML, and the numbers of those that are marked."""
    first, text = cut(lines.file, lines.functions)
    return {
        "file": f"numpy_gpt/{lines.file}",
        "first": first,
        "html": coloured(tuple(text), first),
        "marks": {
            "output": [first + found(text, each, lines) for each in lines.output],
            "inputs": {str(i): [first + found(text, e, lines) for e in each] for i, each in lines.inputs.items()},
            "parameters": {
                str(i): [first + found(text, e, lines) for e in each] for i, each in lines.parameters.items()
            },
        },
    }


def cut(file: str, functions: tuple[str, ...]) -> tuple[int, list[str]]:
    """The first line's number, and the lines from the first function to the last."""
    source = (PACKAGE / file).read_text("utf-8")
    places = {node.name: node for node in ast.parse(source).body if isinstance(node, ast.FunctionDef)}
    start = min(places[name].lineno for name in functions)
    end = max(places[name].end_lineno or 0 for name in functions)
    return start, source.splitlines()[start - 1 : end]


def found(text: list[str], part: str, lines: Lines) -> int:
    """Where in the listing the one line is that has this part."""
    places = [i for i, line in enumerate(text) if part in line]
    if len(places) != 1:
        raise LookupError(f"{lines.file}: {part!r} is in {len(places)} lines of {', '.join(lines.functions)}")
    return places[0]


@cache
def coloured(text: tuple[str, ...], first: int) -> str:
    """Pygments' HTML, one element a line, which ends in its newline."""
    from pygments import highlight  # type: ignore[import-untyped]
    from pygments.formatters import HtmlFormatter  # type: ignore[import-untyped]
    from pygments.lexers import PythonLexer  # type: ignore[import-untyped]

    html = highlight("\n".join(text) + "\n", PythonLexer(stripnl=False), HtmlFormatter(nowrap=True)).splitlines()
    return "".join(f'<span class="line" data-line="{first + i}">{line}\n</span>' for i, line in enumerate(html))
