"""Work shared among threads: equal results, BLAS's thread count restored, and errors propagated."""

import ast
import os
import subprocess
import sys
import threading
import warnings
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
from threadpoolctl import threadpool_limits

from numpy_gpt import GPT, AdamW, Generator, GPTConfig, generate
from numpy_gpt.ops import attention, cross_entropy, gelu, layernorm, linear
from numpy_gpt.parallel import threads
from parity_tests.judge.compare import check_exact


@pytest.fixture
def team_of_three(monkeypatch):
    """Use three threads for any amount of work, on any machine."""
    if not threads._blas().lib_controllers:
        pytest.skip("threadpoolctl does not know this NumPy's BLAS, so nothing is shared")
    monkeypatch.setattr(threads, "LEAST", 1)
    monkeypatch.setattr(threads, "LEAST_PRODUCT", 1)
    monkeypatch.setattr(attention, "LEAST", 1)
    with threadpool_limits(3, user_api="blas"):
        yield


def used(work):
    """The names of the threads that ran parts when `work` shared out a callable."""
    names = set()
    together = threading.Barrier(3, timeout=600)

    def part(start, stop):
        names.add(threading.current_thread().name)
        together.wait()  # so that no thread does two parts

    work(part)
    return names


def test_team_takes_over_blas_threads(team_of_three):
    inside = []
    names = used(lambda part: threads.share(lambda *edges: (part(*edges), inside.append(threads.thread_count())), 3))
    assert len(names) == 3
    assert inside == [1] * 3
    assert threads.thread_count() == 3


def test_parts_do_not_share_again(team_of_three):
    parts = []

    def part(start, stop):
        threads.share(lambda *edges: parts.append(edges), 10)

    threads.share(part, 3)
    assert parts == [(0, 10)] * 3


def test_other_threads_work_alone_while_a_team_runs(team_of_three):
    parts = []
    with threads.all_cores():
        other = threading.Thread(target=lambda: threads.share(lambda *edges: parts.append(edges), 10))
        other.start()
        other.join(30)
        assert parts == [(0, 10)]
        assert threads.thread_count() == 1
    assert threads.thread_count() == 3
    threads.share(lambda *edges: parts.append(edges), 3)
    assert len(parts) == 1 + 3


@pytest.mark.parametrize("where", [0, 1, 2])
def test_error_in_a_part_is_raised_after_all_parts(where, team_of_three):
    done = []

    def part(start, stop):
        if start == where:
            raise ArithmeticError(f"part {where}")
        done.append(start)

    with pytest.raises(ArithmeticError, match=f"part {where}"):
        threads.share(part, 3)
    assert sorted(done) == sorted({0, 1, 2} - {where})
    assert threads.thread_count() == 3


def test_callers_errstate_applies_in_every_part(team_of_three):
    x = np.zeros(3)
    with np.errstate(divide="ignore"), warnings.catch_warnings():
        warnings.simplefilter("error")
        threads.share(lambda start, stop: np.divide(1, x[start:stop]), 3)
    with np.errstate(divide="raise"), pytest.raises(FloatingPointError):
        threads.share(lambda start, stop: np.divide(1, x[start:stop]), 3)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="fork is Unix's")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_forked_child_starts_its_own_threads(team_of_three):
    threads.share(lambda *edges: None, 3)  # start the parent's threads
    child = os.fork()
    if child == 0:
        names = used(lambda part: threads.share(part, 3))
        os._exit(len(names))
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 3


@pytest.mark.parametrize(("n", "row", "start"), [(0, 1, 0), (1, 1, 0), (7, 2**17, 0), (1000, 2**15, 3), (3, 2**20, 1)])
def test_blocks_cover_the_range(n, row, start):
    blocks = threads.blocks(n, row, start)
    assert [i for block in blocks for i in range(block.start, block.stop)] == list(range(start, n))
    assert all((block.stop - block.start) * row <= max(1.5 * threads.BLOCK, row) for block in blocks)


def operations_answers(dtype):
    """(name, outputs and gradients) of every operation that shares its work, on fixed inputs."""
    rng = np.random.default_rng(0)

    def draw(*shape):
        return rng.standard_normal(shape).astype(dtype)

    x, w, b = draw(3, 70, 24), draw(31, 24), draw(31)
    y, cache = linear.linear_forward(x, w, b)
    yield "linear", (y, *linear.linear_backward(draw(3, 70, 31), cache))
    y, cache = linear.linear_forward(x[:1, :1], w, b)
    yield "linear of one row", (y, *linear.linear_backward(draw(1, 1, 31), cache))
    y, cache = gelu.gelu_forward(x)
    yield "gelu", (y, gelu.gelu_backward(draw(3, 70, 24), cache))
    y, cache = layernorm.layernorm_forward(x, draw(24), draw(24))
    yield "layernorm", (y, *layernorm.layernorm_backward(draw(3, 70, 24), cache))
    q, k, v = draw(3, 2, 5, 70, 8)
    y, cache = attention.attention_forward(q, k, v)
    yield "attention", (y, *attention.attention_backward(draw(2, 5, 70, 8), cache))
    loss, cache = cross_entropy.cross_entropy_forward(x, rng.integers(0, 24, (3, 70)))
    yield "cross_entropy", (np.asarray(loss), cross_entropy.cross_entropy_backward(0.7, cache))


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_three_threads_match_one(dtype, request):
    """Bit for bit, except products, whose parts BLAS may add in another order."""
    alone = dict(operations_answers(dtype))
    request.getfixturevalue("team_of_three")
    for operation, arrays in operations_answers(dtype):
        for got, want in zip(arrays, alone[operation], strict=True):
            if operation in ("linear", "attention"):
                assert np.abs(got - want).max() <= 64 * np.finfo(dtype).eps * np.abs(want).max(), operation
            else:
                check_exact(operation, got, want)


