"""What the command line chose, for every measurement alike."""

from dataclasses import dataclass, field

from benchmarks.contenders.torch_backends import Way, gpu_ways
from torch_gpt.train import choose_device


@dataclass(frozen=True)
class Settings:
    """quick: a smaller model; runs: timed rounds; compiled: torch.compile's tuned model too; gpus: what a GPU does."""

    quick: bool = False
    runs: int = 9
    compiled: bool = False
    gpus: list[Way] = field(default_factory=list)


def gpus_here() -> list[Way]:
    """The ways on this machine's GPU; none without one."""
    device = choose_device().type
    return gpu_ways(None if device == "cpu" else device)
