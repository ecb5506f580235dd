"""trace against torch's retain_grad, its replacements against torch's detach, and the terms of explain."""

import math
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from numpy_gpt import GPT, Generator, GPTConfig, trace
from numpy_gpt.errors import InputError
from numpy_gpt.model import HEAD_ROWS
from numpy_gpt.ops import attention, gelu
from parity_tests.judge import compare, strategies
from parity_tests.judge.compare import check_exact
from parity_tests.judge.models import (
    DROP_RATES,
    SMALL,
    RecordedMasks,
    check_loss,
    dropout_factors,
    reject_cancelled,
    reject_certain,
)
from parity_tests.judge.strategies import ModelCase
from parity_tests.judge.trace import check_traces, names, torch_trace
from parity_tests.tools.museum import DK, DROPPED, ONE_ROW, UNTIED, around, dv_before_dropout, layernorm_without


def check_intermediates(case, replaced=()):
    """One case, with dropout where its configuration has any; replaced: names to replace."""
    rng = RecordedMasks(case.seed) if case.config.drop_rate else None
    put = {name: other_numbers(case.seed) for name in replaced}
    got = trace(case.model(), *case.batch(), rng, put)
    factors = dropout_factors(case, rng.drawn) if rng else None
    want = torch_trace(case.config, case.params(), *case.batch(), factors, put)
    reject_certain(want.loss)  # as test_model does: gradients that are rounding on both sides
    reject_cancelled(case, want.values["logits"], case.batch()[1], want.grads)
    check_traces(case.config, got, want)
    check_loss("loss", got.loss, want.loss, want.values["logits"])


def other_numbers(seed):
    """A function of an activation: as much of other numbers as of its own, −inf left where it was."""

    def change(a):
        rng = np.random.default_rng([seed, 2])
        return np.where(np.isinf(a), a, 0.5 * a + 0.5 * np.abs(rng.standard_normal(a.shape)))

    return change


CASES = strategies.model_cases(drop_rates=(0.0, *DROP_RATES))


@settings(max_examples=60)
@given(case=CASES)
@example(ModelCase(GPTConfig(2, 1, 4, 2, 1, 0.0), B=1, T=1))
@example(replace(DROPPED, config=replace(DROPPED.config, tie_weights=True)))
def test_activations_and_gradients_match_torch(case):
    check_intermediates(case)


@pytest.mark.slow
@settings(max_examples=500)
@given(case=CASES)
def test_activations_and_gradients_match_torch_in_many_cases(case):
    check_intermediates(case)


@settings(max_examples=30)
@given(case=CASES, data=st.data())
def test_replacements_act_as_torchs_detach(case, data):
    """One name or several, so that one may lie above another."""
    check_intermediates(case, data.draw(st.sets(st.sampled_from(names(case.config)), min_size=1, max_size=3)))


@pytest.mark.parametrize("name", names(GPTConfig(2, 1, 4, 2, 1, 0.0)))
@pytest.mark.parametrize("case", [UNTIED, DROPPED], ids=["plain", "dropout"])
def test_each_activation_can_be_replaced(case, name):
    check_intermediates(case, {name.replace("blocks.0", "blocks.1")})


