"""Several processes of torch-gpt, started as a launcher starts them: by the variables RANK, WORLD_SIZE, LOCAL_RANK."""

import os
import socket
import subprocess
import sys
from contextlib import contextmanager

from parity_tests.judge.runs import SMALL

LIMIT = 300
"""Seconds after which processes count as hanging."""


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@contextmanager
def ranks(size, *arguments, module="torch_gpt", each=None):
    """The processes, by rank, killed at the end if they still run. each: further arguments of a rank, by rank."""
    common = {"WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", module, *map(str, arguments), *map(str, (each or {}).get(rank, []))],
            env=os.environ | common | {"RANK": str(rank), "LOCAL_RANK": str(rank), "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        for rank in range(size)
    ]
    try:
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.communicate()


def finish(processes, limit=LIMIT):
    """Wait for all: their exit codes, outputs and errors, by rank. A process that hangs fails the test."""
    outputs = [process.communicate(timeout=limit) for process in processes]
    return [process.returncode for process in processes], *map(list, zip(*outputs, strict=True))


def train_on(size, text, out, *flags):
    """pretrain on `size` processes, to its end: rank 0's output. The others must be silent."""
    with ranks(size, "pretrain", "--text", text, "--out", out, *SMALL, *flags) as processes:
        codes, outputs, errors = finish(processes)
    assert codes == [0] * size, (codes, errors)
    assert errors == [""] * size
    assert outputs[1:] == [""] * (size - 1)
    return outputs[0]
