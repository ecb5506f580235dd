"""GPT-2 in PyTorch as the book teaches it, and as its readers run it: every part written out, nothing fused."""

import math

import torch
from torch import Tensor, nn

from numpy_gpt import GPTConfig
from numpy_gpt.typing import Params


class LayerNorm(nn.Module):
    """Mean and variance by hand."""

    def __init__(self, C: int):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(C))
        self.shift = nn.Parameter(torch.zeros(C))

    def forward(self, x: Tensor) -> Tensor:
        mean = x.mean(dim=-1, keepdim=True)
        variance = x.var(dim=-1, keepdim=True, unbiased=False)
        return self.scale * ((x - mean) / torch.sqrt(variance + 1e-5)) + self.shift


class GELU(nn.Module):
    """The tanh form by hand."""

    def forward(self, x: Tensor) -> Tensor:
        return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * torch.pow(x, 3))))


class MultiHeadAttention(nn.Module):
    """Three projections, a mask kept as a buffer, all (T, T) scores: (B, T, C) -> (B, T, C)."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        C, T = config.emb_dim, config.context_length
        self.heads, self.head_size = config.n_heads, config.head_size
        self.W_query = nn.Linear(C, C, bias=config.qkv_bias)
        self.W_key = nn.Linear(C, C, bias=config.qkv_bias)
        self.W_value = nn.Linear(C, C, bias=config.qkv_bias)
        self.out_proj = nn.Linear(C, C)
        self.dropout = nn.Dropout(config.drop_rate)
        self.register_buffer("mask", torch.triu(torch.ones(T, T), diagonal=1), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        B, T, C = x.shape
        split = (B, T, self.heads, self.head_size)
        queries = self.W_query(x).view(split).transpose(1, 2)  # (B, NH, T, HS)
        keys = self.W_key(x).view(split).transpose(1, 2)
        values = self.W_value(x).view(split).transpose(1, 2)
        scores = queries @ keys.transpose(2, 3)
        scores.masked_fill_(self.mask.bool()[:T, :T], -torch.inf)
        weights = self.dropout(torch.softmax(scores / math.sqrt(self.head_size), dim=-1))
        return self.out_proj((weights @ values).transpose(1, 2).contiguous().view(B, T, C))


class TransformerBlock(nn.Module):
    """Attention and feed-forward, each with a norm before and dropout and a residual sum after."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        C = config.emb_dim
        self.att = MultiHeadAttention(config)
        self.ff = nn.ModuleDict({"layers": nn.Sequential(nn.Linear(C, 4 * C), GELU(), nn.Linear(4 * C, C))})
        self.norm1, self.norm2 = LayerNorm(C), LayerNorm(C)
        self.drop_shortcut = nn.Dropout(config.drop_rate)

    def forward(self, x: Tensor) -> Tensor:
        x = self.drop_shortcut(self.att(self.norm1(x))) + x
        return self.drop_shortcut(self.ff["layers"](self.norm2(x))) + x


class BookGPT(nn.Module):
    """(B, T) ids -> (B, T, V) logits."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        C = config.emb_dim
        self.context_length = config.context_length
        self.tok_emb = nn.Embedding(config.vocab_size, C)
        self.pos_emb = nn.Embedding(config.context_length, C)
        self.drop_emb = nn.Dropout(config.drop_rate)
        self.trf_blocks = nn.Sequential(*(TransformerBlock(config) for _ in range(config.n_layers)))
        self.final_norm = LayerNorm(C)
        self.out_head = nn.Linear(C, config.vocab_size, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        positions = torch.arange(tokens.shape[1], device=tokens.device)
        x = self.drop_emb(self.tok_emb(tokens) + self.pos_emb(positions))
        return self.out_head(self.final_norm(self.trf_blocks(x)))

    def load(self, params: Params) -> None:
        """Load numpy_gpt's parameters, which have the same names."""
        self.load_state_dict({name: torch.from_numpy(array) for name, array in params.items()})

    def gradients(self) -> dict[str, Tensor]:
        """The gradients, under numpy_gpt's names."""
        return {name: p.grad for name, p in self.named_parameters()}

    def generate(self, tokens: Tensor, max_new_tokens: int) -> Tensor:
        """Greedy decoding with the full window through the model for every token: the book's generate_text_simple."""
        for _ in range(max_new_tokens):
            logits = self(tokens[:, -self.context_length :])[:, -1]
            tokens = torch.cat([tokens, logits.argmax(dim=-1, keepdim=True)], dim=1)
        return tokens
