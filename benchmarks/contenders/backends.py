"""The backend interface, and the NumPy backends. PyTorch's are in torch_backends, so that NumPy runs without torch."""

from typing import Any, Literal, Protocol

import numpy as np

from numpy_gpt import GPT, AdamW, Generator, GPTConfig, generate, plain
from numpy_gpt.block import Dropout
from numpy_gpt.typing import Array, Params

SEED = 123
LR, WEIGHT_DECAY = 4e-4, 0.1
"""The book's settings."""

Precision = Literal["float64", "float32", "TF32", "bf16"]
"""TF32: float32 with products' operands rounded to 10 bits; bf16: autocast over float32 parameters."""

EPS = {"float64": 2.0**-52, "float32": 2.0**-23, "TF32": 2.0**-10, "bf16": 2.0**-7}
"""Distance from 1 to the next number that a product's operands can take."""


class Backend(Protocol):
    """One model being trained. tokens and targets are (B, T) int64 NumPy arrays, read but not kept."""

    name: str
    precision: Precision

    def loss_and_grads(self, tokens: Array, targets: Array) -> tuple[float, Params]:
        """Loss without dropout, in nats per token, and gradients by numpy_gpt's names, valid until the next call."""

    def step(self, tokens: Array, targets: Array, dropout: bool) -> Any:
        """Forward, backward and AdamW. Returns the loss before the update, not yet synchronised."""

    def forward(self, tokens: Array) -> Any:
        """Logits (B, T, V), without dropout; nothing is kept for a backward pass."""

    def generate(self, tokens: Array, max_new_tokens: int) -> Array:
        """The ids followed by greedily chosen ones, (B, T + max_new_tokens)."""

    def touch_every_row(self) -> None:
        """One AdamW step with a gradient in every row of the token embedding, so that no row's moments are 0."""

    def synchronise(self) -> None:
        """Wait for all pending work."""


class NumPyBackend:
    """numpy_gpt, through its public interface."""

    name, precision = "NumPy", "float32"

    def __init__(self, config: GPTConfig):
        self.model = GPT(config, SEED)
        self._optimizer = AdamW(self.model.params, lr=LR, weight_decay=WEIGHT_DECAY)
        self._rng = Generator(SEED)

    def loss_and_grads(self, tokens: Array, targets: Array) -> tuple[float, Params]:
        loss, grads = self.model.loss_and_grads(tokens, targets)
        return float(loss), grads

    def step(self, tokens: Array, targets: Array, dropout: bool) -> Any:
        loss, grads = self.model.loss_and_grads(tokens, targets, rng=self._rng if dropout else None)
        self._optimizer.step(grads)
        return loss

    def forward(self, tokens: Array) -> Array:
        return self.model(tokens)

    def generate(self, tokens: Array, max_new_tokens: int) -> Array:
        return generate(self.model, tokens, max_new_tokens)

    def touch_every_row(self) -> None:
        self._optimizer.step(_of_every_row(self.model.params))

    def synchronise(self) -> None:
        """NumPy is done when it returns."""


class PlainBackend:
    """numpy_gpt/plain.py, the textbook: what NumPy costs without threads, buffers and blocks."""

    name, precision = "plain NumPy", "float32"

    def __init__(self, config: GPTConfig):
        self.config, self.params = config, GPT(config, SEED).params
        self._m, self._v = ({name: np.zeros_like(p) for name, p in self.params.items()} for _ in range(2))
        self._t, self._rng = 0, Generator(SEED)

    def loss_and_grads(self, tokens: Array, targets: Array) -> tuple[float, Params]:
        loss, grads = plain.loss_and_grads(self.params, tokens, targets, self.config)
        return float(loss), grads

    def step(self, tokens: Array, targets: Array, dropout: bool) -> Any:
        masks = self._masks(*tokens.shape) if dropout else None
        loss, grads = plain.loss_and_grads(self.params, tokens, targets, self.config, masks)
        self._update(grads)
        return loss

    def forward(self, tokens: Array) -> Array:
        return plain.forward(self.params, tokens, self.config)

    def generate(self, tokens: Array, max_new_tokens: int) -> Array:
        return plain.generate(self.params, tokens, max_new_tokens, self.config)

    def touch_every_row(self) -> None:
        self._update(_of_every_row(self.params))

    def synchronise(self) -> None:
        """NumPy is done when it returns."""

    def _update(self, grads: Params) -> None:
        self._t += 1
        plain.adamw_step(self.params, grads, self._m, self._v, self._t, LR, WEIGHT_DECAY)

    def _masks(self, B: int, T: int) -> list[Array | None]:
        """The masks of one pass, drawn as in numpy_gpt's model."""
        config, drop = self.config, Dropout(self.config.drop_rate, self._rng, np.float32)
        x, p = (B, T, config.emb_dim), (B, config.n_heads, T, T)
        return [drop.mask(shape) for shape in [x] + config.n_layers * [p, x, x]]


def _of_every_row(params: Params) -> Params:
    """Gradients that are 0 except in the token embedding."""
    grads = {name: np.zeros_like(p) for name, p in params.items()}
    grads["tok_emb.weight"][...] = 1e-6
    return grads
