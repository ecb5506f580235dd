"""Bring your own backward: runs the operation suite on functions that a user wrote.

The user's file defines any of the functions in numpy_gpt.ops, under the same names and signatures. They replace ours,
and every output and gradient is compared with torch's within the same budget. A wrong tensor is then compared with
what each fault of the museum gives for the same inputs: an equal result is the diagnosis.
"""

import difflib
import importlib.util
import inspect
import math
import re
import sys
import traceback
import warnings
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from unittest import mock

import hypothesis
import numpy as np
import pytest
from hypothesis import Phase, settings
from hypothesis.errors import Flaky, NoSuchExample

from numpy_gpt import plain
from parity_tests.judge import compare
from parity_tests.judge.operations import OPERATIONS, check_tensor, in_place, names, torch_answers, unchanged
from parity_tests.judge.progress import unseen
from parity_tests.judge.snippet import snippet
from parity_tests.tools.museum import FAULTS

CASES = {"float64": 200, "float32": 60}
"""Cases drawn per operation, by dtype; the same in every run."""


RETURNS = {
    "linear_backward": ("dx", "dw", "db"),
    "layernorm_backward": ("dx", "dscale", "dshift"),
    "embedding_backward": ("dw",),
    "position_embedding_backward": ("dx", "dw"),
    "attention_backward": ("dq", "dk", "dv"),
    "cross_entropy_forward": ("loss", "cache"),
    "cross_entropy_backward": ("dlogits",),
    "dropout_mask": ("mask",),
}
"""The results of functions that do not return just (y, cache) or dx."""

UNSTEADY = "gives different answers for the same input: it may keep state between calls, or draw random numbers"


@dataclass(frozen=True)
class Verdict:
    """The verdict on one operation. wrong: None, or the error, starting with the tensor; hint: a possible cause.

    seen: the case that showed the cause, if not the smallest.
    """

    operation: str
    functions: tuple[str, ...]
    cases: int
    wrong: str | None = None
    case: Any = None
    hint: str | None = None
    seen: str | None = None
    sizes: dict[str, int] = field(default_factory=dict)
    """The largest sizes tried."""
    code: str = ""
    """Python that reproduces the wrong case."""


@dataclass(frozen=True)
class Wrong:
    """The first wrong tensor on given inputs. got and want: None if there was no answer to compare."""

    tensor: str
    message: str
    got: Any = None
    want: Any = None


def signatures():
    """The calls of all functions that a file may define, with the textbook's arguments (ours may take more)."""
    calls = {name: inspect.signature(getattr(plain, name)).parameters for name in names()}
    return [f"{name}({', '.join(parameters)})" for name, parameters in calls.items()]


def read(path):
    """The file's functions named as in numpy_gpt.ops, and other functions' names -> the name probably meant.

    Raises ValueError if the file cannot be run or has no such functions.
    """
    path = Path(path)
    spec = importlib.util.spec_from_file_location("my_ops", path)
    if spec is None or spec.loader is None or not path.is_file():
        raise ValueError(f"{path} is not a Python file: give one with functions like layernorm_backward")
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(path.parent.resolve()))  # it may import modules next to it
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        raise ValueError(f"{path} does not run: {_where(error, path)}") from error
    finally:
        sys.path.pop(0)
    functions = {name: getattr(module, name) for name in names() if callable(getattr(module, name, None))}
    others = {
        other: near[0]
        for other, value in vars(module).items()
        if other not in functions
        and inspect.isfunction(value)
        and value.__module__ == module.__name__
        and (near := difflib.get_close_matches(other, names(), n=1, cutoff=0.85))
    }
    if not functions:
        meant = "".join(f"; for {other}, did you mean {near}?" for other, near in others.items())
        raise ValueError(f"{path} has none of the functions that can be judged: {', '.join(names())}{meant}")
    return functions, others


def _where(error, path):
    """An exception in one line, with the last line number of the file in its traceback."""
    frames = traceback.extract_tb(error.__traceback__)
    lines = [frame.lineno for frame in frames if Path(frame.filename).resolve() == path.resolve()]
    place = f" ({path.name}, line {lines[-1]})" if lines else ""
    said = " ".join(str(error).split())
    return f"{type(error).__name__}{said and ': '}{said}{place}"


class StudentError(Exception):
    """A user's function fails or returns the wrong kind of result; the message is for its author."""