def test_the_names_are_those_of_the_documentation():
    t = trace(UNTIED.model(), *UNTIED.batch())
    B, T, C, NH, HS, V = 2, 6, 12, 3, 4, 13
    block = {
        **dict.fromkeys(("resid_pre", "norm1"), (B, T, C)),
        **dict.fromkeys(("att.q", "att.k", "att.v"), (B, NH, T, HS)),
        **dict.fromkeys(("att.scores", "att.probs"), (B, NH, T, T)),
        **dict.fromkeys(("att.heads", "att.out", "resid_mid", "norm2"), (B, T, C)),
        **dict.fromkeys(("ff.pre", "ff.act"), (B, T, 4 * C)),
        **dict.fromkeys(("ff.out", "resid_post"), (B, T, C)),
    }
    want = {"tok_emb": (B, T, C), "pos_emb": (T, C), "emb": (B, T, C)}
    want |= {f"trf_blocks.{i}.{name}": shape for i in range(2) for name, shape in block.items()}
    want |= {"final_norm": (B, T, C), "logits": (B, T, V)}
    assert list({name: a.shape for name, a in t.values.items()}.items()) == list(want.items())
    assert list(t.grads) == [*want, *UNTIED.params()]
    assert all(name in trace.__doc__ for name in block)
    future = np.triu(np.ones((T, T), bool), k=1)
    assert (t.values["trf_blocks.1.att.scores"][..., future] == -np.inf).all()
    assert not t.grads["trf_blocks.1.att.scores"][..., future].any()


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("drop_rate", [0.0, 0.2])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize(("B", "T"), [(1, 1), (3, 9), (3, attention.ROWS + 40)])
def test_a_trace_has_the_bits_of_loss_and_grads(tied, drop_rate, dtype, B, T):
    """With several blocks of queries and of logits too."""
    config = GPTConfig(50, 120, 24, 3, 2, drop_rate, qkv_bias=True, tie_weights=tied)
    case = ModelCase(config, B=B, T=T, dtype=dtype)
    model, (tokens, targets) = case.model(), case.batch()
    loss, grads = model.loss_and_grads(tokens, targets, Generator(1))
    t = trace(model, tokens, targets, Generator(1))
    assert (B * T > HEAD_ROWS) == (B * T == 3 * 104)
    check_exact("loss", np.asarray(t.loss), np.asarray(loss))
    for name, grad in grads.items():
        check_exact(f"d {name}", t.grads[name], grad)
    check_exact("logits", trace(model, tokens).logits, model(tokens))
    assert {a.dtype.name for a in (*t.values.values(), *t.grads.values())} == {dtype}


def test_a_trace_keeps_its_numbers_when_the_model_changes():
    """And the gradients that the model returned before stay as they are."""
    model, batch = UNTIED.model(), UNTIED.batch()
    _, grads = model.loss_and_grads(*batch)
    returned = {name: a.copy() for name, a in grads.items()}
    t = trace(model, *batch[::-1], Generator(1))
    for name, a in returned.items():
        check_exact(f"returned d {name}", grads[name], a)
    before = {name: a.copy() for name, a in (t.values | t.params).items()}
    arrays = [*t.values.values(), *t.grads.values(), *t.params.values(), *model.params.values()]
    assert not any(np.may_share_memory(a, b) for i, a in enumerate(arrays) for b in arrays[:i])
    for a in model.params.values():
        a += 1
    model.loss_and_grads(*batch)
    for name, a in before.items():
        check_exact(name, (t.values | t.params)[name], a)


def test_a_replacement_takes_the_models_dtype():
    t = trace(GPT(SMALL), [[1, 2]], [[2, 3]], replace={"emb": np.ones((1, 2, SMALL.emb_dim), int)})
    assert {a.dtype.name for a in (*t.values.values(), *t.grads.values())} == {"float32"}


def test_without_targets_a_trace_has_values_only():
    t = trace(UNTIED.model(), UNTIED.batch()[0])
    assert t.loss is None
    assert t.grads == {}
    assert t.targets is None
    assert list(t.values) == names(UNTIED.config)
    with pytest.raises(InputError, match=r"^explain: without targets there is no loss and no gradient"):
        t.explain("logits", (0, 0, 0), gradient=True)


@pytest.mark.parametrize(
    ("put", "message"),
    [
        ({"trf_blocks.0.att.prob": 0}, r"^replace: a trace has no 'trf_blocks.0.att.prob'; .* trf_blocks.0.att.probs"),
        ({"trf_blocks.2.norm1": 0}, r"no 'trf_blocks.2.norm1'; the nearest names are .*trf_blocks.1.norm1"),
        ({7: 0}, "^replace: a trace has no 7; the nearest names are"),
        ({"emb": np.zeros((2, 6, 11))}, r"^replace: emb has shape \(2, 6, 12\), its replacement shape \(2, 6, 11\)"),
        ({"emb": lambda a: a[0]}, r"its replacement shape \(6, 12\)$"),
        ({"emb": lambda a: a.fill(0)}, "its replacement is None: return the array$"),
        ({"emb": "zeros"}, "its replacement is not an array of numbers$"),
        ({"emb": lambda a: 1j * a}, "its replacement is not an array of numbers$"),
        ({"emb": [[1, 2], [3]]}, r"^replace: emb has shape \(2, 6, 12\), its replacement rows of different lengths$"),
    ],
)
def test_a_replacement_that_does_not_fit_is_named(put, message):
    with pytest.raises(InputError, match=message):
        trace(UNTIED.model(), *UNTIED.batch(), replace=put)


