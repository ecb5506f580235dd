"""Text generation, token by token: greedy, or sampled with temperature, top-k and top-p, with a key-value cache."""

import math
import numbers
import operator
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from numpy_gpt.block import KVCache
from numpy_gpt.errors import InputError
from numpy_gpt.model import GPT, checked_ids
from numpy_gpt.random.generator import Generator
from numpy_gpt.typing import Array


def keep_top_k(logits: Array, k: int) -> Array:
    """logits (B, V) with all but each row's k largest at −inf; of equals the lower id is kept, so exactly k are."""
    rows, largest = np.arange(len(logits))[:, None], np.argsort(-logits, stable=True)[:, :k]
    kept = np.full_like(logits, -np.inf)
    kept[rows, largest] = logits[rows, largest]
    return kept


def softmax(logits: Array) -> Array:
    """Probabilities (B, V) of logits (B, V); −inf becomes 0."""
    e = np.exp(logits - logits.max(axis=1, keepdims=True))
    probs: Array = e / e.sum(axis=1, keepdims=True)
    return probs


def at_temperature(logits: Array, temperature: float) -> Array:
    """softmax(logits / temperature) (B, V) in the dtype of logits, for every finite temperature above 0.

    Near 0 the likeliest token takes all (equally likely ones share); near infinity the distribution is uniform.
    """
    info = np.finfo(logits.dtype)
    if float(info.tiny) <= temperature <= float(info.max):
        with np.errstate(over="ignore"):
            scaled = logits / temperature
        if np.isfinite(scaled.max(axis=1)).all():
            return softmax(scaled)
    # out of the dtype's range: subtract the largest first, in float64, where the temperature does not round to 0
    below = logits.astype(np.float64) - logits.max(axis=1, keepdims=True)
    with np.errstate(over="ignore"):
        return softmax(below / temperature).astype(logits.dtype)


def keep_top_p(probs: Array, p: float) -> Array:
    """probs (B, V) cut to each row's nucleus, the fewest tokens whose sum is at least p (Holtzman et al. 2020).

    The rest becomes 0; the nucleus is not rescaled. The likeliest token is always kept.
    """
    rows, order = np.arange(len(probs))[:, None], np.argsort(-probs, stable=True)
    sorted_probs = probs[rows, order]
    # The sum of the likelier tokens: in float32 a running sum of 50,257 terms would reach p too early or too late, and
    # subtracting a token's own share from the sum that includes it would not give the sum before it.
    before = np.zeros(probs.shape)
    np.cumsum(sorted_probs[:, :-1], axis=1, out=before[:, 1:])  # in float64, as `before` is
    kept = np.zeros_like(probs)
    kept[rows, order] = np.where(before < p, sorted_probs, 0)
    return kept


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen; `generate` explains each setting. Raises InputError for unusable settings."""

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    eos_id: int | None = None
    rng: Generator | None = None
    n_vocab: int | None = None

    def __post_init__(self) -> None:
        for name in ("top_k", "eos_id", "n_vocab"):
            if getattr(self, name) is not None:
                _check_whole(name, getattr(self, name))
        for name, number in (("temperature", self.temperature), ("top_p", 1.0 if self.top_p is None else self.top_p)):
            if not isinstance(number, numbers.Real | np.ndarray) or np.ndim(number):
                raise InputError(f"{name} must be a number, not {number!r:.80}")
        if not 0 <= self.temperature < math.inf:
            raise InputError(f"temperature must be 0 (greedy) or a positive number, not {self.temperature}")
        if self.temperature > 0 and self.rng is None:
            raise InputError(
                f"temperature {self.temperature} draws at random: give rng=Generator(seed), or temperature=0"
            )
        if self.n_vocab is not None and self.n_vocab < 1:
            raise InputError(f"n_vocab must be at least 1, not {self.n_vocab}")
        if self.top_k is not None and self.top_k < 1:
            raise InputError(f"top_k must be at least 1, not {self.top_k}")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise InputError(f"top_p must be a share of the probability, above 0 and at most 1, not {self.top_p}")

    def choose(self, logits: Array) -> npt.NDArray[np.int64]:
        """The next id of each row (B,) of logits (B, V): top-k, then temperature, then top-p, in the book's order."""
        logits = logits[:, : self.n_vocab]
        if self.temperature == 0 or self.rng is None:
            ids: npt.NDArray[np.int64] = logits.argmax(axis=1)
            return ids
        if self.top_k is not None:
            logits = keep_top_k(logits, self.top_k)
        probs = at_temperature(logits, float(self.temperature))  # a NumPy scalar would impose its dtype
        if self.top_p is not None and self.top_p < 1:  # at 1 every token is kept, however the sum rounds
            probs = keep_top_p(probs, self.top_p)
            probs /= probs.sum(axis=1, keepdims=True)
        return self.rng.multinomial(probs)[:, 0]


def stream(
    model: GPT, tokens: npt.ArrayLike, max_new_tokens: int, sampling: Sampling | None = None
) -> Iterator[npt.NDArray[np.int64]]:
    """Yield generate's new ids one by one: at most max_new_tokens arrays (B,). sampling None: greedy."""
    sampling = sampling or Sampling()
    context = model.config.context_length
    ids = checked_ids("tokens", tokens, model.config.vocab_size)
    _check_whole("max_new_tokens", max_new_tokens)
    if max_new_tokens < 0:
        raise InputError(f"max_new_tokens must be at least 0, not {max_new_tokens}")
    ended = np.zeros(len(ids), bool)
    past = KVCache(model.config, len(ids), model.dtype)
    new = ids[:, -context:]
    for _ in range(max_new_tokens):
        if past.length + new.shape[1] > context:
            # the window slides, so every token's position changes and the cache is invalid
            past, new = KVCache(model.config, len(ids), model.dtype), ids[:, -context:]
        chosen = sampling.choose(model.next_logits(new, past))
        if sampling.eos_id is not None:
            chosen[ended] = sampling.eos_id
            ended = chosen == sampling.eos_id
            if ended.all():
                return
        yield chosen
        new = chosen[:, None]
        ids = np.concatenate([ids, new], axis=1)


def generate(
    model: GPT,
    tokens: npt.ArrayLike,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    eos_id: int | None = None,
    rng: Generator | None = None,
    n_vocab: int | None = None,
) -> npt.NDArray[np.int64]:
    """tokens (B, T) followed by up to max_new_tokens more each: (B, T + new) int64.

    temperature 0 takes the likeliest token (of equals, the lowest id); above 0 a token is drawn from
    softmax(logits / temperature), which needs rng. top_k keeps the k likeliest, top_p the nucleus of that mass.
    Past the context length the model sees the last context_length tokens, as in the book.

    eos_id ends a row. Generation stops when every row has ended, and that last step's tokens are not appended (a single
    row never contains its eos_id, as in the book). Rows that end earlier are padded with eos_id.

    n_vocab, an encoding's size, excludes the ids from it on: a padded vocabulary has ids without text.
    Raises InputError for unusable settings or ids.
    """
    sampling = Sampling(temperature, top_k, top_p, eos_id, rng, n_vocab)
    columns = [column[:, None] for column in stream(model, tokens, max_new_tokens, sampling)]
    return np.concatenate([np.asarray(tokens, dtype=np.int64), *columns], axis=1)


def _check_whole(name: str, value: float) -> None:
    """Raise InputError, naming the setting, unless the value is a whole number."""
    try:
        operator.index(value)  # type: ignore[arg-type]
    except TypeError as error:
        if not (name == "eos_id" and isinstance(value, float) and value.is_integer()):
            raise InputError(f"{name} must be a whole number, not {value!r:.80}") from error
