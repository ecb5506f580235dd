"""The model against torch: logits, loss and every gradient by name, in float64 and in float32.

museum.py's faults must make check_model fail.
"""

import copy
import math
import pickle
import re
import tracemalloc
from dataclasses import replace
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.errors import Unsatisfiable

import torch_gpt.model
from numpy_gpt import GPT, AdamW, Generator, GPTConfig, block
from numpy_gpt.block import KVCache
from numpy_gpt.errors import InputError
from numpy_gpt.model import HEAD_ROWS, checked_ids
from numpy_gpt.parallel.threads import in_blocks, thread_count
from numpy_gpt.parameters import MOST_LAYERS, QKV, check_possible, check_shapes, join, parameter_count, parameter_shapes
from parity_tests import profiles
from parity_tests.judge import compare, strategies
from parity_tests.judge.compare import check, check_exact
from parity_tests.judge.models import (
    DROP_RATES,
    SMALL,
    VARIANTS,
    RecordedMasks,
    check_float32,
    check_gradients,
    check_model,
    check_own_masks,
    check_parts,
    float32_case,
    float32_percentiles,
    torch_answers,
)
from parity_tests.judge.strategies import ModelCase
from torch_gpt.model import GPTModel, from_params, loss_and_grads, to_params


@pytest.mark.parametrize("attention", ["plain", "sdpa"])
@pytest.mark.parametrize(("tied", "bias"), VARIANTS)
def test_model_matches_torch(tied, bias, attention):
    @settings(max_examples=25)
    @given(case=strategies.model_cases(tie_weights=tied, qkv_bias=bias))
    @example(ModelCase(GPTConfig(2, 1, 4, 2, 1, 0.0, qkv_bias=bias, tie_weights=tied), B=1, T=1))
    def holds(case):
        check_model(case, attention)

    holds()


@pytest.mark.parametrize(("tied", "bias"), VARIANTS)
def test_model_matches_torch_with_dropout(tied, bias):
    @settings(max_examples=25)
    @given(case=strategies.model_cases(tie_weights=tied, qkv_bias=bias, drop_rates=DROP_RATES))
    def holds(case):
        check_model(case)

    holds()


@pytest.mark.slow
@settings(max_examples=1000)
@given(case=strategies.model_cases(drop_rates=(0.0, *DROP_RATES)))
def test_model_matches_torch_over_many_cases(case):
    check_model(case)


@settings(max_examples=60)
@given(case=strategies.model_cases(drop_rates=(0.0, 0.5), fills=strategies.MODEL_FILLS[1:]))
@example(ModelCase(GPTConfig(2, 2, 9, 3, 2, 0.0), B=1, T=2, scale=2.13, seed=0, fill="constant rows"))
def test_model_matches_torch_at_extremes(case):
    """Constant rows, and logits of ±1e4 and 1e-30."""
    check_model(case)


@pytest.mark.slow
@settings(max_examples=500)
@given(case=strategies.model_cases(drop_rates=(0.0, 0.5), fills=strategies.MODEL_FILLS[1:]))
def test_model_matches_torch_at_extremes_in_many_cases(case):
    check_model(case)


def test_only_cancelling_batches_are_rejected():
    alike = ModelCase(GPTConfig(2, 1, 4, 1, 1, 0.0), B=2, T=1, scale=0.01, seed=254, fill="tiny logits")
    with pytest.raises(Unsatisfiable):  # token 0 twice, followed once by 0 and once by 1
        given(st.just(alike))(lambda case: check_model(case))()
    tied = ModelCase(GPTConfig(2, 3, 4, 1, 2, 0.0, tie_weights=True), 2, 2, scale=0.01, seed=57, fill="constant rows")
    with pytest.raises(Unsatisfiable):
        given(st.just(tied))(lambda case: check_model(case))()
    check_model(replace(tied, B=3))
    check_model(replace(alike, B=3))
    check_model(replace(alike, fill="normal", seed=0, scale=1.0))


@pytest.mark.parametrize("drop_rate", [0.0, 0.1])
def test_thread_count_changes_only_rounding(drop_rate):
    """Run BLAS and torch on one thread and on all; both results stay within the budget of torch's."""
    config = GPTConfig(700, 128, 96, 3, 2, drop_rate)
    for threads in (1, profiles.ALL_THREADS):
        with profiles.threads(threads):
            assert (torch.get_num_threads(), thread_count()) == (threads, threads)
            check_model(ModelCase(config, B=4, T=128, scale=0.2))


@pytest.mark.parametrize("drop_rate", [0.0, 0.1])
@pytest.mark.parametrize(("T", "tied"), [(128, True), (150, False)])
def test_longer_contexts_match_torch(T, tied, drop_rate):
    """Contexts long enough for several blocks of rows."""
    config = GPTConfig(301, T, 48, 3, 2, drop_rate, qkv_bias=tied, tie_weights=tied)
    check_model(ModelCase(config, B=3, T=T, scale=0.2))


