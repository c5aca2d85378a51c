"""Memory that is freed and asked for again, on CPUs."""

from __future__ import annotations

import ctypes
import platform

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h
_LARGEST = 2**31 - 1  # bytes; mallopt takes an int


def keep_freed_memory() -> bool:
    """Let this process keep large pieces of memory that it frees, for what it asks for next.

    By default glibc hands them back to the system at once, and every large tensor then consists of
    fresh pages, which the system has to clear first: a third of GroupMamba's training step at
    800x1280. As with PyTorch's allocator for GPUs, the process goes on holding as much memory as it
    ever needed.

    Returns:
        Whether that was possible: on Linux with glibc.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    # Not M_MMAP_MAX: with mapping switched off altogether, evaluation was slower.
    return all(mallopt(option, _LARGEST) for option in (_M_MMAP_THRESHOLD, _M_TRIM_THRESHOLD))
