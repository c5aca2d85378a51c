"""Shared parts of all operators: choice of backend, compiled library, dtypes, autocast and devices.

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
import struct
import sysconfig
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Optional

import torch
from torch import Tensor
from torch.autograd import forward_ad

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3}
"""Codes of the element types, as in ``DType`` of ``csrc/dispatch.h``."""


# ------------------------------------------------------------------------------------- choice of backend


def choose(x: Tensor, *, gpu: ModuleType, cpu: ModuleType, fallback: ModuleType) -> ModuleType:
    """Return the fastest of an operator's three backends that works for ``x``; warn once if it is a slow one."""
    if x.is_cuda:
        if not triton_available():
            warn_no_triton()
        elif triton_works():
            return gpu
    if x.device.type == "cpu" and cpu.available():
        return cpu
    return fallback


@functools.cache
def triton_available() -> bool:
    """Whether Triton can be imported. Modules in this folder import it only after this check."""
    try:
        import triton  # noqa: F401
    except Exception:  # a broken installation may raise anything
        return False
    return True


@functools.cache
def warn_no_triton() -> None:
    """Warn that the GPU kernels cannot run and that the fallback is slow."""
    warnings.warn(
        "mmvssm: Triton cannot be imported, so scans and sparse convolutions on the GPU run in plain PyTorch, which is "
        'slow. Run "import triton" to see the error, and install the Triton that matches your PyTorch.',
        RuntimeWarning,
        stacklevel=2,
    )


@functools.cache
def triton_works() -> bool:
    """Whether Triton can be imported and launch kernels; warn once if it can be imported but cannot launch them."""
    if not triton_available():
        return False
    missing = missing_for_triton()
    if missing:
        warnings.warn(
            f"mmvssm: Triton cannot launch GPU kernels: it found {missing}. Scans and sparse convolutions on the GPU "
            "run in plain PyTorch, many times slower. Install what is missing, or set the environment variable CC to "
            "a C compiler.",
            RuntimeWarning,
            stacklevel=2,
        )
    return not missing