@settings(max_examples=60)
@given(case=strategies.model_cases(drop_rates=(0.0, 0.3)), head_rows=st.sampled_from((1, 3)))
def test_uneven_blocks_match_torch(case, head_rows):
    """Run the head, attention and the loops between the products in blocks of a few rows or numbers."""
    with (
        mock.patch("numpy_gpt.model.HEAD_ROWS", head_rows),
        mock.patch("numpy_gpt.ops.attention.ROWS", 2),
        mock.patch("numpy_gpt.parallel.threads.BLOCK", 16),
    ):
        check_model(case)


@settings(max_examples=60)
@given(
    case=strategies.model_cases(drop_rates=(0.0, 0.5, 1.0)),
    parts=st.integers(1, 4),
    head_rows=st.sampled_from((2, 256)),
)
def test_batch_in_parts_matches_torchs_batch(case, parts, head_rows):
    """Gradient accumulation. Two passes: the second must not add to what the first left in the buffers."""
    case = replace(case, B=parts * min(case.B, 2))
    with mock.patch("numpy_gpt.model.HEAD_ROWS", head_rows):
        check_parts(case, parts)
        model, batch = case.model(), case.batch()
        _, first = model.loss_and_grads(*batch, parts=parts)
        first = {name: grad.copy() for name, grad in first.items()}
        for name, grad in model.loss_and_grads(*batch, parts=parts)[1].items():
            check_exact(f"d {name} again", grad, first[name])


def test_batch_in_parts_takes_the_memory_of_a_part():
    """Activations dominate here: 8 rows take 3.5 times the memory of 2."""
    case = ModelCase(GPTConfig(300, 64, 48, 3, 2, 0.1), B=8, T=64, dtype="float32")
    peaks = {}
    for B, parts in ((2, 1), (8, 4), (8, 1)):
        model, (tokens, targets) = case.model(), replace(case, B=B).batch()
        tracemalloc.start()
        model.loss_and_grads(tokens, targets, Generator(1), parts=parts)
        peaks[B, parts] = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peaks[8, 4] < 1.05 * peaks[2, 1] < 0.5 * peaks[8, 1]


@pytest.mark.parametrize("parts", [0, -1, 3, 5])
def test_parts_that_do_not_divide_a_batch_are_refused(parts):
    case = ModelCase(SMALL, B=4)
    with pytest.raises(InputError, match=f"^a batch of 4 cannot be split into {parts} equal parts: choose a divisor$"):
        case.model().loss_and_grads(*case.batch(), parts=parts)


@pytest.mark.parametrize("how", ["another dtype's memory", "in another order", "one elsewhere", "transposed"])
def test_replaced_queries_keys_and_values_match_torch(how):
    """They are one product only if they are parts of one array; replaced arrays are used correctly either way."""
    case = ModelCase(SMALL, scale=0.5)
    model, names = case.model(), [f"trf_blocks.1.att.{name}.weight" for name in QKV]
    C = SMALL.emb_dim
    memory = np.concatenate([model.params[name] * 2 for name in names])
    if how == "another dtype's memory":
        memory = memory.view(np.int64).copy().view(np.float64)
        assert memory.base.dtype == np.int64
    parts = np.split(memory, 3)
    if how == "in another order":
        parts = parts[::-1]
    elif how == "one elsewhere":
        parts[1] = parts[1].copy()
    elif how == "transposed":
        parts = [part.T for part in parts]
    assert parts[0].shape == (C, C)
    model.params |= dict(zip(names, parts, strict=True))
    tokens, targets = case.batch()
    want, want_grads = loss_and_grads(from_params(SMALL, model.params), tokens, targets)
    loss, grads = model.loss_and_grads(tokens, targets)
    check("loss", loss, np.asarray(want), 10.0, compare.MODEL)
    check_gradients(grads, want_grads)


def test_float32_is_no_worse_than_torch():
    check_float32(
        [float32_case(i) for i in range(128)]
    )  # at least 64 of each kind: half of the cases have biases, half heads


def test_float32_with_weights_of_scale_3_is_reported():
    """Such models amplify rounding at random, in torch too, so the ratio is only reported."""
    percentiles = float32_percentiles([float32_case(i, scale=3.0) for i in range(24)])
    for name, value in percentiles.items():
        compare.record("whole model, float32, weights of scale 3: the same, reported only", name, value)
    assert all(math.isfinite(value) for value in percentiles.values()), percentiles


def test_float64_errors_of_each_tensor_are_reported():
    """The asserted budget uses the model's G; this also reports every tensor's error relative to its own size."""
    title = "whole model, float64: error / (64 eps max|this tensor|), reported only"
    for i in range(24):
        case = replace(float32_case(i), dtype="float64")
        want = torch_answers(case, "plain", torch.float64)
        grads = case.model().loss_and_grads(*case.batch())[1]
        check_gradients(grads, {name[2:]: answer for name, answer in want.items() if name.startswith("d ")})
        for name, grad in grads.items():
            if not name.endswith("W_key.bias"):  # rounding only
                error, size = np.abs(grad - want[f"d {name}"]).max(), np.abs(want[f"d {name}"]).max()
                compare.record(title, f"d {name}", float(error / (64 * np.finfo(np.float64).eps * size)))


