"""Freed memory kept for the next array."""

import ctypes
from functools import cache

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # mallopt's numbers for M_TRIM_THRESHOLD and M_MMAP_THRESHOLD, malloc.h
_LARGEST_ON_THE_HEAP = 2**25  # bytes; the most that glibc takes for M_MMAP_THRESHOLD


@cache
def keep_freed_memory() -> None:
    """Tell the C library not to hand memory back to the kernel whenever the last of a large array's uses is over.

    glibc does so by default for what is at the end of its heap, and the next array of that size is paid for again, page
    by page: a tenth of a small model's step. Once a process; where there is no mallopt it does nothing.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # another C library; Windows has no CDLL(None)
        return
    mallopt(_TRIM_THRESHOLD, 2**31 - 1)
    mallopt(_MMAP_THRESHOLD, _LARGEST_ON_THE_HEAP)
