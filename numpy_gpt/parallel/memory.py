"""Reuse of freed memory for the next array."""

import ctypes
from functools import cache

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # mallopt's numbers for M_TRIM_THRESHOLD and M_MMAP_THRESHOLD, malloc.h
_LARGEST_ON_THE_HEAP = 2**25  # bytes; glibc's maximum for M_MMAP_THRESHOLD


@cache
def keep_freed_memory() -> None:
    """Tell the C library to keep the memory of freed large arrays instead of returning it to the kernel.

    By default glibc returns the free end of its heap, and the next array of that size costs page faults again: a tenth
    of a small model's step. Done once per process; does nothing without mallopt.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # another C library; Windows has no CDLL(None)
        return
    mallopt(_TRIM_THRESHOLD, 2**31 - 1)
    mallopt(_MMAP_THRESHOLD, _LARGEST_ON_THE_HEAP)
