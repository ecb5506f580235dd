"""pretrain on several processes: the same run as on one, in torch and in NumPy; stopped, killed and resumed."""

import json
import os
import signal
import time

import numpy as np
import pytest

from numpy_gpt import GPT, GPTConfig, load
from numpy_gpt.cli.main import main as numpy_main
from numpy_gpt.errors import InputError, LostProcessError
from numpy_gpt.io.outermost import INTERRUPTED
from numpy_gpt.weights.checkpoint import load_training
from parity_tests.judge.models import check_gradients
from parity_tests.judge.ranks import finish, ranks, train_on
from parity_tests.judge.runs import SMALL, invoke, pretrain, rows
from parity_tests.tools.rank_kills import kill_ranks
from torch_gpt.cli import main as torch_main
from torch_gpt.launchers import Place, launched, meeting_point
from torch_gpt.processes import Process, Team
from torch_gpt.train import TorchLearner

ROWS = 2e-5
"""Largest difference of a loss, in nats per token, between two numbers of processes."""


def losses(out):
    return np.array([[float(row[k]) for k in ("train_loss", "val_loss", "step_loss")] for row in rows(out)])


def check_rows(out, want, limit=ROWS):
    assert losses(out).shape == losses(want).shape
    difference = np.abs(losses(out) - losses(want)).max()
    assert difference <= limit, f"{out.name}: rows differ by {difference:.2e}"


# Who am I?


@pytest.mark.parametrize(
    ("variables", "place"),
    [
        ({}, None),
        ({"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}, Place(3, 8, 1)),
        ({"RANK": "0", "WORLD_SIZE": "1"}, Place(0, 1, 0)),
        ({"SLURM_PROCID": "2", "SLURM_STEP_NUM_TASKS": "4", "SLURM_LOCALID": "2"}, Place(2, 4, 2)),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "4"}, None),  # in sbatch's own script, which is one process
        ({"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_LOCAL_RANK": "1"}, Place(1, 2, 1)),
        (
            {
                "OMPI_COMM_WORLD_RANK": "1",
                "OMPI_COMM_WORLD_SIZE": "2",
                "SLURM_PROCID": "0",
                "SLURM_STEP_NUM_TASKS": "1",
            },
            Place(1, 2, 1),
        ),
        ({"PMI_RANK": "1", "PMI_SIZE": "2", "MPI_LOCALRANKID": "0"}, Place(1, 2, 0)),
        ({"RANK": "1"}, None),
    ],
)
def test_launchers_give_a_place(variables, place):
    assert launched(variables) == place


@pytest.mark.parametrize("port", ["", "abc", "0", "65536", "-5", "1_0"])
def test_impossible_ports_are_refused(port):
    with pytest.raises(InputError, match=f"^MASTER_PORT={port} is not a port: set it to a number"):
        meeting_point({"MASTER_PORT": port}, 2)


@pytest.mark.parametrize(
    ("rank", "size"), [("2", "2"), ("-1", "2"), ("0", "0"), ("one", "2"), ("0", ""), ("0", str(10**20))]
)
def test_impossible_places_are_refused(rank, size):
    with pytest.raises(InputError, match=f"RANK={rank}, WORLD_SIZE={size}, LOCAL_RANK={rank} are impossible"):
        launched({"RANK": rank, "WORLD_SIZE": size})


@pytest.mark.parametrize(
    ("variables", "address", "port"),
    [
        ({}, "127.0.0.1", "29500"),
        ({"MASTER_ADDR": "a", "MASTER_PORT": "1"}, "a", "1"),
        (
            {"SLURM_STEP_NODELIST": "gpu[07-09,11],cpu1", "SLURM_JOB_ID": "41234"},
            "gpu07",
            "25649",
        ),
        ({"SLURM_STEP_NODELIST": "node-1,node-2", "SLURM_JOB_ID": "3"}, "node-1", "16896"),
    ],
)
def test_processes_meet_on_the_first_host(variables, address, port):
    assert meeting_point(variables, 2) == {"MASTER_ADDR": address, "MASTER_PORT": port}


