"""What the page shows of one pass: a summary that JSON can carry, and every array by group and name."""

import base64
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from numpy_gpt.config import GPTConfig
from numpy_gpt.errors import InputError
from numpy_gpt.explain.operations import operations
from numpy_gpt.explore.sources import formulas, source_key, sources
from numpy_gpt.model import GPT
from numpy_gpt.ops import layernorm, linear
from numpy_gpt.optim import AdamW
from numpy_gpt.parallel.threads import all_cores
from numpy_gpt.tokenizer import encode
from numpy_gpt.trace import Trace, trace
from numpy_gpt.typing import Array, Params

if TYPE_CHECKING:
    import tiktoken

TOP, LENS_TOP = 10, 3
"""Likeliest next tokens that the summary names at each position, and at each position of the logit lens."""

THUMB_ROWS, THUMB_COLUMNS = 32, 48
SMALL_VOCABULARY = 4096
"""Up to so many tokens the summary has the pieces of all of them."""

QUICK_FLOPS = 2e10
"""The summary includes the loss without each head if that takes no more operations than this, about a second."""

TOGETHER = 512
"""Tokens that one pass takes when many heads are zeroed, each in a row of its own."""

GROUPS = ("values", "grads", "params", "masks", "caches")


class Tokens(NamedTuple):
    """A text as the model reads it. tokens, targets: (1, T) ids."""

    text: str
    tokens: Array
    targets: Array


def read_text(
    encoding: "tiktoken.Encoding", config: GPTConfig, text: str, following: str | None, field: str = "--targets"
) -> Tokens:
    """The text's ids and, as targets, the ids one later; following: the text whose first token is the last target.

    Without it the text's last token is a target only. Raises InputError, naming
    the field that following comes from, if the text is empty, too short or too long.
    """
    text = _unicode(text)
    if not text:
        raise InputError(f"the text is empty: give at least two tokens, or one and what follows it ({field})")
    ids, room = encode(encoding, text), config.context_length
    if following is None:
        if len(ids) < 2:
            raise InputError(f"the text is one token: give a longer one, or what follows it ({field})")
        ids, last, target = ids[:-1], ids[-1], " (and one that is only a target)"
    else:
        after = encode(encoding, _unicode(following))
        if not len(after):
            raise InputError(f"what follows the text ({field}) is empty: give it, or leave it out")
        last, target = after[0], ""
    if len(ids) > room:
        raise InputError(f"the model reads {room:,} tokens, and the text has {len(ids):,}{target}: shorten it")
    tokens = ids[None]
    return Tokens(text, tokens, np.append(tokens[:, 1:], [[last]], axis=1))


