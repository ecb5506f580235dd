"""The allowed imports, checked in every module's syntax tree, and the modules that `import numpy_gpt` loads."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FOLDERS = ("numpy_gpt", "torch_gpt", "parity_tests", "benchmarks")
ARROWS = {  # folder -> the folders it may import; tests may import what they test
    "numpy_gpt": {"numpy_gpt"},
    "torch_gpt": {"numpy_gpt", "torch_gpt"},
    "benchmarks": {"numpy_gpt", "torch_gpt", "benchmarks"},
    "parity_tests": set(FOLDERS),
}
ROOMS = {  # folder -> its layers, lowest first; a module may import its own layer and those below
    "numpy_gpt": (
        *("typing", "errors", "config", "explain", "plain", "io", "parallel", "random", "ops", "parameters"),
        *("block", "model", "trace", "optim", "decoding", "encodings", "tokenizer", "data", "tokens", "train"),
        *("console", "weights", "runs"),
        *("book", "explore", "cli", "__main__"),
    ),
    "torch_gpt": (
        *(
            "model",
            "decoding",
            "weights",
            "train",
            "launchers",
            "processes",
            "parallel",
            "chapter5",
            "explore",
            "cli",
            "__main__",
        ),
    ),
    "benchmarks": (
        *("environment", "cards", "machine", "timing", "results", "contenders", "settings", "jobs", "peak_memory"),
        *("measure", "compare", "cli", "__main__"),
    ),
    "parity_tests": ("profiles", "judge", "tools", "__main__", "conftest", "test_"),
}
MATHS = ("ops", "model", "block", "optim", "random", "plain", "parallel", "decoding", "trace")
REFERENCE_NEEDS = (  # all that torch_gpt may have of numpy_gpt: names, settings, texts, commands, and no arithmetic
    *(f"numpy_gpt.{part}" for part in ("cli", "config", "errors", "io", "runs.settings", "typing", "weights")),
    "numpy_gpt.parameters.check_state",  # validates an optimiser's state
    "numpy_gpt.book.chapter5.replay",  # the chapter's order; the arithmetic is passed in
    "numpy_gpt.train.check_finite_step",  # checks a loss and a norm computed by torch
    "numpy_gpt.runs.pretrain.MakeLearner",  # how a backend makes its learner
)


def modules(folder):
    """(dotted name, path) of every module under a folder, if it exists."""
    for path in sorted((ROOT / folder).rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        yield ".".join(parts[:-1] if parts[-1] == "__init__" else parts), path


def imports(name, path):
    """(name, line) of every import of a module, also in functions: "a.b" for `import a.b` and `from a import b`."""
    package = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
    for node in ast.walk(ast.parse(path.read_text(), path)):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            source = ".".join([*base, *([node.module] if node.module else [])])
            yield from ((f"{source}.{alias.name}", node.lineno) for alias in node.names)


def within(what, *names):
    """Whether this is one of the named modules or lies in one."""
    return any(what == name or what.startswith(f"{name}.") for name in names)


def complaints(folder, wrong):
    """file:line of every import for which the predicate holds."""
    found = [(path, line, what) for name, path in modules(folder) for what, line in imports(name, path) if wrong(what)]
    return [f"{path.relative_to(ROOT)}:{line} imports {what}" for path, line, what in found]


@pytest.mark.parametrize("folder", FOLDERS)
def test_folders_import_in_one_direction(folder):
    forbidden = set(FOLDERS) - ARROWS[folder]
    found = complaints(folder, lambda what: within(what, *forbidden))
    assert not found, found


def room(folder, name):
    """The number of a module's layer; the folder's __init__ may import all."""
    rooms, parts = ROOMS[folder], name.split(".")
    if len(parts) == 1:
        return len(rooms)
    return next(
        i for i, layer in enumerate(rooms) if parts[1] == layer or (layer == "test_" and parts[1].startswith(layer))
    )


def arrows(folder):
    """(module, imported module of the same folder, line) for every import, also in functions."""
    known = dict(modules(folder))
    for name, path in known.items():
        for what, line in imports(name, path):
            target = next((t for t in (what, what.rpartition(".")[0]) if t in known), None)
            if target not in (None, name):
                yield name, target, line


@pytest.mark.parametrize("folder", FOLDERS)
def test_no_module_imports_a_higher_layer(folder):
    up = [
        f"{name}:{line} imports {target}"
        for name, target, line in arrows(folder)
        if room(folder, target) > room(folder, name) and target != folder
    ]
    assert not up, up


@pytest.mark.parametrize("folder", FOLDERS)
def test_no_import_cycles(folder):
    ahead = {}
    for name, target, _ in arrows(folder):
        if target != folder:
            ahead.setdefault(name, set()).add(target)
    done, path = set(), []

    def walk(name):
        assert name not in path, " imports ".join([*path[path.index(name) :], name])
        if name not in done:
            path.append(name)
            for target in sorted(ahead.get(name, ())):
                walk(target)
            path.pop()
            done.add(name)

    for name in sorted(ahead):
        walk(name)
    assert done, "this test sees no imports at all"


def test_no_test_module_is_imported():
    for folder in FOLDERS:
        found = complaints(folder, lambda what: what.startswith("parity_tests.test_"))
        assert not found, found


def test_numpy_gpt_never_imports_torch():
    """Not even inside a function."""
    found = complaints("numpy_gpt", lambda what: within(what, "torch"))
    assert not found, found
    assert any(complaints("torch_gpt", lambda what: within(what, "torch"))), "this test sees no imports at all"


def of_the_maths(what):
    """Whether this is part of numpy_gpt that torch_gpt must not import."""
    return within(what, "numpy_gpt") and not within(what, *REFERENCE_NEEDS)


def test_reference_imports_no_maths_of_numpy_gpt():
    found = complaints("torch_gpt", of_the_maths)
    assert not found, found
    for part in (
        "",
        ".GPT",
        ".ops.gelu",
        ".decoding.softmax",
        ".runs.learner.NumpyLearner",
        ".book.chapter5.NumpyChapter",
        ".parallel.sums",
        ".parameters.initial_parameters",
    ):
        assert of_the_maths(f"numpy_gpt{part}"), part
    unused = [name for name in REFERENCE_NEEDS if not complaints("torch_gpt", lambda what, n=name: within(what, n))]
    assert not unused, f"torch_gpt does not need {unused}"
    for part in MATHS:
        assert (ROOT / "numpy_gpt" / part).exists() or (ROOT / "numpy_gpt" / f"{part}.py").exists(), f"{part} has moved"


def test_operations_import_no_model_code():
    wrong = [f"numpy_gpt.{part}" for part in {"config", "parameters", *MATHS} - {"parallel"}]
    found = complaints("numpy_gpt/ops", lambda what: within(what, *wrong))
    assert not found, found
    assert len(list(modules("numpy_gpt/ops"))) > 7, "the operations have moved"


def test_plain_imports_only_numpy():
    """It imports numpy, math and names for annotations: nothing else has to be read first."""
    found = {what for what, _ in imports("numpy_gpt.plain", ROOT / "numpy_gpt/plain.py")}
    types = {
        "typing.Any",
        "numpy_gpt.config.GPTConfig",
        *(f"numpy_gpt.typing.{n}" for n in ("Array", "Float", "Params")),
    }
    assert found == {"math", "numpy"} | types


def test_optimiser_imports_no_model():
    wrong = ("numpy_gpt.model", "numpy_gpt.block", "numpy_gpt.ops", "numpy_gpt.config")
    found = [
        f"optim.py:{line}"
        for what, line in imports("numpy_gpt.optim", ROOT / "numpy_gpt/optim.py")
        if within(what, *wrong)
    ]
    assert not found, found


def test_all_randomness_comes_from_generator():
    """np.random is used only in generator.py, as the engine; the standard library's random nowhere.

    The page's secret address is not a draw: it must not be repeatable.
    """
    found = complaints("numpy_gpt", lambda what: within(what, "random", "secrets", "numpy.random"))
    found = [each for each in found if not re.fullmatch(r"numpy_gpt/explore/server\.py:\d+ imports secrets", each)]
    for _, path in modules("numpy_gpt"):
        if path.name == "generator.py":
            continue
        for node in ast.walk(ast.parse(path.read_text(), path)):
            if isinstance(node, ast.Attribute) and node.attr == "random" and ast.unparse(node.value) in ("np", "numpy"):
                found.append(f"{path.relative_to(ROOT)}:{node.lineno} uses np.random")
    assert not found, found


def test_import_loads_only_numpy():
    """Other packages would take about a second to load or may not be installed."""
    script = (
        "import sys; import numpy, numpy.random; before = set(sys.modules); import numpy_gpt; "
        "print(*sorted({name.partition('.')[0] for name in set(sys.modules) - before}))"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    loaded = set(done.stdout.split())
    assert "numpy_gpt" in loaded
    foreign = loaded - sys.stdlib_module_names - {"numpy", "numpy_gpt"}
    assert not foreign, f"import numpy_gpt loads {sorted(foreign)}"


@pytest.mark.parametrize(
    ("name", "source", "want"),
    [
        ("a.b", "import x.y", ["x.y"]),
        ("a.b", "from x import y, z", ["x.y", "x.z"]),
        ("a.b", "from . import c", ["a.c"]),
        ("a.b.c", "from ..d import e", ["a.d.e"]),
        ("a.b", "def f():\n    from x import y as z", ["x.y"]),
    ],
)
def test_imports_reads_every_form(name, source, want, tmp_path):
    path = tmp_path / "module.py"
    path.write_text(source)
    assert [what for what, _ in imports(name, path)] == want


def test_laws_run_without_torch():
    """All are collected and a few are run."""
    code = """
import sys, pytest
sys.modules["torch"] = None
sys.exit(pytest.main([sys.argv[1], "-q", "-p", "no:cacheprovider", "-k", "first_query or keeps_the_mean or log_v"]))
"""
    path = Path(__file__).with_name("test_laws.py")
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "9 passed" in done.stdout
