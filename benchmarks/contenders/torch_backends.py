"""The PyTorch backends, each with its own copy of NumPy's initial weights."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F

from benchmarks.contenders.backends import LR, SEED, WEIGHT_DECAY, Precision
from benchmarks.contenders.book_gpt import BookGPT
from benchmarks.contenders.tuned_gpt import TunedGPT
from numpy_gpt import GPTConfig
from numpy_gpt.typing import Array, Params
from torch_gpt.train import check_compiler


@dataclass(frozen=True)
class Way:
    """A way to run PyTorch."""

    style: Literal["book", "tuned"]
    device: str = "cpu"
    precision: Precision = "float32"
    compiled: bool = False

    def __str__(self) -> str:
        name = "PyTorch, book's" if self.style == "book" else "PyTorch, tuned"
        place = "" if self.device == "cpu" and self.precision == "float32" else f", {self.device} {self.precision}"
        return name + (", compiled" if self.compiled else "") + place


class TorchBackend:
    """BookGPT with the default AdamW, or TunedGPT with the fused one, from NumPy's initial weights."""

    def __init__(self, way: Way, config: GPTConfig, params: Params):
        self.name, self.precision = str(way), way.precision
        self._device = torch.device(way.device)
        model = (BookGPT if way.style == "book" else TunedGPT)(config)
        model.load(params)
        dtype = torch.float64 if way.precision == "float64" else torch.float32
        self.model = model.to(self._device, dtype)
        fused = way.style == "tuned" and self._device.type != "meta"  # torch has no fused step for meta tensors
        self._optimizer = torch.optim.AdamW(self.model.parameters(), lr=LR, weight_decay=WEIGHT_DECAY, fused=fused)
        if way.compiled:
            check_compiler(self._device)
            torch.compiler.reset()  # torch keeps code for 8 variants of a function, and runs any further ones eagerly
        self._logits, self._loss = self.model, self._plain_loss
        if way.compiled:  # not dynamic: for exactly these shapes
            self._logits, self._loss = (torch.compile(f, dynamic=False) for f in (self.model, self._plain_loss))
        torch.manual_seed(SEED)

    def loss_and_grads(self, tokens: Array, targets: Array) -> tuple[float, Params]:
        self.model.eval()
        loss = self._backward(tokens, targets)
        return loss.item(), {name: grad.cpu().numpy() for name, grad in self.model.gradients().items()}

    def step(self, tokens: Array, targets: Array, dropout: bool) -> torch.Tensor:
        self.model.train(dropout)
        loss = self._backward(tokens, targets)
        self._optimizer.step()
        return loss.detach()

    @torch.no_grad()
    def forward(self, tokens: Array) -> torch.Tensor:
        self.model.eval()
        with self._arithmetic(), self._autocast():
            return self._logits(self.tensor(tokens))

    @torch.no_grad()
    def generate(self, tokens: Array, max_new_tokens: int) -> Array:
        self.model.eval()
        with self._arithmetic(), self._autocast():
            return self.model.generate(self.tensor(tokens), max_new_tokens).cpu().numpy()

    def touch_every_row(self) -> None:
        for name, p in self.model.named_parameters():
            p.grad = torch.full_like(p, 1e-6 if name == "tok_emb.weight" else 0)
        self._optimizer.step()

    def synchronise(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        elif self._device.type == "mps":
            torch.mps.synchronize()

    def tensor(self, tokens: Array) -> torch.Tensor:
        """tokens on the backend's device, which its methods also take: then they copy nothing."""
        return torch.as_tensor(tokens, device=self._device)

    def _plain_loss(self, tokens: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(self.model(tokens).flatten(0, 1), targets.flatten())

    def _backward(self, tokens: Array, targets: Array) -> torch.Tensor:
        self._optimizer.zero_grad(set_to_none=True)
        with self._arithmetic():
            with self._autocast():
                loss = self._loss(self.tensor(tokens), self.tensor(targets))
            loss.backward()  # outside autocast: its products take the dtypes of the forward pass's
        return loss

    @contextmanager
    def _arithmetic(self) -> Iterator[None]:
        """Round the operands of float32 products to TF32, or not: a setting of the process, read by every product."""
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("high" if self.precision == "TF32" else "highest")
        try:
            yield
        finally:
            torch.set_float32_matmul_precision(before)

    def _autocast(self) -> AbstractContextManager[None]:
        bf16 = self.precision == "bf16"
        return torch.autocast(self._device.type, torch.bfloat16) if bf16 else nullcontext()  # meta has no autocast


def gpu_ways(device: str) -> list[Way]:
    """The ways to run on a GPU; TF32 and the compiled model only on CUDA."""
    if device != "cuda":
        return [Way(style, device, precision) for precision in ("float32", "bf16") for style in ("book", "tuned")]
    return [
        Way(style, device, precision, compiled)
        for precision in ("float32", "TF32", "bf16")
        for style, compiled in (("book", False), ("tuned", False), ("tuned", True))
    ]
