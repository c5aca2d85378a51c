"""Depthwise convolutions over all tokens of a grid or a line, with gradients that are fast on CPUs too."""

from __future__ import annotations

from typing import Optional

import torch
import torch.nn.functional as F
from torch import Tensor

from .backend import gradients_of, lowered_dtype
from .sparse_depthwise_conv import cpu, neighbor_table


def depthwise_conv(
    x: Tensor, weight: Tensor, grid: tuple[int, int], bias: Optional[Tensor] = None
) -> Tensor:
    """Depthwise convolution (cross-correlation, stride 1) of tokens that fill a grid row by row.

    Equals ``torch.nn.functional.conv2d`` with ``padding`` of half the kernel and ``groups=C`` on the same memory seen
    as a channels-last image. On a CPU, PyTorch's gradients of large kernels take tens of times as long as the
    convolution itself; there we use the kernels of :func:`sparse_depthwise_conv`, with the whole grid as the kept
    tokens.

    Args:
        x: Tokens ``(B, L, C)``, ``L = H * W``.
        weight: As in ``torch.nn.Conv2d(C, C, (h, w), groups=C)``, ``(C, 1, h, w)``, ``h`` and ``w`` odd.
        grid: Height and width.
        bias: ``(C,)``.

    Returns:
        ``(B, L, C)``.
    """
    # PyTorch is as fast for kernels up to 3.
    if weight.shape[-1] > 3 and _needs_our_gradients(x, weight):
        return _with_our_gradients(x, weight, bias, grid)
    return _convolve(x, weight, bias, grid)


def line_conv(
    x: Tensor, weight: Tensor, bias: Optional[Tensor] = None, backwards: bool = False
) -> Tensor:
    """One-sided depthwise convolution of tokens on a line: a token sees itself and the ``k - 1`` before it.

    Equals ``torch.nn.functional.conv1d`` with ``padding=k - 1`` and ``groups=C``, of which the first ``L`` outputs are
    kept.

    Args:
        x: Tokens ``(B, L, C)``.
        weight: As in ``torch.nn.Conv1d(C, C, k, groups=C)``, ``(C, 1, k)``. Its last value weighs the token itself.
        bias: ``(C,)``.
        backwards: Whether a token sees those after it instead, as if the line were turned round before and afterwards.

    Returns:
        ``(B, L, C)``.
    """
    if _needs_our_gradients(x, weight):
        return _with_our_gradients(x, centred(weight, backwards), bias, (1, x.shape[1]))
    weight = weight.flip(-1) if backwards else weight
    reach = weight.shape[-1] - 1
    # On channels-last memory a convolution of two dimensions takes a sixth of the time of conv1d.
    y = F.conv2d(
        x.transpose(1, 2)[:, :, None],
        weight[:, :, None],
        bias,
        padding=(0, reach),
        groups=weight.shape[0],
    )
    y = y[:, :, 0].transpose(1, 2)
    return y[:, reach:] if backwards else y[:, : x.shape[1]]


def centred(weight: Tensor, backwards: bool = False) -> Tensor:
    """The weight ``(C, 1, 1, 2 * k - 1)`` of a centred convolution that equals :func:`line_conv` with ``(C, 1, k)``."""
    reach = weight.shape[-1] - 1
    weight = F.pad(weight.flip(-1), (reach, 0)) if backwards else F.pad(weight, (0, reach))
    return weight[:, :, None]


def _needs_our_gradients(x: Tensor, weight: Tensor) -> bool:
    return (
        x.device.type == "cpu"
        and {lowered_dtype(x), lowered_dtype(weight)} in ({torch.float32}, {torch.bfloat16})
        and torch.is_grad_enabled()
        and (x.requires_grad or weight.requires_grad)
        and not torch.compiler.is_compiling()
        and cpu.available()
    )


def _with_our_gradients(
    x: Tensor, weight: Tensor, bias: Optional[Tensor], grid: tuple[int, int]
) -> Tensor:
    dtype = lowered_dtype(x)
    tensors = (x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype))
    with torch.autocast("cpu", enabled=False):
        return _DepthwiseConv.apply(*tensors, grid)


def _convolve(x: Tensor, weight: Tensor, bias: Optional[Tensor], grid: tuple[int, int]) -> Tensor:
    x = x.unflatten(1, grid).permute(0, 3, 1, 2)
    padding = tuple(size // 2 for size in weight.shape[2:])
    y = F.conv2d(x, weight, bias, padding=padding, groups=weight.shape[0])
    return y.permute(0, 2, 3, 1).flatten(1, 2)


class _DepthwiseConv(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, grid):
        ctx.save_for_backward(x, weight, bias)
        ctx.grid = grid
        return _convolve(x, weight, bias, grid)

    @staticmethod
    def backward(ctx, grad_y):
        x, weight, bias = ctx.saved_tensors
        if torch.is_grad_enabled():
            return gradients_of(_convolve, (x, weight, bias, ctx.grid), grad_y)
        everywhere = torch.arange(x.shape[1]).expand(1, -1)
        neighbors = neighbor_table(everywhere, ctx.grid, tuple(weight.shape[2:]))
        neighbors = neighbors.expand(x.shape[0], -1, -1).contiguous()
        needed = ctx.needs_input_grad[:3]
        grads = torch.ops.mmvssm.sparse_depthwise_conv_backward(
            grad_y, x, weight, neighbors, bias, *needed
        )
        return (*(grad if need else None for grad, need in zip(grads, needed)), None)