def called(name, function, path):
    """Wrap a function for the suite: our operations are back in place while it runs, and its result is checked.

    The wrapper raises StudentError.
    """
    ours = {own: getattr(module, own) for own, (module, _) in names().items()}
    wanted = RETURNS.get(name, ("y", "cache") if name.endswith("_forward") else ("dx",))

    def call(*args, **kwargs):
        try:
            with in_place(ours):
                answer = function(*args, **kwargs)
        except (Exception, SystemExit) as error:
            stage = "backward" if name.endswith("_backward") else "forward"
            raise StudentError(f"the {stage} function fails: {name}: {_where(error, path)}") from error
        parts = (answer,) if len(wanted) == 1 else answer
        if not isinstance(parts, tuple | list) or len(parts) != len(wanted) or not all(map(_fits, wanted, parts)):
            line = f" ({path.name}, line {function.__code__.co_firstlineno})" if hasattr(function, "__code__") else ""
            raise StudentError(f"{name} returns {_described(answer)}, should be {', '.join(wanted)}{line}")
        return answer

    return call


def _fits(tensor, part):
    return tensor == "cache" or isinstance(part, np.ndarray | np.number | float) or (tensor == "db" and part is None)


def _described(answer):
    if isinstance(answer, tuple | list):
        return (
            f"a {type(answer).__name__} of {len(answer)}: {', '.join(map(_described, answer))}" if answer else "nothing"
        )
    return f"an array {answer.shape}" if isinstance(answer, np.ndarray) else type(answer).__name__


def first_wrong(operation, inputs, backward=True):
    """The first tensor of the operation now in numpy_gpt.ops that differs from torch's, outputs first; or None."""
    one = OPERATIONS[operation]
    wants, scales, got = torch_answers(operation, inputs), one.scales(**inputs), {}
    dtype = inputs[one.leaves[0]].dtype
    stage = "forward"
    try:
        with unchanged(operation, inputs):
            got, cache = one.forward(inputs)
            got = dict(got)
        if backward and not _wrong_in(operation, got, wants, scales, dtype):
            stage = "backward"
            with unchanged(operation, inputs):
                got |= one.backward(inputs, cache)
    except (AssertionError, StudentError) as error:
        return Wrong(stage, str(error))
    except Exception as error:
        return Wrong(stage, f"the {stage} function fails: {error!r}")
    return _wrong_in(operation, got, wants, scales, dtype)


def _wrong_in(operation, got, wants, scales, dtype):
    for want in wants.values():
        for tensor in want:
            if tensor not in got:
                continue
            answer = want[tensor].astype(dtype)
            try:
                check_tensor(tensor, got[tensor], answer, scales[tensor])
            except AssertionError as error:
                return Wrong(tensor, str(error), np.asarray(got[tensor]), answer)
    asked = {tensor for want in wants.values() for tensor in want}
    extra = next((tensor for tensor in got if tensor not in asked), None)
    return None if extra is None else Wrong(extra, f"{extra}: an answer where None is right: there is no {extra[1:]}")


def judge(functions, operation, path=Path("my_ops.py"), watch=unseen):
    """Judge one operation with these functions replacing ours. watch: progress.counted or similar."""
    with watch(f"judging {operation}", sum(CASES.values())) as tick:
        verdict = _judge(functions, operation, path, tick)
    if verdict.wrong is None:
        return verdict
    return replace(verdict, code=snippet(operation, verdict.case, verdict.wrong, verdict.functions, path))


def _judge(functions, operation, path, tick):
    one = OPERATIONS[operation]
    own = tuple(name for name in functions if names()[name][1] == operation)
    has_backward = any(name.endswith("_backward") for name in own)
    backward = has_backward or not any(name.endswith("_forward") for name in own)  # with their cache, or ours

    theirs = {name: called(name, functions[name], path) for name in own}
    failing, sizes = [], {}

    def wrong(case):
        tick()
        sizes.update({axis: max(n, sizes.get(axis, 0)) for axis, n in case.shape.items()})
        with in_place(theirs), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # only wrong numbers count
            found = first_wrong(operation, one.inputs(case), backward)
        if found is not None:
            failing.append(case)
        return found

    cases = 0
    with mock.patch.object(compare, "record"):
        for dtype, count in CASES.items():
            how = settings(
                max_examples=count,
                derandomize=True,
                database=None,
                deadline=None,
                phases=(Phase.generate, Phase.shrink),
                suppress_health_check=list(hypothesis.HealthCheck),
            )
            try:
                smallest = hypothesis.find(one.cases(dtype), lambda case: wrong(case) is not None, settings=how)
            except (NoSuchExample, Flaky):
                if failing:  # but correct on a second call
                    return Verdict(operation, own, cases, UNSTEADY, failing[-1])
                cases += count
                continue
            found, *again = (wrong(smallest) for _ in range(10))
            if found is None or any(repeat is None or repeat.message != found.message for repeat in again):
                return Verdict(operation, own, cases, UNSTEADY, smallest)
            hint, case, shown = diagnose(operation, wrong, smallest, found)
            seen = None if hint is None or case == smallest else f"{in_words(shown.message)}; of {case}"
            return Verdict(operation, own, cases, in_words(found.message), smallest, hint, seen)
    return Verdict(operation, own, cases, sizes=sizes)


