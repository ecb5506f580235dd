"""The benchmarks measure what they say: the same work on both sides, and not before both agree."""

import numpy as np
import pytest
import torch

from benchmarks.streams import Case, cases, mask_shapes, measure
from numpy_gpt import GPTConfig

SMALL = GPTConfig(vocab_size=60, context_length=8, emb_dim=16, n_heads=2, n_layers=2, drop_rate=0.1)


def test_streams_are_the_same_work():
    for case in cases(SMALL, B=2):
        assert len(measure(case, pairs=2)) == 2
    assert len(list(cases(SMALL, B=2))) == 3


def test_masks_are_those_of_a_step():
    """18 times the probabilities' worth in the book's run."""
    sizes = [np.prod(shape) for shape in mask_shapes(GPTConfig(), B=2)]
    assert len(sizes) == 37
    assert round(sum(sizes) / (2 * 12 * 256 * 256)) == 18


def test_other_bits_are_not_timed():
    wrong = Case("wrong", lambda rng: [rng.uniform((4,), 0, 1)], lambda: [torch.rand(4) + 1])
    with pytest.raises(AssertionError, match="other bits"):
        measure(wrong, pairs=1)
    short = Case("short", lambda rng: [], lambda: [torch.rand(4)])
    with pytest.raises(AssertionError, match="0 arrays"):
        measure(short, pairs=1)
