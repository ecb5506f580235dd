"""Train, evaluate, generate, save, load and resume in any order, with torch doing the same on its own streams.

Each side has one float64 model from the same seed, and draws its own dropout masks, batch orders and tokens. After
every rule the two must agree within budgets derived from the run so far. Saves must load bit for bit, and evaluating or
sampling must not change the training state.
"""

import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, precondition, rule

from numpy_gpt import load
from numpy_gpt.runs.learner import NumpyLearner
from numpy_gpt.train import Position
from numpy_gpt.weights.checkpoint import load_params, load_training, save_params
from parity_tests.judge import compare
from parity_tests.judge.compare import check, check_exact
from parity_tests.judge.learners import CONFIG, SETTINGS, STEPS, check_resume
from parity_tests.judge.strategies import ModelCase, repeated_ids
from parity_tests.judge.training import TrajectoryBudget
from torch_gpt.train import TorchLearner


def bits(arrays):
    return {name: array.tobytes() for name, array in arrays.items()}


# Resuming


def test_resumed_learner_equals_the_uninterrupted_one():
    check_resume()


# The machine


class Training(RuleBasedStateMachine):
    """NumPy and torch in parallel, through every operation on a model."""

    saved = Bundle("saved")

    @initialize(
        seed=st.integers(0, 2**32), tied=st.booleans(), bias=st.booleans(), drop_rate=st.sampled_from((0.0, 0.3))
    )
    def begin(self, seed, tied, bias, drop_rate):
        self.place = tempfile.TemporaryDirectory()
        self.config = replace(CONFIG, tie_weights=tied, qkv_bias=bias, drop_rate=drop_rate)
        self.settings = replace(SETTINGS, seed=seed)
        self.params = ModelCase(self.config, scale=0.3, seed=seed).params()
        self.ours = NumpyLearner(self.config, self.settings, STEPS, {name: p.copy() for name, p in self.params.items()})
        self.torchs = self.torch_learner(self.params)
        self.stream = torch.get_rng_state()
        self.step, self.budget = 0, TrajectoryBudget(self.params)
        self.files = 0

    def torch_learner(self, params):
        device = torch.device("cpu")
        return TorchLearner(
            self.config, self.settings, STEPS, params, device=device, dtype="float64", attention="plain"
        )

    def batch(self, seed):
        rng = np.random.default_rng(seed)
        shape = (2, self.config.context_length)
        return repeated_ids(rng, self.config.vocab_size, shape), repeated_ids(rng, self.config.vocab_size, shape)

    def both(self, use):
        """use(learner) for both; torch's stream is global, so it is restored before and saved after."""
        torch.set_rng_state(self.stream)
        answers = use(self.ours), use(self.torchs)
        self.stream = torch.get_rng_state()
        return answers

    def check_loss(self, name, got, want):
        check(name, np.float64(got), np.float64(want), max(want, 1.0), compare.MODEL)

    @precondition(lambda self: self.step < STEPS)
    @rule(seed=st.integers(0, 99))
    def train(self, seed):
        (got, lr), (want, rate) = self.both(lambda learner: learner.train_step(*self.batch(seed), self.step))
        self.check_loss("machine: loss of a step", got, want)
        check("machine: learning rate", np.float64(lr), np.float64(rate), rate)
        self.budget.step(self.torchs.model, self.torchs.optimizer)
        self.step += 1

    @rule(seed=st.integers(0, 99))
    def evaluate(self, seed):
        before = bits(self.ours.state())
        self.check_loss("machine: loss", *self.both(lambda learner: learner.loss(*self.batch(seed))))
        assert bits(self.ours.state()) == before, "an evaluation changed the training state"

    @rule(seed=st.integers(0, 99), temperature=st.sampled_from((0.0, 0.7)), top_k=st.sampled_from((None, 3)))
    def generate(self, seed, temperature, top_k):
        before, prompt = bits(self.ours.state()), self.batch(seed)[0][:1, :3]
        got, want = self.both(lambda learner: learner.sample(prompt, 6, temperature, top_k))
        assert got.tolist() == want.tolist(), f"machine: generated {got.tolist()} for {want.tolist()}"
        assert bits(self.ours.state()) == before, "generating changed the training state"

    @rule()
    def begin_epoch(self):
        got, want = self.both(lambda learner: learner.shuffled_order(9))
        assert got.tolist() == want.tolist(), "machine: the order of an epoch"

    @rule(target=saved)
    def save(self):
        self.files += 1
        path = Path(self.place.name) / str(self.files)
        training = self.ours.state() | Position(self.step).state()
        save_params(self.config, self.ours.params(), path, training=training)
        torch.set_rng_state(self.stream)
        theirs = (self.torchs.params(), self.torchs.state())
        return path, bits(self.ours.params()), bits(training), theirs, self.budget.copy()

    @rule(checkpoint=saved, seed=st.integers(0, 99))
    def load(self, checkpoint, seed):
        path, params, *_ = checkpoint
        model, (tokens, _) = load(path), self.batch(seed)
        assert bits(model.params) == params, "the loaded parameters differ from the saved ones"
        if bits(self.ours.params()) == params:
            check_exact("machine: logits of the loaded model", model(tokens), self.ours.model(tokens))

    @rule(checkpoint=consumes(saved))
    def resume(self, checkpoint):
        path, params, training, (their_params, their_state), budget = checkpoint
        config, arrays = load_params(path)
        state = load_training(path)
        assert config == self.config
        self.ours = NumpyLearner(config, self.settings, STEPS, arrays)
        self.ours.restore(state)
        self.step = Position.restored(state).step
        assert bits(self.ours.params()) == params
        assert bits(self.ours.state() | Position(self.step).state()) == training, (
            "the restored training state differs from the saved one"
        )
        self.torchs = self.torch_learner(their_params)
        self.torchs.restore(their_state)
        self.stream, self.budget = torch.get_rng_state(), budget.copy()

    @invariant()
    def the_two_agree(self):
        if not hasattr(self, "ours"):
            return
        self.budget.check("machine:", self.ours.params(), self.torchs.params())
        check_exact("machine: random state", self.ours.rng.get_state(), self.stream.numpy())

    def teardown(self):
        if hasattr(self, "place"):
            self.place.cleanup()


TestTraining = Training.TestCase
TestTraining.settings = settings(max_examples=30, stateful_step_count=25)
