"""Arrays that are to be updated in place: each must be writable, and have its memory to itself."""

from collections.abc import Iterable, Mapping

import numpy as np
from numpy.lib.array_utils import byte_bounds

from numpy_gpt.errors import InputError
from numpy_gpt.typing import Array

FOREIGN = 0
"""In `memory`: what NumPy did not allocate, a mapped file or another library's tensor. It may be any other array's."""


def check_updatable(caller: str, written: Mapping[str, Array], read: Mapping[str, Array] | None = None) -> None:
    """Raise InputError, naming the array, unless each of `written` can be updated without changing another.

    None may be read-only, have elements that share memory (as a broadcast array's do), or share memory with another of
    `written` or with one of `read`, whose names stand for gradients. caller begins the message. The time taken does not
    depend on the arrays' size.
    """
    for name, a in written.items():
        if not a.flags.writeable:
            raise InputError(f"{caller}: {name} is read-only: give a copy that can be written to")
        if not a.flags.forc and _overlaps_itself(a):
            raise InputError(f"{caller}: elements of {name} share memory, as a broadcast array's do: give a copy")
    named = [(name, a, True) for name, a in written.items()]
    named += [(f"the gradient of {name}", a, False) for name, a in (read or {}).items()]
    pieces: dict[int, list[tuple[str, Array, bool]]] = {}
    apart = FOREIGN not in memory(a for _, a, _ in named)
    for each in named:
        pieces.setdefault(_owner(each[1]) if apart else FOREIGN, []).append(each)
    for piece in pieces.values():
        if len(piece) > 1:
            _check_piece(caller, piece)


def memory(arrays: Iterable[Array]) -> set[int]:
    """A number for each piece of memory in which these arrays lie, or FOREIGN; in two pieces nothing is shared."""
    return {_owner(a) for a in arrays}


def _owner(a: Array) -> int:
    while isinstance(a.base, np.ndarray):
        a = a.base
    return id(a) if a.flags.owndata else FOREIGN


def _check_piece(caller: str, piece: list[tuple[str, Array, bool]]) -> None:
    """By address: each array is compared with those before it that reach into it."""
    bounds = [byte_bounds(a) for _, a, _ in piece]
    before: list[int] = []
    for i in sorted(range(len(piece)), key=bounds.__getitem__):
        before = [j for j in before if bounds[j][1] > bounds[i][0]]
        name, a, written = piece[i]
        for j in before:
            other, b, also_written = piece[j]
            if (written or also_written) and np.shares_memory(a, b):
                raise InputError(f"{caller}: {other} and {name} share memory: give each an array of its own")
        before.append(i)


def _overlaps_itself(a: Array) -> bool:
    """Whether a step along an axis is shorter than all that the axes of shorter steps cover."""
    reach = a.itemsize
    for step, n in sorted((abs(step), n) for step, n in zip(a.strides, a.shape, strict=True) if n > 1):
        if step < reach:
            return True
        reach += step * (n - 1)
    return False