@pytest.mark.parametrize("attention", ["plain", "sdpa"])
@settings(max_examples=40)
@given(case=strategies.model_cases(drop_rates=(0.1,)))
def test_seeded_dropout_matches_torch(attention, case):
    check_own_masks(case, attention)


@pytest.mark.slow
@settings(max_examples=1000)
@given(case=strategies.model_cases(drop_rates=DROP_RATES))
def test_seeded_dropout_matches_torch_in_many_cases(case):
    check_own_masks(case, "plain")


def test_float32_with_dropout_is_no_worse_than_torch():
    """NumPy, torch with plain attention, torch with sdpa, and float64 torch each draw their own masks."""
    check_float32([float32_case(i, drop_rate=0.1) for i in range(128)], "dropout 0.1 with own masks")


SITES = ("attention probabilities", "attention branch", "feed-forward branch")


def torch_masks(case):
    """(site, factors) of every dropout, in order of use: its output for ones after manual_seed(case.seed)."""
    reference, masks = from_params(case.config, case.params(), attention="plain").train(), []
    for module in reference.modules():
        if isinstance(module, torch_gpt.model.Dropout):
            module.register_forward_pre_hook(lambda module, args: torch.ones_like(args[0]))
            module.register_forward_hook(lambda module, args, y: masks.append(y.numpy()))
    torch.manual_seed(case.seed)
    with torch.no_grad():
        reference(torch.from_numpy(case.batch()[0]))
    sites = ["embeddings"] + [f"block {i}, {site}" for i in range(case.config.n_layers) for site in SITES]
    return list(zip(sites, masks, strict=True))


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@given(
    case=strategies.model_cases(drop_rates=(*DROP_RATES, 0.09, 0.42))
)  # rates where factor · 1 / (1 − rate) and division differ
def test_masks_of_every_site_match_torch(dtype, case):
    """Bit for bit, including the division by 1 − rate; after the pass the stream's state equals torch's."""
    case, masks = replace(case, dtype=dtype), []

    class Recorded(block.Dropout):
        def mask(self, shape):
            masks.append(super().mask(shape))
            return masks[-1]

    rng = Generator(case.seed)
    with mock.patch("numpy_gpt.model.Dropout", Recorded):
        case.model().loss_and_grads(*case.batch(), rng)
    want = torch_masks(case)
    assert len(masks) == len(want)
    for (site, factors), mask in zip(want, masks, strict=True):
        check_exact(f"mask of {site}", mask, factors)
    check_exact("state after the pass", rng.get_state(), torch.get_rng_state().numpy())


@pytest.mark.parametrize("scalar", [np.float32, np.float64])
def test_numpy_scalar_rate_equals_python_float(scalar):
    rate = scalar(0.42)
    got = block.Dropout(rate, Generator(1), np.float32).mask((1000,))
    torch.manual_seed(1)
    check_exact("mask", got, torch.nn.functional.dropout(torch.ones(1000), float(rate)).numpy())


def test_dropout_is_off_without_rng_and_with_rate_0():
    dropped = ModelCase(replace(SMALL, drop_rate=0.5))
    tokens, targets = dropped.batch()
    model, plain = dropped.model(), replace(dropped, config=SMALL).model()
    check_exact("logits", model(tokens), plain(tokens))
    check_exact("loss", model.loss(tokens, targets), plain.loss(tokens, targets))
    loss, _ = model.loss_and_grads(tokens, targets)
    check_exact("loss with gradients", loss, plain.loss(tokens, targets))
    assert model.loss_and_grads(tokens, targets, Generator(1))[0] != loss
    unused = RecordedMasks(0)
    assert plain.loss_and_grads(tokens, targets, unused)[0] == plain.loss(tokens, targets)
    assert unused.drawn == [], "rate 0 draws nothing"


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize(
    "config",
    [
        SMALL,
        GPTConfig(vocab_size=50, context_length=8, emb_dim=16, n_heads=4, n_layers=2),
        GPTConfig(vocab_size=37, context_length=5, emb_dim=7, n_heads=1, n_layers=1, tie_weights=True),
        GPTConfig(vocab_size=13, context_length=3, emb_dim=15, n_heads=5, n_layers=3, qkv_bias=True, tie_weights=True),
        GPTConfig(vocab_size=3, context_length=5, emb_dim=3, n_heads=3, n_layers=1),  # tables of 9 and 15 numbers
        GPTConfig(vocab_size=2, context_length=1, emb_dim=1, n_heads=1, n_layers=2, qkv_bias=True),
        GPTConfig(vocab_size=400, context_length=64, emb_dim=96, n_heads=6, n_layers=2),
    ],
)
def test_initial_parameters_match_torch_exactly(config, dtype):
    torch.manual_seed(123)
    want = to_params(GPTModel(config))
    model = GPT(config, seed=123, dtype=dtype)
    assert list(model.params) == list(want)
    assert model.dtype == dtype
    for name, array in want.items():
        check_exact(name, model.params[name], array.astype(dtype))


