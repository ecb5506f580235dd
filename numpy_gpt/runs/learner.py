"""The NumPy model behind the interface that train.py's loop calls, on one random stream."""

import math

from numpy_gpt.config import GPTConfig
from numpy_gpt.decoding import generate
from numpy_gpt.errors import DivergedError, InputError
from numpy_gpt.model import GPT
from numpy_gpt.optim import AdamW, clip_grad_norm, warmup_cosine
from numpy_gpt.parameters import decayed_parameters
from numpy_gpt.random.generator import Generator
from numpy_gpt.runs.settings import Settings
from numpy_gpt.train import check_finite_step
from numpy_gpt.typing import Array, Params, Weights


class NumpyLearner:
    """numpy_gpt's model, AdamW and Generator, float32. See train.Learner for the methods."""

    def __init__(
        self,
        config: GPTConfig,
        settings: Settings,
        total_steps: int,
        params: Weights | None = None,
    ):
        """Seed once; the model (unless params are given) and then training draw from that one stream."""
        self._settings, self._total_steps = settings, total_steps
        self.rng = Generator(settings.seed)
        self.model = GPT(config, self.rng) if params is None else GPT.from_params(config, params)
        decayed = decayed_parameters(config, settings.decay)
        self.optimizer = AdamW(self.model.params, settings.lr, settings.betas, 1e-8, settings.weight_decay, decayed)

    def train_step(self, x: Array, y: Array, step: int) -> tuple[float, float]:
        s = self._settings
        if s.warmup_steps:
            self.optimizer.lr = warmup_cosine(step, s.lr, s.warmup_steps, self._total_steps)
        before = self.rng.get_state()
        loss, grads = self.model.loss_and_grads(x, y, rng=self.rng, parts=s.accumulate)
        norm = clip_grad_norm(grads, math.inf if s.clip is None else s.clip)
        try:
            check_finite_step(float(loss), norm, step, self.optimizer.lr)
        except DivergedError:
            self.rng.set_state(before)  # undo drawing the dropout masks: the step did not happen
            raise
        self.optimizer.step(grads)
        return float(loss), self.optimizer.lr

    def loss(self, x: Array, y: Array) -> float:
        return float(self.model.loss(x, y))

    def sample(
        self,
        ids: Array,
        max_new_tokens: int,
        temperature: float = 0.0,
        top_k: int | None = None,
        n_vocab: int | None = None,
    ) -> Array:
        rng = Generator(self._settings.seed)
        return generate(self.model, ids, max_new_tokens, temperature, top_k, rng=rng, n_vocab=n_vocab)

    def shuffled_order(self, windows: int) -> Array | None:
        return self.rng.loader_order(windows)

    def shuffle_seed(self) -> int:
        self.rng.start_loader()
        return int(self.rng.random_())

    def file_order(self, windows: int) -> Array | None:
        self.rng.start_loader()
        return None

    def params(self) -> Params:
        return self.model.params

    def state(self) -> Params:
        return {f"optimizer.{name}": array for name, array in self.optimizer.state().items()} | {
            "rng": self.rng.get_state()
        }

    def restore(self, state: Params) -> None:
        if "rng" not in state:
            raise InputError("the checkpoint has no random state: start from it with --init instead")
        self.rng.set_state(state["rng"])
        prefix = "optimizer."
        self.optimizer.restore({k.removeprefix(prefix): a for k, a in state.items() if k.startswith(prefix)})
