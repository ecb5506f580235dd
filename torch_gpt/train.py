"""The reference's learner: torch's AdamW, schedulers, loaders and random stream in numpy_gpt's training loop."""

import math
import os
import re
import shutil
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from itertools import repeat
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from numpy_gpt.config import GPTConfig
from numpy_gpt.errors import DivergedError, InputError
from numpy_gpt.parameters import check_state
from numpy_gpt.runs.settings import Settings
from numpy_gpt.train import check_finite_step
from numpy_gpt.typing import Array, Params, Weights
from torch_gpt.decoding import stream
from torch_gpt.model import Attention, GPTModel, from_params

DTYPES = ("float32", "float64", "bfloat16")
"""Arithmetic dtypes; bfloat16 is autocast over float32 parameters."""


def choose_device(name: str | None = None) -> torch.device:
    """The device called name; None: CUDA, else MPS, else the CPU. Raises InputError if it is not available."""
    here = ["cpu"]
    if torch.backends.mps.is_available():
        here.insert(0, "mps")
    if torch.cuda.is_available():
        here.insert(0, "cuda")
    if name is None:
        return torch.device(here[0])
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise InputError(f"unknown device {name!r}: choose one of {', '.join(here)}") from error
    if device.type not in here or (device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count()):
        raise InputError(f"device {name} is not available here: choose one of {', '.join(here)}")
    return device


def check_dtype(name: str, device: torch.device) -> None:
    """Raise InputError if the device does not support this dtype."""
    if name == "float64" and device.type == "mps":
        raise InputError("MPS has no float64: choose --dtype float32 or --device cpu")
    if name == "bfloat16" and not (
        torch.amp.is_autocast_available(device.type) and (device.type != "cuda" or torch.cuda.is_bf16_supported())
    ):
        raise InputError(f"{device} has no bfloat16: choose --dtype float32")


def check_compiler(device: torch.device) -> None:
    """Raise InputError unless torch.compile works here: it needs a C++ compiler and Python's headers."""
    if device.type == "cpu" and not any(map(shutil.which, (os.environ.get("CXX", "g++"), "g++", "clang++", "cl"))):
        raise InputError(
            "--compile needs a C++ compiler on the CPU, but none was found: install g++, or omit --compile"
        )
    try:
        torch.compile(lambda x: x + 1)(torch.zeros(2, device=device))
    except (RuntimeError, OSError) as error:  # torch raises RuntimeErrors for all compiler faults
        words = str(error)
        fault = found[0] if (found := re.search(r"(fatal )?error: .*", words)) else words.partition("\n")[0]
        raise InputError(
            f"--compile needs a C++ compiler and Python's headers, but torch.compile fails here ({fault}): "
            "install g++ and python3-dev, correct $CXX, or omit --compile"
        ) from error


def learning_rates(lr: float, warmup_steps: int, total_steps: int) -> Iterator[float]:
    """Yield each step's rate from torch's schedulers: linear up to lr, then half a cosine down to a tenth of it.

    A generator, since max_steps may exceed what a list can hold.
    """
    if not warmup_steps:
        yield from repeat(lr)
    sgd = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr)
    warmup = torch.optim.lr_scheduler.LinearLR(sgd, 1 / (warmup_steps + 1), 1.0, warmup_steps)
    steps_down = max(1, total_steps - 1 - warmup_steps)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(sgd, steps_down, eta_min=lr / 10)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # SequentialLR itself triggers torch's warning
        schedule = torch.optim.lr_scheduler.SequentialLR(sgd, [warmup, cosine], [warmup_steps])
    while True:
        yield float(sgd.param_groups[0]["lr"])
        sgd.step()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            schedule.step()


def parameter_groups(model: nn.Module, decay: str, weight_decay: float) -> list[dict[str, Any]]:
    """The parameters that decay and the others, as AdamW takes them; decay: one of numpy_gpt.runs.settings.DECAYS."""
    linear = {module.weight for module in model.modules() if isinstance(module, nn.Linear)}
    decays: dict[str, Callable[[nn.Parameter], bool]] = {
        "all": lambda p: True,
        "2d": lambda p: p.dim() >= 2,
        "matrices": lambda p: p in linear,
    }
    with_decay = [p for p in model.parameters() if decays[decay](p)]
    without = [p for p in model.parameters() if not decays[decay](p)]
    return [{"params": with_decay, "weight_decay": weight_decay}, {"params": without, "weight_decay": 0.0}]


