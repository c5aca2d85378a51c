"""Triton kernels of gpu_check.py: the building blocks of the operators' kernels, one by one."""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from mmvssm.ops.selective_scan.triton_functions import step_size

TILES = [(8, 16, 4), (4, 32, 4), (16, 16, 8), (8, 32, 8), (32, 8, 8)]
"""Groups of steps, lanes and warps of the tiles that are scanned along axis 0."""

GRADIENTS_TILE = (2, 4, 8)
"""Channels, lanes and groups of steps of the one that is scanned along axis 2, by a warp."""

FUNCTIONS = {"exp2": torch.exp2, "softplus": F.softplus}
"""Functions that :func:`apply` supports."""


@triton.jit
def add(x, y, z, size, SIZE: tl.constexpr):
    """``z = x + y``."""
    i = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    tl.store(z + i, tl.load(x + i, i < size) + tl.load(y + i, i < size), i < size)


@triton.jit
def _compose(keep1, add1, keep2, add2):
    return keep1 * keep2, add1 * keep2 + add2


@triton.jit
def scan(keep, add, out, GROUPS: tl.constexpr, LANES: tl.constexpr, REVERSE: tl.constexpr):
    """``out[0, t] = keep[t] * out[0, t - 1] + add[t]`` along axis 0, or from the end.

    ``out[1, t] = out[0, t - 1]``, and ``out[2]`` is the last of ``out[0]`` everywhere.
    """
    group = tl.arange(0, GROUPS)[:, None]
    i = group * LANES + tl.arange(0, LANES)[None, :]
    pair = (tl.load(keep + i), tl.load(add + i))
    _, total = tl.associative_scan(pair, 0, _compose, reverse=REVERSE)
    before = tl.broadcast_to(tl.maximum(group - 1, 0), (GROUPS, LANES))
    last = tl.full((GROUPS, LANES), GROUPS - 1, tl.int32)
    tl.store(out + i, total)
    tl.store(out + GROUPS * LANES + i, tl.gather(total, before, 0))
    tl.store(out + 2 * GROUPS * LANES + i, tl.gather(total, last, 0))


@triton.jit
def scan_both_ways(
    keep, add, out, CHANNELS: tl.constexpr, LANES: tl.constexpr, GROUPS: tl.constexpr
):
    """Along axis 2: ``out[0]`` as :func:`scan`, ``out[1]`` from the end, with time turned round before and after."""
    shape: tl.constexpr = (CHANNELS, LANES, GROUPS)
    group = tl.arange(0, GROUPS)[None, None, :]
    mirrored = tl.broadcast_to(GROUPS - 1 - group, shape)
    row = tl.arange(0, CHANNELS)[:, None, None] * LANES + tl.arange(0, LANES)[None, :, None]
    i = row * GROUPS + group
    k = tl.load(keep + i)
    x = tl.load(add + i)
    _, forward = tl.associative_scan((k, x), 2, _compose)
    pair = (tl.gather(k, mirrored, 2), tl.gather(x, mirrored, 2))
    _, backward = tl.associative_scan(pair, 2, _compose)
    tl.store(out + i, forward)
    tl.store(out + CHANNELS * LANES * GROUPS + i, tl.gather(backward, mirrored, 2))


@triton.jit
def apply(x, y, size, NAME: tl.constexpr, SIZE: tl.constexpr):
    """Apply a function to each element."""
    i = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    value = tl.load(x + i, i < size, other=0.0)
    value = tl.exp2(value) if NAME == "exp2" else step_size(value, True)
    tl.store(y + i, value, i < size)