@pytest.mark.parametrize(
    ("apply", "case", "message"),
    [
        (
            around(gelu, "gelu_forward", lambda real, x: (real(x)[0] * (1 + 1e-6), real(x)[1])),
            UNTIED,
            r"trf_blocks\.0\.ff\.act\[",
        ),
        (DK, UNTIED, r"d trf_blocks\.1\.att\.k\[.* made of that of att\.scores$"),
        (dv_before_dropout, DROPPED, r"d trf_blocks\.1\.att\.v\[.* made of that of att\.heads$"),
        (layernorm_without(1), UNTIED, r"d trf_blocks\.1\.resid_post\[.* made of that of what reads the block$"),
        (
            around(gelu, "gelu_backward", lambda real, dy, cache: -real(dy, cache)),
            UNTIED,
            r"d trf_blocks\.1\.ff\.pre\[.* made of that of ff\.act$",
        ),
        (ONE_ROW, UNTIED, None),  # the trace adds the rows itself; test_a_trace_has_the_bits_... finds it
    ],
)
def test_first_diverging_operation_is_named(apply, case, message, monkeypatch):
    monkeypatch.setattr(compare, "record", lambda *_: None)
    check_intermediates(case)
    apply(monkeypatch)
    if message is None:
        check_intermediates(case)
        return
    with pytest.raises(AssertionError, match=f"^{message}"):
        check_intermediates(case)


# explain


def cells(t, rng, each):
    """`each` random cells of every activation, parameter and gradient, and the loss."""
    for gradient, arrays in ((False, t.values | t.params), (True, t.grads)):
        for name, a in arrays.items():
            for _ in range(each):
                yield name, tuple(int(rng.integers(n)) for n in a.shape), gradient
    yield "loss", (), False
    yield "loss", (), True