def in_words(message):
    """The judge's message, reworded to say whose number is which."""
    message = re.sub(r"np\.\w+\((\S+)\)", r"\1", message)
    message = re.sub(r": (\S+) vs (\S+), ", r": yours \1, torch's \2, ", message)
    return re.sub(r", (nan|inf)x the budget$", "", message)


def diagnose(operation, wrong, case, smallest):
    """A possible cause, the case that shows it and the Wrong found there; None, case and smallest if unknown.

    The cause is a fault of the museum that gives the same numbers, or else a relation to the right answer. The museum's
    cases are tried first, if they show the same tensor wrong. The smallest case is a last resort, since much is equal
    there by chance: with two features every wrong gradient of LayerNorm is a multiple of the right one.
    """
    found = [(case, smallest)]
    for fault in FAULTS:
        if fault.operation != operation:
            continue
        theirs_in = fault.check.args[1]
        theirs = wrong(theirs_in)
        if theirs is None or theirs.tensor != smallest.tensor:
            continue
        found.insert(0, (theirs_in, theirs))
        with pytest.MonkeyPatch.context() as patch:
            fault.apply(patch)
            made = first_wrong(operation, OPERATIONS[operation].inputs(theirs_in))
        if made is not None and made.tensor == theirs.tensor and _same(made, theirs):
            return f"{fault.what}: {fault.fix}" if fault.fix else fault.what, theirs_in, theirs
    hints = ((relation(operation, *shown), *shown) for shown in found[:-1] or found)
    return next((hint for hint in hints if hint[0]), (None, case, smallest))


def _same(one, other):
    """Whether two wrong answers are equal up to rounding, and far closer to each other than to the truth."""
    if one.got is None or other.got is None:
        return False
    if one.got.shape != other.got.shape or one.got.dtype != other.got.dtype:
        return False
    if one.got.shape != one.want.shape or one.got.dtype != one.want.dtype:
        return one.got.shape == other.got.shape and np.allclose(one.got, other.got)
    between, apart = np.abs(one.got - other.got).max(), np.abs(one.got - one.want).max()
    return bool(between <= 1e-6 * apart)


def relation(operation, case, wrong):
    """How a wrong tensor relates to the right one, or to another of the operation's; None if unknown."""
    got, want = wrong.got, wrong.want
    if "wrote into its argument" in wrong.message:
        return "an argument is changed in place: others still need it, so work on a copy"
    if got is None:
        return None
    inputs = OPERATIONS[operation].inputs(case)
    for other, answer in next(iter(torch_answers(operation, inputs).values())).items():
        if other != wrong.tensor and answer.shape == got.shape and got.size > 1 and answer.any() and _near(got, answer):
            return f"this is {other}: returned in another order?"
    if got.shape != want.shape:
        turned = got.ndim >= 2 and got.shape == want.shape[::-1]
        return "transposed: gradients have the shape of what they are the gradient of" if turned else None
    if got.dtype != want.dtype:
        widened = (got.dtype, want.dtype) == (np.float64, np.float32)
        return "np.sqrt of an int is float64 and widens the rest: use math.sqrt" if widened else None
    if not np.isfinite(got).all():
        softmax = operation in ("attention", "cross_entropy")
        return "not finite: exp overflows unless the row's largest number is subtracted first" if softmax else None
    if (operation, wrong.tensor) == ("layernorm", "dx") and got.size > 2 and _near(_projected(got, inputs["x"]), want):
        formula = "dx = rstd · (g − mean(g) − x̂ · mean(g · x̂)) with g = dy · scale"
        return f"right except for its parts along 1 and along x̂, which must be subtracted: {formula}"
    for name, term in terms(operation, inputs).get(wrong.tensor, {}).items():
        for factor, words in ((2, "has the wrong sign"), (1, "is missing")):
            if np.abs(term).max() > 1e-6 * np.abs(want).max() and _near(got + factor * term, want):
                return f"the term {name} {words}"
    where = np.abs(want) > 1e-9 * max(float(np.abs(want).max()), 1e-300)
    if not where.any() or not got.any():
        return "all zeros" if want.any() else None
    ratios = got[where] / want[where]
    factor = float(np.median(ratios))
    if got.size > 1 and np.abs(ratios - factor).max() <= 1e-6 * abs(factor):
        return "the sign is reversed" if math.isclose(factor, -1, rel_tol=1e-6) else _factor(factor)
    if got.size > 2 and np.allclose(np.sort(got, axis=None), np.sort(want, axis=None), rtol=1e-9):
        return "the right numbers in another order: reshaped where it should be transposed?"
    return None