def _unicode(text: str) -> str:
    """The text with each lone surrogate replaced by U+FFFD."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


class Page:
    """A model, one text, its pass, and the same pass with something changed."""

    def __init__(self, model: GPT, encoding: "tiktoken.Encoding", checkpoint: str, ids: Tokens):
        self.model, self.encoding, self.checkpoint, self.ids = model, encoding, checkpoint, ids
        with np.errstate(all="ignore"):
            self.trace: Trace = trace(model, ids.tokens, ids.targets)
        self.caches = flat_caches(self.trace.caches)
        self._precise: tuple[GPT, float] | None = None

    def group(self, group: str) -> Mapping[str, Array]:
        """The arrays of one of GROUPS; KeyError for another."""
        if group not in GROUPS:
            raise KeyError(group)
        found: Params = self.caches if group == "caches" else getattr(self.trace, group)
        return found

    def piece(self, token: int) -> str:
        """The text of one token; bytes that are no UTF-8 on their own as ⟨E2⟩, an id without a text as ⟨id 300⟩."""
        try:
            raw = self.encoding.decode_single_token_bytes(token)
        except (KeyError, OverflowError):
            return f"⟨id {token}⟩"
        text = raw.decode("utf-8", "surrogateescape")
        return "".join(f"⟨{ord(c) - 0xDC00:02X}⟩" if "\udc80" <= c <= "\udcff" else c for c in text)

    @all_cores()
    def summary(self, served: bool, torch: bool) -> dict[str, Any]:
        """Everything that the page shows before it asks for arrays. See the keys."""
        t, ids, V = self.trace, self.ids, self.model.config.vocab_size
        tokens, targets = ids.tokens[0].tolist(), ids.targets[0].tolist()
        losses, predictions = self.after(t.logits[0])
        lens = self.lens()
        named = {*tokens, *targets} | {each["id"] for row in predictions for each in row}
        named |= {each["id"] for point in lens for row in point["top"] for each in row}
        words = range(V) if V <= SMALL_VOCABULARY or not served else sorted(named)
        groups = {group: self.group(group) for group in GROUPS}
        return {
            "served": served,
            "torch": torch,
            "checkpoint": self.checkpoint,
            "text": ids.text,
            "config": self.model.config.to_dict(),
            "dtype": str(self.model.dtype),
            "eps": float(np.finfo(self.model.dtype).eps),
            "tiny": float(np.finfo(self.model.dtype).tiny),
            "parameters": sum(array.size for array in t.params.values()),
            "tokens": [tokens],
            "pieces": [self.piece(i) for i in tokens],
            "targets": [targets],
            "targetPieces": [self.piece(i) for i in targets],
            "loss": number(t.loss),
            "tokenLosses": losses,
            "predictions": predictions,
            "operations": [
                operation._asdict() | {"source": source_key(operation)} for operation in operations(t.config)
            ],
            "arrays": {group: {name: stats(a) for name, a in arrays.items()} for group, arrays in groups.items()},
            "thumbs": {
                group: {name: thumb(a) for name, a in groups[group].items()} for group in ("values", "grads", "params")
            },
            "lens": lens,
            "heads": self.zeroed_heads() if self.heads_flops() <= QUICK_FLOPS or not served else None,
            "words": {str(i): self.piece(i) for i in words},
            "formulas": formulas(),
            "sources": sources(),
        }

    def after(self, logits: Array, most: int = TOP) -> tuple[list[float | None], list[list[dict[str, Any]]]]:
        """logits (T, V) -> the loss at each position in nats, and the `most` likeliest tokens there."""
        p, losses = probabilities(logits, self.ids.targets[0])
        most = min(most, p.shape[1])
        likeliest = np.argpartition(logits, -most, axis=1)[:, -most:]
        top = []
        for row, found in zip(p, likeliest, strict=True):
            order = found[np.lexsort((found, -row[found]))].tolist()
            top.append([{"id": i, "piece": self.piece(i), "p": number(row[i])} for i in order])
        return [number(loss) for loss in losses], top

    def lens(self) -> list[dict[str, Any]]:
        """What the model would say next if it ended there: the final norm and the head applied to the stream."""
        t, found = self.trace, []
        scale, shift = t.params["final_norm.scale"], t.params["final_norm.shift"]
        head = t.params["tok_emb.weight" if t.config.tie_weights else "out_head.weight"]
        points = ["emb"]
        points += [f"trf_blocks.{i}.{name}" for i in range(t.config.n_layers) for name in ("resid_mid", "resid_post")]
        for name in points:
            x = t.values[name][0]  # (T, C)
            with np.errstate(all="ignore"):
                h, _ = layernorm.layernorm_forward(x, scale, shift)
                logits, _ = linear.linear_forward(h, head, None)  # (T, V)
            p, losses = probabilities(logits, self.ids.targets[0])
            _, top = self.after(logits, LENS_TOP)
            found.append(
                {
                    "name": name,
                    "loss": number(losses.mean()),
                    "top": top,
                    "targetP": [number(x) for x in p[np.arange(len(p)), self.ids.targets[0]]],
                }
            )
        return found

    def heads_flops(self) -> float:
        """Floating-point operations of zeroed_heads."""
        c = self.model.config
        return 2.0 * sum(a.size for a in self.trace.params.values()) * self.ids.tokens.size * c.n_layers * c.n_heads

    def zeroed_heads(self, tick: Callable[[int, int], None] = lambda done, of: None) -> dict[str, Any]:
        """The loss with each head's part of att.heads set to 0: one row of a batch for each head."""
        c, T = self.model.config, self.ids.tokens.shape[1]
        found: list[list[float | None]] = []
        at_once = max(1, TOGETHER // T)
        for layer in range(c.n_layers):
            losses: list[float | None] = []
            for start in range(0, c.n_heads, at_once):
                heads = range(start, min(start + at_once, c.n_heads))

                def zero(array: Array, heads: range = heads) -> Array:
                    for row, h in enumerate(heads):
                        array[row, :, h * c.head_size : (h + 1) * c.head_size] = 0
                    return array

                logits = self._logits(self.ids.tokens.repeat(len(heads), 0), {f"trf_blocks.{layer}.att.heads": zero})
                losses += [number(probabilities(each, self.ids.targets[0])[1].mean()) for each in logits]
                tick(layer * c.n_heads + heads.stop, c.n_layers * c.n_heads)
            found.append(losses)
        return {"loss": self._base(), "zeroed": found}

    def _logits(self, tokens: Array, replace: dict[str, Any]) -> Array:
        with np.errstate(all="ignore"):
            return trace(self.model, tokens, replace=replace).logits

    def _base(self) -> float | None:
        """The loss of the pass, computed as for changed passes, so that the two can be subtracted."""
        return number(probabilities(self.trace.logits[0], self.ids.targets[0])[1].mean())

    def ablate(self, zero: Mapping[str, list[tuple[Any, ...]]]) -> dict[str, Any]:
        """The pass with slices of activations set to 0. zero: name -> indices as NumPy takes them."""

        def at(slices: list[tuple[Any, ...]]) -> Callable[[Array], Array]:
            def change(array: Array) -> Array:
                for each in slices:
                    array[each] = 0
                return array

            return change

        logits = self._logits(self.ids.tokens, {name: at(slices) for name, slices in zero.items()})
        losses, predictions = self.after(logits[0])
        loss = probabilities(logits[0], self.ids.targets[0])[1].mean()
        return {"loss": number(loss), "base": self._base(), "tokenLosses": losses, "predictions": predictions}

    def nudge(self, name: str, index: tuple[int, ...], h: float) -> dict[str, Any]:
        """The loss with h added to one number of a parameter. In float64, where it can tell so small a change."""
        ids = self.ids
        if self._precise is None:
            params = {key: array.astype(np.float64) for key, array in self.trace.params.items()}
            model = GPT.from_params(self.model.config, params)
            with np.errstate(all="ignore"):
                self._precise = model, float(model.loss(ids.tokens, ids.targets))
        model, base = self._precise
        array = model.params[name]
        before = array[index]
        array[index] = before + h
        try:
            with np.errstate(all="ignore"):
                loss = float(model.loss(ids.tokens, ids.targets))
        finally:
            array[index] = before
        return {"loss": number(loss), "base": number(base), "dtype": "float64"}

    def updated(self, lr: float) -> dict[str, Any]:
        """What the model says after one step of AdamW on this text, as in the book (weight decay 0.1)."""
        params: Params = {name: array.copy() for name, array in self.trace.params.items()}
        model = GPT.from_params(self.model.config, params)
        with np.errstate(all="ignore"):
            AdamW(model.params, lr=lr, weight_decay=0.1).step({name: self.trace.grads[name] for name in model.params})
            logits = model(self.ids.tokens)[0]
            losses, predictions = self.after(logits)
            loss = probabilities(logits, self.ids.targets[0])[1].mean()
        return {"loss": number(loss), "base": self._base(), "tokenLosses": losses, "predictions": predictions}


def flat_caches(caches: Mapping[str, Any]) -> Params:
    """A trace's caches by name: a LayerNorm's .x_hat and .rstd, a GELU's .slope, a softmax's .max and .total."""
    found: Params = {}
    for name, cache in caches.items():
        if isinstance(cache, tuple):
            of = ("max", "total") if name.endswith("probs") else ("x_hat", "rstd")
            found |= {f"{name}.{of[i]}": array for i, array in enumerate(cache)}
        else:
            found[f"{name}.slope"] = cache
    return found


def probabilities(logits: Array, targets: Array) -> tuple[Array, Array]:
    """logits (T, V), targets (T,) -> softmax (T, V), and −log of the target's (T,), in float64."""
    with np.errstate(all="ignore"):
        z = logits.astype(np.float64)
        z -= z.max(axis=1, keepdims=True)
        at_target = z[np.arange(len(z)), targets]
        p = np.exp(z, out=z)
        total = p.sum(axis=1, keepdims=True)
        p /= total
        return p, np.log(total[:, 0]) - at_target


def number(x: Any) -> float | None:
    """A float that JSON can carry; None for NaN and infinities."""
    return float(x) if math.isfinite(x) else None


def stats(array: Array) -> dict[str, Any]:
    """Shape, size, and of the finite numbers how many they are, smallest, largest, mean and Euclidean norm."""
    flat = array.reshape(-1)
    low, high = flat.min(), flat.max()
    if not (np.isfinite(low) and np.isfinite(high)):
        flat = flat[np.isfinite(flat)]
        low, high = (flat.min(), flat.max()) if flat.size else (0.0, 0.0)
    with np.errstate(all="ignore"):
        mean = flat.mean(dtype=np.float64) if flat.size else 0.0
        parts = np.array_split(flat, -(-flat.size // 65536) or 1)
        squares = (float(np.vdot(wide, wide)) for wide in (part.astype(np.float64) for part in parts))
        try:
            norm = math.sqrt(math.fsum(squares))
        except OverflowError:
            norm = math.inf
    return {
        "shape": list(array.shape),
        "size": array.size,
        "finite": flat.size,
        "min": number(low),
        "max": number(high),
        "mean": number(mean),
        "norm": number(norm),
    }


def plane(array: Array) -> Array:
    """An array of the first text as rows and columns: heads side by side, vectors as one row."""
    if array.ndim == 4:
        heads: Array = array[0].swapaxes(0, 1)  # (T, NH, HS)
        return heads.reshape(len(heads), -1)
    return array.reshape(-1, array.shape[-1] if array.ndim > 1 else array.size)


def thumb(array: Array) -> dict[str, Any]:
    """A picture of at most 32 × 48 means; −inf counts as 0."""
    a = plane(array)
    if not np.isfinite(a.min()):
        a = np.where(np.isfinite(a), a, 0)
    a = _row_means(_row_means(a, THUMB_ROWS).T, THUMB_COLUMNS).T
    a = np.where(np.isfinite(a), a, 0).astype(np.float64)
    scale = float(np.abs(a).max(initial=0))
    cells = np.rint(a / (scale or 1) * 127).astype(np.int8)
    rows, columns = cells.shape
    return {"rows": rows, "cols": columns, "scale": scale, "data": base64.b64encode(cells.tobytes()).decode()}


def _row_means(a: Array, most: int) -> Array:
    """a (N, C) -> the means of at most `most` groups of neighbouring rows. As products: they read memory fastest."""
    n = len(a)
    if n <= most:
        return a
    starts = [i * n // most for i in range(most + 1)]
    return np.stack([np.full(j - i, 1 / (j - i), a.dtype) @ a[i:j] for i, j in pairwise(starts)])


def parse_slice(at: str, shape: Sequence[int]) -> tuple[int | slice, ...]:
    """ "0,2,:,7" or "3:8,:" as an index of an array of this shape. Raises InputError for one that is not."""
    parts = at.split(",") if at else []
    if len(parts) != len(shape):
        raise InputError(f"a slice of an array of shape {tuple(shape)} has {len(shape)} parts, not {len(parts)}")
    return tuple(_part(part.strip(), n) for part, n in zip(parts, shape, strict=True))


def _part(part: str, n: int) -> int | slice:
    if part == ":":
        return slice(None)
    bounds = [int(i) for i in part.split(":") if i.isascii() and i.isdigit() and len(i) < 19]
    if len(bounds) == 2 == part.count(":") + 1 and bounds[0] < bounds[1] <= n:
        return slice(*bounds)
    if len(bounds) != 1 or ":" in part or bounds[0] >= n:
        raise InputError(f"a part of a slice is :, 2:5 or a whole number from 0 to {n - 1}, not {part[:40]!r}")
    return bounds[0]


def raw(array: Array, at: Iterable[int | slice] = ()) -> bytes:
    """The numbers of a slice, little-endian, in C order."""
    cut = array[tuple(at)]
    return np.ascontiguousarray(cut, dtype=np.dtype(array.dtype).newbyteorder("<")).tobytes()