def test_generator_as_seed_continues_its_stream():
    torch.manual_seed(7)
    rng = Generator(7)
    for _ in range(2):
        want, got = to_params(GPTModel(SMALL)), GPT(SMALL, seed=rng).params
        for name, array in want.items():
            check_exact(name, got[name], array)


@pytest.mark.parametrize(("tied", "bias"), VARIANTS)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_parameters_round_trip_through_torch(tied, bias, dtype):
    case = ModelCase(replace(SMALL, tie_weights=tied, qkv_bias=bias), dtype=dtype)
    params = case.params()
    reference = from_params(case.config, params)
    back = to_params(reference)
    assert list(back) == list(params) == list(parameter_shapes(case.config))
    for name, array in params.items():
        check_exact(name, back[name], array)
        back[name] += 1
        check_exact(f"torch's {name}, after its copy changed", to_params(reference)[name], array)


@pytest.mark.parametrize(("tied", "bias"), VARIANTS)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("drop_rate", [0.1, 1.0])
def test_gradients_have_the_parameters_names_shapes_and_dtype(tied, bias, dtype, drop_rate):
    case = ModelCase(replace(SMALL, tie_weights=tied, qkv_bias=bias, drop_rate=drop_rate), dtype=dtype)
    model = case.model()
    loss, grads = model.loss_and_grads(*case.batch(), Generator(0))
    assert list(grads) == list(model.params)
    assert {name: (g.shape, g.dtype) for name, g in grads.items()} == {
        name: (p.shape, p.dtype) for name, p in model.params.items()
    }
    assert not any(np.shares_memory(grads[name], p) for name, p in model.params.items())
    assert np.asarray(loss).dtype == model.loss(*case.batch()).dtype == model(case.batch()[0]).dtype == dtype
    assert np.asarray(loss).shape == ()


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_second_call_does_not_overwrite_the_first(dtype):
    """Logits belong to the caller; a repeated pass over the same batch gives the same numbers despite reused memory."""
    case = ModelCase(SMALL, dtype=dtype)
    model, (tokens, targets) = case.model(), case.batch()
    logits = model(tokens)
    kept = logits.copy()
    loss, grads = model.loss_and_grads(tokens, targets)
    first = {name: grad.copy() for name, grad in grads.items()}
    other = np.flip(tokens, axis=1)
    model(other)
    model.loss_and_grads(other, targets)
    check_exact("logits", logits, kept)
    again, grads = model.loss_and_grads(tokens, targets)
    check_exact("loss", again, loss)
    for name, grad in grads.items():
        check_exact(f"d {name}", grad, first[name])


@pytest.mark.parametrize("tied", [False, True])
def test_matrix_gradients_reuse_their_memory(tied):
    """The system clears fresh memory first, which at GPT-2's size costs more than the products."""
    case = ModelCase(replace(SMALL, tie_weights=tied))
    model, (tokens, targets) = case.model(), case.batch()
    (_, first), (_, second) = (model.loss_and_grads(tokens, targets) for _ in range(2))
    for name in model.params:
        if name.endswith("weight") and name != "pos_emb.weight":
            assert np.shares_memory(first[name], second[name]), name


def test_table_gradient_is_cleared_in_blocks_of_numbers(monkeypatch):
    """Not in blocks of rows: one block could then cover a table of 100 million numbers."""
    seen = []

    def watched(work, *arrays):
        seen.extend(a.size for a in arrays)
        in_blocks(work, *arrays)

    monkeypatch.setattr("numpy_gpt.model.in_blocks", watched)
    case = ModelCase(SMALL)
    case.model().loss_and_grads(*case.batch())
    assert seen == [SMALL.vocab_size * SMALL.emb_dim]


def test_queries_keys_and_values_are_one_product(monkeypatch):
    """Their weights are parts of one array, as are their gradients: a pass never concatenates them."""
    case = ModelCase(SMALL)
    model = case.model()
    model.loss_and_grads(*case.batch())  # makes the buffers
    joined, concatenate = [], np.concatenate

    def watched(arrays, *args, **kwargs):
        joined.append(arrays[0].shape)
        return concatenate(arrays, *args, **kwargs)

    monkeypatch.setattr(np, "concatenate", watched)
    _, grads = model.loss_and_grads(*case.batch())
    C = SMALL.emb_dim
    assert (C, C) not in joined
    for arrays in (model.params, grads):
        q, k, v = (arrays[f"trf_blocks.1.att.{name}.weight"] for name in QKV)
        assert [third.ctypes.data - q.ctypes.data for third in (k, v)] == [q.nbytes, 2 * q.nbytes]


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model)), copy.copy])
def test_copied_model_follows_its_own_parameters(copied):
    case = ModelCase(SMALL)
    original = case.model()
    original.loss_and_grads(*case.batch())
    model = copied(original)
    name = "trf_blocks.1.att.W_key.weight"
    model.params[name] *= 2
    params = case.params()
    params[name] *= 2
    want = GPT.from_params(SMALL, params)
    check_exact("logits", model(case.batch()[0]), want(case.batch()[0]))
    grads = want.loss_and_grads(*case.batch())[1]
    for name, grad in model.loss_and_grads(*case.batch())[1].items():
        check_exact(f"d {name}", grad, grads[name])
    shared = copied is copy.copy
    assert all((model.params[n] is a) == shared for n, a in original.params.items())


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))])
def test_a_model_copied_with_its_optimiser_is_trained_by_it(copied):
    case = ModelCase(SMALL)
    model = case.model()
    pairs = [(model, AdamW(model.params))]
    pairs.append(copied(pairs[0]))
    for model, optimiser in pairs:
        optimiser.step(model.loss_and_grads(*case.batch())[1])
    for name, array in pairs[0][0].params.items():
        check_exact(name, pairs[1][0].params[name], array)
        assert (array != case.params()[name]).any(), name


