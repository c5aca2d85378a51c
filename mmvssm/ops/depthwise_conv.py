"""Depthwise convolution over all tokens of a grid, with gradients that are fast on CPUs too."""

from __future__ import annotations

from typing import Optional

import torch
import torch.nn.functional as F
from torch import Tensor

from .sparse_depthwise_conv import cpu, neighbor_table


def depthwise_conv(
    x: Tensor, weight: Tensor, grid: tuple[int, int], bias: Optional[Tensor] = None
) -> Tensor:
    """Depthwise convolution (cross-correlation, stride 1) of tokens that fill a grid row by row.

    Equals ``torch.nn.functional.conv2d`` with ``padding=k // 2`` and ``groups=C`` on the same memory seen as a
    channels-last image. On a CPU, PyTorch's gradients of large kernels take tens of times as long as the convolution
    itself; there we use the kernels of :func:`sparse_depthwise_conv`, with the whole grid as the kept tokens.

    Args:
        x: Tokens ``(B, L, C)``, ``L = H * W``.
        weight: As in ``torch.nn.Conv2d(C, C, k, groups=C)``, ``(C, 1, k, k)``, ``k`` odd.
        grid: Height and width.
        bias: ``(C,)``.

    Returns:
        ``(B, L, C)``.
    """
    fast_gradients = (
        weight.shape[-1] > 3  # PyTorch is as fast for kernels up to 3
        and x.device.type == "cpu"
        and x.dtype == weight.dtype == torch.float32
        and torch.is_grad_enabled()
        and (x.requires_grad or weight.requires_grad)
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()
        and cpu.available()
    )
    if fast_gradients:
        return _DepthwiseConv.apply(x, weight, bias, grid)
    return _convolve(x, weight, bias, grid)


def _convolve(x: Tensor, weight: Tensor, bias: Optional[Tensor], grid: tuple[int, int]) -> Tensor:
    x = x.unflatten(1, grid).permute(0, 3, 1, 2)
    y = F.conv2d(x, weight, bias, padding=weight.shape[-1] // 2, groups=weight.shape[0])
    return y.permute(0, 2, 3, 1).flatten(1, 2)


class _DepthwiseConv(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, grid):
        ctx.save_for_backward(x, weight, bias)
        ctx.grid = grid
        return _convolve(x, weight, bias, grid)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_y):
        x, weight, bias = ctx.saved_tensors
        everywhere = torch.arange(x.shape[1]).expand(1, -1)
        neighbors = neighbor_table(everywhere, ctx.grid, weight.shape[-1])
        neighbors = neighbors.expand(x.shape[0], -1, -1).contiguous()
        needed = ctx.needs_input_grad[:3]
        grads = torch.ops.mmvssm.sparse_depthwise_conv_backward(
            grad_y, x, weight, neighbors, bias, *needed
        )
        return (*(grad if need else None for grad, need in zip(grads, needed)), None)
