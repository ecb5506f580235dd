"""What a checkpoint must give back, and disks that are full."""

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
    """A tied model, saved and loaded: one table, counted once, and a change of it reaches the head."""
    with tempfile.TemporaryDirectory() as place:
        save(GPT(replace(CONFIG, tie_weights=True)), place)
        model = load(place)
    assert "out_head.weight" not in model.params, "a tied model, loaded: the head has a table of its own"
    tokens = np.array([[1, 2]])
    before = model(tokens)
    # a token that is not in the input: only the head sees it. One feature: equal changes of all of them would cancel,
    # as what the head reads adds up to 0
    model.params["tok_emb.weight"][9, 0] += 1
    changed = np.any(model(tokens) != before, axis=(0, 1))
    assert changed.tolist() == [v == 9 for v in range(11)], "a tied model, loaded: the head does not follow its table"


@contextmanager
def room_for(size):
    """While it is open no file of this process can grow beyond so many bytes, as on a disk that is full."""
    resource = pytest.importorskip("resource")
    before, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
