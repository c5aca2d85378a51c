"""What all operators share: the choice of backend, the compiled library, dtypes, autocast and devices.

An operator has up to three backends, modules with the same functions: Triton kernels for GPUs, compiled C++ for CPUs,
and plain PyTorch for every other case. The C++ of all operators is one library with a plain C interface that knows
nothing of Python or PyTorch, so one binary serves every version of both. It is built when mmvssm is installed on a
machine with a C++ compiler.
"""

from __future__ import annotations

import ctypes
import functools
import os
import shutil
import sysconfig
import warnings
from collections.abc import Collection, Mapping
from pathlib import Path
from types import ModuleType
from typing import Optional

import torch
from torch import Tensor

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3}
"""The numbers of the element types, ``DType`` of ``csrc/dispatch.h``."""


# ------------------------------------------------------------------------------------- choice of backend


def choose(x: Tensor, *, gpu: ModuleType, cpu: ModuleType, anywhere: ModuleType) -> ModuleType:
    """The fastest backend that works for a tensor, of an operator's three. Slow ones are taken with a warning."""
    if x.is_cuda:
        if not triton_available():
            warn_no_triton()
        elif triton_works():
            return gpu
    if x.device.type == "cpu" and cpu.available():
        return cpu
    return anywhere


@functools.cache
def triton_available() -> bool:
    """Whether triton can be imported. Nothing in this folder does so before it is asked."""
    try:
        import triton  # noqa: F401
    except Exception:  # a broken installation fails in ways of its own
        return False
    return True


@functools.cache
def warn_no_triton() -> None:
    """Say that a GPU's kernels cannot run, and what it costs."""
    warnings.warn(
        "mmvssm: Triton cannot be imported, so scans and sparse convolutions on the GPU run in plain PyTorch, which is "
        'slow. Install the Triton that belongs to your PyTorch, and look at what "import triton" says.',
        RuntimeWarning,
        stacklevel=2,
    )


@functools.cache
def triton_works() -> bool:
    """Whether triton is there and what it needs to launch a kernel; says so, once, where only the latter is missing."""
    if not triton_available():
        return False
    missing = missing_for_triton()
    if missing:
        warnings.warn(
            f"mmvssm: Triton cannot launch GPU kernels here, since there is {missing}. Scans and sparse convolutions "
            "on the GPU run in plain PyTorch, many times slower. Install it, or say in the environment variable CC "
            "where a C compiler is.",
            RuntimeWarning,
            stacklevel=2,
        )
    return not missing


