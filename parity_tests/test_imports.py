"""The arrows of the design, read from every module's syntax tree; and what `import numpy_gpt` loads, in a process."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FOLDERS = ("numpy_gpt", "torch_gpt", "parity_tests", "benchmarks")
ARROWS = {  # who may import whom; a test may import what it tests
    "numpy_gpt": {"numpy_gpt"},
    "torch_gpt": {"numpy_gpt", "torch_gpt"},
    "benchmarks": {"numpy_gpt", "torch_gpt", "benchmarks"},
    "parity_tests": set(FOLDERS),
}
MATHS = ("ops", "model", "block", "optim", "random", "box_muller")  # block is half of what model was
REFERENCE_NEEDS = (  # all that torch_gpt may have of numpy_gpt: names, settings, texts, commands, and no arithmetic
    *(f"numpy_gpt.{part}" for part in ("cli", "cli_weights", "config", "errors", "flags", "formats")),
    *(f"numpy_gpt.{part}" for part in ("moments", "outermost", "paths", "run", "typing", "weights")),
    "numpy_gpt.chapter5.replay",  # the order of the chapter; the arithmetic is its argument
    "numpy_gpt.train.check_finite_step",  # of a loss and a norm that torch has computed: a comparison and a sentence
)


def modules(folder):
    """(dotted name, path) of every module under a folder; none where the folder is not there yet."""
    for path in sorted((ROOT / folder).rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        yield ".".join(parts[:-1] if parts[-1] == "__init__" else parts), path


def imports(name, path):
    """(what, line) of every import of a module, inside functions too: "a.b" for `import a.b` and `from a import b`."""
    package = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
    for node in ast.walk(ast.parse(path.read_text(), path)):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            source = ".".join([*base, *([node.module] if node.module else [])])
            yield from ((f"{source}.{alias.name}", node.lineno) for alias in node.names)


def within(what, *names):
    """Is this module, or something in it, among the named?"""
    return any(what == name or what.startswith(f"{name}.") for name in names)


def complaints(folder, wrong):
    """file:line of every import that the predicate calls wrong."""
    found = [(path, line, what) for name, path in modules(folder) for what, line in imports(name, path) if wrong(what)]
    return [f"{path.relative_to(ROOT)}:{line} imports {what}" for path, line, what in found]


@pytest.mark.parametrize("folder", FOLDERS)
def test_arrows_between_the_folders_run_one_way(folder):
    forbidden = set(FOLDERS) - ARROWS[folder]
    found = complaints(folder, lambda what: within(what, *forbidden))
    assert not found, found


def test_numpy_gpt_never_imports_torch():
    """Not inside a function either."""
    found = complaints("numpy_gpt", lambda what: within(what, "torch"))
    assert not found, found
    assert any(complaints("torch_gpt", lambda what: within(what, "torch"))), "this test sees no imports at all"


def of_the_maths(what):
    """Is this something of numpy_gpt that torch_gpt has no need of?"""
    return within(what, "numpy_gpt") and not within(what, *REFERENCE_NEEDS)


def test_the_reference_uses_none_of_the_maths_it_judges():
    found = complaints("torch_gpt", of_the_maths)
    assert not found, found
    for part in (
        "",
        ".GPT",
        ".ops.gelu",
        ".decoding.softmax",
        ".learner.NumpyLearner",
        ".chapter5.NumpyChapter",
        ".sums",
    ):
        assert of_the_maths(f"numpy_gpt{part}"), part
    unused = [name for name in REFERENCE_NEEDS if not complaints("torch_gpt", lambda what, n=name: within(what, n))]
    assert not unused, f"torch_gpt does not need {unused}"
    for part in MATHS[:2]:
        assert (ROOT / "numpy_gpt" / part).exists() or (ROOT / "numpy_gpt" / f"{part}.py").exists(), f"{part} has moved"


def test_operations_know_neither_each_other_nor_names_nor_configurations():
    wrong = [f"numpy_gpt.{part}" for part in ("config", *MATHS)]
    found = complaints("numpy_gpt/ops", lambda what: within(what, *wrong))
    assert not found, found
    assert len(list(modules("numpy_gpt/ops"))) > 7, "the operations have moved"


def test_the_textbook_stands_alone():
    """numpy and math, and names for annotations: nothing else has to be read first."""
    found = {what for what, _ in imports("numpy_gpt.plain", ROOT / "numpy_gpt/plain.py")}
    types = {
        "typing.Any",
        "numpy_gpt.config.GPTConfig",
        *(f"numpy_gpt.typing.{n}" for n in ("Array", "Float", "Params")),
    }
    assert found == {"math", "numpy"} | types


def test_the_optimiser_knows_no_model():
    wrong = ("numpy_gpt.model", "numpy_gpt.block", "numpy_gpt.ops", "numpy_gpt.config")
    found = [
        f"optim.py:{line}"
        for what, line in imports("numpy_gpt.optim", ROOT / "numpy_gpt/optim.py")
        if within(what, *wrong)
    ]
    assert not found, found


def test_every_draw_comes_from_a_generator():
    """np.random in random.py only, where it is the engine; and the standard library's random nowhere."""
    found = complaints("numpy_gpt", lambda what: within(what, "random", "secrets", "numpy.random"))
    for _, path in modules("numpy_gpt"):
        if path.name == "random.py":
            continue
        for node in ast.walk(ast.parse(path.read_text(), path)):
            if isinstance(node, ast.Attribute) and node.attr == "random" and ast.unparse(node.value) in ("np", "numpy"):
                found.append(f"{path.relative_to(ROOT)}:{node.lineno} uses np.random")
    assert not found, found


def test_importing_numpy_gpt_loads_numpy_and_nothing_heavier():
    """Anything beyond the standard library, numpy and itself is a second's wait, or a package that may not be there."""
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
def test_the_reader_of_imports_reads_every_form(name, source, want, tmp_path):
    path = tmp_path / "module.py"
    path.write_text(source)
    assert [what for what, _ in imports(name, path)] == want


def test_the_laws_run_without_torch():
    """Collected as a whole; a few of them are run."""
    code = """
import sys, pytest
sys.modules["torch"] = None
sys.exit(pytest.main([sys.argv[1], "-q", "-p", "no:cacheprovider", "-k", "first_query or keeps_the_mean or log_v"]))
"""
    path = Path(__file__).with_name("test_laws.py")
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "9 passed" in done.stdout