def terms(operation, i):
    """Tensor -> formula -> value of the terms added or subtracted in the right answer."""
    i = {
        name: a.astype(np.float64) if isinstance(a, np.ndarray) and a.dtype.kind == "f" else a for name, a in i.items()
    }
    if operation == "linear":
        return {} if i["b"] is None else {"y": {"b": i["b"]}}
    if operation == "position_embedding":
        return {"y": {"w": i["w"][i["start"] : i["start"] + i["x"].shape[1]]}}
    if operation == "gelu":
        c = math.sqrt(2 / math.pi)
        t = np.tanh(c * (i["x"] + 0.044715 * i["x"] ** 3))
        return {"dx": {"½ x (1 − t²) u′": i["dy"] * 0.5 * i["x"] * (1 - t**2) * c * (1 + 3 * 0.044715 * i["x"] ** 2)}}
    if operation == "layernorm":
        x, g = i["x"] - i["x"].mean(axis=-1, keepdims=True), i["dy"] * i["scale"]
        rstd = 1 / np.sqrt((x**2).mean(axis=-1, keepdims=True) + compare.LAYERNORM_EPS)
        along = -(x * rstd) * (g * x * rstd).mean(axis=-1, keepdims=True) * rstd
        return {
            "y": {"shift": i["shift"]},
            "dx": {"mean(g)": -g.mean(axis=-1, keepdims=True) * rstd, "x̂ · mean(g · x̂)": along},
        }
    if operation == "cross_entropy":
        onehot = np.arange(i["logits"].shape[-1]) == i["targets"][..., None]
        return {"dlogits": {"[v = target] / N": -i["dloss"] * onehot / i["targets"].size}}
    if operation == "attention":
        q, k, mask = i["q"], i["k"], 1.0 if i["mask"] is None else i["mask"]
        (T, HS), S = q.shape[-2:], k.shape[-2]
        s = np.where(np.arange(S) <= np.arange(T)[:, None] + S - T, q @ k.mT / math.sqrt(HS), -np.inf)
        p = np.exp(s - s.max(axis=-1, keepdims=True))
        p /= p.sum(axis=-1, keepdims=True)
        ds = -p * (p * (i["dy"] @ i["v"].mT) * mask).sum(axis=-1, keepdims=True) / math.sqrt(HS)
        return {"dq": {"Σ dp · p": ds @ k}, "dk": {"Σ dp · p": ds.mT @ q}}
    return {}


def _near(one, other):
    return np.allclose(one, other, rtol=1e-6, atol=1e-9 * np.abs(other).max())


def _projected(dx, x):
    """dx without its parts along 1 and along x̂, as in LayerNorm's backward."""
    centred = x - x.mean(axis=-1, keepdims=True)
    x_hat = centred / np.sqrt((centred**2).mean(axis=-1, keepdims=True) + compare.LAYERNORM_EPS)
    return dx - dx.mean(axis=-1, keepdims=True) - x_hat * (dx * x_hat).mean(axis=-1, keepdims=True)


def _factor(factor):
    larger = factor if abs(factor) >= 1 else 1 / factor
    way = "large" if abs(factor) >= 1 else "small"
    return f"every number is {larger:.6g} times too {way}: a count or a scale is missing or applied twice"


def judge_file(path, tell=lambda line: None, watch=unseen):
    """Yield a Verdict for every operation that the file has functions for, in the suite's order.

    tell receives a line for every function whose name is close to a judged one's; watch as in judge.
    """
    functions, others = read(path)
    for name, near in others.items():
        tell(f"not judged: {name} (did you mean {near}?)")
    for operation in OPERATIONS:
        if any(names()[name][1] == operation for name in functions):
            yield judge(functions, operation, Path(path), watch)
