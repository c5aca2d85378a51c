"""Functions that the selective scan's Triton kernels share: softplus, addresses, loads and composition.

Import this module only from ``triton_launch.py`` and the kernels: it needs Triton.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)

# Neither sizes nor strides are specialised, so that one compiled kernel serves images of every size.
_SIZES = ["length", "walks", "channels", "chunks", "runs", "spans", "steps", "columns", "rounds"]
_SIZES += [
    "tiles",
    "half",
    "blocks",
    "y_l",
    "du_l",
    "ddelta_l",
    "A_k",
    "D_k",
    "delta_bias_k",
    "rest_k",
]
_STRIDES = [
    f"{x}_{dim}" for x in ("u", "delta", "B", "C", "dy", "values", "weights") for dim in "blk"
]
_STRIDES += [f"{x}_{dim}" for x in ("order", "source", "gap", "index") for dim in "bk"]
kernel = triton.jit(do_not_specialize=_SIZES + _STRIDES)


# ------------------------------------------------------------------------------------------- functions


@triton.jit
def log1p_of_exp_minus(x):
    """``log(1 + exp(-x))`` for ``x >= 0``, to full precision."""
    if x.dtype == tl.float64:
        # After Kahan: log(1 + e) = log(w) e / (w - 1) with w = 1 + e rounded.
        e = tl.exp(-x)
        w = 1.0 + e
        result = tl.where(w == 1.0, e, tl.log(w) * (e / tl.where(w == 1.0, 1.0, w - 1.0)))
    else:
        # log(1 + e) = e P(e) on [0, 1], to 1.5e-7: no logarithm and no division.
        e = tl.exp2(x * -LOG2_E)
        p = 0.005232651252299547
        p = p * e - 0.02970767207443714
        p = p * e + 0.07894400507211685
        p = p * e - 0.13763527572155
        p = p * e + 0.19175679981708527
        p = p * e - 0.24867944419384003
        p = p * e + 0.3332338333129883
        p = p * e - 0.49999770522117615
        p = p * e + 1.0
        result = e * p
    return result


@triton.jit
def step_size(x, SOFTPLUS: tl.constexpr):
    """Softplus of ``x`` if ``SOFTPLUS``, else ``x``."""
    if SOFTPLUS:
        x = tl.maximum(x, 0.0) + log1p_of_exp_minus(tl.abs(x))
    return x


@triton.jit
def step_size_and_slope(x, SOFTPLUS: tl.constexpr):
    """The softplus and its derivative ``1 / (1 + exp(-x)) = exp(min(x, 0) - log(1 + exp(-|x|)))``."""
    if SOFTPLUS:
        log1p = log1p_of_exp_minus(tl.abs(x))
        slope = tl.exp2((tl.minimum(x, 0.0) - log1p) * LOG2_E)
        x = tl.maximum(x, 0.0) + log1p
    else:
        slope = tl.full(x.shape, 1.0, x.dtype)
    return x, slope


# --------------------------------------------------------------------------------------------- addresses
# A token's 64-bit address is that of token 0 plus its number times a stride in bytes: one instruction.


@triton.jit
def bytes_of(x):
    """Cast pointers to bytes, for :func:`at`."""
    return x.to(tl.pointer_type(tl.int8), bitcast=True)


@triton.jit
def at(pointer, index, stride, like):
    """Move a byte pointer by ``index`` rows of ``stride`` bytes and cast it to the type of ``like``.

    The operands are unsigned so that the compiler emits one multiplication of 32 by 32 bits.
    """
    moved = pointer + index.to(tl.uint32).to(tl.uint64) * stride.to(tl.uint32).to(tl.uint64)
    return moved.to(tl.pointer_type(like.dtype.element_ty), bitcast=True)


@triton.jit
def indices(index, first, length, STEPS: tl.constexpr, ALIGNED: tl.constexpr, BACKWARDS: tl.constexpr):  # fmt: skip
    """Load ``index`` at ``STEPS`` steps from ``first``; without an index, return the steps themselves."""
    found = ()
    # With an index, widen once here, so that only the first address is computed.
    first = first if index is None else first.to(tl.int64)
    if ALIGNED:
        first = tl.minimum(first, length - STEPS)
    for s in tl.static_range(STEPS):
        step = first + (STEPS - 1 - s if BACKWARDS else s)
        if not ALIGNED:
            step = tl.minimum(step, length - 1)
        found = found + (step if index is None else tl.load(index + step),)
    return found


@triton.jit
def rows(x, x_l, tokens, STEPS: tl.constexpr):
    """Load ``STEPS`` tokens of ``x``, which points to elements of token 0."""
    found = ()
    pointer = bytes_of(x)
    for s in tl.static_range(STEPS):
        found = found + (tl.load(at(pointer, tokens[s], x_l, x)),)
    return found


@triton.jit
def parameter(x, place, dtype: tl.constexpr):
    """Load a parameter of the channels; 0 if it is None."""
    if x is None:
        value = tl.zeros(place.shape, dtype)
    else:
        value = tl.load(x + place).to(dtype)
    return value


# ------------------------------------------------------------------------------------------------ scans


@triton.jit
def compose(keep1, add1, keep2, add2):
    """Compose two maps ``h -> keep h + add``, first 1, then 2."""
    return keep1 * keep2, add1 * keep2 + add2
