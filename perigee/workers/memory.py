"""Keeps memory that was freed, for the next step to use again.

A step's large tensors come and go. By default the C library hands each back to the system at once, and the next step
touches fresh pages: one fault for every 4 KiB, which takes as long as a third of a prefill's arithmetic.
"""

import ctypes

# From glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8
_LARGEST = 2**31 - 1


def keep_freed_memory() -> None:
    """Serves every size from one heap that never shrinks. Does nothing where the C library is not glibc."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except AttributeError:
        return
    mallopt(_M_MMAP_THRESHOLD, 1 << 30)
    mallopt(_M_TRIM_THRESHOLD, _LARGEST)
    mallopt(_M_ARENA_MAX, 1)  # the heaps of further arenas are too small for such tensors
