"""Text, token by token: greedy, or drawn with temperature, top-k and top-p, over a key-value cache."""

import math
import numbers
import operator
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from numpy_gpt.block import KVCache
from numpy_gpt.errors import InputError
from numpy_gpt.model import GPT, checked_ids
from numpy_gpt.random.generator import Generator
from numpy_gpt.typing import Array


def keep_top_k(logits: Array, k: int) -> Array:
    """logits (B, V) with all but each row's k largest at −inf; among equals the lower id stays, so exactly k do."""
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

    Towards 0 the limit is greedy (shared by tokens that are equally likely), towards infinity every token is as likely.
    """
    info = np.finfo(logits.dtype)
    if float(info.tiny) <= temperature <= float(info.max):
        with np.errstate(over="ignore"):
            scaled = logits / temperature
        if np.isfinite(scaled.max(axis=1)).all():
            return softmax(scaled)
    # out of the dtype's range: differences first, so that the largest is 0, in float64, where the temperature is not 0
    below = logits.astype(np.float64) - logits.max(axis=1, keepdims=True)
    with np.errstate(over="ignore"):
        return softmax(below / temperature).astype(logits.dtype)


def keep_top_p(probs: Array, p: float) -> Array:
    """probs (B, V) cut to each row's nucleus, the fewest tokens that hold at least p of it (Holtzman et al. 2020).

    The rest becomes 0, the nucleus is not rescaled; the likeliest token always stays.
    """
    rows, order = np.arange(len(probs))[:, None], np.argsort(-probs, stable=True)
    sorted_probs = probs[rows, order]
    # what the likelier tokens already hold; in float32 a running sum of 50,257 terms would reach p too early or late,
    # and a sum with a token's own share taken off again is not the sum before it
    before = np.zeros(probs.shape)
    np.cumsum(sorted_probs[:, :-1], axis=1, out=before[:, 1:])  # in float64, as `before` is
    kept = np.zeros_like(probs)
    kept[rows, order] = np.where(before < p, sorted_probs, 0)
    return kept


def choose(
    logits: Array, temperature: float, top_k: int | None, top_p: float | None, rng: Generator | None
) -> npt.NDArray[np.int64]:
    """One next id per row (B,) of logits (B, V): top-k, then temperature, then top-p, as the book orders them."""
    if temperature == 0 or rng is None:
        ids: npt.NDArray[np.int64] = logits.argmax(axis=1)
        return ids
    if top_k is not None:
        logits = keep_top_k(logits, top_k)
    probs = at_temperature(logits, float(temperature))  # a NumPy scalar would bring its own dtype along
    if top_p is not None and top_p < 1:  # at 1 everything stays, whatever the rounding of a sum
        probs = keep_top_p(probs, top_p)
        probs /= probs.sum(axis=1, keepdims=True)
    return rng.multinomial(probs)[:, 0]


def stream(
    model: GPT,
    tokens: npt.ArrayLike,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    eos_id: int | None = None,
    rng: Generator | None = None,
    n_vocab: int | None = None,
) -> Iterator[npt.NDArray[np.int64]]:
    """generate's new ids as they are made: at most max_new_tokens arrays (B,)."""
    context = model.config.context_length
    ids = checked_ids("tokens", tokens, model.config.vocab_size)
    _check_numbers(max_new_tokens=max_new_tokens, top_k=top_k, eos_id=eos_id, n_vocab=n_vocab)
    _check_sampling(max_new_tokens, temperature, top_k, top_p, rng, n_vocab)
    ended = np.zeros(len(ids), bool)
    past = KVCache(model.config, len(ids), model.dtype)
    new = ids[:, -context:]
    for _ in range(max_new_tokens):
        if past.length + new.shape[1] > context:
            # the window slides, so every token's position changes and nothing cached holds: begin again
            past, new = KVCache(model.config, len(ids), model.dtype), ids[:, -context:]
        chosen = choose(model.next_logits(new, past)[:, :n_vocab], temperature, top_k, top_p, rng)
        if eos_id is not None:
            chosen[ended] = eos_id
            ended = chosen == eos_id
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

    temperature 0 takes the likeliest token (the lowest id among equals); above 0 a token is drawn from
    softmax(logits / temperature), which needs rng. top_k keeps the k likeliest, top_p the nucleus of that mass.
    Past the context length the model sees the last context_length tokens, as the book's sliding crop does.

    eos_id ends a row: generation stops when every row has ended, before the token that ends the last one is appended
    (so one row never holds its eos_id, as in the book); rows that end earlier are filled up with eos_id.

    n_vocab, an encoding's, keeps to the ids below it: the table of a padded vocabulary has more, which have no text.
    Raises InputError for settings or ids that cannot be used.
    """
    given = (max_new_tokens, temperature, top_k, top_p, eos_id, rng, n_vocab)
    columns = [column[:, None] for column in stream(model, tokens, *given)]
    return np.concatenate([np.asarray(tokens, dtype=np.int64), *columns], axis=1)


def _check_numbers(**settings: int | None) -> None:
    """Raise InputError, naming it, for a setting that is neither None nor a whole number."""
    for name, value in settings.items():
        try:
            if value is not None or name == "max_new_tokens":
                operator.index(value)  # type: ignore[arg-type]
        except TypeError as error:
            if not (name == "eos_id" and isinstance(value, float) and value.is_integer()):
                raise InputError(f"{name} must be a whole number, not {value!r:.80}") from error


def _check_sampling(
    max_new_tokens: int,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    rng: Generator | None,
    n_vocab: int | None,
) -> None:
    for name, number in (("temperature", temperature), ("top_p", 1.0 if top_p is None else top_p)):
        if not isinstance(number, numbers.Real | np.ndarray) or np.ndim(number):
            raise InputError(f"{name} must be a number, not {number!r:.80}")
    if max_new_tokens < 0:
        raise InputError(f"max_new_tokens must be at least 0, not {max_new_tokens}")
    if not 0 <= temperature < math.inf:
        raise InputError(f"temperature must be 0 (greedy) or a positive number, not {temperature}")
    if temperature > 0 and rng is None:
        raise InputError(f"temperature {temperature} draws at random: give rng=Generator(seed), or temperature=0")
    if n_vocab is not None and n_vocab < 1:
        raise InputError(f"n_vocab must be at least 1, not {n_vocab}")
    if top_k is not None and top_k < 1:
        raise InputError(f"top_k must be at least 1, not {top_k}")
    if top_p is not None and not 0 < top_p <= 1:
        raise InputError(f"top_p is a share of the probability, above 0 and at most 1, not {top_p}")
