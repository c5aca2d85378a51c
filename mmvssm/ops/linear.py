"""Linear layers by oneDNN on CPUs whose vector instructions PyTorch's own matrix products leave unused."""

from __future__ import annotations

import functools
import math
from typing import Optional

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import flop_registry, register_flop_formula

from .backend import gradients_of, has_tangent

LEAST_WORK = 1 << 20
"""Multiply-adds from which a product is worth a call of oneDNN."""


def linear(x: Tensor, weight: Tensor, bias: Optional[Tensor] = None) -> Tensor:
    """As ``torch.nn.functional.linear``.

    PyTorch multiplies float32 matrices by MKL, which has no AVX-512 code for AMD's processors, and convolves by oneDNN,
    which has: on one core of a Zen 5, 105 against 230 GFLOPs a second. So where there is AVX-512, float32 products of
    some size go to oneDNN, forward and backward.

    Args:
        x: ``(..., in_features)``.
        weight: ``(out_features, in_features)``.
        bias: ``(out_features,)``.

    Returns:
        ``(..., out_features)``.
    """
    if not _uses_onednn(x, weight, bias):
        return F.linear(x, weight, bias)
    if torch.is_grad_enabled() and any(
        tensor is not None and tensor.requires_grad for tensor in (x, weight, bias)
    ):
        return _Linear.apply(x, weight, bias)
    return _product(x, weight, bias)


def matmul(a: Tensor, b: Tensor) -> Tensor:
    """The product of matrices ``(M, K)`` and ``(K, N)``, without gradients, as :func:`linear` computes it."""
    return _product(a, b.t(), None) if _uses_onednn(a, b.t(), None) else a @ b


def weight_gradient(grad_y: Tensor, x: Tensor) -> Tensor:
    """``(M, N)`` and ``(M, K)`` to their product over the rows, ``(N, K)``, without gradients."""
    # oneDNN copies the transposed first factor: it had better be the narrower one.
    if x.shape[1] < grad_y.shape[1]:
        return matmul(x.t(), grad_y).t()
    return matmul(grad_y.t(), x)


def _product(x: Tensor, weight: Tensor, bias: Optional[Tensor]) -> Tensor:
    # Rows with gaps between them would take an implementation that is tens of times as slow.
    if not (weight.is_contiguous() or weight.t().is_contiguous()):
        weight = weight.contiguous()
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


def _uses_onednn(x: Tensor, weight: Tensor, bias: Optional[Tensor]) -> bool:
    if torch.compiler.is_compiling() or x.device.type != "cpu":
        return False
    # What does not fit is PyTorch's to refuse or to broadcast.
    fits = (
        x.dim() > 1
        and weight.dim() == 2
        and x.shape[-1] == weight.shape[1]
        and (bias is None or bias.shape == weight.shape[:1])
    )
    tensors = [tensor for tensor in (x, weight, bias) if tensor is not None]
    return (
        fits
        and x.numel() * weight.shape[0] >= LEAST_WORK
        and all(tensor.dtype == torch.float32 for tensor in tensors)
        and not torch.is_autocast_enabled("cpu")
        and _has_onednn()
        and not has_tangent(*tensors)
    )


@functools.cache
def _has_onednn() -> bool:
    """Whether there is AVX-512, and an operator of PyTorch's that multiplies by oneDNN, which is no public one."""
    if not torch.backends.mkldnn.is_available() or not hasattr(
        torch.ops.mkldnn, "_linear_pointwise"
    ):
        return False
    if torch.backends.cpu.get_cpu_capability() != "AVX512":
        return False
    # Whatever the defaults are when mmvssm is imported.
    a, b = (torch.arange(3 * n, dtype=torch.float32, device="cpu").view(n, 3) for n in (2, 4))
    try:
        return torch.equal(_product(a, b, None), a @ b.t())
    except Exception:  # whatever another version of it raises
        return False


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(x, weight, bias)
        return _product(x, weight, bias)

    @staticmethod
    def backward(ctx, grad_y):
        x, weight, bias = ctx.saved_tensors
        if torch.is_grad_enabled():
            return gradients_of(F.linear, (x, weight, bias), grad_y)
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad
        rows, grad_rows = x.flatten(0, -2), grad_y.flatten(0, -2)
        return (
            matmul(grad_rows, weight).view(x.shape) if needs_x else None,
            weight_gradient(grad_rows, rows) if needs_weight else None,
            grad_rows.sum(0) if needs_bias else None,
        )


if _has_onednn() and torch.ops.mkldnn._linear_pointwise not in flop_registry:

    @register_flop_formula(torch.ops.mkldnn._linear_pointwise)
    def _flops(x_shape, weight_shape, *args, out_shape=None, **kwargs) -> int:
        """Two for each multiply-add, as PyTorch counts matrix products."""
        return 2 * math.prod(x_shape) * weight_shape[0]
