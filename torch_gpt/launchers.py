"""Where a launcher has put this process: its rank, the number of processes, and where they meet."""

import os
import re
import socket
from collections.abc import Mapping
from dataclasses import dataclass

from numpy_gpt.errors import InputError

LAUNCHERS = (
    ("RANK", "WORLD_SIZE", "LOCAL_RANK"),  # torchrun, and whatever follows its convention
    ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID"),  # srun; sbatch itself sets no STEP
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK"),  # Open MPI
    ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID"),  # MPICH, Intel MPI
)
"""The variables in which launchers give a process's rank, the number of processes, and the rank on its host."""


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
            if not 0 <= rank < size or local_rank < 0:
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
        job, step = (int(environ.get(name, "0")) for name in ("SLURM_JOB_ID", "SLURM_STEP_ID"))
        port = 15000 + (31 * job + step) % 20000
    return {"MASTER_ADDR": environ.get("MASTER_ADDR", host), "MASTER_PORT": environ.get("MASTER_PORT", str(port))}
