"""Where a launcher has put this process: its rank, the number of processes, and where they meet."""

import os
import re
import socket
import zlib
from collections.abc import Mapping
from dataclasses import dataclass

from numpy_gpt.errors import InputError

LAUNCHERS = (
    ("RANK", "WORLD_SIZE", "LOCAL_RANK"),  # torchrun, and whatever follows its convention
    (
        "OMPI_COMM_WORLD_RANK",
        "OMPI_COMM_WORLD_SIZE",
        "OMPI_COMM_WORLD_LOCAL_RANK",
    ),  # Open MPI, which may run inside srun
    ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID"),  # srun; sbatch itself sets no STEP
    ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID"),  # MPICH, Intel MPI
)
"""The variables in which launchers give a process's rank, the number of processes, and the rank on its host."""


MOST = 1 << 20
"""Most processes: a larger number is a mistake."""


@dataclass(frozen=True)
class Place:
    """A process's rank among `size`, and its rank on its host."""

    rank: int
    size: int
    local_rank: int


def launched(environ: Mapping[str, str] = os.environ) -> Place | None:
    """The place that a launcher gave this process; None if it was started alone.

    Raises InputError for impossible values.
    """
    for names in LAUNCHERS:
        if names[0] in environ and names[1] in environ:
            values = [environ.get(name, environ[names[0]]) for name in names]  # without a local rank: on one host
            try:
                rank, size, local_rank = map(int, values)
            except ValueError:
                rank, size, local_rank = 0, 0, 0
            if not 0 <= rank < size <= MOST or local_rank < 0:
                given = ", ".join(f"{name}={value}" for name, value in zip(names, values, strict=True))
                raise InputError(
                    f"the launcher's variables {given} are impossible: the rank must be below the number of processes; "
                    "use torchrun or srun"
                )
            return Place(rank, size, local_rank)
    return None


def meeting_point(environ: Mapping[str, str], size: int) -> dict[str, str]:
    """MASTER_ADDR and MASTER_PORT, where the launcher did not set them: on the first host of a Slurm step, or here.

    A single process takes any free port.
    """
    first = re.match(r"([^,\[]+)(?:\[(\d+))?", environ.get("SLURM_STEP_NODELIST", ""))
    host = "127.0.0.1" if first is None else first[1] + (first[2] or "")
    if size == 1:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
    elif first is None:
        port = 29500
    else:
        step = f"{environ.get('SLURM_JOB_ID')}.{environ.get('SLURM_STEP_ID')}"
        port = 15000 + zlib.crc32(step.encode()) % 20000  # the same on all hosts, and another in each step
    given = environ.get("MASTER_PORT", str(port))
    if not (given.isdecimal() and 0 < int(given) < 65536):
        raise InputError(f"MASTER_PORT={given} is not a port: set it to a number from 1 to 65535, or leave it unset")
    return {"MASTER_ADDR": environ.get("MASTER_ADDR") or host, "MASTER_PORT": given}
