"""The convolution with activation in C++ for CPUs: the Python side of ``csrc/conv_act_cpu.cpp``."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from typing import Optional

import torch
from torch import Tensor

from .. import backend

ACTIVATIONS = ("identity", "silu", "gelu")
"""In the order of ``Activation`` in the C++ file."""

DTYPES = (torch.float32, torch.bfloat16)

_INTERFACE_VERSION = 1


def available() -> bool:
    """Whether the compiled kernel can be used; warn once if it cannot."""
    library, reason = _load()
    if library is None:
        backend.warn_no_library(reason)
    return library is not None


def forward(
    x: Tensor, weight: Tensor, bias: Optional[Tensor], activation: str, padding: Sequence[int]
) -> Tensor:
    """See :func:`mmvssm.ops.conv_act.formula`; ``x`` is of :data:`DTYPES`."""
    conv = _Conv.over(x, weight, bias, activation, padding)
    y = conv.output("y", (conv.batch, conv.height, conv.width, conv.channels), x.dtype)
    conv.run("forward")
    return y


def backward(
    grad_y: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Optional[Tensor],
    activation: str,
    padding: Sequence[int],
    with_y: bool,
) -> tuple[Tensor, Tensor, Tensor, Optional[Tensor]]:
    """Gradients of ``x``, of the weight ``(C, 9)`` and of the bias ``(C,)``; and the output once more, if wanted."""
    conv = _Conv.over(x, weight, bias, activation, padding)
    conv.input_rows("grad_y", grad_y)
    grad_x = conv.output("grad_x", x.shape, x.dtype)
    grads = conv.output("grad_parameters", (conv.channels, 10), torch.float32)
    y = conv.output("y", grad_y.shape, x.dtype) if with_y else None
    conv.run("backward")
    return grad_x, grads[:, :9], grads[:, 9], y


class _Rows(ctypes.Structure):
    _fields_ = [
        ("data", ctypes.c_void_p),
        ("batch_stride", ctypes.c_int64),
        ("row_stride", ctypes.c_int64),
        ("pixel_stride", ctypes.c_int64),
    ]


class _Conv(backend.KernelArguments):
    """Mirror of ``struct ConvAct`` in the C++ file, field by field."""

    wide_dtype = torch.float32
    _fields_ = [
        *((name, ctypes.c_int64) for name in ("batch", "height", "width", "channels")),
        *((name, ctypes.c_int64) for name in ("above", "below")),
        *((name, ctypes.c_int64) for name in ("dtype", "activation", "threads")),
        *((name, _Rows) for name in ("x", "grad_y")),
        *((name, ctypes.c_void_p) for name in ("weight", "bias", "y", "grad_x")),
        ("grad_parameters", ctypes.c_void_p),
    ]

    @classmethod
    def over(
        cls,
        x: Tensor,
        weight: Tensor,
        bias: Optional[Tensor],
        activation: str,
        padding: Sequence[int],
    ) -> _Conv:
        batch, rows, width, channels = x.shape
        conv = cls(batch, rows - 2 + sum(padding), width, channels, *padding)
        conv.element_dtype = x.dtype
        conv.dtype = backend.DTYPES[x.dtype]
        conv.activation = ACTIVATIONS.index(activation)
        conv.threads = torch.get_num_threads()
        conv.input_rows("x", x)
        conv.input_array("weight", weight)
        if bias is not None:
            conv.input_array("bias", bias)
        return conv

    def run(self, function: str) -> None:
        library, _ = _load()
        if getattr(library, f"conv_act_{function}")(ctypes.byref(self)):
            raise MemoryError("conv_act: out of memory.")


@functools.cache
def _load() -> tuple[Optional[ctypes.CDLL], str]:
    """Return the library and an empty string, or None and the reason."""
    return backend.load_library("conv_act", _INTERFACE_VERSION, _Conv, ["forward", "backward"])