def missing_for_triton() -> str:
    """Name what Triton lacks to compile its launcher, such as "no C compiler"; empty if it has everything."""
    import triton

    build = getattr(getattr(triton, "knobs", None), "build", None)
    if getattr(build, "impl", None) is not None:  # the user has replaced Triton's compile function
        return ""
    if not (os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")):
        return "no C compiler (such as gcc)"
    scheme = sysconfig.get_default_scheme()
    scheme = "posix_prefix" if scheme == "posix_local" else scheme  # Debian; Triton does the same
    folders = [sysconfig.get_path("include", scheme)]
    for variable in ("CPATH", "C_INCLUDE_PATH"):  # conda and Nix set these for compilers
        folders += filter(None, os.environ.get(variable, "").split(os.pathsep))
    if not any((Path(folder) / "Python.h").exists() for folder in folders):
        return "no header Python.h (in packages such as python3-dev)"
    return ""


# ------------------------------------------------------------------------------------- derivatives


def gradients_of(
    formula: Callable[..., Tensor], inputs: Sequence[object], grad_y: Tensor
) -> tuple[Optional[Tensor], ...]:
    """Differentiate an operator's formula by PyTorch, so that the gradients can be differentiated again.

    For backward passes under ``create_graph=True``, since the kernels have first derivatives only. It takes more time
    and memory than they do.

    Args:
        formula: Computes the operator with differentiable PyTorch functions.
        inputs: Its arguments, as the forward pass got them.
        grad_y: Gradient of what it returns.

    Returns:
        A gradient for each argument; None for those that need none.
    """
    with torch.enable_grad():
        # Views tell arguments apart that are one tensor.
        inputs = [x.view_as(x) if getattr(x, "requires_grad", False) else x for x in inputs]
        y = formula(*inputs)
    needed = [i for i, x in enumerate(inputs) if getattr(x, "requires_grad", False)]
    found = torch.autograd.grad(
        y, [inputs[i] for i in needed], grad_y, create_graph=True, allow_unused=True
    )
    grads = dict(zip(needed, found))
    return tuple(grads.get(i) for i in range(len(inputs)))


def has_tangent(*inputs: object) -> bool:
    """Whether an argument carries a tangent of forward-mode differentiation, which kernels would lose."""
    return forward_ad._current_level >= 0 and any(
        isinstance(x, Tensor) and forward_ad.unpack_dual(x).tangent is not None for x in inputs
    )


# --------------------------------------------------------------------------------- dtypes, autocast, devices


def accumulation_dtype(*tensors: Tensor) -> torch.dtype:
    """The dtype of states and sums: float64 if any input is, else float32."""
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


def lowered_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which a convolution or a linear layer on a CPU takes a tensor: autocast's, if that is on."""
    lowers = torch.is_autocast_enabled("cpu") and x.dtype == torch.float32
    return torch.get_autocast_dtype("cpu") if lowers else x.dtype


def check_devices(operator: str, x_name: str, x: Tensor, others: Mapping[str, object]) -> None:
    """Check that all tensors of an operator are on one device.

    Args:
        operator: Name of the operator, for the message.
        x_name: Name of the argument ``x``.
        x: Tensor on the expected device.
        others: The other arguments by name; those that are no tensors are skipped.

    Raises:
        ValueError: If a tensor is on another device.
    """
    for name, other in others.items():
        if isinstance(other, Tensor) and other.device != x.device:
            raise ValueError(
                f"{operator}: {name} must be on the device of {x_name}, {x.device}; got {other.device}."
            )


def check_positions(operator: str, positions: Tensor, places: int) -> None:
    """Raise a ValueError unless positions ``(B, L)`` increase in ``[0, places)``; on a CPU, as it waits for a GPU."""
    if torch.compiler.is_compiling() or type(positions) is not Tensor or not positions.is_cpu:
        return
    first, last = (positions.new_full((len(positions), 1), end) for end in (-1, places))
    if not (torch.cat([first, positions, last], 1).diff() > 0).all():
        raise ValueError(f"{operator}: positions must increase and lie in [0, {places}).")


def register_autocast(operator: str, lowered: Collection[int]) -> None:
    """Make autocast convert some of an operator's arguments, except float64 ones, to its dtype.

    Args:
        operator: Name in the namespace ``mmvssm``.
        lowered: Positions of the arguments to convert.
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
    """Base of the structs that the library's functions take. Its methods store tensors and keep them alive.

    Attributes:
        element_dtype: Dtype of token rows; set it before the first row.
        wide_dtype: Dtype of parameters, states and sums; set it before the first of them.
    """

    element_dtype: torch.dtype
    wide_dtype: torch.dtype

    def input_rows(self, name: str, x: Tensor) -> None:
        """Store tokens ``(B, L, ..., C)``; only the last dimension has to be contiguous, else we copy."""
        x = x.to(self.element_dtype)
        if x.shape[-1] > 1 and x.stride(-1) != 1:
            x = x.contiguous()
        rows = type(getattr(self, name))
        setattr(self, name, rows(self.address(x), *x.stride()[:-1]))

    def input_array(self, name: str, x: Tensor) -> None:
        """Store a tensor that the library reads as one contiguous block."""
        setattr(self, name, self.address(x.to(self.wide_dtype).contiguous()))

    def output(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Allocate a tensor that the library writes."""
        x = torch.empty(shape, dtype=dtype)
        setattr(self, name, self.address(x))
        return x

    def address(self, x: Tensor) -> int:
        """Return a tensor's address and keep the tensor alive."""
        self.__dict__.setdefault("_tensors", []).append(x)
        return x.data_ptr()


def load_library(
    prefix: str, version: int, arguments: type[KernelArguments], functions: list[str]
) -> tuple[Optional[ctypes.CDLL], str]:
    """Load the library and declare its functions ``{prefix}_{function}(const arguments*)``.

    Returns:
        The library and an empty string, or None and the reason.
    """
    library, reason = _open_library()
    if library is None:
        return None, reason
    if _interface(library, prefix) != (version, ctypes.sizeof(arguments)):
        return None, _OTHER_VERSION
    for function in functions:
        try:
            getattr(library, f"{prefix}_{function}").argtypes = [ctypes.POINTER(arguments)]
        except AttributeError:
            return None, _OTHER_VERSION
    return library, ""


def onnxruntime_library() -> str:
    """Path of the library with the native operator ``mmvssm::SelectiveScan`` for onnxruntime 1.17 and later.

    The same library holds the compiled CPU kernels; it needs neither Python nor PyTorch. A session runs the operator on
    its own ``intra_op_num_threads`` threads. Results are bitwise equal for any number of threads::

        options = onnxruntime.SessionOptions()
        options.register_custom_ops_library(mmvssm.ops.onnxruntime_library())

    Raises:
        RuntimeError: If it was not built when mmvssm was installed, or cannot be loaded.
    """
    library, reason = _open_library()
    if library is not None and not hasattr(library, "RegisterCustomOps"):
        library, reason = None, _OTHER_VERSION
    if library is None:
        raise RuntimeError(
            f"mmvssm: onnxruntime's native operator needs the compiled CPU kernels, but {reason}. "
            "Install a C++ compiler (such as g++) and reinstall mmvssm to build them, or run without the operator."
        )
    return str(_LIBRARY)


_OTHER_VERSION = "they were built from another version of mmvssm"


def _open_library() -> tuple[Optional[ctypes.CDLL], str]:
    if not _LIBRARY.exists():
        return None, "they were not built when mmvssm was installed"
    try:
        if not _is_whole(_LIBRARY):
            return None, f"{_LIBRARY} is only part of a file"
        return ctypes.CDLL(str(_LIBRARY)), ""
    except OSError as error:
        return None, f"they cannot be loaded ({error})"


def _is_whole(path: Path) -> bool:
    """Whether an ELF file (Linux) reaches to its section headers, which come last; loading a part kills the process."""
    with path.open("rb") as file:
        header = file.read(64)
    if header[:6] != b"\x7fELF\x02\x01" or len(header) < 64:  # 64 bits, little-endian
        return True
    (start,) = struct.unpack_from("<Q", header, 40)
    size, count = struct.unpack_from("<HH", header, 58)
    return path.stat().st_size >= start + size * count


def _interface(library: ctypes.CDLL, prefix: str) -> Optional[tuple[int, int]]:
    try:
        return tuple(
            getattr(library, f"{prefix}_interface_{part}")() for part in ("version", "size")
        )
    except AttributeError:
        return None


@functools.cache
def warn_no_library(reason: str) -> None:
    """Warn that the library is missing and that the fallback is slow."""
    warnings.warn(
        f"mmvssm: the compiled CPU kernels are missing: {reason}. Scans and sparse convolutions on the CPU run in "
        "plain PyTorch, many times slower. Install a C++ compiler (such as g++) and reinstall mmvssm to build them.",
        RuntimeWarning,
        stacklevel=2,
    )
