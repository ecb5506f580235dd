"""Checks of what a checkpoint restores, and a simulated full disk."""

import signal
import tempfile
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import pytest

from numpy_gpt import GPT, GPTConfig, load, save

CONFIG = GPTConfig(vocab_size=11, context_length=6, emb_dim=8, n_heads=2, n_layers=2, drop_rate=0.2)


def check_same_bits(a, b):
    """Assert that two parameter dicts agree in names, their order, dtypes, shapes and every bit."""
    assert list(a) == list(b)
    for name in a:
        assert a[name].dtype == b[name].dtype, name
        assert a[name].shape == b[name].shape, name
        assert a[name].tobytes() == b[name].tobytes(), name


def check_tied():
    """Assert that a tied model, saved and loaded, has one table, and that changing it changes the head."""
    with tempfile.TemporaryDirectory() as place:
        save(GPT(replace(CONFIG, tie_weights=True)), place)
        model = load(place)
    assert "out_head.weight" not in model.params, "a tied model, loaded: the head has a separate table"
    tokens = np.array([[1, 2]])
    before = model(tokens)
    # a token absent from the input, so only the head uses it; one feature, since equal changes of all would cancel:
    # the head's input sums to 0
    model.params["tok_emb.weight"][9, 0] += 1
    changed = np.any(model(tokens) != before, axis=(0, 1))
    assert changed.tolist() == [v == 9 for v in range(11)], "a tied model, loaded: the head does not follow its table"


@contextmanager
def room_for(size):
    """Limit this process's files to `size` bytes within the block, as on a full disk."""
    resource = pytest.importorskip("resource")
    before, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
