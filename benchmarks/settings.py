"""The command line's settings, shared by all measurements, and the ways to run PyTorch on this machine."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from benchmarks.contenders.torch_backends import Way, gpu_ways
from benchmarks.results import Row
from numpy_gpt.errors import InputError
from torch_gpt.train import check_compiler, choose_device

NOT_MEASURED = "not measured here"


@dataclass(frozen=True)
class Settings:
    """quick: a smaller model; runs: timed rounds; compiled: also torch.compile's tuned model on the CPU.

    gpus: the ways to run on this machine's GPU; absent: those it lacks, with the reason.
    """

    quick: bool = False
    runs: int = 9
    compiled: bool = False
    gpus: list[Way] = field(default_factory=list)
    absent: dict[Way, str] = field(default_factory=dict)

    @property
    def cpu(self) -> list[Way]:
        """The ways to run on the CPU."""
        return [Way("tuned"), *([Way("tuned", compiled=True)] if self.compiled else []), Way("book")]

    def absent_rows(self, case: str, which: Callable[[Way], bool] = lambda way: True) -> list[Row]:
        """A row without figures for every absent way, or those that `which` selects."""
        return [Row(case, str(way), note=reason) for way, reason in self.absent.items() if which(way)]


def gpus_here(tell: Callable[[str], None]) -> tuple[list[Way], dict[Way, str]]:
    """Settings' gpus and absent for this machine. Tells why torch.compile fails on the GPU, if it does."""
    device = choose_device()
    if device.type != "cuda":
        here = [] if device.type == "cpu" else gpu_ways(device.type)
        return here, dict.fromkeys(gpu_ways("cuda"), NOT_MEASURED)
    tensor_cores = torch.cuda.get_device_capability() >= (8, 0)  # the first with TF32 and bf16; others emulate bf16
    compiles = True
    try:
        check_compiler(device)
    except InputError as error:
        compiles = False
        tell(f"without the compiled model on the GPU: {error}")
    absent = {}
    for way in gpu_ways("cuda"):
        if way.precision != "float32" and not tensor_cores:
            absent[way] = f"this GPU has no {way.precision}"
        elif way.compiled and not compiles:
            absent[way] = "torch.compile fails on this GPU"
    return [way for way in gpu_ways("cuda") if way not in absent], absent
