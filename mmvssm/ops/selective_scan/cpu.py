"""The selective scan in C++ for CPUs: the Python side of ``csrc/scan_cpu.cpp``."""

from __future__ import annotations

import ctypes
import functools
from typing import Optional

import torch
from torch import Tensor

from .. import backend
from .inputs import DIFFERENTIABLE, PARAMETERS, ScanInputs

_INTERFACE_VERSION = 4
_PROBLEMS = {
    1: (IndexError, "an index in {index} is not a token: it must lie in [0, L)."),
    2: (ValueError, "{index} must visit every token exactly once in each walk."),
    3: (MemoryError, "out of memory."),
}


def available() -> bool:
    """Whether the compiled kernel can be used; warn once if it cannot."""
    library, reason = _load()
    if library is None:
        backend.warn_no_library(reason)
    return library is not None


def forward(inputs: ScanInputs) -> tuple[Tensor, Tensor]:
    """See :func:`mmvssm.ops.selective_scan.pytorch.forward`.

    Raises:
        IndexError: If ``order`` or ``source`` names a token that does not exist.
        ValueError: If ``order`` does not visit every token once.
    """
    scan = _Scan.of(inputs)
    y = scan.output_rows("y", inputs.y_shape, inputs.sum_walks)
    states = scan.output("saved_states", inputs.states_shape, scan.wide_dtype)
    scan.run("scan_forward")
    return y.to(inputs.u.dtype), states


def backward(
    grad_y: Tensor, inputs: ScanInputs, states: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """See :func:`mmvssm.ops.selective_scan.pytorch.backward`.

    Raises:
        IndexError: If ``order`` or ``source`` names a token that does not exist.
        ValueError: If ``order`` or ``source`` does not visit every token once.
    """
    scan = _Scan.of(inputs)
    scan.input_rows("grad_y", grad_y)
    scan.input_array("saved_states", states)
    differentiated = {name: getattr(inputs, name) for name in DIFFERENTIABLE}
    grads = {}
    for name, x in differentiated.items():
        if x is None:
            grads[name] = grad_y.new_empty(0)
        elif name in ("u", "delta"):
            grads[name] = scan.output_rows(f"grad_{name}", x.shape, x.shape[2] < scan.walks)
        else:
            dtype = scan.wide_dtype if name in PARAMETERS else scan.element_dtype
            grads[name] = scan.output(f"grad_{name}", x.shape, dtype)
    scan.run("scan_backward")
    return tuple(
        grads[name] if x is None else grads[name].to(x.dtype) for name, x in differentiated.items()
    )


def runs_walks_together(inputs: ScanInputs) -> bool:
    """Whether :func:`forward` computes the part that the walks share only once for these inputs."""
    library, _ = _load()
    return bool(library.scan_runs_walks_together(_Scan.of(inputs)))


def _walks_share(inputs: ScanInputs) -> bool:
    """Whether all inputs but ``B``, ``order`` and ``gap`` have stride 0 along the walks."""
    u, delta, A, _, C, D, delta_bias, order, source, _, rest, *_ = inputs
    source = order if source is None else source
    dims = [(u, 2), (delta, 2), (C, 2), (A, 0), (D, 0), (delta_bias, 0), (rest, 0), (source, -2)]
    return all(x is None or x.stride(dim) == 0 for x, dim in dims)


class _Rows(ctypes.Structure):
    _fields_ = [
        ("data", ctypes.c_void_p),
        ("batch_stride", ctypes.c_int64),
        ("token_stride", ctypes.c_int64),
        ("walk_stride", ctypes.c_int64),
    ]


class _Index(ctypes.Structure):
    _fields_ = [
        ("data", ctypes.c_void_p),
        ("batch_stride", ctypes.c_int64),
        ("walk_stride", ctypes.c_int64),
    ]


class _Scan(backend.KernelArguments):
    """Mirror of ``struct Scan`` in ``scan.h``, field by field."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("batch", "length", "walks", "channels", "states")),
        *((name, ctypes.c_int64) for name in ("dtype", "softplus", "threads", "shared")),
        *((f"sum_{name}", ctypes.c_int64) for name in ("y", "grad_u", "grad_delta")),
        *((name, _Rows) for name in ("u", "delta", "B", "C", "grad_y")),
        *((name, _Index) for name in ("order", "source", "gap")),
        *((name, ctypes.c_void_p) for name in ("A", "D", "delta_bias", "rest")),
        *((name, ctypes.c_void_p) for name in ("y", "saved_states")),
        *((name, ctypes.c_void_p) for name in ("grad_u", "grad_delta", "grad_B", "grad_C")),
        *((name, ctypes.c_void_p) for name in ("grad_A", "grad_D", "grad_delta_bias", "grad_rest")),
        *((name, ctypes.c_void_p) for name in ("run_on_pool", "pool")),  # null: OpenMP's threads
    ]

    @classmethod
    def of(cls, inputs: ScanInputs) -> _Scan:
        inputs = inputs.for_each_walk()
        u, delta, A, B, C, D, delta_bias, order, source, gap, rest, delta_softplus, _ = inputs
        batch, length, walks, channels = u.shape
        scan = cls(batch, length, walks, channels, A.shape[-1])
        scan.wide_dtype = inputs.accumulation_dtype
        dtype = functools.reduce(torch.promote_types, (x.dtype for x in (u, delta, B, C)))
        scan.element_dtype = torch.float64 if scan.wide_dtype == torch.float64 else dtype
        scan.dtype = backend.DTYPES[scan.element_dtype]
        scan.softplus = delta_softplus
        scan.threads = torch.get_num_threads()
        scan.shared = _walks_share(inputs)
        for name, x in (("u", u), ("delta", delta), ("B", B), ("C", C)):
            scan.input_rows(name, x)
        for name, x in (("A", A), ("D", D), ("delta_bias", delta_bias), ("rest", rest)):
            if x is not None:
                scan.input_array(name, x)
        for name, x in (("order", order), ("source", source), ("gap", gap)):
            if x is not None:
                scan.input_index(name, x)
        return scan

    def output_rows(self, name: str, shape: tuple[int, ...], summed: bool) -> Tensor:
        """Allocate tokens that the library writes, or those to which it adds what is summed over the walks."""
        if not summed:
            return self.output(name, shape, self.element_dtype)
        setattr(self, f"sum_{name}", True)
        return self.output(name, shape, self.wide_dtype).zero_()

    def input_index(self, name: str, x: Tensor) -> None:
        """Store an index ``(K, L)`` or ``(B, K, L)``."""
        if x.stride(-1) != 1:
            x = x.contiguous()
        batch_stride = x.stride(0) if x.dim() == 3 else 0
        setattr(self, name, _Index(self.address(x), batch_stride, x.stride(-2)))

    def run(self, function: str) -> None:
        library, _ = _load()
        status = getattr(library, function)(ctypes.byref(self))
        if status:
            error, message = _PROBLEMS[status % 16]
            index = "traversal.order" if status < 16 else "traversal.source"
            raise error("selective_scan: " + message.format(index=index))


@functools.cache
def _load() -> tuple[Optional[ctypes.CDLL], str]:
    """Return the library and an empty string, or None and the reason."""
    return backend.load_library(
        "scan",
        _INTERFACE_VERSION,
        _Scan,
        ["forward", "backward", "runs_walks_together"],
    )
