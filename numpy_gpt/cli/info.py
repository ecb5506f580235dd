"""A model's parameters, memory and FLOPs, from its configuration alone."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

from rich.console import Console
from rich.table import Table

from numpy_gpt.config import GPTConfig
from numpy_gpt.errors import InputError
from numpy_gpt.parameters import parameter_count, parameter_shapes


def forward_flops(config: GPTConfig, T: int) -> int:
    """Floating-point operations per token of a forward pass over T tokens; a multiply-add counts as 2.

    Counts matrix products only: 2 · (12 L C² + V C) for the weights, 4 L T C for attention's two products with T
    positions. As is usual, that includes the masked half, most of which is skipped here. Backward costs twice the
    forward pass (Kaplan et al. 2020, table 1).
    """
    C, L, V = config.emb_dim, config.n_layers, config.vocab_size
    return 2 * (12 * L * C * C + V * C) + 4 * L * T * C


def describe(console: Console, config: GPTConfig) -> None:
    """Print the parameters, totals, memory and FLOPs."""
    L = config.n_layers
    table = Table("parameter", "shape", "count", box=None, pad_edge=False)
    table.columns[2].justify = "right"
    for name, shape in parameter_shapes(replace(config, n_layers=1)).items():
        in_block, count = name.startswith("trf_blocks.0."), f"{math.prod(shape):,}"
        if in_block and L > 1:
            name, count = name.replace(".0.", f".{{0…{L - 1}}}.", 1), f"{L} × {count}"
        table.add_row(name, " × ".join(map(str, shape)), count)
    console.print(table)
    total = parameter_count(config)
    head = config.vocab_size * config.emb_dim
    if config.tie_weights:
        tied = f"token embedding and output head are one array, counted once; untied {total + head:,}"
    else:
        tied = f"with a tied output head {total - head:,}"
    T = config.context_length
    flops = forward_flops(config, T)
    rows = {
        "configuration": ", ".join(f"{key}={value}" for key, value in config.to_dict().items()),
        "parameters": f"{total:,} ({tied})",
        "weights in float32": _bytes(4 * total),
        "training in float32": f"{_bytes(16 * total)} for weights, gradients and AdamW's moments; activations extra",
        "key-value cache": f"{_bytes(8 * config.n_layers * T * config.emb_dim)} a sequence of {T} tokens in float32",
        "FLOPs a token": f"{flops:.3g} forward, {3 * flops:.3g} in training (T = {T})",
    }
    console.print()
    for key, value in rows.items():
        console.print(f"{key:20} {value}", markup=False, soft_wrap=True)


@contextmanager
def enough_memory(config: GPTConfig, bytes_per_parameter: int, purpose: str) -> Iterator[None]:
    """Turn an out-of-memory error of NumPy or torch into an InputError that states the memory needed."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:  # torch raises RuntimeError
        torchs = any(words in str(error) for words in ("allocate memory", "out of memory"))
        if not isinstance(error, MemoryError) and not torchs:
            raise
        count = parameter_count(config)
        asked = f" ({error})" if isinstance(error, MemoryError) and str(error) else ""
        needed = f"{_bytes(bytes_per_parameter * count)}, {bytes_per_parameter} bytes for each of {count:,} parameters"
        raise InputError(
            f"not enough memory{asked}: {purpose} takes at least {needed}, plus the batch's activations: "
            "free some, raise the limit (ulimit -v), or choose a smaller model, batch or context"
        ) from error


def _bytes(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.2f} MB"
