"""Sparse depthwise convolution in PyTorch: the fallback for CPUs without the compiled kernel and for other devices.

It adds up tap by tap over all tokens, so no tensor is larger than ``(B, K, C)``.

:func:`convolve` and :func:`weight_gradient` are the contract of every backend.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Optional

import torch
from torch import Tensor

from ..backend import accumulation_dtype


def convolve(
    x: Tensor, weight: Tensor, neighbors: Tensor, bias: Optional[Tensor], reverse: bool = False
) -> Tensor:
    """``y[b, i] = bias + sum over t of weight[:, t] * x[b, neighbors[b, i, t]]``, skipping neighbours -1.

    Args:
        x: ``(B, K, C)``, any strides.
        weight: ``(C, 1, k, k)``, any strides.
        neighbors: ``(B, K, k * k)``, int32, any strides.
        bias: ``(C,)``.
        reverse: Reverse the taps; then ``x`` is the gradient of the output and ``y`` that of the input.

    Returns:
        ``y (B, K, C)``, contiguous, in the dtype of ``x``.
    """
    dtype = accumulation_dtype(x, weight)
    y = x.new_zeros((x.shape[0] * x.shape[1], x.shape[2]), dtype=dtype)
    if bias is not None:
        y += bias.to(dtype)
    taps = weight.flatten(1).t().to(dtype)
    for tap, x_t in zip(taps.flip(0) if reverse else taps, _under_taps(x, neighbors)):
        y.addcmul_(x_t.to(dtype), tap)
    return y.to(x.dtype).view(x.shape)


def weight_gradient(grad_y: Tensor, x: Tensor, neighbors: Tensor) -> Tensor:
    """``grad_weight[:, t] = sum over b and i of grad_y[b, i] * x[b, neighbors[b, i, t]]``.

    Args:
        grad_y: ``(B, K, C)``, any strides.
        x: ``(B, K, C)``, any strides.
        neighbors: ``(B, K, T)``, int32, any strides.

    Returns:
        ``grad_weight (C, T)``, contiguous, in the accumulation dtype.
    """
    dtype = accumulation_dtype(grad_y, x)
    grad_y = grad_y.flatten(0, 1).to(dtype)
    sums = [(x_t * grad_y).sum(0) for x_t in _under_taps(x, neighbors)]
    return torch.stack(sums, dim=1)


def _under_taps(x: Tensor, neighbors: Tensor) -> Iterator[Tensor]:
    """Yield for each tap its token at every kept token ``(B * K, C)``; zero where there is none."""
    batch, kept, channels = x.shape
    # Append a row of zeros to each image for absent neighbours.
    rows = torch.cat([x, x.new_zeros(batch, 1, channels)], dim=1).flatten(0, 1)
    first = torch.arange(batch, device=x.device)[:, None, None] * (kept + 1)
    index = torch.where(neighbors < 0, kept, neighbors) + first
    for rows_t in index.flatten(0, 1).unbind(1):
        yield rows.index_select(0, rows_t)