def test_a_pickle_holds_the_parameters_alone():
    """Not the buffers of a training step, nor a second copy of the attention's weights."""
    config = GPTConfig(100, 32, emb_dim=64, n_heads=4, n_layers=2, drop_rate=0.0)
    model = GPT(config)
    model.loss_and_grads([[1, 2]], [[2, 3]])
    assert len(pickle.dumps(model)) < 1.05 * sum(array.nbytes for array in model.params.values())


def test_block_backward_allocates_missing_gradients():
    """If given arrays for the weights' gradients, it writes into them; the numbers are the same."""
    case, first = ModelCase(SMALL), "trf_blocks.0."
    p = join({name.removeprefix(first): a for name, a in case.params().items() if name.startswith(first)})
    x, dy = np.random.default_rng(0).standard_normal((2, 2, 5, SMALL.emb_dim))
    given_ = {name: np.full_like(a, np.nan) for name, a in p.items() if name.endswith("weight")}
    new, own = {}, dict(given_)
    for grads in (new, own):
        _, c = block.block_forward(x, p, SMALL.n_heads, block.Dropout(0.0, None, np.float64), None, 0)
        block.block_backward(dy, c, grads)
        assert set(grads) == set(p)
    for name, grad in new.items():
        check_exact(f"d {name}", own[name], grad)
    assert all(own[name] is a for name, a in given_.items())


@pytest.mark.parametrize("T", [256, 600])
@pytest.mark.parametrize("call", ["loss", "loss_and_grads"])
def test_head_holds_256_rows_of_logits_at_a_time(call, T):
    """And one array for them: logits, exp and d logits share memory."""
    case = ModelCase(GPTConfig(6000, T, 4, 1, 1, 0.0), B=1, T=T, dtype="float32")
    model, batch = case.model(), case.batch()
    getattr(model, call)(*batch)
    tracemalloc.start()
    getattr(model, call)(*batch)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1.5 * HEAD_ROWS * 6000 * 4


@pytest.mark.parametrize("name", parameter_shapes(SMALL))
def test_writing_into_a_parameter_changes_the_model(name):
    case = ModelCase(SMALL, B=3, T=6)
    model, (tokens, targets) = case.model(), case.batch()
    tokens[0, 0] = 0
    before, _ = model(tokens), model.loss_and_grads(tokens, targets)  # fills any caches
    flat = model.params[name].reshape(-1)
    flat += np.linspace(-1, 2, flat.size)
    params = {parameter: a.copy() for parameter, a in model.params.items()}
    fresh = GPT.from_params(SMALL, params)
    check_exact("logits", model(tokens), fresh(tokens))
    if not name.endswith("W_key.bias"):  # which shifts all scores alike
        assert np.abs(model(tokens) - before).max() > 1e-6
    grads, fresh_grads = model.loss_and_grads(tokens, targets)[1], fresh.loss_and_grads(tokens, targets)[1]
    for parameter, grad in fresh_grads.items():
        check_exact(f"d {parameter}", grads[parameter], grad)


def test_replacing_a_parameter_changes_the_model():
    case = ModelCase(SMALL)
    model, (tokens, _) = case.model(), case.batch()
    other = replace(case, seed=1).model()
    model.params.update(other.params)
    check_exact("logits", model(tokens), other(tokens))


