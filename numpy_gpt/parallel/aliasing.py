"""Checks that arrays can be updated in place: writable, and sharing no memory."""

from collections.abc import Iterable, Mapping

import numpy as np
from numpy.lib.array_utils import byte_bounds

from numpy_gpt.errors import InputError
from numpy_gpt.typing import Array

FOREIGN = 0
"""In `memory`: allocated outside NumPy (a mapped file, another library's tensor), so possibly shared with any array."""


def check_updatable(caller: str, written: Mapping[str, Array], read: Mapping[str, Array] | None = None) -> None:
    """Raise InputError, naming the array, unless each of `written` can be updated without changing another.

    An array of `written` must not be read-only, have elements that share memory (as in a broadcast array), or share
    memory with another of `written` or with one of `read`, whose names are those of gradients. caller begins the
    message. The time does not depend on the arrays' sizes.
    """
    for name, a in written.items():
        if not a.flags.writeable:
            raise InputError(f"{caller}: {name} is read-only: give a copy that can be written to")
        if not a.flags.forc and _overlaps_itself(a):
            raise InputError(f"{caller}: elements of {name} share memory, as in a broadcast array: give a copy")
    named = [(name, a, True) for name, a in written.items()]
    named += [(f"the gradient of {name}", a, False) for name, a in (read or {}).items()]
    pieces: dict[int, list[tuple[str, Array, bool]]] = {}
    apart = FOREIGN not in memory(a for _, a, _ in named)
    for entry in named:
        pieces.setdefault(_owner(entry[1]) if apart else FOREIGN, []).append(entry)
    for piece in pieces.values():
        if len(piece) > 1:
            _check_piece(caller, piece)


def memory(arrays: Iterable[Array]) -> set[int]:
    """A number for each allocation that these arrays use, or FOREIGN; different allocations share no memory."""
    return {_owner(a) for a in arrays}


def _owner(a: Array) -> int:
    while isinstance(a.base, np.ndarray):
        a = a.base
    return id(a) if a.flags.owndata else FOREIGN


def _check_piece(caller: str, piece: list[tuple[str, Array, bool]]) -> None:
    """Compare each array, in order of address, with the earlier ones that extend beyond its start."""
    bounds = [byte_bounds(a) for _, a, _ in piece]
    before: list[int] = []
    for i in sorted(range(len(piece)), key=bounds.__getitem__):
        before = [j for j in before if bounds[j][1] > bounds[i][0]]
        name, a, written = piece[i]
        for j in before:
            other, b, also_written = piece[j]
            if (written or also_written) and np.shares_memory(a, b):
                raise InputError(f"{caller}: {other} and {name} share memory: give each a separate array")
        before.append(i)


def _overlaps_itself(a: Array) -> bool:
    """Whether an axis has a stride shorter than the range covered by the axes of smaller strides."""
    reach = a.itemsize
    for step, n in sorted((abs(step), n) for step, n in zip(a.strides, a.shape, strict=True) if n > 1):
        if step < reach:
            return True
        reach += step * (n - 1)
    return False
