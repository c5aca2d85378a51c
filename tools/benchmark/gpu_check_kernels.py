"""Triton kernels of gpu_check.py: what the operators' kernels are made of, by itself."""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from mmvssm.ops.selective_scan.triton_functions import step_size

TILES = [(8, 16, 4), (8, 32, 8), (32, 8, 8)]
"""Groups of steps, lanes and warps of the scan's tiles."""

FUNCTIONS = {"exp2": torch.exp2, "softplus": F.softplus}
"""What :func:`apply` knows."""


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
    """``out[t] = keep[t] * out[t - 1] + add[t]`` along axis 0, or from the end."""
    i = tl.arange(0, GROUPS)[:, None] * LANES + tl.arange(0, LANES)[None, :]
    pair = (tl.load(keep + i), tl.load(add + i))
    _, total = tl.associative_scan(pair, 0, _compose, reverse=REVERSE)
    tl.store(out + i, total)


@triton.jit
def apply(x, y, size, NAME: tl.constexpr, SIZE: tl.constexpr):
    """A function of each element."""
    i = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    value = tl.load(x + i, i < size, other=0.0)
    value = tl.exp2(value) if NAME == "exp2" else step_size(value, True)
    tl.store(y + i, value, i < size)