# The same run


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_two_processes_train_as_numpy_does(tmp_path, text, parallel):
    """The last batch of the validation text has fewer windows than there are processes."""
    flags = ["--epochs", 2, "--eval-iter", 100, "--clip", 0.5]
    output = train_on(2, text, tmp_path / "two", *flags, "--parallel", parallel, "--accumulate", 2)
    assert f"2 processes ({parallel})" in output
    pretrain(numpy_main, text, tmp_path / "numpy", *flags)
    check_rows(tmp_path / "two", tmp_path / "numpy")
    two, one = load(tmp_path / "two"), load(tmp_path / "numpy")
    for name, p in two.params.items():
        np.testing.assert_allclose(p, one.params[name], rtol=0, atol=1e-4, err_msg=name)
    state, want = load_training(tmp_path / "two"), load_training(tmp_path / "numpy")
    assert list(state) == list(want)
    assert state["rng"].tobytes() == want["rng"].tobytes()
    for name, array in want.items():
        np.testing.assert_allclose(state[name], array, rtol=1e-3, atol=1e-5, err_msg=name)
    again = invoke(numpy_main, "pretrain", "--resume", tmp_path / "two", "--epochs", 3)
    assert again.exit_code == 0, again.output
    assert invoke(numpy_main, "pretrain", "--resume", tmp_path / "numpy", "--epochs", 3).exit_code == 0
    check_rows(tmp_path / "two", tmp_path / "numpy", 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("size", "parallel", "accumulate"),
    [(2, "ddp", 1), (2, "ddp", 2), (2, "fsdp", 1), (2, "fsdp", 2), (1, "fsdp", 1), (4, "ddp", 2), (4, "fsdp", 1)],
)
def test_any_number_of_processes_trains_as_numpy_does(tmp_path, text, size, parallel, accumulate):
    flags = ["--batch-size", 8, "--max-steps", 50, "--epochs", 100, "--eval-freq", 1 if size == 2 else 10]
    train_on(size, text, tmp_path / "team", *flags, "--parallel", parallel, "--accumulate", accumulate)
    pretrain(numpy_main, text, tmp_path / "numpy", *flags, "--accumulate", accumulate)
    check_rows(tmp_path / "team", tmp_path / "numpy")


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_gradients_of_two_processes_are_numpys(tmp_path, parallel):
    check_first_gradients(tmp_path, 2, parallel)


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_gradients_of_four_processes_are_numpys(tmp_path, parallel):
    check_first_gradients(tmp_path, 4, parallel)


def check_first_gradients(tmp_path, size, parallel):
    """In float64, within the whole model's budget; the parameter counts do not divide by the number of processes."""
    config = GPTConfig(vocab_size=31, context_length=9, emb_dim=15, n_heads=3, n_layers=2, drop_rate=0.0, qkv_bias=True)
    rng = np.random.default_rng(0)
    x, y = rng.integers(0, 31, (2, 8, 9))
    np.savez(tmp_path / "batch.npz", x=x, y=y)
    (tmp_path / "config.json").write_text(json.dumps(config.to_dict()))
    with ranks(size, tmp_path, parallel, module="parity_tests.tools.team_gradients") as processes:
        codes, _, errors = finish(processes)
    assert codes == [0] * size, errors
    with np.load(tmp_path / "gradients.npz") as file:
        got = {name: file[name] for name in file.files}
    loss, want = GPT(config, 123, np.float64).loss_and_grads(x, y)
    assert abs(got.pop("loss") - loss) <= 1e-14
    check_gradients(want, got)


