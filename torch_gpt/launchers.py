"""Where a launcher has put this process: its rank, the number of processes, and where they meet."""

import os
import re
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
    """The place that a launcher gave this process; None if it was started alone. Raises InputError for nonsense."""
    for names in LAUNCHERS:
        if names[0] in environ and names[1] in environ:
            values = [environ.get(name, "0") for name in names]
            try:
                rank, size, local_rank = map(int, values)
            except ValueError:
                rank, size, local_rank = 0, 0, 0
            if not 0 <= rank < size or local_rank < 0:
                given = ", ".join(f"{name}={value}" for name, value in zip(names, values, strict=True))
                raise InputError(f"the launcher's variables {given} give no rank below the number of processes")
            return Place(rank, size, local_rank)
    return None


def meeting_point(environ: Mapping[str, str]) -> dict[str, str]:
    """MASTER_ADDR and MASTER_PORT, where the launcher did not set them: on the first host of a Slurm step, or here."""
    first = re.match(r"([^,\[]+)(?:\[(\d+))?", environ.get("SLURM_STEP_NODELIST", ""))
    host = "127.0.0.1" if first is None else first[1] + (first[2] or "")
    port = 29500 if first is None else 15000 + int(environ.get("SLURM_JOB_ID", "0")) % 20000
    return {"MASTER_ADDR": environ.get("MASTER_ADDR", host), "MASTER_PORT": environ.get("MASTER_PORT", str(port))}
