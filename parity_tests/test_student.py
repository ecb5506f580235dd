"""A student's operations: correct ones pass, and the fault of a wrong one is named.

The correct operations are plain.py's; a wrong one is its source with one change.
"""

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from numpy_gpt import plain
from parity_tests.__main__ import main
from parity_tests.judge.compare import check_exact
from parity_tests.judge.operations import OPERATIONS, names
from parity_tests.judge.snippet import snippet
from parity_tests.judge.strategies import LAYOUTS, OperationCase
from parity_tests.tools import student
from parity_tests.tools.student import judge_file

ROOT = Path(__file__).parent.parent

RIGHT = Path(plain.__file__).read_text(encoding="utf-8")

FAULTS = [  # old source, new source, operation, start of the message, part of the hint
    (
        "return dqk @ k, dqk.mT @ q, dv",
        "return dqk @ k, (q.mT @ dqk).reshape(k.shape), dv",
        "attention",
        "dk[",
        "dK scrambled by a reshape",
    ),
    ("dv = a.mT @ dy", "dv = p.mT @ dy", "attention", "dv[", "dV from the probabilities before dropout"),
    ("k.mT / math.sqrt(HS)", "k.mT / math.sqrt(HS * q.shape[1])", "attention", "y[", "√HS"),
    ("np.arange(S - T, S)", "np.arange(T)", "attention", "y[", "mask aligned to the first key"),
    ("np.arange(S - T, S)[:, None]", "np.arange(S - T, S)[:, None] + 1", "attention", "y[", "mask shifted by one"),
    ("np.add.at(dw, ids, dy)", "dw[ids] += dy", "embedding", "dw[", "dw[ids] += dy: use np.add.at"),
    ("np.add.at(dw, ids, dy)", "dw[ids] = dy", "embedding", "dw[", "rows assigned to dw"),
    ("= dy.sum(axis=0)", "= dy[0]", "position_embedding", "dw[", "sum dy over the batch"),
    ("g - along_1 - x_hat", "g - x_hat", "layernorm", "dx[", "dx without mean(g)"),
    (" - x_hat * along_x_hat", "", "layernorm", "dx[", "dx without the part along x_hat"),
    (
        "(centred**2).mean(axis=-1, keepdims=True)",
        "x.var(axis=-1, keepdims=True, ddof=1)",
        "layernorm",
        "y[",
        "variance with n - 1",
    ),
    (
        "np.sqrt((centred**2).mean(axis=-1, keepdims=True) + 1e-5)",
        "(x.std(axis=-1, keepdims=True) + 1e-5)",
        "layernorm",
        "y[",
        "eps outside the root",
    ),
    ("0.044715 * x**3))\n", "0.0044715 * x**3))\n", "gelu", "y[", "0.0044715 for 0.044715"),
    ("np.tanh(math.sqrt(2 / math.pi) *", "np.tanh(0.797885 *", "gelu", "y[", "a six-digit constant"),
    (
        "-log_p[np.arange(N), ids].mean()",
        "-np.log(np.exp(log_p[np.arange(N), ids]) + 1e-9).mean()",
        "cross_entropy",
        "loss[",
        "it needs no eps",
    ),
    ("* (dloss / len(ids))", "* dloss", "cross_entropy", "dlogits[", "backward without 1/N"),
    ("* (dloss / len(ids))", "/ len(ids)", "cross_entropy", "dlogits[", "dloss assumed to be 1"),
    ("z = z - z.max(axis=1, keepdims=True)", "z = z * 1", "cross_entropy", "loss[", "not finite: exp overflows"),
    (" / (1 - drop_rate if drop_rate < 1 else 1)", "", "dropout", "mask[", "not rescaled"),
    ("rows(dy).sum(axis=0)  # (O,)", "rows(dy).mean(axis=0)", "linear", "db[", "a bias gradient averaged"),
    ("rows(dy).T @ rows(x)", "rows(x).T @ rows(dy)", "linear", "dw: shape", "a weight gradient transposed"),
    ("(1 + t), (x, t)", "(1 + t) / np.sqrt(1), (x, t)", "gelu", "y: dtype float64", "math.sqrt"),
    (
        "    return dx, dscale, dshift",
        "    dy *= 2\n    return dx, dscale, dshift",
        "layernorm",
        "layernorm wrote into its argument dy",
        "work on a copy",
    ),
    ("return dqk @ k, dqk.mT", "return -dqk @ k, dqk.mT", "attention", "dq[", "the sign is reversed"),
    ("return dqk @ k, dqk.mT", "return 2 * dqk @ k, dqk.mT", "attention", "dq[", "2 times too large"),
]