@pytest.mark.parametrize("call", ["__call__", "loss", "loss_and_grads", "next_logits"])
@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        (
            "out_head.weight",
            lambda a: a.astype(np.float32),
            "parameter {} is float32, the model float64: use one dtype",
        ),
        ("trf_blocks.1.norm1.shift", lambda a: a.astype(np.float32), "parameter {} is float32, the model float64: use"),
        ("pos_emb.weight", lambda a: a.astype(int), "parameter {} is int64, the model float64: use one dtype"),
        ("tok_emb.weight", lambda a: a.astype(">f8"), "parameter {} is >f8, the model float64: use one dtype"),
        (
            "out_head.weight",
            lambda a: a[:-1],
            r"parameter {} has shape \(\d+, 12\), the configuration needs \(\d+, 12\)",
        ),
        ("trf_blocks.0.att.W_key.weight", lambda a: a[:1], "parameter {} has shape"),
        ("final_norm.scale", lambda a: a[:1], "parameter {} has shape"),
        ("trf_blocks.0.att.out_proj.bias", lambda a: a.tolist(), "parameter {} must be a NumPy array, not a list"),
        ("tok_emb.weight", lambda a: torch.from_numpy(a), "parameter {} must be a NumPy array, not a Tensor"),
        ("trf_blocks.0.norm2.scale", lambda a: None, "parameter {} must be a NumPy array, not a NoneType"),
    ],
)
def test_mismatched_parameter_is_refused_on_use(call, name, change, message):
    """The model works again once the parameter is restored."""
    case = ModelCase(SMALL)
    model, fresh, batch = case.model(), case.model(), case.batch()

    def use():
        return (
            model.next_logits(batch[0], KVCache(SMALL, len(batch[0]), np.float64))
            if call == "next_logits"
            else (getattr(model, call)(*(batch[:1] if call == "__call__" else batch)))
        )

    kept = model.params[name]
    model.params[name] = change(kept)
    for _ in range(2):
        with pytest.raises(InputError, match=f"^{message.format(re.escape(name))}"):
            use()
    model.params[name] = kept
    use()
    grads, fresh_grads = model.loss_and_grads(*batch)[1], fresh.loss_and_grads(*batch)[1]
    for parameter, grad in fresh_grads.items():
        check_exact(f"d {parameter}", grads[parameter], grad)


def test_missing_or_extra_parameter_is_refused_on_use():
    case = ModelCase(SMALL)
    model, (tokens, _) = case.model(), case.batch()
    model.params["extra"] = np.zeros(1)
    with pytest.raises(InputError, match=r"^parameter extra is not one of this configuration"):
        model(tokens)
    del model.params["extra"], model.params["final_norm.scale"]
    with pytest.raises(InputError, match=r"^parameter final_norm\.scale is missing"):
        model(tokens)


def test_replacing_all_parameters_by_another_dtype_is_refused():
    model, (tokens, _) = ModelCase(SMALL).model(), ModelCase(SMALL).batch()
    model.params |= ModelCase(SMALL, dtype="float32").model().params
    with pytest.raises(InputError, match=r"^parameter tok_emb\.weight is float32, the model float64"):
        model(tokens)


def test_parameters_may_be_replaced_in_any_order_and_memory(tmp_path):
    """Including read-only and memory-mapped arrays: a model that is not trained writes to none."""
    case = ModelCase(SMALL)
    model, (tokens, targets) = case.model(), case.batch()
    want, grads = model.loss_and_grads(tokens, targets)
    grads = {name: grad.copy() for name, grad in grads.items()}
    for name in reversed(list(model.params)):
        array = model.params.pop(name)
        mapped = np.memmap(tmp_path / name, array.dtype, "w+", shape=array.shape)
        mapped[...] = array
        mapped.setflags(write=False)
        model.params[name] = mapped
    loss, again = model.loss_and_grads(tokens, targets)
    check_exact("loss", loss, want)
    assert list(again) == list(model.params)
    for name, grad in grads.items():
        check_exact(f"d {name}", again[name], grad)


def test_one_array_under_two_names_is_used_but_not_trained():
    """As an untied model's two tables it has two gradients; an optimiser would update it twice per step."""
    params = ModelCase(SMALL).params()
    params["out_head.weight"] = params["tok_emb.weight"]
    model, tied = (
        GPT.from_params(SMALL, params),
        GPT.from_params(replace(SMALL, tie_weights=True), {n: p for n, p in params.items() if n != "out_head.weight"}),
    )
    tokens, _ = ModelCase(SMALL).batch()
    check_exact("logits", model(tokens), tied(tokens))
    before = {name: p.copy() for name, p in model.params.items()}
    with pytest.raises(InputError, match=r"^AdamW: tok_emb\.weight and out_head\.weight share memory"):
        AdamW(model.params)
    for name, p in model.params.items():
        check_exact(name, p, before[name])


def test_tied_weights_are_one_array():
    config = replace(SMALL, tie_weights=True)
    model = ModelCase(config).model()
    assert "out_head.weight" not in model.params
    tokens = np.array([[1, 2, 3]])  # id 5's row is used only by the head
    before = model(tokens)
    model.params["tok_emb.weight"][5] += 1
    changed = (model(tokens) != before).any(axis=(0, 1))
    assert changed.tolist() == [v == 5 for v in range(config.vocab_size)]


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (np.zeros((1, 7), int), r"tokens: T = 7 is over the 6 positions .* context_length 6"),
        ([[0, 11]], "tokens: id 11 is outside the vocabulary of 11"),
        ([[0, -1]], "tokens: id -1 is outside the vocabulary of 11"),
        ([0, 1], r"tokens must be a non-empty \(B, T\) array of whole numbers, not int64 \(2,\)"),
        (np.zeros((2, 0), int), r"tokens must be a non-empty .* \(2, 0\)"),
        ([[0.0, 1.0]], "tokens must be .* whole numbers, not float64"),
        ([[True, False]], "tokens must be .* whole numbers, not bool"),
    ],
)
def test_invalid_tokens_are_named(tokens, message):
    model = ModelCase(SMALL).model()
    good = np.zeros((1, 2), int)
    for call in (model, lambda t: model.loss(t, good), lambda t: model.loss_and_grads(t, good)):
        with pytest.raises(InputError, match=message):
            call(tokens)
    for call in (model.loss, model.loss_and_grads):
        with pytest.raises(InputError, match=message.replace("tokens", "targets")):
            call(good, tokens)


