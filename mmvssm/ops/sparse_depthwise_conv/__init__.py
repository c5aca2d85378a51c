"""Depthwise convolution over the kept tokens of a pruned grid: public functions, checks and registration.

Pruned positions are never computed, and no map of the grid is built: tokens stay the rows of ``(B, K, C)``, and a
table lists their neighbours.
"""

from __future__ import annotations

import math
from types import ModuleType
from typing import Optional, Union

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from .. import backend
from . import cpu, pytorch, triton_launch


def neighbor_table(
    positions: Tensor, grid: tuple[int, int], kernel_size: Union[int, tuple[int, int]]
) -> Tensor:
    """For each kept token, list the tokens under the taps of a kernel centred on it.

    Taps are numbered row by row, as the weights of ``torch.nn.Conv2d`` lie in memory. The table serves every
    :func:`sparse_depthwise_conv` until tokens are pruned again.

    Args:
        positions: Row-major grid positions of the kept tokens of each image ``(B, K)``, int32 or int64, increasing.
        grid: Height and width of the grid.
        kernel_size: Height and width of the kernel, odd; one number for both, or a pair.

    Returns:
        Indices in ``0 .. K-1`` of the neighbours ``(B, K, height * width)``, int32, contiguous; -1 where the tap's
        position is outside the grid or pruned.

    Raises:
        ValueError: If ``kernel_size`` is not odd, or the shape or dtype of ``positions`` does not fit.
    """
    size = (kernel_size, kernel_size) if isinstance(kernel_size, int) else tuple(kernel_size)
    if any(side < 1 or side % 2 == 0 for side in size):
        raise ValueError(
            f"neighbor_table: kernel_size must be odd, to have a centre; got {kernel_size}."
        )
    if positions.dim() != 2 or positions.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            "neighbor_table: positions must have shape (B, K), image, kept token, and be int32 or int64; got "
            f"{tuple(positions.shape)}, {positions.dtype}."
        )
    height, width = grid
    backend.check_positions("neighbor_table", positions, height * width)
    batch, kept = positions.shape
    # A border as wide as the kernel's reach keeps every tap inside the map without comparisons.
    above, beside = size[0] // 2, size[1] // 2
    stride = width + 2 * beside
    positions = positions.long()
    places = positions + 2 * beside * (positions // width) + above * stride + beside
    numbers = torch.arange(kept, dtype=torch.int32, device=positions.device)
    index_map = numbers.new_full((batch, (height + 2 * above) * stride), -1)
    index_map = index_map.scatter(1, places, numbers.expand(batch, kept))
    rows, columns = (
        torch.arange(-reach, reach + 1, device=positions.device) for reach in (above, beside)
    )
    taps = (rows[:, None] * stride + columns).flatten()
    under_taps = (places[:, :, None] + taps).flatten(1)
    return index_map.gather(1, under_taps).view(batch, kept, len(taps))


def sparse_depthwise_conv(
    x: Tensor, weight: Tensor, neighbors: Tensor, bias: Optional[Tensor] = None
) -> Tensor:
    """Depthwise convolution (cross-correlation, stride 1) at kept tokens only; pruned neighbours count as zero.

    Equals scattering the tokens into a zero map ``(B, C, H, W)``, ``torch.nn.functional.conv2d`` with ``padding`` of
    half the kernel and ``groups=C``, and gathering at the kept positions. Sums are float32 (float64 for float64 inputs)
    in a fixed order, so two runs give the same bits. ``x``, ``weight`` and ``bias`` are differentiable; second
    derivatives and forward mode go through PyTorch's formula, which is slower.

    The gradient of ``x`` relies on a symmetry that every table of :func:`neighbor_table` has: with ``T`` taps,
    ``neighbors[b, i, t] == j`` if and only if ``neighbors[b, j, T - 1 - t] == i``. What tap ``t`` carries from one
    token to another, tap ``T - 1 - t`` carries back, so the gradient is the same convolution with the taps reversed.

    Args:
        x: Kept tokens ``(B, K, C)``: batch, token, channel. Channels should be adjacent in memory.
        weight: As in ``torch.nn.Conv2d(C, C, (h, w), groups=C)``, ``(C, 1, h, w)``, ``h`` and ``w`` odd.
        neighbors: By :func:`neighbor_table` for the same ``(h, w)``, ``(B, K, h * w)``, int32.
        bias: ``(C,)``.

    Returns:
        ``(B, K, C)``, contiguous, in the dtype of ``x``. Under autocast ``x`` and ``weight`` take the autocast dtype.

    Raises:
        ValueError: If a shape, dtype or device does not fit; the message names the argument.
    """
    _check(x, weight, neighbors, bias)
    if backend.has_tangent(x, weight, bias):
        return pytorch.convolve(x, weight, neighbors, bias)
    return torch.ops.mmvssm.sparse_depthwise_conv(x, weight, neighbors, bias)


def _check(x: Tensor, weight: Tensor, neighbors: Tensor, bias: Optional[Tensor]) -> None:
    name = "sparse_depthwise_conv"
    if x.dim() != 3 or 0 in x.shape:
        raise ValueError(
            f"{name}: x must have shape (B, K, C), batch, token, channel, each at least 1; got {tuple(x.shape)}."
        )
    batch, kept, channels = x.shape
    size = tuple(weight.shape[2:])
    odd = len(size) == 2 and size[0] % 2 == size[1] % 2 == 1
    if tuple(weight.shape[:2]) != (channels, 1) or not odd:
        raise ValueError(
            f"{name}: weight must have shape (C, 1, h, w) = ({channels}, 1, h, w), h and w odd, to go with x of shape "
            f"{tuple(x.shape)}; got {tuple(weight.shape)}."
        )
    if tuple(neighbors.shape) != (batch, kept, math.prod(size)):
        raise ValueError(
            f"{name}: neighbors must have shape (B, K, h * w) = {(batch, kept, math.prod(size))} to go with x of shape "
            f"{tuple(x.shape)} and weight of shape {tuple(weight.shape)}; got {tuple(neighbors.shape)}."
        )
    if neighbors.dtype != torch.int32:
        raise ValueError(f"{name}: neighbors must be int32; got {neighbors.dtype}.")
    if bias is not None and tuple(bias.shape) != (channels,):
        raise ValueError(
            f"{name}: bias must have shape (C,) = ({channels},) to go with x of shape {tuple(x.shape)}; got "
            f"{tuple(bias.shape)}."
        )
    for argument, tensor in (("x", x), ("weight", weight), ("bias", bias)):
        if tensor is not None and not tensor.is_floating_point():
            raise ValueError(f"{name}: {argument} must be floating point; got {tensor.dtype}.")
    backend.check_devices(name, "x", x, dict(weight=weight, neighbors=neighbors, bias=bias))


def _check_memory(x: Tensor, weight: Tensor, neighbors: Tensor, *others: Optional[Tensor]) -> None:
    """Check what kernels trust, also where the operator is called directly, with a weight of any shape ``(C, ...)``.

    Args:
        x: As for :func:`sparse_depthwise_conv`.
        weight: ``(C, ...)``, a value for each tap.
        neighbors: As for :func:`sparse_depthwise_conv`.
        others: The bias, and the gradient of the output.

    Raises:
        ValueError: If a shape, dtype or device does not fit.
    """
    bias, grad_y = (*others, None)[:2]
    fits = x.dim() == neighbors.dim() == 3 and 0 not in x.shape and weight.dim() > 0
    fits = fits and neighbors.shape[:2] == x.shape[:2] and neighbors.dtype == torch.int32
    fits = (
        fits and weight.shape[0] == x.shape[2] and weight.numel() == x.shape[2] * neighbors.shape[2]
    )
    fits = fits and (bias is None or bias.shape == x.shape[2:])
    fits = fits and (grad_y is None or grad_y.shape == x.shape)
    if not fits:
        found = [
            None if t is None else (tuple(t.shape), t.dtype)
            for t in (x, weight, neighbors, *others)
        ]
        raise ValueError(
            "sparse_depthwise_conv: expected x (B, K, C), weight (C, ...) of T taps, neighbors (B, K, T) int32, and "
            f"bias (C,), grad_y (B, K, C) where there is one; got {found}."
        )
    named = dict(weight=weight, neighbors=neighbors, bias=bias, grad_y=grad_y)
    backend.check_devices("sparse_depthwise_conv", "x", x, named)


def _backend(x: Tensor) -> ModuleType:
    return backend.choose(x, gpu=triton_launch, cpu=cpu, fallback=pytorch)


@torch.library.custom_op("mmvssm::sparse_depthwise_conv", mutates_args=())
def _conv(x: Tensor, weight: Tensor, neighbors: Tensor, bias: Optional[Tensor]) -> Tensor:
    _check_memory(x, weight, neighbors, bias)
    return _backend(x).convolve(x, weight, neighbors, bias)


@_conv.register_fake
def _(x, weight, neighbors, bias):
    return x.new_empty(x.shape)


@torch.library.custom_op("mmvssm::sparse_depthwise_conv_backward", mutates_args=())
def _conv_backward(
    grad_y: Tensor,
    x: Tensor,
    weight: Tensor,
    neighbors: Tensor,
    bias: Optional[Tensor],
    needs_x: bool,
    needs_weight: bool,
    needs_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    _check_memory(x, weight, neighbors, bias, grad_y)
    absent = x.new_empty(0)
    grad_x, grad_weight, grad_bias = absent, absent.clone(), absent.clone()
    if needs_x:
        grad_x = _backend(x).convolve(grad_y.to(x.dtype), weight, neighbors, None, reverse=True)
    if needs_weight:
        grad_weight = _backend(x).weight_gradient(grad_y, x, neighbors)
        grad_weight = grad_weight.view(weight.shape).to(weight.dtype)
    if needs_bias:
        wide = backend.accumulation_dtype(grad_y, bias)
        grad_bias = grad_y.sum((0, 1), dtype=wide).to(bias.dtype)
    return grad_x, grad_weight, grad_bias


@_conv_backward.register_fake
def _(grad_y, x, weight, neighbors, bias, needs_x, needs_weight, needs_bias):
    def like(tensor: Optional[Tensor], needed: bool) -> Tensor:
        return tensor.new_empty(tensor.shape) if needed else x.new_empty(0)

    return like(x, needs_x), like(weight, needs_weight), like(bias, needs_bias)


def _save_for_backward(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs)


def _differentiate(ctx, grad_y: Tensor):
    if torch.is_grad_enabled():
        return backend.gradients_of(pytorch.convolve, ctx.saved_tensors, grad_y)
    needs = [ctx.needs_input_grad[i] for i in (0, 1, 3)]
    grads = torch.ops.mmvssm.sparse_depthwise_conv_backward(grad_y, *ctx.saved_tensors, *needs)
    grad_x, grad_weight, grad_bias = (g if needed else None for g, needed in zip(grads, needs))
    return grad_x, grad_weight, None, grad_bias


_conv.register_autograd(_differentiate, setup_context=_save_for_backward)


backend.register_autocast("sparse_depthwise_conv", lowered=(0, 1))


@register_flop_formula(torch.ops.mmvssm.sparse_depthwise_conv)
def sparse_depthwise_conv_flops(
    x_shape, weight_shape, neighbors_shape, *args, out_shape=None, **kwargs
) -> int:
    """Count two FLOPs for every tap at every kept token; pruned neighbours count like kept ones."""
    return 2 * math.prod(neighbors_shape) * weight_shape[0]


@register_flop_formula(torch.ops.mmvssm.sparse_depthwise_conv_backward)
def sparse_depthwise_conv_backward_flops(
    grad_shape,
    x_shape,
    weight_shape,
    neighbors_shape,
    bias_shape,
    needs_x,
    needs_weight,
    *args,
    **kwargs,
) -> int:
    """Count the forward pass once for each of the gradients of ``x`` and ``weight``."""
    once = sparse_depthwise_conv_flops(x_shape, weight_shape, neighbors_shape)
    return (bool(needs_x) + bool(needs_weight)) * once