def missing_for_triton() -> str:
    """What Triton would miss when it compiles its launcher, empty if nothing."""
    import triton

    build = getattr(getattr(triton, "knobs", None), "build", None)
    if getattr(build, "impl", None) is not None:  # somebody's own way to compile
        return ""
    if not (os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")):
        return "no C compiler (such as gcc)"
    scheme = sysconfig.get_default_scheme()
    scheme = "posix_prefix" if scheme == "posix_local" else scheme  # Debian's own; as Triton does
    folders = [sysconfig.get_path("include", scheme)]
    for variable in ("CPATH", "C_INCLUDE_PATH"):  # where compilers look too, in conda and Nix
        folders += filter(None, os.environ.get(variable, "").split(os.pathsep))
    if not any((Path(folder) / "Python.h").exists() for folder in folders):
        return "no header Python.h (in packages such as python3-dev)"
    return ""


# --------------------------------------------------------------------------------- dtypes, autocast, devices


def accumulation_dtype(*tensors: Tensor) -> torch.dtype:
    """The dtype of states and sums: float64 if any input is, else float32."""
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


def check_devices(operator: str, x_name: str, x: Tensor, others: Mapping[str, object]) -> None:
    """Compare the devices of an operator's tensors.

    Args:
        operator: Its name, for the message.
        x_name: What the operator calls ``x``.
        x: The tensor whose device counts.
        others: Its other arguments by name; what is no tensor is passed over.

    Raises:
        ValueError: If one is on another device.
    """
    for name, other in others.items():
        if isinstance(other, Tensor) and other.device != x.device:
            raise ValueError(
                f"{operator}: {name} must be on the device of {x_name}, {x.device}; got {other.device}."
            )


def register_autocast(operator: str, lowered: Collection[int]) -> None:
    """Let autocast convert some of an operator's arguments, float64 apart, and run it as it is then.

    Args:
        operator: Its name in the namespace ``mmvssm``.
        lowered: The positions of those arguments.
    """
    for device_type, dispatch_key in (("cpu", "AutocastCPU"), ("cuda", "AutocastCUDA")):
        function = functools.partial(_under_autocast, operator, frozenset(lowered), device_type)
        _library.impl(operator, function, dispatch_key)


def _under_autocast(operator: str, lowered: Collection[int], device_type: str, *arguments):
    dtype = torch.get_autocast_dtype(device_type)
    arguments = [
        x.to(dtype) if i in lowered and x.dtype != torch.float64 else x
        for i, x in enumerate(arguments)
    ]
    with torch.autocast(device_type, enabled=False):
        return getattr(torch.ops.mmvssm, operator)(*arguments)


_library = torch.library.Library("mmvssm", "FRAGMENT")


# ------------------------------------------------------------------------------------ the compiled library

_LIBRARY = Path(__file__).parent / "_kernels.so"


class KernelArguments(ctypes.Structure):
    """Base of the structs that the library's functions take: it fills in tensors and keeps them alive.

    Attributes:
        element_dtype: Of rows of tokens, to be set before them.
        wide_dtype: Of parameters, states and sums, likewise.
    """

    element_dtype: torch.dtype
    wide_dtype: torch.dtype

    def input_rows(self, name: str, x: Tensor) -> None:
        """Tokens ``(B, L, ..., C)`` with any strides but the last."""
        x = x.to(self.element_dtype)
        if x.shape[-1] > 1 and x.stride(-1) != 1:
            x = x.contiguous()
        rows = type(getattr(self, name))
        setattr(self, name, rows(self.address(x), *x.stride()[:-1]))

    def input_array(self, name: str, x: Tensor) -> None:
        """A tensor that is read as it lies in contiguous memory."""
        setattr(self, name, self.address(x.to(self.wide_dtype).contiguous()))

    def output(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Make a tensor for the library to write."""
        x = torch.empty(shape, dtype=dtype)
        setattr(self, name, self.address(x))
        return x

    def address(self, x: Tensor) -> int:
        """Where a tensor lies, which from now on is kept."""
        self.__dict__.setdefault("_tensors", []).append(x)
        return x.data_ptr()


def load_library(
    prefix: str, version: int, arguments: type[KernelArguments], functions: list[str]
) -> tuple[Optional[ctypes.CDLL], str]:
    """Load the library and make ready the functions ``{prefix}_{function}(const arguments*)``.

    Returns:
        The library, or None and the reason.
    """
    library, reason = _open_library()
    if library is None:
        return None, reason
    if _interface(library, prefix) != (version, ctypes.sizeof(arguments)):
        return None, _OTHER_VERSION
    for function in functions:
        getattr(library, f"{prefix}_{function}").argtypes = [ctypes.POINTER(arguments)]
    return library, ""


def onnxruntime_library() -> str:
    """The library with the native operator ``mmvssm::SelectiveScan`` for onnxruntime 1.17 and later.

    It is the one that has the compiled CPU kernels, and needs neither Python nor PyTorch. Sessions run the operator on
    their own threads, ``intra_op_num_threads`` of them, with the same bits for any number::

        options = onnxruntime.SessionOptions()
        options.register_custom_ops_library(mmvssm.ops.onnxruntime_library())

    Returns:
        Its path.

    Raises:
        RuntimeError: If it was not built when mmvssm was installed, or cannot be used.
    """
    library, reason = _open_library()
    if library is not None and not hasattr(library, "RegisterCustomOps"):
        library, reason = None, _OTHER_VERSION
    if library is None:
        raise RuntimeError(
            f"mmvssm: onnxruntime's native operator is one of the compiled CPU kernels, which are missing, {reason}. "
            "Install a C++ compiler (such as g++) and reinstall mmvssm to build them, or run models without it."
        )
    return str(_LIBRARY)


_OTHER_VERSION = "they were built from another version of mmvssm"


def _open_library() -> tuple[Optional[ctypes.CDLL], str]:
    if not _LIBRARY.exists():
        return None, "they were not built when mmvssm was installed"
    try:
        return ctypes.CDLL(str(_LIBRARY)), ""
    except OSError as error:
        return None, f"they cannot be loaded ({error})"


def _interface(library: ctypes.CDLL, prefix: str) -> Optional[tuple[int, int]]:
    try:
        return tuple(
            getattr(library, f"{prefix}_interface_{part}")() for part in ("version", "size")
        )
    except AttributeError:
        return None


@functools.cache
def warn_no_library(reason: str) -> None:
    """Say that the library is missing, and what it costs."""
    warnings.warn(
        f"mmvssm: the compiled CPU kernels are missing, {reason}. Scans and sparse convolutions on the CPU run in "
        "plain PyTorch, many times slower. Install a C++ compiler (such as g++) and reinstall mmvssm to build them.",
        RuntimeWarning,
        stacklevel=2,
    )