def test_models_in_two_threads_do_not_disturb_each_other(team_of_three):
    config = GPTConfig(40, 16, 24, 3, 2, 0.1)
    tokens = np.random.default_rng(0).integers(0, 40, (2, 16))
    models = [GPT(config, seed=seed) for seed in (1, 2)]
    alone = [model.loss_and_grads(tokens, tokens, Generator(3)) for model in models]
    alone = [(loss, {name: g.copy() for name, g in grads.items()}) for loss, grads in alone]
    wrong = []

    def again(i):
        for _ in range(20):
            loss, grads = models[i].loss_and_grads(tokens, tokens, Generator(3))
            if abs(loss - alone[i][0]) > 1e-5 or any(np.abs(grads[n] - g).max() > 1e-4 for n, g in alone[i][1].items()):
                wrong.append(i)
            generate(models[i], tokens[:, :3], 5)

    pair = [threading.Thread(target=again, args=(i,)) for i in range(2)]
    for thread in pair:
        thread.start()
    for thread in pair:
        thread.join(120)
    assert not wrong
    assert threads.thread_count() == 3


def test_thread_outliving_main_works_alone():
    """Executors accept no work once the main thread has ended."""
    program = """
import threading, time
import numpy as np
from threadpoolctl import threadpool_limits
from numpy_gpt.parallel import threads

def late():
    threads.share(lambda start, stop: None, 3)
    main.join()
    time.sleep(0.2)
    seen = np.zeros(3)
    def part(start, stop):
        seen[start:stop] += 1
    threads.share(part, 3)
    print(seen.tolist(), flush=True)

main = threading.main_thread()
threading.Thread(target=late).start()
"""
    environment = os.environ | {"OPENBLAS_NUM_THREADS": "3"}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment, check=False)
    assert (done.stdout, done.stderr) == ("[1.0, 1.0, 1.0]\n", "")


def test_no_sharing_if_blas_cannot_be_limited(team_of_three, monkeypatch):
    """If the limit does not take effect in this thread, BLAS keeps its threads, and ours would be too many."""
    monkeypatch.setattr(threads, "_blas", lambda: Disobedient())
    parts = []
    threads.share(lambda *edges: parts.append(edges), 3)
    assert parts == [(0, 3)]


class Disobedient:
    """A BLAS with three threads that ignores limits."""

    class _Library:
        num_threads = 3

    lib_controllers = (_Library(),)

    def limit(self, limits):
        return nullcontext()


def flags_raised(product):
    """A product like some BLAS libraries': correct, but raising spurious floating-point flags."""

    def noisy(*args, **kwargs):
        np.divide(np.ones(1), np.zeros(1))
        np.multiply(np.full(1, 1e308), np.full(1, 1e308))
        np.subtract(np.full(1, np.inf), np.full(1, np.inf))
        return product(*args, **kwargs)

    return noisy


def test_spurious_flags_of_products_cause_no_warnings(monkeypatch, team_of_three):
    """These tests turn warnings into errors; this one also turns floating-point flags into errors."""
    for name in ("matmul", "vecdot"):
        monkeypatch.setattr(np, name, flags_raised(getattr(np, name)))
    config = GPTConfig(vocab_size=90, context_length=70, emb_dim=12, n_heads=3, n_layers=2, qkv_bias=True)
    model, tokens = GPT(config), np.random.default_rng(0).integers(0, 90, (2, 70))
    with np.errstate(all="raise", under="ignore"):
        with pytest.raises(FloatingPointError):
            np.matmul(np.ones((1, 1)), np.ones((1, 1)))
        optimizer = AdamW(model.params)
        for rng in (None, Generator(1)):
            optimizer.step(model.loss_and_grads(tokens, tokens, rng=rng)[1])
        generate(model, tokens[:, :3], 2)
        linear.linear_backward(
            np.ones((9, 1)), linear.linear_forward(np.ones((9, 1)), np.ones((1, 1)), None)[1], np.ones((1, 1)), add=True
        )


def test_nonfinite_products_stay_nonfinite():
    big = np.full((2, 2), 1e308)
    for got in (
        threads.product(big, big),
        threads.matmul(big, big),
        threads.dots(big, big),
        threads.matmul(big[:1], big),
    ):
        assert np.isinf(got).all()
    assert np.isnan(threads.product(np.full((1, 1), np.inf), np.zeros((1, 1)))).all()


def test_all_products_go_through_threads():
    """Other products could warn because of spurious flags."""
    products = {"matmul", "dot", "vecdot", "einsum", "inner", "tensordot", "matvec", "vecmat"}
    for path in Path(threads.__file__).parent.rglob("*.py"):
        found = {
            ast.unparse(node)
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
            if (isinstance(node, ast.BinOp | ast.AugAssign) and isinstance(node.op, ast.MatMult))
            or (isinstance(node, ast.Attribute) and ast.unparse(node.value) == "np" and node.attr in products)
        }
        assert found == ({"np.matmul", "np.vecdot"} if path.name == "threads.py" else set()), path