FAULTS += [
    ("return dx, dscale, dshift", "return dx, dshift, dscale", "layernorm", "dscale[", "this is dshift"),
    (
        "rstd * (g - along_1 - x_hat * along_x_hat)",
        "rstd * g",
        "layernorm",
        "dx[",
        "along 1 and along x̂, which must be subtracted",
    ),
]
FAULTS += [  # wrong signs and missing terms, which with two features look like a wrong factor
    (
        "g - along_1 - x_hat",
        "g - along_1 + x_hat",
        "layernorm",
        "dx[",
        "the term x̂ · mean(g · x̂) has the wrong sign",
    ),
    ("g - along_1 - x_hat", "g + along_1 - x_hat", "layernorm", "dx[", "the term mean(g) has the wrong sign"),
    ("(dp - (dp * p)", "(dp + (dp * p)", "attention", "dq[", "the term Σ dp · p has the wrong sign"),
    ("p * (dp - (dp * p).sum(axis=-1, keepdims=True))", "p * dp", "attention", "dq[", "Σ dp · p is missing"),
    ("+ 0.5 * x * dt_dx)", "- 0.5 * x * dt_dx)", "gelu", "dx[", "½ x (1 − t²) u′ has the wrong sign"),
    ("ids] -= 1", "ids] += 1", "cross_entropy", "dlogits[", "the term [v = target] / N has the wrong sign"),
    ("ids] -= 1", "ids] -= 0", "cross_entropy", "dlogits[", "the term [v = target] / N is missing"),
    ("else y + b,", "else y - b,", "linear", "y[", "the term b has the wrong sign"),
    ("return x + w[start", "return x - w[start", "position_embedding", "y[", "the term w has the wrong sign"),
    ("return x_hat * scale + shift", "return x_hat * scale", "layernorm", "y[", "the term shift is missing"),
]
NO_HINT = [  # faults for which no hint is useful
    ("return dx, dw, db", "return dx * np.sqrt(-1.0), dw, db", "linear", "dx["),
    ("return 0.5 * x * (1 + t),", "return (0.5 * x * (1 + t)).astype(np.float32),", "gelu", "y: dtype float32"),
]


@pytest.fixture
def my_ops(tmp_path):
    """Write a file and judge it."""

    def judge(source):
        path = tmp_path / "my_ops.py"
        path.write_text(source)
        return list(judge_file(path))

    return judge


def test_textbook_operations_match():
    """All operations, by name, as `python -m parity_tests check numpy_gpt/plain.py` judges them."""
    said = []
    verdicts = list(judge_file(plain.__file__, said.append))
    assert [(verdict.operation, verdict.wrong) for verdict in verdicts] == [
        (name, None) for name in dict.fromkeys(o for _, o in names().values())
    ]
    assert all(verdict.cases == 260 for verdict in verdicts)
    assert sum((verdict.functions for verdict in verdicts), ()) == tuple(names())
    assert said == []


def only(source, operation):
    """The same source with only one operation to judge: the other functions are renamed."""
    for i, (name, (_, of)) in enumerate(names().items()):
        if of != operation:
            source = re.sub(rf"\b{name}\b", f"helper_{i}", source)
    return source


@pytest.mark.parametrize(("old", "new", "operation", "wrong", "hint"), FAULTS)
def test_fault_is_found_and_named(my_ops, old, new, operation, wrong, hint):
    assert RIGHT.count(old) == 1, old
    (verdict,) = my_ops(only(RIGHT.replace(old, new), operation))
    assert verdict.operation == operation
    assert verdict.wrong.startswith(wrong), verdict
    assert hint in (verdict.hint or ""), verdict


@pytest.mark.parametrize(("old", "new", "operation", "wrong"), NO_HINT)
def test_unexplained_fault_has_no_hint(my_ops, old, new, operation, wrong):
    (verdict,) = my_ops(only(RIGHT.replace(old, new), operation))
    assert verdict.wrong.startswith(wrong), verdict
    assert verdict.hint is None
    assert "budget" not in verdict.wrong


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("(g * x_hat).mean(axis=-1, keepdims=True)", "(g * x_hat).sum(axis=-1, keepdims=True)"),
        ("dx = rstd * (g", "dx = rstd**2 * (g"),
    ],
)
def test_factor_in_the_smallest_case_only_is_not_a_hint(my_ops, old, new):
    """With two features any error of dx looks like a factor: 1.2 times too small, 293 times too large."""
    assert RIGHT.count(old) == 1
    (verdict,) = my_ops(only(RIGHT.replace(old, new), "layernorm"))
    assert (verdict.wrong[:3], verdict.case.shape["C"], verdict.hint) == ("dx[", 2, None), verdict


