"""A learner on several processes: torch's DistributedDataParallel, or its fully sharded form (FSDP2).

A batch is shared among the processes in equal parts, so that its mean loss and gradients are those of one process.
Rank 0 draws the weights and the orders, as one process does. Dropout masks depend on the seed, the step and the rank.
"""

import hashlib
import logging
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from numpy_gpt.config import GPTConfig
from numpy_gpt.runs.settings import Settings
from numpy_gpt.typing import Array, Params, Weights
from torch_gpt.launchers import Place
from torch_gpt.model import Attention, GPTModel
from torch_gpt.processes import Parallel, Team
from torch_gpt.train import TorchLearner


class Loss(nn.Module):
    """The model's loss as a module's forward pass, which DistributedDataParallel wraps."""

    def __init__(self, model: GPTModel):
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        return self.model.loss(tokens, targets)


class Member(TorchLearner):
    """A process's share of a learner. Its methods are called on all ranks at once, with the complete batch."""

    def __init__(
        self,
        place: Place,
        config: GPTConfig,
        settings: Settings,
        total_steps: int,
        device: str,
        dtype: str,
        attention: Attention,
        compiled: bool,
        parallel: Parallel,
        params: Weights | None,
    ):
        """params: on rank 0 the weights, or None for new ones; they are sent to the others one by one."""
        self._place, self._parallel = place, parallel
        own = torch.device(device, place.local_rank) if device == "cuda" else torch.device(device)
        super().__init__(
            config, settings, total_steps, params, device=own, dtype=dtype, attention=attention, compiled=compiled
        )

    def _new_model(
        self, config: GPTConfig, params: Weights | None, attention: Attention, precision: torch.dtype
    ) -> GPTModel:
        if self._place.rank == 0 and params is None:
            params = {name: p.detach().numpy() for name, p in GPTModel(config, attention).named_parameters()}
        with torch.device("meta"):
            model = GPTModel(config, attention).to(precision)
        if self._parallel == "fsdp":
            mesh = init_device_mesh(self._device.type, (self._place.size,))
            for block in model.trf_blocks:
                fully_shard(block, mesh=mesh)
            fully_shard(model, mesh=mesh, reshard_after_forward=True)  # or evaluations leave it gathered
        model = model.to_empty(device=self._device)
        with torch.no_grad():
            for name, p in model.named_parameters():
                p.copy_(self._from_rank_0(p, None if params is None else params[name]))
        return model

    def _new_loss(self, compiled: bool) -> Any:
        if self._parallel == "fsdp":
            return super()._new_loss(compiled)
        devices = [self._device.index] if self._device.type == "cuda" else None
        self._ddp = DistributedDataParallel(Loss(self.model), device_ids=devices, gradient_as_bucket_view=True)
        if not compiled:
            return self._ddp
        # it warns that the profiler's marks, of which DistributedDataParallel has one, are lost
        logging.getLogger("torch._dynamo.variables.ctx_manager").setLevel(logging.ERROR)
        return torch.compile(self._ddp)

    def _from_rank_0(self, p: Tensor, array: Any) -> Tensor:
        """The tensor that rank 0 has as an array, on this device, or this rank's shard of it, as p is sharded."""
        full = torch.empty(p.shape, dtype=p.dtype, device=self._device)
        if self._place.rank == 0:
            full.copy_(torch.from_numpy(np.array(array)))
        dist.broadcast(full, 0)
        if isinstance(p, DTensor):
            return distribute_tensor(full, p.device_mesh, p.placements, src_data_rank=None)
        return full

    def _whole(self, tensor: Tensor) -> Tensor:
        return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor

    def _array(self, tensor: Tensor) -> Array:
        """On rank 0 the complete tensor, elsewhere nothing."""
        full = self._whole(tensor)
        return super()._array(full) if self._place.rank == 0 else np.empty(0)

    def _backward(self, x: Array, y: Array) -> float:
        rows = len(x) // self._place.size
        own = slice(self._place.rank * rows, (self._place.rank + 1) * rows)
        return self._sum(super()._backward(x[own], y[own]) / self._place.size)

    def _synchronised(self, last: bool) -> AbstractContextManager[None]:
        """Let DistributedDataParallel average the gradients once a step; FSDP adds each part's to its shards."""
        return nullcontext() if last or self._parallel == "fsdp" else self._ddp.no_sync()

    @contextmanager
    def _dropout_stream(self, step: int) -> Iterator[None]:
        seed = hashlib.sha256(f"{self._seed} {step} {self._place.rank}".encode()).digest()[:8]
        with torch.random.fork_rng([self._device] if self._device.type == "cuda" else []):
            torch.manual_seed(int.from_bytes(seed) >> 1)
            yield

    def loss(self, x: Array, y: Array) -> float:
        """The mean over all rows, each computed by one rank; a rank without a row computes one that does not count."""
        own = slice(self._place.rank, None, self._place.size)
        rows = len(x[own])
        x_own, y_own = (x[own], y[own]) if rows else (x[:1], y[:1])
        return self._sum(super().loss(x_own, y_own) * rows / len(x))

    def restore(self, state: Params | None) -> None:
        """Take the state from rank 0, which has checked it; elsewhere it is None."""
        t = torch.tensor(float(state["optimizer.t"][0]) if state else 0.0)
        dist.broadcast(t, 0)
        for name, p in self._parameters.items():
            m, v = (self._from_rank_0(p, state and state[f"optimizer.{moment}.{name}"]) for moment in "mv")
            self.optimizer.state[p] = {"step": t.clone(), "exp_avg": m, "exp_avg_sq": v}
        if state is not None:
            self._restore_random(state)

    def _sum(self, value: float) -> float:
        """The sum over all ranks."""
        total = torch.tensor(value, dtype=torch.float64)
        dist.all_reduce(total)
        return total.item()


class TeamLearner:
    """Rank 0's learner, whose work all processes share. See numpy_gpt.train.Learner for the methods."""

    def __init__(
        self,
        config: GPTConfig,
        settings: Settings,
        total_steps: int,
        params: Weights | None = None,
        *,
        team: Team,
        device: torch.device,
        dtype: str,
        attention: Attention,
        compiled: bool,
        parallel: Parallel,
    ):
        self._team = team
        options = device.type, dtype, attention, compiled, parallel
        self._member: Member = team.call("make", config, settings, total_steps, *options, own=(params,))

    def train_step(self, x: Array, y: Array, step: int) -> tuple[float, float]:
        found: tuple[float, float] = self._team.call("train_step", x, y, step)
        return found

    def loss(self, x: Array, y: Array) -> float:
        return float(self._team.call("loss", x, y))

    def sample(
        self,
        ids: Array,
        max_new_tokens: int,
        temperature: float = 0.0,
        top_k: int | None = None,
        n_vocab: int | None = None,
    ) -> Array:
        found: Array = self._team.call("sample", ids, max_new_tokens, temperature, top_k, n_vocab)
        return found

    def shuffled_order(self, windows: int) -> Array | None:
        return self._member.shuffled_order(windows)

    def shuffle_seed(self) -> int:
        return self._member.shuffle_seed()

    def file_order(self, windows: int) -> Array | None:
        return self._member.file_order(windows)

    def params(self) -> Params:
        found: Params = self._team.call("params")
        return found

    def state(self) -> Params:
        found: Params = self._team.call("state")
        return found

    def restore(self, state: Params) -> None:
        self._member.check(state)
        self._team.call("restore", own=(state,))
