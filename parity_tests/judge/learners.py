"""Learners stopped and resumed."""

import tempfile

import numpy as np

from numpy_gpt import GPTConfig, load
from numpy_gpt.data import Loader
from numpy_gpt.runs.learner import NumpyLearner
from numpy_gpt.runs.settings import Settings
from numpy_gpt.train import Position, train
from numpy_gpt.weights.checkpoint import load_training, save_params
from parity_tests.judge.compare import check_exact

CONFIG = GPTConfig(vocab_size=13, context_length=6, emb_dim=8, n_heads=2, n_layers=1, drop_rate=0.2)


SETTINGS = Settings(model="tiny", context_length=6, batch_size=2, lr=5e-3, warmup_steps=2, clip=0.5, seed=7)


STEPS = 60
"""The schedule's end: more steps than the state machine makes."""


def small_learner(make=NumpyLearner):
    """A float32 learner after three steps, the last of them within its second epoch."""
    learner = make(CONFIG, SETTINGS, STEPS)
    learner.position = Position()
    advance(learner, 3)
    return learner


def loaders(learner):
    """Four windows, two batches an epoch."""
    rng = np.random.default_rng(5)
    inputs, targets = rng.integers(0, CONFIG.vocab_size, (2, 4, CONFIG.context_length))
    common = {"batch_size": 2, "drop_last": True}
    return (
        Loader(inputs, targets, **common, begin_epoch=learner.shuffled_order),
        Loader(inputs[:2], targets[:2], **common, begin_epoch=learner.file_order),
    )


def advance(learner, steps):
    """Train on, and evaluate after every step: evaluations draw from the stream too."""
    total = learner.position.step + steps
    return [step.loss for step in train(learner, *loaders(learner), total, 1, 1, learner.position)]


def resumed(learner, make=NumpyLearner):
    """The learner a new process restores from a checkpoint."""
    with tempfile.TemporaryDirectory() as place:
        save_params(CONFIG, learner.params(), place, training=learner.state() | learner.position.state())
        model, training = load(place), load_training(place)
    again = make(model.config, SETTINGS, STEPS, model.params)
    again.restore(training)
    again.position = Position.restored(training)
    return again


class Recording(NumpyLearner):
    """A learner that keeps the batches it is trained on."""

    def train_step(self, x, y, step):
        self.__dict__.setdefault("batches", []).append(x.tolist())
        return super().train_step(x, y, step)


def check_resume():
    """Assert that a run resumed within an epoch equals the uninterrupted one in batches, losses and parameters."""
    straight = small_learner(Recording)
    again = resumed(straight, Recording)
    straight.batches.clear()
    want, got = advance(straight, 5), advance(again, 5)
    assert again.batches == straight.batches, f"resumed: batches {again.batches} for {straight.batches}"
    assert got == want, f"resumed: losses {got} for {want}"
    for name, p in straight.params().items():
        check_exact(f"resumed: {name}", again.params()[name], p)
