"""Keep freed memory for reuse on CPUs."""

from __future__ import annotations

import ctypes
import platform

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h
_LARGEST = 2**31 - 1  # bytes; mallopt takes an int


def keep_freed_memory() -> bool:
    """Make this process keep large blocks of memory that it frees, for its next allocations.

    By default glibc returns them to the system at once. Every large tensor then consists of fresh pages, which the
    system first clears: a third of GroupMamba's training step at 800x1280. As with PyTorch's allocator for GPUs, the
    process keeps its peak memory.

    Returns:
        Whether it worked: only on Linux with glibc.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    # Not M_MMAP_MAX: without any mapping, evaluation was slower.
    return all(mallopt(option, _LARGEST) for option in (_M_MMAP_THRESHOLD, _M_TRIM_THRESHOLD))
