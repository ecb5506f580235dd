"""The training loop: steps, evaluations and epochs in the book's order, whatever backend does the arithmetic."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Protocol

import numpy as np

from numpy_gpt.data import Loader
from numpy_gpt.errors import DivergedError, InputError
from numpy_gpt.typing import Array, Params


class Learner(Protocol):
    """A model in training with its optimiser and its random stream. Losses are in nats per token; x, y (B, T) ids."""

    def train_step(self, x: Array, y: Array, step: int) -> tuple[float, float]:
        """One update (step = 0 is the first) with dropout on: the loss before it, and the learning rate used.

        Raises DivergedError if the loss or the gradients' norm is not finite; the state is then that before the step.
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
        """ids (B, T) with new tokens appended: the likeliest, or above temperature 0 drawn by a stream of their own.

        top_k: drawn among the k likeliest only; n_vocab: among the ids below it. The stream is that of the run's seed.
        """

    def shuffled_order(self, windows: int) -> Array | None:
        """The order of an epoch's windows, at the cost in random numbers of torch's DataLoader(shuffle=True)."""

    def file_order(self, windows: int) -> Array | None:
        """None, at the cost in random numbers of a DataLoader that does not shuffle."""

    def params(self) -> Params:
        """The parameters, as NumPy arrays under their names."""

    def state(self) -> Params:
        """What else it takes to go on: the optimiser's moments and the random stream, as arrays."""

    def restore(self, state: Params) -> None:
        """Take up a state again. Raises InputError if it is not one of this model."""


@dataclass
class Position:
    """Where a run stands, between two steps. epoch counts from 0; batch is the next one of the epoch.

    order: that of the epoch's windows, None until it has been drawn.
    """

    step: int = 0  # the next one; equal to the number of steps made
    epoch: int = 0
    batch: int = 0
    tokens_seen: int = 0
    order: Array | None = None

    def state(self) -> Params:
        """As arrays, for a checkpoint."""
        counters = np.array([self.step, self.epoch, self.batch, self.tokens_seen], np.int64)
        return {"loop.counters": counters} | ({} if self.order is None else {"loop.order": self.order})

    @classmethod
    def restored(cls, state: Params) -> "Position":
        """The inverse of state. Raises InputError if it holds something else."""
        counters, order = state.get("loop.counters"), state.get("loop.order")
        whole = counters is not None and counters.shape == (4,) and counters.dtype.kind in "iu"
        if counters is None or not whole or counters.min() < 0 or counters.max() >= 1 << 62:
            raise InputError("the checkpoint does not say where its run stood: start from it with --init")
        step, epoch, batch, tokens_seen = (int(each) for each in counters)
        if order is not None and not _is_permutation(order):
            raise InputError(
                "the checkpoint's order of windows does not name each of them once: start from it with --init"
            )
        return cls(step, epoch, batch, tokens_seen, order)

    def check_fits(self, windows: int, batches: int) -> None:
        """Raise InputError unless a run whose epoch has so many windows, in so many batches, can stand here."""
        length = None if self.order is None else len(self.order)
        whole = self.batch < batches and self.step == self.epoch * batches + self.batch
        if not whole or length not in (windows, None if self.batch == 0 else windows):
            raise InputError(
                f"the checkpoint's run stood at batch {self.batch} of epoch {self.epoch}, step {self.step}, in an "
                f"order of {length} windows; its text has {windows} windows in {batches} batches: "
                "start from it with --init"
            )


def _is_permutation(order: Array) -> bool:
    return order.ndim == 1 and order.dtype.kind in "iu" and np.array_equal(np.sort(order), np.arange(len(order)))


@dataclass(frozen=True)
class Evaluation:
    """Losses in nats per token on batches of either text, without dropout."""

    train_loss: float
    val_loss: float


@dataclass(frozen=True)
class Step:
    """One step made. epoch counts from 1 here; epochs is the fraction of them that is done."""

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
    for what, value in (("loss", loss), ("gradients' norm", norm)):
        if not math.isfinite(value):
            raise DivergedError(f"training has diverged: in step {step} the {what} is {value} (learning rate {lr:.6g})")


def loader_loss(learner: Learner, loader: Loader, num_batches: int | None = None) -> float:
    """The mean of the losses of the loader's first num_batches batches (None: all), each counting the same."""
    losses = [learner.loss(x, y) for x, y in islice(loader, num_batches)]
    return sum(losses) / len(losses)


def undrawn_loss(learner: Learner, loader: Loader, num_batches: int) -> float:
    """The mean over the loader's first num_batches batches in the order of the text, without a draw from any stream.

    So a save may ask for it, and the run goes on as if it had not.
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
    """Train from position up to total_steps steps, and yield each when all that belongs to it is done.

    After steps 0, eval_freq, 2 · eval_freq, … the losses of eval_iter batches of both loaders are taken; the shuffled
    train loader draws a new order for it from the same random stream, as the book's does. Between two steps position
    and the learner's state are what a checkpoint needs: a run restored from them goes on as if it had never stopped.
    """
    while position.step < total_steps:
        if position.batch == 0 and position.order is None:
            position.order = train_loader.begin_epoch(len(train_loader.inputs))
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