class TorchLearner:
    """torch_gpt's model with torch.optim.AdamW. See numpy_gpt.train.Learner for the methods.

    device: torch's device; dtype: one of DTYPES; attention: "plain" or "sdpa"; compiled: use torch.compile. Weights and
    batch orders are drawn on the CPU and so equal numpy_gpt's for the same seed; dropout masks do too if the device is
    the CPU.
    """

    def __init__(
        self,
        config: GPTConfig,
        settings: Settings,
        total_steps: int,
        params: Weights | None = None,
        *,
        device: torch.device,
        dtype: str = "float32",
        attention: Attention = "sdpa",
        compiled: bool = False,
    ):
        self._clip, self._seed, self._parts = settings.clip, settings.seed, settings.accumulate
        self._device = device
        self._autocast = dtype == "bfloat16"
        precision = torch.float64 if dtype == "float64" else torch.float32
        torch.manual_seed(settings.seed)
        self.model = self._new_model(config, params, attention, precision)
        self._parameters = dict(self.model.named_parameters())
        groups = parameter_groups(self.model, settings.decay, settings.weight_decay)
        self.optimizer = torch.optim.AdamW(groups, settings.lr, settings.betas)
        self._rates = learning_rates(settings.lr, settings.warmup_steps, total_steps)
        self._known_rates: list[float] = []
        self._loss = self._new_loss(compiled)

    def _new_model(
        self, config: GPTConfig, params: Weights | None, attention: Attention, precision: torch.dtype
    ) -> GPTModel:
        if params is None:
            return GPTModel(config, attention).to(self._device, precision)
        return from_params(config, params, attention=attention, device=self._device, dtype=precision)

    def _new_loss(self, compiled: bool) -> Callable[[Tensor, Tensor], Tensor]:
        return torch.compile(self.model.loss) if compiled else self.model.loss

    def train_step(self, x: Array, y: Array, step: int) -> tuple[float, float]:
        while len(self._known_rates) <= step:
            self._known_rates.append(next(self._rates))
        lr = self._known_rates[step]
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        before = self._random_state()
        self.model.train()
        self.optimizer.zero_grad()
        with self._dropout_stream(step):
            loss = self._backward(x, y)
        try:
            check_finite_step(loss, self._clip_gradients(), step, lr)
        except DivergedError:
            self._restore_random(before)  # undo drawing the dropout masks: the step did not happen
            raise
        self.optimizer.step()
        return loss, lr

    def _dropout_stream(self, step: int) -> AbstractContextManager[None]:
        """The random stream of a step's dropout masks: here torch's own, which also draws the orders."""
        return nullcontext()

    def _backward(self, x: Array, y: Array) -> float:
        """Add the batch's gradients to the parameters', part by part, and return its loss."""
        loss = 0.0
        for i, part in enumerate(zip(np.split(x, self._parts), np.split(y, self._parts), strict=True)):
            with self._synchronised(last=i == self._parts - 1):
                share = self._forward(*part) / self._parts
                share.backward()  # type: ignore[no-untyped-call]
            loss += share.item()
        return loss

    def _synchronised(self, last: bool) -> AbstractContextManager[None]:
        """What a part's forward and backward pass run in; last: of the step's parts."""
        return nullcontext()

    def _clip_gradients(self) -> float:
        """Scale the gradients as clip_grad_norm_ does; returns the norm before."""
        limit = math.inf if self._clip is None else self._clip
        return self._whole(nn.utils.clip_grad_norm_(self._parameters.values(), limit)).item()

    def _whole(self, tensor: Tensor) -> Tensor:
        """The tensor, gathered if it is sharded."""
        return tensor

    def loss(self, x: Array, y: Array) -> float:
        self.model.eval()
        with torch.no_grad():
            return self._forward(x, y).item()

    def sample(
        self,
        ids: Array,
        max_new_tokens: int,
        temperature: float = 0.0,
        top_k: int | None = None,
        n_vocab: int | None = None,
    ) -> Array:
        """The ids with up to max_new_tokens more each, drawn from a new stream of the run's seed."""
        generator = torch.Generator().manual_seed(self._seed)
        tokens = torch.as_tensor(ids, device=self._device)
        new = stream(self.model, tokens, max_new_tokens, temperature, top_k, generator=generator, n_vocab=n_vocab)
        return torch.cat([tokens.cpu(), *(column[:, None] for column in new)], dim=1).numpy()

    def shuffled_order(self, windows: int) -> Array | None:
        batch: Tensor = next(iter(DataLoader(range(windows), batch_size=windows, shuffle=True)))  # type: ignore[arg-type]
        return batch.numpy()

    def shuffle_seed(self) -> int:
        iter(DataLoader(range(1)))  # type: ignore[arg-type]  # draws its base seed
        return int(torch.empty((), dtype=torch.int64).random_())  # as RandomSampler draws its seed

    def file_order(self, windows: int) -> Array | None:
        iter(DataLoader(range(windows)))  # type: ignore[arg-type]  # draws its base seed
        return None

    def params(self) -> Params:
        return {name: self._array(p) for name, p in self._parameters.items()}

    def state(self) -> Params:
        moments = {"m": "exp_avg", "v": "exp_avg_sq"}
        state = self._random_state() | {"optimizer.t": np.array([0])}
        for name, p in self._parameters.items():
            own = self.optimizer.state[p]
            for short, long in moments.items():
                moment = own[long] if own else torch.zeros_like(p)  # none before the first step
                state[f"optimizer.{short}.{name}"] = self._array(moment)
            state["optimizer.t"] = np.array([int(own["step"]) if own else 0])
        return state

    def _array(self, tensor: Tensor) -> Array:
        array: Array = tensor.detach().cpu().numpy().copy()
        return array

    def restore(self, state: Params) -> None:
        self.check(state)
        t = torch.tensor(float(state["optimizer.t"][0]))
        for name, p in self._parameters.items():
            m, v = (torch.from_numpy(state[f"optimizer.{moment}.{name}"]).to(p, copy=True) for moment in "mv")
            self.optimizer.state[p] = {"step": t.clone(), "exp_avg": m, "exp_avg_sq": v}
        self._restore_random(state)

    def check(self, state: Params) -> None:
        """Raise InputError unless this is a state that the learner can be in."""
        try:
            self._check_state(state)
        except KeyError as error:
            raise InputError(
                f"the checkpoint has no training state {error}: start from it with --init instead"
            ) from error

    def _check_state(self, state: Params) -> None:
        """Raise InputError for an impossible state of the optimiser or the generators, KeyError for a missing part."""
        if state["optimizer.t"].shape != (1,):
            raise InputError("the optimiser's state does not have one step count: use the one saved with this model")
        check_state("t", state["optimizer.t"], np.dtype(np.int64))
        for name, p in self._parameters.items():
            for moment in "mv":
                array = state[f"optimizer.{moment}.{name}"]
                if array.shape != p.shape:
                    raise InputError(f"the optimiser's state of {name} has another shape: use the one of this model")
                check_state(f"{moment}.{name}", array, torch.empty(0, dtype=p.dtype).numpy().dtype)
        try:
            torch.Generator().set_state(torch.from_numpy(state["rng"]))
        except (RuntimeError, TypeError) as error:
            raise InputError(
                f"the checkpoint has no usable random state ({error!s:.80}): start from it with --init"
            ) from error
        cuda = state.get("rng.cuda")
        if cuda is not None and (cuda.dtype != np.uint8 or cuda.shape != (16,)):
            raise InputError("the checkpoint has no usable GPU random state: start from it with --init instead")

    def _random_state(self) -> Params:
        """The state of the CPU's generator, and of the GPU's if that draws the dropout masks."""
        state: Params = {"rng": torch.get_rng_state().numpy()}
        if self._device.type == "cuda":
            state["rng.cuda"] = torch.cuda.get_rng_state(self._device).numpy()
        return state

    def _restore_random(self, state: Params) -> None:
        torch.set_rng_state(torch.from_numpy(state["rng"]))
        if self._device.type == "cuda" and "rng.cuda" in state:
            torch.cuda.set_rng_state(torch.from_numpy(state["rng.cuda"]), self._device)

    def _forward(self, x: Array, y: Array) -> Tensor:
        tokens, targets = (torch.as_tensor(ids, device=self._device) for ids in (x, y))
        with torch.autocast(self._device.type, torch.bfloat16, enabled=self._autocast):
            return self._loss(tokens, targets)