def explained_case(i):
    config = GPTConfig(31, 12, 24, 3, 2, 0.2 * (i // 8), qkv_bias=i % 2 == 0, tie_weights=i // 2 % 2 == 0)
    return ModelCase(config, B=2, T=9, seed=i, scale=0.2, dtype=("float64", "float32")[i // 4 % 2])


@pytest.mark.parametrize("case", [explained_case(i) for i in range(16)])
def test_terms_add_up_to_the_stored_number(case):
    """Some 280 cells in each of 16 models; what a term names is the number in its place."""
    t = trace(case.model(), *case.batch(), Generator(1) if case.config.drop_rate else None)
    for name, index, gradient in cells(t, np.random.default_rng(case.seed), 2):
        e = t.explain(name, index, gradient)
        stored = 1.0 if (name, gradient) == ("loss", True) else known(t, name, index, gradient)
        assert e.stored == stored
        compare.record("explain: |sum − stored| in eps · Σ |terms|, at most 64", name, e.error)
        assert e.error <= 64, f"{name}{index} {gradient}: {e}"
        assert [abs(term.value) for term in e.terms] == sorted((abs(term.value) for term in e.terms), reverse=True)
        for term in e.terms:
            assert term.value == math.prod(term.factors)
            check_inputs(t, term)


def known(t, name, index, gradient):
    if name in ("tokens", "targets"):
        return int(getattr(t, name)[index])
    if name == "loss":
        return 1.0 if gradient else float(t.loss)
    return float((t.grads if gradient else t.values | t.params)[name][index])


def check_inputs(t, term):
    """Every input exists; a linear term's factors begin with its inputs' numbers."""
    numbers = [known(t, *each) for each in term.inputs]
    if (
        len(numbers) == 2
        and len(term.factors) >= 2
        and not {"tokens", "targets", "loss"} & {i.name for i in term.inputs}
    ):
        first, second = term.inputs
        if first.gradient and not second.name.endswith(("resid_pre", "resid_mid", "resid_post", "ff.pre")):
            assert term.factors[:2] == tuple(numbers)


@pytest.mark.parametrize("gradient", [False, True])
def test_following_the_largest_term_ends_at_a_token_or_a_parameter(gradient):
    """Of a gradient too: by the loss, or by the logit whose probability it holds."""
    case = ModelCase(SMALL, B=2, T=5)
    t = trace(case.model(), *case.batch())
    ends = set()
    for name, index, _ in cells(t, np.random.default_rng(0), 2):
        at, steps = (name, index, gradient), 0
        while at[0] not in (*t.params, "tokens") or at[2]:
            e = t.explain(*at)
            if at == ("loss", (), True):
                at = ("loss", (), False)
            elif not e.terms:
                assert e.stored == 0  # a row of a table that was not read, and the future
                break
            elif e.stored == -math.inf:
                break  # a score of the future
            else:
                at = e.terms[0].inputs[0]
            steps += 1
            assert steps < 100
        else:
            ends.add("tokens" if at[0] == "tokens" else "parameter")
    assert "parameter" in ends


def test_explaining_a_replaced_activation_stops_there():
    name = "trf_blocks.1.resid_pre"
    case = ModelCase(SMALL, B=2, T=5)
    t = trace(case.model(), *case.batch(), replace={name: lambda a: a + 1})
    (term,) = t.explain(name, (0, 1, 2)).terms
    assert term.inputs == ()
    assert term.value == t.values[name][0, 1, 2]
    assert t.explain("trf_blocks.0.resid_post", (0, 1, 2), gradient=True).terms == ()
    assert t.grads["trf_blocks.0.resid_post"].any() == t.grads["tok_emb"].any() == False  # noqa: E712
    assert t.grads[name].any()


def test_an_explanation_prints_its_terms_their_sum_and_the_number():
    t = trace(UNTIED.model(), *UNTIED.batch())
    e = t.explain("trf_blocks.1.ff.pre", (0, -1, -2))
    lines = str(e).splitlines()
    assert len(lines) == 1 + 13 + 2
    assert lines[1].startswith(str(e.terms[0].inputs[0]))
    assert f"{e.terms[0].value:.8g}" in lines[1]
    assert re.match(r"^trf_blocks\.1\.ff\.pre\[0, 5, 46\] +stored +" + re.escape(f"{e.stored:.8g}"), lines[-1])
    assert e._repr_html_().count("<tr>") == len(lines)
    long = t.explain("final_norm.scale", (3,), gradient=True)
    assert len(long.terms) == 12
    assert "d final_norm[1, 0, 3], x̂ of trf_blocks.1.resid_post[1, 0, 3]" in str(long)


@pytest.mark.parametrize("size", [1e2, 1e4, 1e8])
def test_probabilities_of_huge_scores_are_probabilities(size):
    """The operation's scores, in blocks of queries, have other bits than those of all queries at once."""
    config = GPTConfig(vocab_size=50, context_length=256, emb_dim=64, n_heads=4, n_layers=1, drop_rate=0.0)
    model, rng = GPT(config, seed=1), np.random.default_rng(0)
    for name in ("W_query", "W_key"):
        model.params[f"trf_blocks.0.att.{name}.weight"] *= np.float32(size**0.5)
    ids = rng.integers(0, 50, (1, 201))
    t = trace(model, ids[:, :-1], ids[:, 1:])
    p, at = t.values["trf_blocks.0.att.probs"], "trf_blocks.0.att."
    scores = t.values[f"{at}scores"]
    assert np.abs(scores[np.isfinite(scores)]).max() > size
    assert p.max() <= 1
    assert np.abs(p.sum(axis=-1) - 1).max() < 1e-5
    for index in rng.integers(0, (1, 4, 200, 200), (50, 4)):
        assert t.explain(f"{at}probs", tuple(index)).error <= 64
        assert t.explain(f"{at}heads", (0, index[2], index[3] % 64)).error <= 64


@pytest.mark.parametrize("index", [np.array(3), (True, 0, 0), np.array([0.0, 0, 0]), "012", None])
def test_an_index_that_is_none_is_refused(index):
    t = trace(UNTIED.model(), *UNTIED.batch())
    with pytest.raises(InputError, match=r"^explain: emb has shape \(2, 6, 12\), so index is 3 whole numbers"):
        t.explain("emb", index)
    assert t.explain("emb", np.array([0, 1, 2])).stored == t.values["emb"][0, 1, 2]
    with pytest.raises(InputError, match=r"^explain: there is no"):
        t.explain(np.array(["emb", "logits"]), (0, 0, 0))


def test_a_rebound_parameter_that_is_no_array_is_named():
    model = UNTIED.model()
    model.params["final_norm.scale"] = 1.0
    with pytest.raises(InputError, match=r"final_norm\.scale"):
        trace(model, *UNTIED.batch())


@pytest.mark.parametrize("replace", [[1], "emb", 5])
def test_replacements_that_are_no_dict_are_refused(replace):
    with pytest.raises(InputError, match=r"^replace: give a dict from names to arrays or functions, not "):
        trace(UNTIED.model(), *UNTIED.batch(), replace=replace)


def test_a_tensor_that_requires_a_gradient_is_refused_as_a_replacement():
    put = {"emb": torch.zeros(2, 6, 12, requires_grad=True)}
    with pytest.raises(InputError, match=r"^replace: emb has shape \(2, 6, 12\), its replacement fails: .*detach"):
        trace(UNTIED.model(), *UNTIED.batch(), replace=put)


def test_a_factor_that_is_not_its_inputs_number_says_what_it_is():
    """Without such a word, a factor is the number in the named array."""
    t = trace(UNTIED.model(), *UNTIED.batch())
    words = set()
    for name, array, gradient in [
        *((name, array, False) for name, array in t.values.items()),
        *((name, array, True) for name, array in t.grads.items()),
        ("loss", np.asarray(t.loss), False),
    ]:
        for term in t.explain(name, (0,) * array.ndim, gradient).terms:
            for i, named in enumerate(term.inputs[: len(term.factors)]):
                if term.means and term.means[i]:
                    words.add(term.means[i])
                    assert term.names[i] == f"{term.means[i]} {named}"
                elif named.name not in ("tokens", "targets", "loss"):
                    arrays = t.grads if named.gradient else t.values | t.params
                    assert term.factors[i] == float(arrays[named.name][named.index]), (name, term)
    assert {"x̂ of", "slope at", "softmax at"} < words
    wide = t.explain("trf_blocks.1.norm1", (0, 0, 0), gradient=True)
    assert len(wide.terms) == 36
    assert "16 smaller terms" in str(wide)


@pytest.mark.parametrize(
    ("name", "index", "message"),
    [
        ("trf_blocks.0.att.kk", (0,), r"^explain: there is no 'trf_blocks.0.att.kk'; the nearest names are .*att\.k"),
        ("emb", (0, 1), r"^explain: emb has shape \(2, 6, 12\), so index is 3 whole numbers, not \(0, 1\)$"),
        ("emb", (0, 1, 1.0), r"so index is 3 whole numbers, not \(0, 1, 1.0\)$"),
        ("emb", (0, 6, 0), r"^explain: index \(0, 6, 0\) is outside emb, which has shape \(2, 6, 12\)$"),
        ("loss", (0,), r"^explain: loss has shape \(\)"),
    ],
)
def test_a_number_that_does_not_exist_is_named(name, index, message):
    with pytest.raises(InputError, match=message):
        trace(UNTIED.model(), *UNTIED.batch()).explain(name, index)


def test_the_first_querys_score_has_no_gradient():
    """It sees one key: p = 1 whatever the score, and the two terms cancel."""
    t = trace(GPT(SMALL, dtype=np.float64), [[1, 2, 3]], [[2, 3, 4]])
    e = t.explain("trf_blocks.0.att.scores", (0, 0, 0, 0), gradient=True)
    assert e.stored == 0
    assert len(e.terms) == 2
    assert abs(e.sum) <= 4 * e.eps * abs(e.terms[0].value)


def test_numbers_of_a_diverged_pass_are_explained_too():
    """Opposite infinities have no sum; and a cube may be infinite."""
    t = trace(GPT(SMALL), [[1, 2]], replace={"final_norm": lambda a: np.full_like(a, np.inf)})
    e = t.explain("logits", (0, 0, 0))
    assert math.isnan(e.sum)
    assert e.error == math.inf
    assert "nan" in str(e)
    t = trace(GPT(SMALL, dtype=np.float64), [[1, 2]], replace={"trf_blocks.0.ff.pre": lambda a: np.full_like(a, 1e120)})
    assert t.explain("trf_blocks.0.ff.act", (0, 0, 0)).error == 0
    with pytest.raises(InputError, match=r"^explain: without targets there is no loss"):
        t.explain("loss", ())
