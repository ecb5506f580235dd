"""Short trials of interrupts, errors, signals and races wherever a run writes, and of their power to detect faults."""

import os
import shutil
import sys
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
from click.testing import CliRunner

from numpy_gpt.cli import weights as cli_weights
from numpy_gpt.io import files
from numpy_gpt.random.generator import Generator
from numpy_gpt.runs import folder as run
from numpy_gpt.weights.checkpoint import save_params
from parity_tests.__main__ import main
from parity_tests.tools.chains import Chains
from parity_tests.tools.file_operations import watched
from parity_tests.tools.interrupts import LONG, do, plan
from parity_tests.tools.races import Races
from parity_tests.tools.saves import Saves
from parity_tests.tools.trials import DifferentError, command, outcome


@pytest.fixture(scope="module")
def saves(tmp_path_factory):
    return Saves(tmp_path_factory.mktemp("saves"))


@pytest.fixture(scope="module")
def races(tmp_path_factory):
    return Races(tmp_path_factory.mktemp("races"))


def operation(saves, run, what):
    """The number of the first file operation that begins with `what`."""
    return next(number for number, seen in enumerate(saves.seen(run)) if seen.startswith(what))


def test_save_interrupted_at_any_bytecode_loses_nothing(saves):
    endings = [saves.trial(name) for name in saves.bytecodes(12, seed=0)]
    assert endings.count("not reached") < 4


def test_interrupt_after_a_file_operation_loses_nothing(saves):
    for name in saves.operations(every=307, seed=0):
        assert saves.trial(name) != "not reached"


def test_error_at_a_file_operation_loses_nothing(saves):
    for name in saves.errors(every=211, seed=0):
        assert saves.trial(name) != "not reached"


def test_repeatedly_stopped_run_ends_identically(tmp_path):
    chains = Chains(tmp_path)
    for name in chains.chains(2, seed=0):
        chains.trial(name)
        got, want = outcome(chains.stage.run), chains.stage.want
        assert [part for part in got | want if got.get(part) != want.get(part)] == [], name  # names only: short output


def test_one_of_concurrent_commands_gets_the_folder(races):
    for name in races.races(8, seed=0):
        codes = [int(code) for code in races.trial(name).removeprefix("exit codes ").split(", ")]
        assert set(codes) <= {0, 2, 130}, f"{name}: {codes}"
        one_folder = name.split()[1] in ("pretrain_with_one_--out", "import", "export", "import_beside_pretrain")
        assert codes.count(0) == 1 if one_folder else 0 in codes, f"{name}: {codes}"


@pytest.mark.slow
@pytest.mark.parametrize("kind", LONG)
def test_tenth_of_the_trials(kind):
    found = do(plan(kind, 10 if LONG[kind] == 1 else LONG[kind] // 10, 1))
    assert not found.faults, "\n".join(found.faults[:5])


def test_cleanup_deleting_the_new_state_is_detected(saves, monkeypatch):
    def forgetful(config, params, path, **kwargs):
        try:
            save_params(config, params, path, **kwargs)
        except BaseException:
            for file in Path(path).glob("training-*"):
                file.unlink()
            raise

    monkeypatch.setattr(run, "save_params", forgetful)
    number = operation(saves, "new", "replace run/checkpoint/model.safetensors")
    with pytest.raises(DifferentError, match="training state, is missing"):
        saves.trial(f"operations new {number} 0")


def test_unrestored_random_state_is_detected(saves, monkeypatch):
    monkeypatch.setattr(Generator, "set_state", lambda self, state: None)
    with pytest.raises(DifferentError, match="differs from the undisturbed run"):
        saves.trial("bytecodes new ours 2 100 0")


def test_unswept_leftovers_are_detected(saves, monkeypatch):
    monkeypatch.setattr(files, "sweep", lambda target: None)
    monkeypatch.setattr(run, "sweep_folder", lambda folder: None)
    monkeypatch.setattr("numpy_gpt.weights.checkpoint.sweep_folder", lambda folder: None)
    number = operation(saves, "new", "rmdir run/best/.model")
    with pytest.raises(DifferentError, match="left over"):
        saves.trial(f"errors new {number} EIO once")


def test_error_ending_in_a_traceback_is_detected(saves, monkeypatch):
    @contextmanager
    def unworded(path):
        try:
            yield
        except OSError as error:
            raise RuntimeError("an unforeseen error") from error

    monkeypatch.setattr(run, "written", unworded)
    number = operation(saves, "resumed", "replace run/run.json")
    with pytest.raises(DifferentError, match="the command ends with"):
        saves.trial(f"errors resumed {number} ENOSPC once")


@contextmanager
def greedy_folder(folder):
    """Like new_folder, but accepts any folder and removes everything in it if the block fails."""
    folder.mkdir(exist_ok=True)
    try:
        yield folder
    except BaseException:
        shutil.rmtree(folder)
        raise


def test_removal_of_others_files_is_detected(races, monkeypatch):
    @contextmanager
    def removing(tell, told, error):
        def fetch(size, folder, report):
            os.write(tell, b"1")
            os.read(told, 1)
            shutil.rmtree(races.out)
            raise error

        monkeypatch.setattr("numpy_gpt.weights.download.fetch_gpt2", fetch)
        yield

    monkeypatch.setattr("parity_tests.tools.races.download_that_ends", removing)
    with pytest.raises(DifferentError, match="missing"):
        races.trial("races failing_download 1")


def test_two_commands_in_one_folder_are_detected(races, monkeypatch):
    monkeypatch.setattr(cli_weights, "new_folder", greedy_folder)
    with pytest.raises(DifferentError, match="2 of 2 commands got the folder"):
        races.trial("races export 0")


@contextmanager
def audited(folder, operations, told):
    """Write to `told` the file operations below folder that the interpreter audits but `operations` misses."""
    events = {
        "open",
        "os.mkdir",
        "os.rename",
        "os.remove",
        "os.rmdir",
        "os.link",
        "os.chmod",
        "os.utime",
        "os.truncate",
    }
    uncounted, listening = [], True

    def hook(event, args):
        path = args[0] if listening and event in events else None
        if isinstance(path, (str, Path)) and str(path).startswith(str(folder)) and not operations().inside:
            uncounted.append(f"{event} {path}")

    sys.addaudithook(hook)
    try:
        yield
    finally:
        listening = False
        told.write_text("\n".join(uncounted))


def test_every_file_operation_is_counted(saves):
    """Check against the interpreter's audit events; an audit hook cannot be removed, only silenced."""
    told, stage, seen = saves.stage.base / "uncounted", saves.stage, []

    @contextmanager
    def both():
        with ExitStack() as stack:
            seen.append(stack.enter_context(watched(stage.trial)))
            stack.enter_context(audited(stage.trial, lambda: seen[0], told))
            yield

    stage.clear()
    assert command(stage.begin, stage.errors, both()).code == 0
    assert told.read_text() == ""


def test_unknown_trial_name_is_refused():
    result = CliRunner().invoke(main, ["interrupts", "--again", "race 5"])
    assert result.exit_code == 2
    assert "no trial is called 'race 5'" in result.output
    result = CliRunner().invoke(main, ["interrupts", "rases"])
    assert "no kind rases: choose from bytecodes, operations" in result.output
