"""The command line's settings, shared by all measurements."""

from dataclasses import dataclass, field

from benchmarks.contenders.torch_backends import Way, gpu_ways
from torch_gpt.train import choose_device


@dataclass(frozen=True)
class Settings:
    """quick: a smaller model; runs: timed rounds; compiled: also torch.compile's tuned model; gpus: ways on a GPU."""

    quick: bool = False
    runs: int = 9
    compiled: bool = False
    gpus: list[Way] = field(default_factory=list)


def gpus_here() -> list[Way]:
    """The ways to run on this machine's GPU; empty without a GPU."""
    device = choose_device().type
    return gpu_ways(None if device == "cpu" else device)
