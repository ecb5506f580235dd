"""A GPT equal to nanoGPT's (https://github.com/karpathy/nanoGPT), trained by torch_gpt's learner.

It differs from GPT-2 in its exact GELU and in that no layer has a bias; the output head is the token embedding. Weights
begin as N(0, 0.02²), those of the projections back into the residual stream divided by √(2 L).
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from numpy_gpt import GPTConfig
from numpy_gpt.typing import Weights
from torch_gpt.model import Attention
from torch_gpt.train import TorchLearner


class Block(nn.Module):
    """(B, T, C) -> (B, T, C): attention and feed-forward, each after a norm and added to its input."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        C = config.emb_dim
        self.heads = config.n_heads
        self.norm1, self.norm2 = (nn.LayerNorm(C, bias=False) for _ in range(2))
        self.qkv, self.out = nn.Linear(C, 3 * C, bias=False), nn.Linear(C, C, bias=False)
        self.up, self.down = nn.Linear(C, 4 * C, bias=False), nn.Linear(4 * C, C, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        B, T, C = x.shape
        q, k, v = (
            third.view(B, T, self.heads, C // self.heads).transpose(1, 2)  # (B, NH, T, HS)
            for third in self.qkv(self.norm1(x)).split(C, dim=2)
        )
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(y.transpose(1, 2).reshape(B, T, C))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class NanoGPT(nn.Module):
    """(B, T) ids -> (B, T, V) logits."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        C = config.emb_dim
        self.tokens, self.positions = nn.Embedding(config.vocab_size, C), nn.Embedding(config.context_length, C)
        self.blocks = nn.Sequential(*(Block(config) for _ in range(config.n_layers)))
        self.norm = nn.LayerNorm(C, bias=False)
        for name, p in self.named_parameters():
            if p.dim() == 2:
                residual = name.endswith(("out.weight", "down.weight"))
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * config.n_layers) if residual else 0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.tokens(tokens) + self.positions(torch.arange(tokens.shape[1], device=tokens.device))
        return F.linear(self.norm(self.blocks(x)), self.tokens.weight)

    def loss(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """Mean cross-entropy in nats per token."""
        return F.cross_entropy(self(tokens).flatten(0, 1), targets.flatten())


class NanoLearner(TorchLearner):
    """nanoGPT's model in the same training step."""

    def _new_model(self, config: GPTConfig, params: Weights | None, attention: Attention, precision: torch.dtype):
        return NanoGPT(config).to(self._device, precision)