@pytest.mark.parametrize(
    ("said", "words"),
    [
        (
            "dx[1]: 1.5e+00 vs -2.5e+00, 1.2e+03x the budget",
            "dx[1]: yours 1.5e+00, torch's -2.5e+00, 1.2e+03x the budget",
        ),
        ("dx[1]: nan vs 2.0e+00, nanx the budget", "dx[1]: yours nan, torch's 2.0e+00"),
        ("y[0]: 1.0e+00 vs 0.0e+00, infx the budget", "y[0]: yours 1.0e+00, torch's 0.0e+00"),
        (
            "dx[0, 0]: np.float32(1.5) vs np.float32(-2e-05), 3 of 4 differ",
            "dx[0, 0]: yours 1.5, torch's -2e-05, 3 of 4 differ",
        ),
        ("y: shape (1, 2), should be (2,)", "y: shape (1, 2), should be (2,)"),
    ],
)
def test_message_attributes_the_numbers(said, words):
    assert student.in_words(said) == words


def test_hint_is_about_the_shown_tensor(my_ops):
    """y is wrong only for constant rows, as in the smallest case; dx's fault in other cases is unrelated."""
    source = only(RIGHT, "layernorm").replace(
        "return x_hat * scale + shift,", "return np.where(np.ptp(x, -1, keepdims=True) == 0, 7, x_hat * scale + shift),"
    )
    source = source.replace("g - along_1 - x_hat", "g - x_hat")
    (verdict,) = my_ops(source)
    assert verdict.wrong.startswith("y["), verdict
    assert (verdict.hint, verdict.seen) == (None, None)


def test_command_output_for_wrong_operations(tmp_path):
    path = tmp_path / "my_ops.py"
    path.write_text(only(RIGHT, "gelu").replace("0.044715", "0.0044715") + only(RIGHT, "embedding"))
    result = CliRunner().invoke(main, ["check", str(path)])
    assert result.exit_code == 1, result.output
    lines = result.stdout.splitlines()
    assert lines[0] == "gelu (gelu_forward, gelu_backward): wrong"
    assert re.fullmatch(r"  y\[0, 0, 0\]: yours \S+, torch's \S+, \S+x the budget", lines[1])
    assert lines[2].startswith("  smallest case: OperationCase(shape={'B': 1, 'T': 1, 'C': 1}")
    assert lines[3].startswith("  perhaps: 0.0044715 for 0.044715")
    assert re.fullmatch(
        r"  seen in: y\[\d, \d, \d\]: yours \S+, torch's \S+, \S+x the budget; of OperationCase\(.*\)", lines[4]
    )
    assert (
        lines[5]
        == "embedding (embedding_forward, embedding_backward): matches torch in 260 cases: B ≤ 4, T ≤ 9, V ≤ 40, C ≤ 16"
    )


def run_again(output):
    """(output in a new Python, comment) of each snippet at the end of check's output."""
    for code in output.split("\n\n# ")[1:]:
        done = subprocess.run([sys.executable, "-c", f"# {code}"], cwd=ROOT, capture_output=True, text=True, check=True)
        yield done.stdout, code.strip().splitlines()[-1].partition("  # ")[2]


@pytest.mark.parametrize(("old", "new", "operation", "wrong", "hint"), [FAULTS[0], FAULTS[3], FAULTS[5], FAULTS[15]])
def test_shown_case_can_be_rerun(tmp_path, old, new, operation, wrong, hint):
    """From a file whose name is not an identifier and which imports a neighbour."""
    (tmp_path / "neighbour.py").write_text("")
    path = tmp_path / "my-ops.py"
    path.write_text("import neighbour\n" + only(RIGHT.replace(old, new), operation))
    result = CliRunner().invoke(main, ["check", str(path)])
    ((printed, comment),) = run_again(result.stdout)
    assert comment == result.stdout.splitlines()[1].strip()
    yours = float(re.search(r"yours (\S+), torch's", comment)[1])
    numbers = [float(number) for number in re.findall(r"-?\d\.?\d*(?:e[-+]\d+)?", printed)]
    assert any(abs(number - yours) <= 1e-6 * abs(yours) + 1e-8 for number in numbers), (printed, comment)