def test_tokens_and_targets_of_different_shapes_are_refused():
    model = ModelCase(SMALL).model()
    for call in (model.loss, model.loss_and_grads):
        with pytest.raises(InputError, match=r"tokens \(1, 3\) and targets \(1, 2\) must have one shape"):
            call([[1, 2, 3]], [[1, 2]])


@pytest.mark.parametrize("dtype", [np.int8, np.uint8, np.int16, np.uint16, np.int32, np.uint64])
def test_integer_types_of_tokens_are_equivalent(dtype):
    """A list of ids works as well, whatever integer type could hold them."""
    model, tokens = ModelCase(replace(SMALL, vocab_size=300)).model(), np.array([[1, 100, 7], [0, 3, 100]])
    check_exact("logits", model(tokens.astype(dtype)), model(tokens))
    check_exact("loss", model.loss(tokens.astype(dtype), tokens.astype(dtype)), model.loss(tokens, tokens))
    check_exact("logits of id 299", model([[299]]), model(np.array([[299]])))


@pytest.mark.parametrize("dtype", [np.float16, np.int64, np.complex128])
def test_unsupported_dtype_is_refused(dtype):
    with pytest.raises(InputError, match="float32 or float64"):
        GPT(SMALL, dtype=dtype)


def test_exact_messages_for_tokens_and_dtypes():
    model = GPT(SMALL)
    for call, message in (
        (
            lambda: model([[1, 2], [3]]),
            "tokens must be a (B, T) array of whole numbers: its rows have different lengths",
        ),
        (
            lambda: model([[11]]),
            "tokens: id 11 is outside the vocabulary of 11: use the encoding the model was made for",
        ),
        (lambda: GPT(SMALL, dtype=np.float16), "a model is float32 or float64, not float16"),
    ):
        with pytest.raises(InputError, match=f"^{re.escape(message)}$"):
            call()


def test_default_seed_matches_the_book():
    for name, array in GPT(SMALL, seed=123).params.items():
        check_exact(name, GPT(SMALL).params[name], array)


def test_checked_ids_are_int64():
    assert checked_ids("tokens", np.array([[3, 200]], np.uint8), 256).dtype == np.int64


@pytest.mark.parametrize("call", [lambda m, t: m(t), lambda m, t: m.next_logits(t, KVCache(m.config, 8, m.dtype))])
def test_forward_pass_keeps_no_block_caches(call):
    """Peak memory beyond the parameters does not grow with the number of layers, as it would with kept caches."""
    peaks = []
    for n_layers in (1, 8):
        model = GPT(replace(SMALL, n_layers=n_layers, context_length=64, emb_dim=48))
        tokens = np.zeros((8, 64), int)
        call(model, tokens)
        tracemalloc.start()
        call(model, tokens)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    kv = 2 * 7 * 8 * 64 * 48 * 4 if call(model, tokens).ndim == 2 else 0  # the key-value cache grows with layers
    assert peaks[1] - kv < 1.2 * peaks[0], peaks


def test_mismatched_parameters_are_named():
    params = ModelCase(SMALL).params()
    with pytest.raises(InputError, match=r"final_norm\.scale is missing"):
        GPT.from_params(SMALL, {n: a for n, a in params.items() if n != "final_norm.scale"})
    with pytest.raises(InputError, match="parameter extra is not one of"):
        GPT.from_params(SMALL, params | {"extra": np.zeros(1)})
    with pytest.raises(InputError, match=r"pos_emb\.weight has shape \(6, 11\).*needs \(6, 12\)"):
        GPT.from_params(SMALL, params | {"pos_emb.weight": np.zeros((6, 11))})
    with pytest.raises(InputError, match=r"out_head\.weight is float32.*float64"):
        GPT.from_params(SMALL, params | {"out_head.weight": params["out_head.weight"].astype(np.float32)})


def test_from_params_orders_as_torch_and_copies_only_block_matrices():
    params = ModelCase(SMALL).params()
    model = GPT.from_params(SMALL, dict(reversed(params.items())))
    assert list(model.params) == list(params)
    assert all(np.array_equal(model.params[name], array) for name, array in params.items())
    copied = {name for name, array in params.items() if model.params[name] is not array}
    assert copied == {name for name, array in params.items() if name.startswith("trf_blocks") and array.ndim == 2}


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"emb_dim": 10, "n_heads": 3}, "emb_dim 10 does not divide into 3 heads"),
        ({"vocab_size": 0}, "vocab_size must be a whole number of at least 1, not 0"),
        ({"context_length": -1}, "context_length must be .* not -1"),
        ({"n_layers": 1.0}, r"n_layers must be .* not 1\.0"),
        ({"n_heads": True}, "n_heads must be .* not True"),
        ({"emb_dim": "12"}, "emb_dim must be .* not '12'"),
        ({"drop_rate": 1.1}, r"drop_rate must be a probability from 0 to 1, not 1\.1"),
        ({"drop_rate": -0.1}, "drop_rate must be a probability"),
        ({"drop_rate": math.nan}, "drop_rate must be a probability"),
        ({"drop_rate": None}, "drop_rate must be a probability"),
        ({"qkv_bias": 1}, "qkv_bias must be True or False, not 1"),
        ({"tie_weights": None}, "tie_weights must be True or False, not None"),
    ],
)
def test_invalid_configuration_is_named_by_key(keys, message):
    with pytest.raises(InputError, match=message):
        GPTConfig(**keys)


