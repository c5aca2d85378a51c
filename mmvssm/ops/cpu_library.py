"""The compiled CPU kernels: one library, built when mmvssm is installed on a machine with a C++ compiler.

It has a plain C interface and knows nothing of Python or PyTorch, so one binary serves every version of both.
"""

from __future__ import annotations

import ctypes
import functools
import warnings
from pathlib import Path
from typing import Optional

import torch

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3}
"""The numbers of the element types, ``DType`` of ``csrc/dispatch.h``."""


def load(
    folder: Path, prefix: str, version: int, arguments: type[ctypes.Structure], functions: list[str]
) -> tuple[Optional[ctypes.CDLL], str]:
    """Load the library and make ready the functions ``{prefix}_{function}(const arguments*)``.

    Returns:
        The library, or None and the reason.
    """
    path = folder / "_scan_cpu.so"
    if not path.exists():
        return None, "it was not built when mmvssm was installed"
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        return None, f"it cannot be loaded ({error})"
    if _interface(library, prefix) != (version, ctypes.sizeof(arguments)):
        return None, "it was built from another version of mmvssm"
    for function in functions:
        getattr(library, f"{prefix}_{function}").argtypes = [ctypes.POINTER(arguments)]
    return library, ""


def _interface(library: ctypes.CDLL, prefix: str) -> Optional[tuple[int, int]]:
    try:
        return tuple(
            getattr(library, f"{prefix}_interface_{part}")() for part in ("version", "size")
        )
    except AttributeError:
        return None


@functools.cache
def warn_once(reason: str) -> None:
    """Say that the library is missing, and what it costs."""
    warnings.warn(
        f"mmvssm: the compiled CPU kernels are missing, {reason}. Scans and sparse convolutions on the CPU run in "
        "plain PyTorch, many times slower. Install a C++ compiler (such as g++) and reinstall mmvssm to build them.",
        RuntimeWarning,
        stacklevel=2,
    )