def test_half_an_operation_can_be_rerun_with_ours(tmp_path):
    path = tmp_path / "my_ops.py"
    path.write_text(
        "def dropout_backward(dy, mask):\n    return dy + mask\n\n\ndef gelu_forward(x):\n    return 2 * x, x\n"
    )
    result = CliRunner().invoke(main, ["check", str(path)])
    assert "from numpy_gpt.ops import dropout\n" in result.stdout
    assert len(list(run_again(result.stdout))) == 2


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("operation", OPERATIONS)
def test_snippet_reproduces_numbers_and_memory_layout(operation, layout, tmp_path):
    names = ("B", "T", "C", "I", "O", "V", "NH", "HS", "past", "start", "rest")
    case = OperationCase(dict.fromkeys(names, 2), layout=layout, dtype="float32", options={"rate": 0.5})
    code = snippet(operation, case, "cache: wrong", (), tmp_path / "my_ops.py")
    (tmp_path / "my_ops.py").touch()
    scope = {}
    exec(code, scope)
    sys.path.remove(str(tmp_path))
    del sys.modules["my_ops"]
    for name, want in OPERATIONS[operation].inputs(case).items():
        if isinstance(want, np.ndarray):
            check_exact(name, scope[name], want)
            assert scope[name].strides == want.strides, name
            assert scope[name].flags.writeable == want.flags.writeable, name
        else:
            assert scope[name] == want, name


def test_help_lists_the_textbooks_signatures():
    """Without our optional output arrays, which a student's functions are never given."""
    lines = [line.strip() for line in CliRunner().invoke(main, ["check", "--help"]).stdout.splitlines()]
    assert {"linear_forward(x, w, b)", "embedding_backward(dy, cache)"} <= set(lines)
    assert len([line for line in lines if line.partition("(")[0] in names()]) == len(names())


def test_progress_goes_to_stderr(tmp_path):
    """On stderr, so that stdout contains only the verdicts."""
    path = tmp_path / "my_ops.py"
    path.write_text(only(RIGHT, "dropout") + only(RIGHT, "embedding"))
    result = CliRunner().invoke(main, ["check", str(path)])
    assert result.stderr.splitlines() == ["judging dropout …", "judging embedding …"]
    assert len(result.stdout.splitlines()) == 2


def test_correct_operations_exit_with_0(tmp_path):
    path = tmp_path / "my_ops.py"
    path.write_text(only(RIGHT, "dropout"))
    result = CliRunner().invoke(main, ["check", str(path)])
    assert (result.exit_code, "matches torch" in result.output) == (0, True), result.output


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("def gelu_forward(x):\n    return (\n", "does not run: SyntaxError"),
        ("import numpy\n\nx = 1 / 0\n", r"does not run: ZeroDivisionError: division by zero \(my_ops.py, line 3\)"),
        ("import sys\n\nsys.exit(0)\n", r"does not run: SystemExit: 0 \(my_ops.py, line 3\)"),
        ("def relu_forward(x):\n    return x\n", "none of the functions that can be judged: linear_forward"),
        (None, r"File '.*my_ops.py' does not exist"),
        (
            "def layernorm_backwrd(dy, cache):\n    return dy\n",
            r"for layernorm_backwrd, did you mean layernorm_backward\?",
        ),
    ],
)
def test_unjudgeable_file_is_named(tmp_path, source, message):
    path = tmp_path / "my_ops.py"
    if source is not None:
        path.write_text(source)
    result = CliRunner().invoke(main, ["check", str(path)])
    assert result.exit_code == 2
    assert re.search(message, result.output), result.output


def test_non_python_file_is_named(tmp_path):
    path = tmp_path / "my_ops.txt"
    path.write_text("def gelu_forward(x): ...")
    with pytest.raises(ValueError, match="is not a Python file"):
        list(judge_file(path))


def test_misspelled_function_is_reported(tmp_path):
    path = tmp_path / "my_ops.py"
    helpers = "def dropout_rate(x):\n    return x\n\n\ndef scaled(x):\n    return x\n\n\n"
    path.write_text(helpers + only(RIGHT, "dropout").replace("dropout_backward(", "dropout_bakward("))
    result = CliRunner().invoke(main, ["check", str(path)])
    assert result.exit_code == 0, result.output
    said, verdict = result.stdout.splitlines()
    assert said == "not judged: dropout_bakward (did you mean dropout_backward?)"
    assert verdict.startswith("dropout (dropout_mask, dropout_forward): matches torch in 260 cases")