def test_default_configuration_matches_the_book():
    """GPT_CONFIG_124M of chapter 5, and OpenAI's four sizes, whose tied parameter counts are GPT-2's."""
    book = {"vocab_size": 50257, "context_length": 256, "emb_dim": 768, "n_heads": 12, "n_layers": 12}
    assert GPTConfig().to_dict() == book | {"drop_rate": 0.1, "qkv_bias": False, "tie_weights": False}
    assert GPTConfig.from_dict(GPTConfig().to_dict()) == GPTConfig()
    counts = {"124M": 124_439_808, "355M": 354_823_168, "774M": 774_030_080, "1558M": 1_557_611_200}
    for name, count in counts.items():
        config = GPTConfig.gpt2(name, qkv_bias=True, tie_weights=True)
        assert sum(math.prod(shape) for shape in parameter_shapes(config).values()) == count
        assert parameter_count(config) == count
        assert (config.context_length, config.drop_rate) == (1024, 0.0)
    with pytest.raises(InputError, match="unknown GPT-2 size '125M': choose one of 124M"):
        GPTConfig.gpt2("125M")
    with pytest.raises(InputError, match="n_layer"):
        GPTConfig.from_dict({"n_layer": 12})


def test_numpy_scalars_give_the_same_configuration(tmp_path):
    plain = {"vocab_size": 7, "context_length": 4, "emb_dim": 4, "n_heads": 2, "n_layers": 1, "drop_rate": 0.25}
    plain |= {"qkv_bias": True, "tie_weights": False}
    config = GPTConfig(**{key: np.asarray(value)[()] for key, value in plain.items()})
    assert config == GPTConfig(**plain)
    assert [type(value) for value in config.to_dict().values()] == [type(value) for value in plain.values()]
    with pytest.raises(InputError, match="drop_rate must be a probability"):
        GPTConfig(drop_rate=np.float64("nan"))
    with pytest.raises(InputError, match="n_heads must be"):
        GPTConfig(n_heads=np.True_)


@pytest.mark.parametrize("dtype", [None, "nonsense", np.float16, np.int32, ">f4"])
def test_invalid_dtypes_are_refused(dtype):
    """Including None, which NumPy interprets as float64."""
    with pytest.raises(InputError, match="a model is float32 or float64, not "):
        GPT(SMALL, dtype=dtype)


@pytest.mark.parametrize("key", ["vocab_size", "context_length", "emb_dim", "n_layers"])
@pytest.mark.parametrize("value", [10**15, 10**400])
def test_models_larger_than_memory_are_refused_at_once(key, value):
    """Listing the parameters of 10^15 layers would exhaust the memory."""
    with pytest.raises(InputError, match="more memory than a process can have: choose a smaller vocab_size"):
        GPT(GPTConfig(**{key: value, "n_heads": 1}))


def test_the_largest_possible_model_is_that_of_47_bits_of_addresses():
    """4 bytes each for 2^45 parameters, less one row, and layers whose names can be listed."""
    config = GPTConfig((1 << 35) - 12290, 1, emb_dim=1024, n_heads=1, n_layers=1)
    check_possible(config)
    check_possible(GPTConfig(2, 1, emb_dim=1, n_heads=1, n_layers=MOST_LAYERS))
    message = (
        "a model of this configuration takes more memory than a process can have: choose a smaller vocab_size, "
        "context_length, emb_dim or n_layers"
    )
    for larger in (replace(config, vocab_size=config.vocab_size + 1), replace(config, n_layers=MOST_LAYERS + 1)):
        with pytest.raises(InputError, match=f"^{message}$"):
            check_possible(larger)
    with pytest.raises(InputError, match=f"^{message}$"):
        check_possible(GPTConfig(2, 1, emb_dim=1, n_heads=1, n_layers=MOST_LAYERS + 1))


def test_missing_parameters_of_many_layers_are_found_without_listing_them():
    config = replace(SMALL, n_layers=200_000)
    tracemalloc.start()
    with pytest.raises(InputError, match=r"^parameter tok_emb\.weight is missing$"):
        check_shapes(config, {})
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 20


@pytest.mark.parametrize(("dtype", "found"), [("nonsense", "nonsense"), (None, "None"), (np.int64, "int64")])
def test_dtype_of_no_model_is_named(dtype, found):
    with pytest.raises(InputError, match=f"^a model is float32 or float64, not {found}$"):
        GPT(SMALL, dtype=dtype)