@pytest.mark.slow
def test_dropout_differs_by_rank_and_is_resumed(tmp_path, text):
    flags = ["--drop-rate", 0.3, "--epochs", 100]
    for name, steps in (("whole", 6), ("stopped", 3)):
        train_on(2, text, tmp_path / name, *flags, "--max-steps", steps)
    with ranks(2, "pretrain", "--resume", tmp_path / "stopped", "--max-steps", 6) as processes:
        codes, _, errors = finish(processes)
    assert codes == [0, 0], errors
    assert losses(tmp_path / "stopped").tolist() == losses(tmp_path / "whole").tolist()
    pretrain(torch_main, text, tmp_path / "one", *flags, "--max-steps", 6)
    assert np.abs(losses(tmp_path / "one") - losses(tmp_path / "whole"))[1:].max() > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_a_run_is_resumed_on_other_numbers_of_processes(tmp_path, text, parallel):
    flags = ["--batch-size", 8, "--epochs", 100]
    pretrain(numpy_main, text, tmp_path / "whole", *flags, "--max-steps", 12)
    out = tmp_path / "run"
    train_on(2, text, out, *flags, "--max-steps", 3, "--parallel", parallel)
    for steps, size in ((6, 4), (9, 1)):
        with ranks(size, "pretrain", "--resume", out, "--max-steps", steps, "--parallel", parallel) as processes:
            codes, _, errors = finish(processes)
        assert codes == [0] * size, errors
    assert invoke(numpy_main, "pretrain", "--resume", out, "--max-steps", 12).exit_code == 0
    check_rows(out, tmp_path / "whole", 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_bfloat16_and_compiling_work_together_on_two_processes(tmp_path, text, parallel):
    flags = ["--max-steps", 6, "--epochs", 100, "--dtype", "bfloat16"]
    train_on(2, text, tmp_path / "two", *flags, "--parallel", parallel, "--compile")
    pretrain(torch_main, text, tmp_path / "one", *flags)
    check_rows(tmp_path / "two", tmp_path / "one", 0.01)
    pretrain(torch_main, text, tmp_path / "float32", *flags, "--dtype", "float32")
    assert np.abs(losses(tmp_path / "two") - losses(tmp_path / "float32")).max() > ROWS


# Refusals: one sentence, from rank 0 alone


def check_refused_by_rank_0(processes, message, code=2):
    codes, outputs, errors = finish(processes)
    assert codes == [code] * len(codes), errors
    assert outputs == [""] * len(codes)
    assert errors[0].startswith("Error: ")
    assert message in errors[0]
    assert errors[0].count("\n") == 1
    assert errors[1:] == [""] * (len(codes) - 1)


def test_a_batch_that_does_not_divide_is_refused(tmp_path, text):
    arguments = ["pretrain", "--text", text, "--out", tmp_path / "o", "--batch-size", 6, "--accumulate", 2]
    with ranks(2, *arguments) as processes:
        check_refused_by_rank_0(processes, "is not divisible by 2 processes × --accumulate 2: choose a multiple of 4")
    assert not (tmp_path / "o").exists()


def test_ranks_with_other_flags_are_refused(tmp_path, text):
    arguments = ["pretrain", "--text", text, "--out", tmp_path / "o"]
    with ranks(2, *arguments, each={0: ["--seed", 1], 1: ["--seed", 2]}) as processes:
        check_refused_by_rank_0(processes, "rank 1 was started with other arguments than rank 0")
    assert not (tmp_path / "o").exists()


def test_more_processes_than_gpus_are_refused():
    team = Team.__new__(Team)
    team._processes = [
        Process(10 + rank, f"host{rank // 3}", [], rank % 3, gpus) for rank, gpus in enumerate([3] * 3 + [1] * 2)
    ]
    with pytest.raises(
        InputError, match=r"^rank 4 is process 2 on host1, whose number of GPUs is 1: start as many processes"
    ):
        team.check_gpus()
    team._processes.pop()
    team.check_gpus()


def test_a_lone_process_takes_a_free_port():
    first, second = (meeting_point({}, 1)["MASTER_PORT"] for _ in range(2))
    assert 1024 < int(first) != int(second)


@pytest.mark.parametrize(("arguments", "code"), [(["--help"], 0), (["generate"], 2)])
def test_other_commands_wait_for_no_one(arguments, code):
    """As in an interactive step of Slurm, whose other processes never come."""
    with ranks(2, *arguments) as processes:
        processes[1].kill()
        output, errors = processes[0].communicate(timeout=120)
    assert processes[0].returncode == code, errors
    assert "Usage" in output + errors


@pytest.mark.parametrize("at", ["params", "state", "sample"])
def test_a_process_lost_while_saving_is_reported_as_such(tmp_path, text, monkeypatch, at):
    """The learner's calls reach all processes: the exit code and the sentence are the same wherever one dies."""

    def lost(*args, **kwargs):
        raise LostProcessError("rank 1 has died")

    monkeypatch.setattr(TorchLearner, at, lost)
    result = invoke(torch_main, "pretrain", "--text", text, "--out", tmp_path / "o", *SMALL, "--max-steps", 1)
    assert result.exit_code == 4, result.output
    assert "Error: rank 1 has died; " in result.output
    assert "has no save yet" in result.output


def test_one_process_cannot_share_a_model(text):
    result = invoke(torch_main, "pretrain", "--text", text, "--parallel", "fsdp")
    assert result.exit_code == 2
    assert "start them with torchrun or srun" in result.output


# Ends


LONG = [*SMALL, "--epochs", 10**6, "--max-steps", 10**6, "--eval-freq", 10**6, "--save-freq", 5]


def wait_for_a_save(out, processes):
    deadline = time.monotonic() + 120
    while not (out / "checkpoint" / "model.safetensors").exists():
        assert time.monotonic() < deadline
        assert all(process.poll() is None for process in processes)
        time.sleep(0.05)


def test_ctrl_c_stops_all_after_a_step_and_saves(tmp_path, text):
    """A terminal sends it to every process."""
    out = tmp_path / "run"
    with ranks(2, "pretrain", "--text", text, "--out", out, *LONG) as processes:
        wait_for_a_save(out, processes)
        for process in processes:
            os.kill(process.pid, signal.SIGINT)
        codes, outputs, _ = finish(processes, 60)
    assert codes == [INTERRUPTED, INTERRUPTED]
    assert "everything is saved. Resume with: --resume" in outputs[0]
    assert outputs[1] == ""


@pytest.mark.parametrize(("killed", "parallel"), [(1, "ddp"), (0, "fsdp")])
def test_a_killed_rank_ends_the_run_with_its_name(tmp_path, text, killed, parallel):
    out = tmp_path / "run"
    with ranks(2, "pretrain", "--text", text, "--out", out, *LONG, "--parallel", parallel) as processes:
        wait_for_a_save(out, processes)
        processes[killed].kill()
        codes, _, errors = finish(processes, 60)
    other = 1 - killed
    assert (codes[killed], codes[other]) == (-signal.SIGKILL, 4)
    assert f"Error: rank {killed} (process {processes[killed].pid} on " in errors[other]
    assert "--resume" in errors[other]
    assert errors[killed] == "" or "stopping" in errors[killed]
    step = int(load_training(out / "checkpoint")["loop.counters"][0])
    again = invoke(numpy_main, "pretrain", "--resume", out, "--max-steps", step + 2)
    assert again.exit_code == 0, again.output


@pytest.mark.slow
def test_ranks_killed_at_random_instants_cost_no_save(tmp_path):
    assert len(list(kill_ranks(4, tmp_path, seed=1))) == 4
