"""Sum of dilated depthwise convolutions with a replicated border, fast on CPUs."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .backend import has_tangent, lowered_dtype
from .sparse_depthwise_conv import cpu


def dilated_conv(x: Tensor, weights: Sequence[Tensor], dilations: Sequence[int]) -> Tensor:
    """Add up depthwise 3x3 convolutions (cross-correlations, stride 1), each with its dilation.

    Equals the sum of ``torch.nn.Conv2d(C, C, 3, padding=r, dilation=r, groups=C, bias=False,
    padding_mode="replicate")`` over the dilations ``r`` on the same memory seen as channels-last images. On a CPU one
    kernel of :func:`sparse_depthwise_conv` visits the taps of all of them: on one core and maps of 56x56 with 128
    channels that halves the time of three convolutions (3.6 ms against 6.7 ms for two images), and takes a tenth of
    it with gradients (15 ms against 151 ms).

    Args:
        x: Maps ``(B, H, W, C)``.
        weights: One for each dilation, as in ``torch.nn.Conv2d``, ``(C, 1, 3, 3)``.
        dilations: Distances of neighbouring taps, in pixels.

    Returns:
        ``(B, H, W, C)``.
    """
    fast = (
        not torch.compiler.is_compiling()
        and x.device.type == "cpu"
        and all(lowered_dtype(x) == lowered_dtype(weight) for weight in weights)
        and cpu.available()
        and not has_tangent(x, *weights)
    )
    if not fast:
        return _one_by_one(x, weights, dilations)
    x, *weights = (tensor.to(lowered_dtype(tensor)) for tensor in (x, *weights))
    with torch.autocast("cpu", enabled=False):
        return _merged(x, weights, dilations)


def _merged(x: Tensor, weights: Sequence[Tensor], dilations: Sequence[int]) -> Tensor:
    taps = [tap for dilation in dilations for tap in _taps(dilation)]
    offsets = sorted(set(taps))
    places = torch.tensor([offsets.index(tap) for tap in taps])
    stacked = torch.cat([weight.flatten(1) for weight in weights], 1)
    merged = stacked.new_zeros(x.shape[3], len(offsets)).index_add(1, places, stacked)
    if not torch.is_grad_enabled() or not (x.requires_grad or merged.requires_grad):
        return _convolve(x, merged, _neighbors(x.shape[1:3], offsets, replicate=True))
    # The kernel's gradient needs a table in which neighbours are mutual; at a replicated border they aren't.
    reach = max(dilations)
    x = F.pad(x.permute(0, 3, 1, 2), (reach,) * 4, mode="replicate").permute(0, 2, 3, 1)
    y = _convolve(x, merged, _neighbors(x.shape[1:3], offsets, replicate=False))
    return y[:, reach:-reach, reach:-reach]


def _one_by_one(x: Tensor, weights: Sequence[Tensor], dilations: Sequence[int]) -> Tensor:
    x = x.permute(0, 3, 1, 2)
    y = sum(
        F.conv2d(F.pad(x, (r,) * 4, mode="replicate"), weight, dilation=r, groups=weight.shape[0])
        for weight, r in zip(weights, dilations)
    )
    return y.permute(0, 2, 3, 1)


def _taps(dilation: int) -> list[tuple[int, int]]:
    """Rows and columns from the centre to each tap, in the order of the weights."""
    steps = (-dilation, 0, dilation)
    return [(row, column) for row in steps for column in steps]


def _neighbors(grid: Sequence[int], offsets: Sequence[tuple[int, int]], replicate: bool) -> Tensor:
    """For each token of a grid, the tokens at ``offsets`` from it.

    Args:
        grid: Height and width.
        offsets: Sorted, and as many up and left as down and right, so that tap ``t`` is opposite to tap
            ``T - 1 - t``, as the kernel's gradient expects.
        replicate: Whether a tap outside the grid takes the nearest token inside; else its neighbour is -1.

    Returns:
        ``(1, H * W, T)``, int32.
    """
    height, width = grid
    reaches = torch.tensor(offsets, dtype=torch.int32).T
    rows, columns = (
        torch.arange(size, dtype=torch.int32)[:, None] + reach for size, reach in zip(grid, reaches)
    )
    if replicate:
        rows, columns = rows.clamp(0, height - 1), columns.clamp(0, width - 1)
        return (rows[:, None] * width + columns).flatten(0, 1)[None]
    outside = -(2**29)  # less than any sum with a token's number, and twice that is an int32
    rows = torch.where((rows < 0) | (rows >= height), outside, rows * width)
    columns = torch.where((columns < 0) | (columns >= width), outside, columns)
    return (rows[:, None] + columns).clamp(min=-1).flatten(0, 1)[None]


def _convolve(x: Tensor, weight: Tensor, neighbors: Tensor) -> Tensor:
    neighbors = neighbors.expand(x.shape[0], -1, -1)
    y = torch.ops.mmvssm.sparse_depthwise_conv(x.flatten(1, 2), weight, neighbors, None)
    return y.view(x.shape)
