"""The sparse depthwise convolution in C++ for CPUs: the Python side of ``csrc/sparse_depthwise_conv_cpu.cpp``."""

from __future__ import annotations

import ctypes
import functools
from typing import Optional

import torch
from torch import Tensor

from .. import backend
from ..backend import accumulation_dtype

_INTERFACE_VERSION = 1
_OUT_OF_MEMORY = 2


def available() -> bool:
    """Whether the compiled kernel can be used; warn once if it cannot."""
    library, reason = _load()
    if library is None:
        backend.warn_no_library(reason)
    return library is not None


def convolve(
    x: Tensor, weight: Tensor, neighbors: Tensor, bias: Optional[Tensor], reverse: bool = False
) -> Tensor:
    """See :func:`mmvssm.ops.sparse_depthwise_conv.pytorch.convolve`.

    Raises:
        IndexError: If ``neighbors`` names a token that does not exist.
    """
    conv = _Conv.over(x, neighbors, accumulation_dtype(x, weight))
    conv.reversed = reverse
    conv.input_array("weight", weight)
    if bias is not None:
        conv.input_array("bias", bias)
    y = conv.output("y", x.shape, conv.element_dtype)
    conv.run("convolve")
    return y.to(x.dtype)


def weight_gradient(grad_y: Tensor, x: Tensor, neighbors: Tensor) -> Tensor:
    """See :func:`mmvssm.ops.sparse_depthwise_conv.pytorch.weight_gradient`.

    Raises:
        IndexError: If ``neighbors`` names a token that does not exist.
    """
    conv = _Conv.over(x, neighbors, accumulation_dtype(grad_y, x))
    conv.input_rows("grad_y", grad_y)
    grad_weight = conv.output("grad_weight", (conv.channels, conv.taps), conv.wide_dtype)
    conv.run("weight_gradient")
    return grad_weight


class _Rows(ctypes.Structure):
    _fields_ = [
        ("data", ctypes.c_void_p),
        ("batch_stride", ctypes.c_int64),
        ("token_stride", ctypes.c_int64),
    ]


class _Conv(backend.KernelArguments):
    """Mirror of ``struct SparseConv`` in the C++ file, field by field."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("batch", "kept", "channels", "taps")),
        *((name, ctypes.c_int64) for name in ("dtype", "reversed", "threads")),
        *((name, _Rows) for name in ("x", "grad_y")),
        *((name, ctypes.c_void_p) for name in ("neighbors", "weight", "bias", "y", "grad_weight")),
    ]

    @classmethod
    def over(cls, x: Tensor, neighbors: Tensor, wide_dtype: torch.dtype) -> _Conv:
        conv = cls(*x.shape, neighbors.shape[-1])
        conv.wide_dtype = wide_dtype
        conv.element_dtype = torch.float64 if wide_dtype == torch.float64 else x.dtype
        conv.dtype = backend.DTYPES[conv.element_dtype]
        conv.threads = torch.get_num_threads()
        conv.input_rows("x", x)
        conv.neighbors = conv.address(neighbors.contiguous())
        return conv

    def run(self, function: str) -> None:
        library, _ = _load()
        status = getattr(library, f"sparse_depthwise_conv_{function}")(ctypes.byref(self))
        if status == _OUT_OF_MEMORY:
            raise MemoryError("sparse_depthwise_conv: out of memory.")
        if status:
            raise IndexError(
                "sparse_depthwise_conv: an index in neighbors is not a token: it must lie in [0, K), or be -1 for none."
            )


@functools.cache
def _load() -> tuple[Optional[ctypes.CDLL], str]:
    """Return the library and an empty string, or None and the reason."""
    return backend.load_library(
        "sparse_depthwise_conv",
        _INTERFACE_VERSION,
        _Conv,
        ["convolve", "weight_gradient"],
    )
