"""The machine of a measurement: processor, BLAS and its kernel, GPU, threads, versions, environment."""

import os
import platform
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import torch
from threadpoolctl import threadpool_info

from benchmarks.cards import peaks
from benchmarks.environment import removed
from numpy_gpt.parallel.processes import usable_cores

THREAD_VARIABLES = ("OPENBLAS", "OMP", "GOMP", "MKL", "KMP", "GOTO", "VECLIB")
"""Prefixes of environment variables that change the speed of a product."""


def processor() -> str:
    """The processor's name."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(": ")[1] for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def blas() -> str:
    """NumPy's BLAS, its version and the kernel it chose for this processor."""
    for library in threadpool_info():
        if library["user_api"] == "blas" and "numpy" in library["filepath"]:
            kernel = library.get("architecture", "kernel unknown")
            return f"{library['internal_api']} {library['version']} ({kernel}), {library['num_threads']} threads"
    return str(np.show_config(mode="dicts")["Build Dependencies"]["blas"]["name"])  # Accelerate is not listed above


def accelerator() -> str | None:
    """The GPU's name, or None."""
    if torch.cuda.is_available():
        return str(torch.cuda.get_device_name())
    return "Apple GPU (MPS)" if torch.backends.mps.is_available() else None


def driver_version() -> str | None:
    """The version of NVIDIA's driver, which only its tool knows; None without one."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return None
    query = [tool, "--query-gpu=driver_version", "--format=csv,noheader"]
    done = subprocess.run(query, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, check=False)
    return done.stdout.partition("\n")[0].strip() or None if done.returncode == 0 else None


def gpu() -> dict[str, Any]:
    """The GPU, its memory and software, and its peak rates in TFLOP/s by precision; all None without one."""
    on_cuda = torch.cuda.is_available()
    return {
        "gpu": accelerator(),
        "gpu_GB": torch.cuda.get_device_properties(0).total_memory / 1e9 if on_cuda else None,
        "gpu_driver": driver_version() if on_cuda else None,
        "cuda": torch.version.cuda if on_cuda else None,
        "gpu_peaks": peaks(accelerator()),
    }


def machine() -> str:
    """The machine and the versions in one line, to print with the figures."""
    line = (
        f"{processor()}, {usable_cores()} cores; NumPy {np.__version__} with {blas()}; torch {torch.__version__} "
        f"({torch.backends.cpu.get_cpu_capability()}), {torch.get_num_threads()} threads; "
        f"Python {platform.python_version()}"
    )
    card = gpu()
    if card["cuda"]:
        driver = card["gpu_driver"] or "unknown"
        return f"{line}; {card['gpu']}, {card['gpu_GB']:.0f} GB, driver {driver}, CUDA {card['cuda']}"
    return f"{line}; {card['gpu']}" if card["gpu"] else line


def details() -> dict[str, Any]:
    """The same for programs. load: the one-minute load average when the benchmark started."""
    return {
        "line": machine(),
        "processor": processor(),
        "cores": usable_cores(),
        "blas": blas(),
        "torch_blas": "MKL" if torch.backends.mkl.is_available() else "not MKL",
        "torch_threads": torch.get_num_threads(),
        "numpy": np.__version__,
        "torch": str(torch.__version__),
        "python": platform.python_version(),
        "system": platform.platform(),
        **gpu(),
        "load": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "environment": {name: value for name, value in os.environ.items() if name.startswith(THREAD_VARIABLES)},
        "removed_from_environment": removed(),
    }
