"""The same GPT-2 with PyTorch's fast paths: one projection for q, k and v, fused attention, norm and GELU."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from numpy_gpt import GPTConfig
from numpy_gpt.typing import Params

QKV = ("W_query", "W_key", "W_value")


class Block(nn.Module):
    """A transformer block, (B, T, C) -> (B, T, C). W_qkv (3C, C) stacks numpy_gpt's three."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        C = config.emb_dim
        self.heads, self.rate = config.n_heads, config.drop_rate
        self.att = nn.ModuleDict({"W_qkv": nn.Linear(C, 3 * C, bias=config.qkv_bias), "out_proj": nn.Linear(C, C)})
        self.ff = nn.ModuleDict(
            {"layers": nn.Sequential(nn.Linear(C, 4 * C), nn.GELU(approximate="tanh"), nn.Linear(4 * C, C))}
        )
        self.norm1, self.norm2 = nn.LayerNorm(C), nn.LayerNorm(C)

    def forward(self, x: Tensor) -> Tensor:
        B, T, C = x.shape
        qkv = self.att["W_qkv"](self.norm1(x)).view(B, T, 3, self.heads, C // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (B, NH, T, HS)
        rate = self.rate if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=rate)
        x = x + F.dropout(self.att["out_proj"](y.transpose(1, 2).reshape(B, T, C)), rate)
        return x + F.dropout(self.ff["layers"](self.norm2(x)), rate)


class TunedGPT(nn.Module):
    """(B, T) ids -> (B, T, V) logits."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        C = config.emb_dim
        self.tok_emb = nn.Embedding(config.vocab_size, C)
        self.pos_emb = nn.Embedding(config.context_length, C)
        self.drop_emb = nn.Dropout(config.drop_rate)
        self.trf_blocks = nn.Sequential(*(Block(config) for _ in range(config.n_layers)))
        self.final_norm = nn.LayerNorm(C)
        self.out_head = nn.Linear(C, config.vocab_size, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        positions = torch.arange(tokens.shape[1], device=tokens.device)
        x = self.drop_emb(self.tok_emb(tokens) + self.pos_emb(positions))
        return self.out_head(self.final_norm(self.trf_blocks(x)))

    def load(self, params: Params) -> None:
        """Load numpy_gpt's parameters."""
        state = {}
        for name, p in self.named_parameters():
            parts = [params[book_name] for book_name in book_names(name)]
            state[name] = torch.cat([torch.from_numpy(part) for part in parts]).view(p.shape)
        self.load_state_dict(state)

    def gradients(self) -> dict[str, Tensor]:
        """The gradients, under numpy_gpt's names."""
        gradients = {}
        for name, p in self.named_parameters():
            names = book_names(name)
            gradients |= dict(zip(names, p.grad.chunk(len(names)), strict=True))
        return gradients


def book_names(name: str) -> list[str]:
    """numpy_gpt's names for one parameter of this model: three for W_qkv, else one."""
    if "W_qkv" in name:
        return [name.replace("W_qkv", qkv) for qkv in QKV]
    if "norm" in name:
        return [name.replace("weight", "scale").replace("bias", "shift")]
    return [name]
