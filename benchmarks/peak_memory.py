"""python -m benchmarks.peak_memory WORK …: runs one piece of work in this process and prints the memory it took.

Each needs a separate process, because a process's peak never falls. Prints {"before": bytes, "peak": bytes} of resident
memory; before: with everything imported (for attention: and the inputs created), before the work starts.
"""

import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

from numpy_gpt import GPTConfig
from numpy_gpt.errors import InputError

STEPS = 3
"""Training steps: the first allocates the moments, from the second on everything is allocated."""


def resident(which: str) -> int:
    """Bytes of resident memory: VmRSS (current) or VmHWM (peak).

    Not getrusage's ru_maxrss: on Linux a process inherits it through fork and exec, so a small process started by a
    large one would begin with that one's peak. Without /proc it is used anyway, and "current" is the peak so far.
    """
    status = Path("/proc/self/status")
    if status.exists():
        line = next(line for line in status.read_text().splitlines() if line.startswith(which))
        return 1024 * int(line.split()[1])
    try:
        import resource
    except ImportError as error:
        raise InputError("this system does not report a process's peak memory") from error
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def in_own_process(*arguments: str) -> dict[str, float]:
    """Run this module with these arguments and parse its output. Raises CalledProcessError if it fails."""
    command = [sys.executable, "-m", "benchmarks.peak_memory", *arguments]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return dict(json.loads(done.stdout.splitlines()[-1]))


def step(backend: str, config: GPTConfig, B: int, T: int) -> dict[str, int]:
    """Peak of a few training steps with dropout off. backend: "NumPy", or PyTorch's style and device, "tuned cpu"."""
    from benchmarks.contenders.backends import SEED, NumPyBackend
    from benchmarks.jobs import Job, batches, text_for
    from numpy_gpt import GPT

    stream = batches(Job("", config, B, T), text_for(config.vocab_size))
    if backend == "NumPy":
        before = resident("VmRSS")
        chosen = NumPyBackend(config)
    else:  # imported here, because NumPy's process must not load torch
        import torch

        from benchmarks.contenders.torch_backends import TorchBackend, Way

        before = resident("VmRSS")
        style, device = backend.split()
        # NumPy's weights are freed before the first step, so that they do not count as torch's memory
        chosen = TorchBackend(Way(style, device), config, GPT(config, SEED).params)
    for _ in range(STEPS):
        chosen.step(*next(stream), dropout=False)
        chosen.synchronise()
    if backend.endswith("cuda"):
        return {"before": 0, "peak": torch.cuda.max_memory_allocated()}
    return {"before": before, "peak": resident("VmHWM")}


def attention(heads: int, T: int, head_size: int) -> dict[str, int]:
    """Peak of one attention, forward and backward, on one sequence of T tokens."""
    from numpy_gpt.ops.attention import attention_backward, attention_forward

    def once(*inputs: np.ndarray) -> None:
        *qkv, dy = inputs
        _, cache = attention_forward(*qkv)
        attention_backward(dy, cache)

    rng = np.random.default_rng(0)
    once(*(rng.standard_normal((1, heads, 128, head_size), np.float32) for _ in range(4)))  # BLAS allocates its buffers
    inputs = [rng.standard_normal((1, heads, T, head_size), np.float32) for _ in range(4)]
    before = resident("VmRSS")
    once(*inputs)
    return {"before": before, "peak": resident("VmHWM")}


def load(way: str, file: str) -> dict[str, float]:
    """Peak memory and seconds of loading a checkpoint's file in one of the WAYS of contenders/loaders.py."""
    from benchmarks.contenders.loaders import WAYS

    read = WAYS[way]()
    before, begin = resident("VmRSS"), time.perf_counter()
    kept = read(file)
    seconds = time.perf_counter() - begin
    del kept
    return {"before": before, "peak": resident("VmHWM"), "seconds": seconds}


def main(arguments: list[str]) -> None:
    """step BACKEND CONFIG B T, with the configuration as JSON; attention HEADS T HEAD_SIZE; or load WAY FILE."""
    work, *rest = arguments
    found: dict[str, float]
    if work == "attention":
        found = {**attention(*map(int, rest))}
    elif work == "load":
        found = load(*rest)
    else:
        backend, config, B, T = rest
        found = {**step(backend, GPTConfig.from_dict(json.loads(config)), int(B), int(T))}
    print(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1:])
