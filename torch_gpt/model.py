"""The reference: the book's GPT in torch's own operations, under numpy_gpt's parameter names.

It is deliberately simple and uses none of numpy_gpt's mathematics, only torch's layers and autograd.
"""

import math
from collections.abc import Iterable, Iterator
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from numpy_gpt.config import GPTConfig
from numpy_gpt.typing import Params, Weights

Attention = Literal["plain", "sdpa"]
"""plain: separate matrix products, softmax and dropout; sdpa: torch's scaled_dot_product_attention."""

Masks = Iterator[Tensor] | None
"""Given dropout factors, in order of use, replacing torch's own draws."""


class Dropout(nn.Module):
    """torch's dropout, or multiplication by the next given mask."""

    def __init__(self, rate: float):
        super().__init__()
        self.rate = rate
        self.masks: Masks = None

    def forward(self, x: Tensor) -> Tensor:
        if self.masks is not None:
            return x * next(self.masks)
        return F.dropout(x, self.rate, self.training)


class LayerNorm(nn.Module):
    """torch's layer_norm with the book's parameter names."""

    def __init__(self, C: int):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(C))
        self.shift = nn.Parameter(torch.zeros(C))

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], self.scale, self.shift, eps=1e-5)


class MultiHeadAttention(nn.Module):
    """Causal self-attention, (B, T, C) -> (B, T, C), with dropout on the probabilities."""

    def __init__(self, config: GPTConfig, attention: Attention):
        super().__init__()
        C = config.emb_dim
        self.n_heads, self.attention = config.n_heads, attention
        self.W_query = nn.Linear(C, C, bias=config.qkv_bias)
        self.W_key = nn.Linear(C, C, bias=config.qkv_bias)
        self.W_value = nn.Linear(C, C, bias=config.qkv_bias)
        self.out_proj = nn.Linear(C, C)
        self.dropout = Dropout(config.drop_rate)

    def forward(self, x: Tensor) -> Tensor:
        B, T, C = x.shape
        q, k, v = (
            linear(x).view(B, T, self.n_heads, C // self.n_heads).transpose(1, 2)  # (B, NH, T, HS)
            for linear in (self.W_query, self.W_key, self.W_value)
        )
        if self.attention == "sdpa":
            rate = self.dropout.rate if self.training else 0.0
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=rate)
        else:
            scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])
            future = torch.ones(T, T, dtype=torch.bool, device=x.device).triu(1)
            probs = torch.softmax(scores.masked_fill(future, -torch.inf), dim=-1)
            y = self.dropout(probs) @ v
        return self.out_proj(y.transpose(1, 2).reshape(B, T, C))  # type: ignore[no-any-return]


class FeedForward(nn.Module):
    """(B, T, C) -> (B, T, C) through 4C features and a tanh GELU."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        C = config.emb_dim
        self.layers = nn.Sequential(nn.Linear(C, 4 * C), nn.GELU(approximate="tanh"), nn.Linear(4 * C, C))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)  # type: ignore[no-any-return]


class TransformerBlock(nn.Module):
    """Pre-norm attention and feed-forward branches, each dropped out and added to its input."""

    def __init__(self, config: GPTConfig, attention: Attention):
        super().__init__()
        self.att = MultiHeadAttention(config, attention)
        self.ff = FeedForward(config)
        self.norm1 = LayerNorm(config.emb_dim)
        self.norm2 = LayerNorm(config.emb_dim)
        self.drop_shortcut = Dropout(config.drop_rate)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_shortcut(self.att(self.norm1(x)))
        return x + self.drop_shortcut(self.ff(self.norm2(x)))  # type: ignore[no-any-return]


class GPTModel(nn.Module):
    """(B, T) token ids -> (B, T, V) logits. Layers are created, so their weights are drawn, in the book's order."""

    def __init__(self, config: GPTConfig, attention: Attention = "sdpa"):
        super().__init__()
        if attention not in ("plain", "sdpa"):
            raise ValueError(f"attention must be 'plain' or 'sdpa', not {attention!r}")
        self.config = config
        self.tok_emb = nn.Embedding(config.vocab_size, config.emb_dim)
        self.pos_emb = nn.Embedding(config.context_length, config.emb_dim)
        self.drop_emb = Dropout(config.drop_rate)
        self.trf_blocks = nn.Sequential(*(TransformerBlock(config, attention) for _ in range(config.n_layers)))
        self.final_norm = LayerNorm(config.emb_dim)
        self.out_head = None if config.tie_weights else nn.Linear(config.emb_dim, config.vocab_size, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        positions = torch.arange(tokens.shape[1], device=tokens.device)
        x = self.drop_emb(self.tok_emb(tokens) + self.pos_emb(positions))
        x = self.final_norm(self.trf_blocks(x))
        return F.linear(x, self.tok_emb.weight if self.out_head is None else self.out_head.weight)

    def loss(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """Mean cross-entropy in nats per token, computed in at least float32 even under autocast."""
        logits = self(tokens)
        if logits.dtype in (torch.float16, torch.bfloat16):
            logits = logits.float()
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())

    def use_masks(self, masks: Iterable[Tensor] | None) -> None:
        """From now on, take dropout's factors from masks, in order of use; None: resume drawing them."""
        shared = None if masks is None else iter(masks)
        for module in self.modules():
            if isinstance(module, MultiHeadAttention) and shared is not None and module.attention == "sdpa":
                raise ValueError("sdpa draws its own dropout: masks need attention='plain'")
            if isinstance(module, Dropout):
                module.masks = shared


def from_params(
    config: GPTConfig,
    params: Weights,
    *,
    attention: Attention = "sdpa",
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
) -> GPTModel:
    """A GPTModel with exact copies of numpy_gpt's parameters, in their dtype unless another is given.

    Raises torch's RuntimeError, which names missing or unknown parameters and wrong shapes.
    """
    dtype = dtype or torch.from_numpy(np.empty(0, params["tok_emb.weight"].dtype)).dtype
    with torch.device("meta"):  # no memory and no draws for weights replaced at once
        model = GPTModel(config, attention)
    model = model.to_empty(device="cpu").to(dtype)
    model.load_state_dict({name: torch.from_numpy(np.array(array)) for name, array in params.items()})
    return model.to(device)


def to_params(model: GPTModel) -> Params:
    """Copies of the parameters as NumPy arrays, by name, in order."""
    return {name: p.detach().cpu().numpy().copy() for name, p in model.named_parameters()}


def loss_and_grads(
    model: GPTModel, tokens: np.ndarray, targets: np.ndarray, masks: Iterable[np.ndarray] | None = None
) -> tuple[float, Params]:
    """Loss and autograd's gradients, in the form numpy_gpt's model returns; masks: dropout factors, in order of use."""
    device = model.tok_emb.weight.device
    model.train(masks is not None)
    model.use_masks(None if masks is None else [torch.from_numpy(mask).to(device) for mask in masks])
    model.zero_grad()
    loss = model.loss(torch.as_tensor(tokens, device=device), torch.as_tensor(targets, device=device))
    loss.backward()  # type: ignore[no-untyped-call]
    model.use_masks(None)
    grads: Params = {}
    for name, p in model.named_parameters():
        assert p.grad is not None, f"{name} took no part in the loss"
        grads[name] = p.grad.detach().cpu().numpy().copy()
    return loss.item(), grads
