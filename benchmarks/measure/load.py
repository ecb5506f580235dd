"""Loading a checkpoint of GPT-2 124M: seconds and peak memory, each in a separate process, in turn.

The file is in the system's cache. numpy_gpt.load verifies every tensor's CRC-32, checks for NaN, and lays the blocks'
matrices side by side, ready for products. safetensors' load_file for PyTorch maps the file and reads a number only when
it is used, so it is also timed with every number read once.
"""

import statistics
import tempfile
from pathlib import Path

from benchmarks.contenders.loaders import NUMPY, WAYS
from benchmarks.peak_memory import in_own_process
from benchmarks.results import Limits, Ratio, Report, Row
from benchmarks.settings import Settings
from benchmarks.timing import Spread
from numpy_gpt import GPT, GPTConfig, save

LIMIT = 1.15
"""Limit of the peak memory, in file sizes."""


def run(settings: Settings, report: Report) -> None:
    """GPT-2 124M in OpenAI's configuration (tied, with biases, context 1024); quick: a small model of two layers."""
    config = GPTConfig.gpt2("124M", qkv_bias=True, tie_weights=True)
    if settings.quick:
        config = GPTConfig(vocab_size=5000, emb_dim=256, n_heads=4, n_layers=2, qkv_bias=True, tie_weights=True)
    found: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
    with tempfile.TemporaryDirectory() as place:
        file = Path(place, "model.safetensors")
        save(GPT(config), file)
        size = file.stat().st_size
        with report.progress("loading", settings.runs * len(WAYS)) as tick:
            for _ in range(settings.runs):
                for way, runs in found.items():
                    tick(way)
                    runs.append(in_own_process("load", way, str(file)))
    case = f"load {'two layers' if settings.quick else 'GPT-2 124M, tied'}, {size / 1e6:.0f} MB"
    seconds = {way: Spread.of([run["seconds"] for run in runs]) for way, runs in found.items()}
    rows = []
    for way, runs in found.items():
        taken = statistics.median((run["peak"] - run["before"]) / size for run in runs)
        ratios = {}
        if way == NUMPY:
            ratios["peak memory / the file"] = Ratio(taken, limits=Limits() if settings.quick else Limits(LIMIT))
            for other in (name for name in found if name != NUMPY):
                ratios[f"seconds / {other}"] = Ratio(seconds[NUMPY].median / seconds[other].median)
        rows.append(Row(case, way, seconds[way], {"peak, in files": taken}, ratios))
    report.add(rows, "peak: resident memory beyond what the libraries take; medians of processes in turn")
