"""The training loop: steps, evaluations and epochs in the book's order, whatever backend does the arithmetic."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Protocol

import numpy as np

from numpy_gpt.data import Loader, Order
from numpy_gpt.errors import DivergedError, InputError
from numpy_gpt.random.keyed_order import KeyedOrder
from numpy_gpt.typing import Array, Params

LONGEST_PERMUTATION = 1 << 20
"""Up to this many windows an epoch's order is torch's permutation, held in memory; beyond it, a KeyedOrder.

Every evaluation draws an order too. One of 2^20 windows takes 1.6 s and 0.1 GB, one of 2^24 takes 25 s and 1.5 GB.
"""


class Learner(Protocol):
    """A model in training, its optimiser and its random stream. Losses in nats per token; x, y (B, T) ids."""

    def train_step(self, x: Array, y: Array, step: int) -> tuple[float, float]:
        """One update (the first is step 0) with dropout on: the loss before it, and the learning rate used.

        Raises DivergedError if the loss or the gradients' norm is not finite; the state is then unchanged.
        """

    def loss(self, x: Array, y: Array) -> float:
        """Mean cross-entropy without dropout."""

    def sample(
        self,
        ids: Array,
        max_new_tokens: int,
        temperature: float = 0.0,
        top_k: int | None = None,
        n_vocab: int | None = None,
    ) -> Array:
        """ids (B, T) with new tokens appended: the likeliest, or above temperature 0 drawn from a separate stream.

        That stream has the run's seed. top_k: draw from the k likeliest only; n_vocab: from the ids below it.
        """

    def shuffled_order(self, windows: int) -> Array | None:
        """The order of an epoch's windows; draws the same random numbers as torch's DataLoader(shuffle=True)."""

    def shuffle_seed(self) -> int:
        """The seed of an epoch's order, from 0 to 2^63 - 1; draws the same random numbers as shuffled_order."""

    def file_order(self, windows: int) -> Array | None:
        """None; draws the same random numbers as a DataLoader that does not shuffle."""

    def params(self) -> Params:
        """The parameters, as NumPy arrays under their names."""

    def state(self) -> Params:
        """The rest of the state needed to resume, as arrays: the optimiser's moments and the random stream."""

    def restore(self, state: Params) -> None:
        """The inverse of state. Raises InputError if the state is not of this model."""


def epoch_order(learner: Learner, windows: int) -> Order | None:
    """The order of an epoch's windows on the learner's stream: torch's permutation, or a keyed one beyond 2^20 windows.

    torch's needs every window in memory and in each checkpoint, 8 bytes each; the keyed one only its seed.
    """
    if windows <= LONGEST_PERMUTATION:
        return learner.shuffled_order(windows)
    return KeyedOrder(windows, learner.shuffle_seed())


@dataclass
class Position:
    """Where a run is between two steps. epoch counts from 0; batch is the epoch's next batch.

    order: the order of the epoch's windows, None until it is drawn.
    """

    step: int = 0  # the next step, so the number of steps made
    epoch: int = 0
    batch: int = 0
    tokens_seen: int = 0
    order: Order | None = None

    def state(self) -> Params:
        """The position as arrays, for a checkpoint."""
        counters = np.array([self.step, self.epoch, self.batch, self.tokens_seen], np.int64)
        if isinstance(self.order, KeyedOrder):
            return {"loop.counters": counters, "loop.key": np.array([len(self.order), self.order.seed], np.int64)}
        return {"loop.counters": counters} | ({} if self.order is None else {"loop.order": self.order})

    @classmethod
    def restored(cls, state: Params) -> "Position":
        """The inverse of state. Raises InputError for any other arrays."""
        counters, order, key = (state.get(f"loop.{name}") for name in ("counters", "order", "key"))
        integers = counters is not None and counters.shape == (4,) and counters.dtype.kind in "iu"
        if counters is None or not integers or counters.min() < 0 or counters.max() >= 1 << 62:
            raise InputError("the checkpoint has no valid position of its run: start from it with --init")
        step, epoch, batch, tokens_seen = (int(counter) for counter in counters)
        if order is not None and not _is_permutation(order):
            raise InputError(
                "the checkpoint's order of windows is not a permutation of them: start from it with --init"
            )
        if key is None:
            return cls(step, epoch, batch, tokens_seen, order)
        integers = key.shape == (2,) and key.dtype.kind in "iu"
        if order is not None or not integers or key.min() < 0 or key.max() >= 1 << 63:
            raise InputError("the checkpoint's key of its order of windows is not valid: start from it with --init")
        return cls(step, epoch, batch, tokens_seen, KeyedOrder(*key.tolist()))

    def check_fits(self, windows: int, batches: int) -> None:
        """Raise InputError unless a run with this many windows and batches in an epoch can be at this position."""
        length = None if self.order is None else len(self.order)
        consistent = self.batch < batches and self.step == self.epoch * batches + self.batch
        if not consistent or length not in (windows, None if self.batch == 0 else windows):
            raise InputError(
                f"the checkpoint's run was at batch {self.batch} of epoch {self.epoch}, step {self.step}, in an "
                f"order of {length} windows; its text has {windows} windows in {batches} batches: "
                "start from it with --init"
            )