def test_failing_function_is_named_with_its_line(my_ops):
    (verdict,) = my_ops(only(RIGHT, "gelu").replace("dt_dx = (1 - t**2)", "dt_dx = np.tahn(t)"))
    assert re.match(
        r"the backward function fails: gelu_backward: AttributeError: .*\(my_ops.py, line \d+\)", verdict.wrong
    )


OURS = """
from numpy_gpt.ops import gelu, layernorm

def gelu_forward(x):
    return gelu.gelu_forward(x)

def gelu_backward(dy, cache):
    return gelu.gelu_backward(dy, cache)
"""


def test_function_may_call_ours(my_ops):
    """Even through our module, where the student's function is patched in during judging."""
    (verdict,) = my_ops(OURS)
    assert (verdict.wrong, verdict.cases) == (None, 260)


STATEFUL = """
import numpy as np
calls = []

def dropout_backward(dy, mask):
    calls.append(1)
    return dy * mask * ({wrong} if {when} else 1)
"""


@pytest.mark.parametrize(
    ("wrong", "when"),
    [
        ("2", "len(calls) == 30"),
        ("2", "len(calls) % 3 == 0"),
        ("2", "len(calls) < 200 and len(calls) % 7 > 3"),
        ("2", "np.random.default_rng().random() < 0.5"),
        ("np.random.random()", "True"),
    ],
)
def test_nondeterministic_function_is_reported(my_ops, wrong, when):
    (verdict,) = my_ops(STATEFUL.format(wrong=wrong, when=when))
    assert (verdict.wrong or "").startswith("gives different answers for the same input")
    assert verdict.case is not None


GELU = only(RIGHT, "gelu")
ATTENTION = only(RIGHT, "attention")


@pytest.mark.parametrize(
    ("source", "wrong"),
    [
        (GELU.replace("(1 + t), (x, t)\n", "(1 + t)\n"), r"gelu_forward returns an array \(.*\), should be y, cache"),
        (GELU.replace("    return dx\n", "    dy = dx\n"), "gelu_backward returns NoneType, should be dx"),
        (
            GELU.replace("    return dx\n", "    return 0 * dx, dx\n"),
            r"gelu_backward returns a tuple of 2: .*, should be dx",
        ),
        (
            GELU.replace("    return dx\n", "    return [[1, 2], [3]], dx\n"),
            "gelu_backward returns a tuple of 2: a list",
        ),
        (
            ATTENTION.replace("@ q, dv", "@ q"),
            r"attention_backward returns a tuple of 2: an array \(.*\), an array \(.*\), should be dq, dk, dv",
        ),
        (
            only(RIGHT, "linear").replace("return dx, dw, db", "return dx, None, db"),
            r"linear_backward returns a tuple of 3: an array .*, NoneType, .*, should be dx, dw, db",
        ),
    ],
)
def test_wrong_return_value_is_described(my_ops, source, wrong):
    (verdict,) = my_ops(source)
    assert re.fullmatch(rf"{wrong}.* \(my_ops.py, line \d+\)", verdict.wrong), verdict.wrong


@pytest.mark.parametrize(
    ("line", "wrong"),
    [
        ("raise AssertionError", "AssertionError"),
        ("assert False, 'not yet'", "AssertionError: not yet"),
        ("raise SystemExit(3)", "SystemExit: 3"),
    ],
)
def test_raising_function_is_named_with_its_line(my_ops, line, wrong):
    (verdict,) = my_ops(f"def gelu_forward(x):\n    {line}\n")
    assert verdict.wrong == f"the forward function fails: gelu_forward: {wrong} (my_ops.py, line 2)"


def test_gradient_of_a_missing_bias_is_wrong(my_ops):
    (verdict,) = my_ops(only(RIGHT, "linear").replace("db = None if b is None else", "db ="))
    assert verdict.wrong == "db: an answer where None is right: there is no b"


def test_half_an_operation_is_judged(my_ops):
    """A lone backward gets our forward's cache; a lone forward may cache anything."""
    forward, _ = only(RIGHT, "gelu").split("\ndef gelu_backward")
    (verdict,) = my_ops(forward)
    assert (verdict.wrong, verdict.cases) == (None, 260)
    (verdict,) = my_ops("def gelu_backward(dy, slope):\n    return dy * slope\n")
    assert (verdict.wrong, verdict.cases) == (None, 260)
