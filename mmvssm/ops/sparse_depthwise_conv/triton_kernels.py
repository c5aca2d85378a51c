"""Triton kernels of the sparse depthwise convolution; import them only from ``triton_launch.py``.

A program holds a tile of ``TOKENS`` tokens of an image and ``LANES`` channels in registers and loops over the taps
(for the weights' gradient: over tiles, with ``BLOCK`` taps at a time). It gathers neighbours in place; absent ones read
as zero and cost no memory traffic. Offsets are 64-bit. The kernels do not check that neighbours are valid tokens.
"""

from __future__ import annotations

import triton
import triton.language as tl

# No specialisation: one compiled kernel serves batches and pruned grids of every size.
_kernel = triton.jit(do_not_specialize=["kept", "parts"])


@triton.jit
def _under_tap(x, x_k, neighbors, inside, lane_inside, dtype: tl.constexpr):
    """Load the tile's neighbours under one tap, zero where there are none."""
    neighbor = tl.load(neighbors, inside, other=-1)
    there = (neighbor >= 0) & lane_inside
    return tl.load(x + neighbor.to(tl.int64) * x_k, there, other=0.0).to(dtype)


@_kernel
def convolve(
    x, x_b, x_k, taps, neighbors, bias, y, kept, parts, channels,
    TAPS: tl.constexpr, REVERSE: tl.constexpr, TOKENS: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """Write ``y (B, K, C)`` from ``x (B, K, C)`` and ``taps (T, C)``: one tile per program, ``parts`` per image."""
    dtype: tl.constexpr = taps.dtype.element_ty
    image = (tl.program_id(0) // parts).to(tl.int64)
    token = tl.program_id(0) % parts * TOKENS + tl.arange(0, TOKENS)[:, None]
    lane = tl.program_id(1) * LANES + tl.arange(0, LANES)[None, :]
    inside, lane_inside = token < kept, lane < channels
    token = image * kept + token  # of all images
    x += image * x_b + lane
    taps += lane
    if REVERSE:
        taps += (TAPS - 1) * channels
    neighbors += token * TAPS
    total = tl.zeros((TOKENS, LANES), dtype)
    if bias is not None:
        total += tl.load(bias + lane, lane_inside, other=0.0).to(dtype)
    for t in range(TAPS):
        row = -t if REVERSE else t
        weight = tl.load(taps + row * channels, lane_inside, other=0.0)
        total += weight * _under_tap(x, x_k, neighbors + t, inside, lane_inside, dtype)
    tl.store(y + token * channels + lane, total, inside & lane_inside)


@_kernel
def weight_gradient(
    grad_y, grad_y_b, grad_y_k, x, x_b, x_k, neighbors, partials, kept, parts, channels,
    TAPS: tl.constexpr, BLOCK: tl.constexpr, PART: tl.constexpr, TOKENS: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """Write ``partials (B * parts, T, C)``: each program adds ``PART`` tokens to the gradients of ``BLOCK`` taps.

    A program reads its tokens once. Each thread sums its own products; the program adds the threads' sums at the end.
    """
    dtype: tl.constexpr = partials.dtype.element_ty
    part = tl.program_id(0)
    image = (part // parts).to(tl.int64)
    lane = tl.program_id(1) * LANES + tl.arange(0, LANES)[None, :]
    lane_inside = lane < channels
    tap = tl.program_id(2) * BLOCK
    grad_y += image * grad_y_b + lane
    x += image * x_b + lane
    neighbors += image * kept * TAPS + tap
    totals = ()
    for _ in tl.static_range(BLOCK):
        totals = totals + (tl.zeros((TOKENS, LANES), dtype),)
    first = part % parts * PART
    for start in range(first, tl.minimum(first + PART, kept), TOKENS):
        token = start + tl.arange(0, TOKENS)[:, None]
        inside = token < kept
        token = token.to(tl.int64)
        dy = tl.load(grad_y + token * grad_y_k, inside & lane_inside, other=0.0).to(dtype)
        sums = ()
        for t in tl.static_range(BLOCK):
            under_tap = _under_tap(x, x_k, neighbors + token * TAPS + t, inside, lane_inside, dtype)
            sums = sums + (totals[t] + dy * under_tap,)
        totals = sums
    partials += (part.to(tl.int64) * TAPS + tap) * channels + lane
    for t in tl.static_range(BLOCK):
        tl.store(partials + t * channels, tl.sum(totals[t], 0)[None, :], lane_inside)
