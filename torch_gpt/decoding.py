"""Text generation in torch's own operations, as in the book: every token recomputes the full window."""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from torch_gpt.model import GPTModel


def keep_top_k(logits: Tensor, k: int) -> Tensor:
    """logits (B, V) with all but each row's k largest at −inf; of equals the lower id is kept, so exactly k are."""
    order = logits.sort(dim=-1, descending=True, stable=True).indices
    return logits.scatter(-1, order[:, k:], -torch.inf)


def keep_top_p(probs: Tensor, p: float) -> Tensor:
    """probs (B, V) with 0 for all but each row's nucleus: the fewest tokens, likeliest first, whose sum is at least p.

    The sum is taken in float64, where the rounding of 50,257 terms does not move the nucleus's edge.
    """
    likeliest, order = probs.sort(dim=-1, descending=True, stable=True)
    before = F.pad(likeliest.double().cumsum(dim=-1)[:, :-1], (1, 0))  # the sum of the likelier tokens
    return probs.scatter(-1, order, likeliest.masked_fill(before >= p, 0))


def choose(
    logits: Tensor, temperature: float, top_k: int | None, top_p: float | None, generator: torch.Generator | None
) -> Tensor:
    """The next id of each row (B,) of logits (B, V): top-k, then temperature, then top-p, in the book's order."""
    if temperature == 0:
        return logits.argmax(dim=-1)
    if top_k is not None:
        logits = keep_top_k(logits, top_k)
    below = logits.double() - logits.max(dim=-1, keepdim=True).values  # in float64 no temperature overflows
    probs = torch.softmax(below / temperature, dim=-1).to(logits.dtype)
    if top_p is not None and top_p < 1:  # at 1 every token is kept, however the sum rounds
        probs = keep_top_p(probs, top_p)
        probs = probs / probs.sum(dim=-1, keepdim=True)
    return torch.multinomial(probs, 1, generator=generator)[:, 0]


def stream(
    model: GPTModel,
    tokens: Tensor,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    eos_id: int | None = None,
    generator: torch.Generator | None = None,
    n_vocab: int | None = None,
) -> Iterator[Tensor]:
    """Yield the ids that follow tokens (B, T), one by one: at most max_new_tokens tensors (B,), on the CPU.

    The settings are those of numpy_gpt.generate. A torch.Generator on the CPU draws what numpy_gpt's Generator with its
    seed draws; choosing happens on the CPU, so that all devices draw the same numbers.
    """
    model.eval()
    ended = torch.zeros(len(tokens), dtype=torch.bool)
    for _ in range(max_new_tokens):
        with torch.no_grad():
            logits = model(tokens[:, -model.config.context_length :])[:, -1, :n_vocab].cpu()
        widened = logits.to(torch.promote_types(logits.dtype, torch.float32))  # autocast's logits are bfloat16
        chosen = choose(widened, temperature, top_k, top_p, generator)
        if eos_id is not None:
            chosen = chosen.masked_fill(ended, eos_id)
            ended = chosen == eos_id
            if ended.all():
                return
        yield chosen
        tokens = torch.cat([tokens, chosen[:, None].to(tokens.device)], dim=1)