def _is_permutation(order: Array) -> bool:
    return order.ndim == 1 and order.dtype.kind in "iu" and np.array_equal(np.sort(order), np.arange(len(order)))


@dataclass(frozen=True)
class Evaluation:
    """Losses on batches of both texts, in nats per token, without dropout."""

    train_loss: float
    val_loss: float


@dataclass(frozen=True)
class Step:
    """A completed step. Here epoch counts from 1; epochs is the number done so far, with its fraction."""

    step: int
    epoch: int
    epochs: float
    tokens_seen: int
    loss: float
    lr: float
    evaluation: Evaluation | None
    epoch_ended: bool


def check_finite_step(loss: float, norm: float, step: int, lr: float) -> None:
    """Raise DivergedError unless the loss of a step and the norm of its gradients are finite."""
    for quantity, value in (("loss", loss), ("gradients' norm", norm)):
        if not math.isfinite(value):
            raise DivergedError(
                f"training has diverged: in step {step} the {quantity} is {value} (learning rate {lr:.6g})"
            )


def loader_loss(learner: Learner, loader: Loader, num_batches: int | None = None) -> float:
    """The mean loss of the loader's first num_batches batches (None: all), equally weighted."""
    losses = [learner.loss(x, y) for x, y in islice(loader, num_batches)]
    return sum(losses) / len(losses)


def undrawn_loss(learner: Learner, loader: Loader, num_batches: int) -> float:
    """The mean loss of the loader's first num_batches batches in text order, drawing no random numbers.

    A save can therefore call it without changing the rest of the run.
    """
    losses = [learner.loss(x, y) for x, y in islice(loader.batches(None), num_batches)]
    return sum(losses) / len(losses)


def train(
    learner: Learner,
    train_loader: Loader,
    val_loader: Loader,
    total_steps: int,
    eval_freq: int,
    eval_iter: int,
    position: Position,
) -> Iterator[Step]:
    """Train from position up to total_steps steps, yielding each step once it and its evaluation are done.

    After steps 0, eval_freq, 2 · eval_freq, … both loaders' losses are taken over eval_iter batches. For this the
    shuffled train loader draws a new order from the same random stream, as in the book. Between two steps a checkpoint
    needs only position and the learner's state: a run restored from them continues as if it had never stopped.
    """
    while position.step < total_steps:
        if position.batch == 0 and position.order is None:
            position.order = train_loader.begin_epoch(train_loader.windows)
        for x, y in train_loader.batches(position.order, position.batch):
            step, epoch = position.step, position.epoch + 1
            loss, lr = learner.train_step(x, y, step)
            position.step += 1
            position.batch += 1
            position.tokens_seen += x.size
            evaluation = None
            if step % eval_freq == 0:
                train_loss = loader_loss(learner, train_loader, eval_iter)
                evaluation = Evaluation(train_loss, loader_loss(learner, val_loader, eval_iter))
            epochs = position.step / len(train_loader)
            ended = position.batch == len(train_loader)
            if ended:
                position.epoch, position.batch, position.order = epoch, 0, None
            yield Step(step, epoch, epochs, position.tokens_seen, loss, lr, evaluation, ended)
            if ended or position.step >= total_steps:
                break
