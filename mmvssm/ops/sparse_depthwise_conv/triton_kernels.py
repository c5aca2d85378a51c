"""Triton kernels of the sparse depthwise convolution. Reach this module through ``sparse_depthwise_conv_triton``.

A program holds a tile of ``TOKENS`` tokens and ``LANES`` channels in registers and passes over the taps (for the
weights' gradient: over tiles, for one tap). Neighbours are gathered where they are; absent ones read as zero and cost
no memory traffic. Tokens of all images are numbered through. Offsets are 64-bit. Nothing here checks that neighbours
lie within the tokens.
"""

from __future__ import annotations

import triton
import triton.language as tl

# Not specialised, so that one compiled kernel serves batches and pruned grids of every size.
_kernel = triton.jit(do_not_specialize=["kept", "tokens"])


@triton.jit
def _under_tap(
    x,
    x_b,
    x_k,
    neighbors,
    token,
    kept,
    tokens,
    tap,
    TAPS: tl.constexpr,
    lane,
    channels,
    dtype: tl.constexpr,
):
    """The tile's neighbours under one tap, zero where there are none."""
    neighbor = tl.load(neighbors + token * TAPS + tap, token < tokens, other=-1).to(tl.int64)
    rows = x + token // kept * x_b + neighbor * x_k
    return tl.load(rows + lane, (neighbor >= 0) & (lane < channels), other=0.0).to(dtype)


@_kernel
def convolve(
    x, x_b, x_k, taps, neighbors, bias, y, kept, tokens, channels,
    TAPS: tl.constexpr, REVERSE: tl.constexpr, TOKENS: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """``y (tokens, C)`` from ``x (B, K, C)`` and ``taps (T, C)``."""
    dtype: tl.constexpr = taps.dtype.element_ty
    token = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)[:, None]
    lane = tl.program_id(1) * LANES + tl.arange(0, LANES)[None, :]
    total = tl.zeros((TOKENS, LANES), dtype)
    if bias is not None:
        total += tl.load(bias + lane, lane < channels, other=0.0).to(dtype)
    for t in range(TAPS):
        row = TAPS - 1 - t if REVERSE else t
        weight = tl.load(taps + row * channels + lane, lane < channels, other=0.0)
        total += weight * _under_tap(
            x, x_b, x_k, neighbors, token, kept, tokens, t, TAPS, lane, channels, dtype
        )
    tl.store(y + token * channels + lane, total, (token < tokens) & (lane < channels))


@_kernel
def weight_gradient(
    grad_y, grad_y_b, grad_y_k, x, x_b, x_k, neighbors, partials, kept, tokens, channels,
    TAPS: tl.constexpr, PART: tl.constexpr, TOKENS: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """``partials (parts, T, C)``: what ``PART`` tokens add to the gradient of one tap, per program."""
    dtype: tl.constexpr = partials.dtype.element_ty
    tap, part = tl.program_id(0), tl.program_id(2)
    lane = tl.program_id(1) * LANES + tl.arange(0, LANES)[None, :]
    total = tl.zeros((TOKENS, LANES), dtype)
    first = part.to(tl.int64) * PART
    for start in range(first, tl.minimum(first + PART, tokens), TOKENS):
        token = start + tl.arange(0, TOKENS)[:, None]
        under_tap = _under_tap(
            x, x_b, x_k, neighbors, token, kept, tokens, tap, TAPS, lane, channels, dtype
        )
        rows = grad_y + token // kept * grad_y_b + token % kept * grad_y_k
        inside = (token < tokens) & (lane < channels)
        total += under_tap * tl.load(rows + lane, inside, other=0.0).to(dtype)
    total = tl.sum(total, 0)[None, :]
    row = part.to(tl.int64) * TAPS + tap
    tl.store(partials + row * channels + lane, total, lane < channels)
