r"""Triton kernels of the selective scan. Imports triton: reach this module through ``triton_launch.py``.

The recurrence, for one channel and one state, with ``e_t = step_t + gap_t * rest`` the time that step ``t`` takes::

    h_t = exp(e_t A) h_{t-1} + step_t B_t u_t          y_t = sum over states of C_t h_t, plus D u_t

and its adjoint, with ``q_t = dL/dh_{t-1}``, which is the same recurrence walked backwards::

    q_t = exp(e_t A) g_t                               g_t = dL/dh_t = C_t dy_t + q_{t+1}

from which every gradient follows::

    du_t    = D dy_t + sum over states of g_t step_t B_t         dB_t = sum over channels of g_t step_t u_t
    dstep_t = de_t   + sum over states of g_t B_t u_t            dC_t = sum over channels of dy_t h_t
    de_t    = sum over states of q_t h_{t-1} A                   dA   = sum over t of q_t h_{t-1} e_t

A walk is cut into chunks of ``CHUNK`` steps, so that even one long walk fills a GPU. Each pass takes three launches:

1. What every chunk contributes on its own. That needs no scan, for time adds up: the state in which a chunk ends, had
   it begun with zero, is ``sum_t exp(A * time after t) * step_t B_t u_t``, and what it keeps of the state it began
   with is ``exp(A * its whole time)``. The adjoint likewise, with the time from the chunk's beginning.
2. A scan over the chunks, after which each one knows the state that it begins with.
3. Every chunk once more, from that state, now writing outputs or gradients.

Nothing is ever divided by a decay and no times are subtracted: a decay that underflows is a clean zero.

A program holds one chunk, ``GROUPS`` times ``STEPS`` steps, of ``LANES`` channels of one walk. Its tiles have three
dimensions, ``(STEPS, GROUPS, LANES)``, any of which may be 1, and broadcast against each other. Triton gives neighbours
among the threads neighbouring lanes, then groups. There are as many threads as ``GROUPS * LANES``, so each has to
itself the consecutive steps of one group of one channel, and scans them without exchange with other threads.

Steps beyond a walk's end are loaded as steps that take no time and add nothing. Offsets are 64-bit. Nothing here checks
that ``order`` and ``source`` lie within the tokens.
"""

from __future__ import annotations

import triton
import triton.language as tl

# Sizes and strides are not specialised. One compiled kernel then serves images of every size, and Triton does not see
# that rows are aligned, for which it would give each thread several channels and spread the steps over threads.
_SIZES = [
    "images",
    "length",
    "walks",
    "channels",
    "columns",
    "chunks",
    "order_b",
    "source_b",
    "gap_b",
]
_STRIDES = [f"{tensor}_{dim}" for tensor in ("u", "delta", "B", "C", "dy") for dim in "blk"]
_kernel = triton.jit(do_not_specialize=_SIZES + _STRIDES)


# --------------------------------------------------------------------------------------- scans of a tile


@triton.jit
def _compose_before(keep1, add1, keep_before1, add_before1, keep2, add2, keep_before2, add_before2):
    """``h -> keep h + add``, first 1, then 2, and what leads to the state *before* the last of the steps composed."""
    return (
        keep1 * keep2,
        add1 * keep2 + add2,
        keep1 * keep_before2,
        add1 * keep_before2 + add_before2,
    )


@triton.jit
def _state_before(keep, add, entry, BACKWARDS: tl.constexpr):
    """The state before each step of ``h -> keep h + add``, ``entry`` being that before the chunk."""
    STEPS: tl.constexpr = keep.shape[0]
    last = (0 if BACKWARDS else STEPS - 1) == tl.arange(0, STEPS)[:, None, None]
    one, zero = tl.full(keep.shape, 1.0, keep.dtype), tl.zeros_like(keep)
    keep, add, keep_before, add_before = tl.associative_scan(
        (keep, add, one, zero), 0, _compose_before, reverse=BACKWARDS
    )
    # The groups in turn: what is before each of them.
    keep, add = tl.sum(tl.where(last, keep, 0.0), 0), tl.sum(tl.where(last, add, 0.0), 0)
    one, zero = tl.full(keep.shape, 1.0, keep.dtype), tl.zeros_like(keep)
    _, _, keep, add = tl.associative_scan(
        (keep, add, one, zero), 0, _compose_before, reverse=BACKWARDS
    )
    return keep_before * (keep[None] * entry + add[None]) + add_before


@triton.jit
def _add_before(total1, before1, total2, before2):
    """A running sum with and without the last of its terms."""
    return total1 + total2, total1 + before2


@triton.jit
def _time_before(time):
    """The time that the steps before each one take."""
    _, in_group = tl.associative_scan((time, tl.zeros_like(time)), 0, _add_before)
    time = tl.sum(time, 0)
    _, groups_before = tl.associative_scan((time, tl.zeros_like(time)), 0, _add_before)
    return in_group + groups_before[None]


@triton.jit
def _sum_steps(x):
    return tl.sum(tl.sum(x, 0), 0)[None, None, :]


@triton.jit
def _sum_lanes(x):
    return tl.sum(x, 2)[:, :, None]


# ------------------------------------------------------------------------------------------------ loads


@triton.jit
def _place(walks, chunks):
    """Image, walk and chunk of this program. Programs that are neighbours in time are neighbours in number."""
    program = tl.program_id(0).to(tl.int64)
    return program // chunks // walks, program // chunks % walks, program % chunks


@triton.jit
def _steps(chunk, GROUPS: tl.constexpr, STEPS: tl.constexpr, BACKWARDS: tl.constexpr = False):
    step = tl.arange(0, GROUPS)[None, :, None] * STEPS + tl.arange(0, STEPS)[:, None, None]
    if BACKWARDS:
        step = GROUPS * STEPS - 1 - step
    return chunk * GROUPS * STEPS + step


@triton.jit
def _lanes(LANES: tl.constexpr):
    return tl.program_id(1) * LANES + tl.arange(0, LANES)[None, None, :]


@triton.jit
def _load(x, inside, dtype: tl.constexpr):
    return tl.load(x, inside, other=0.0).to(dtype)


@triton.jit
def _token(order, order_b, batch, walk, step, length):
    """The token that each step visits."""
    if order is not None:
        step = tl.load(order + batch * order_b + walk * length + step, step < length, other=0)
    return step.to(tl.int64)


@triton.jit
def _argument(delta, delta_bias, parameter, lane, inside, dtype: tl.constexpr):
    """Of the softplus."""
    x = _load(delta, inside, dtype)
    if delta_bias is not None:
        x += _load(delta_bias + parameter, lane, dtype)
    return x


@triton.jit
def _size(x, inside, SOFTPLUS: tl.constexpr):
    """Step sizes, 0 where there is no step."""
    if SOFTPLUS:
        # To full precision, after Kahan: log(1 + e) = log(w) e / (w - 1) with w = 1 + e rounded.
        e = tl.exp(-tl.abs(x))
        w = 1.0 + e
        x = tl.maximum(x, 0.0) + tl.where(w == 1.0, e, tl.log(w) * (e / (w - 1.0)))
    return tl.where(inside, x, 0.0)


@triton.jit
def _slope(x):
    """Of the softplus."""
    e = tl.exp(-tl.abs(x))
    return tl.where(x < 0, e, 1.0) / (1.0 + e)


@triton.jit
def _absent(gap, gap_b, batch, walk, step, length, dtype: tl.constexpr):
    """How many absent positions each step passed."""
    return _load(gap + batch * gap_b + walk * length + step, step < length, dtype)


@triton.jit
def _time(size, gap, gap_b, rest, parameter, lane, batch, walk, step, length):
    """What each step takes, the absent positions before it included."""
    if gap is not None:
        absent = _absent(gap, gap_b, batch, walk, step, length, size.dtype)
        size += absent * _load(rest + parameter, lane, size.dtype)
    return size


# -------------------------------------------------------------------------------------------- launch 1


@_kernel
def chunk_ends(
    u, delta, A, B, delta_bias, order, source, gap, rest, ends, times,
    u_b, u_l, u_k, delta_b, delta_l, delta_k, B_b, B_l, B_k, order_b, source_b, gap_b,
    length, walks, channels, chunks,
    N: tl.constexpr, SOFTPLUS: tl.constexpr, GROUPS: tl.constexpr, STEPS: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """``ends (B, K, S, D, N)``: the state after each chunk, begun with zero. ``times (B, K, S, D)``: its whole time."""
    dtype: tl.constexpr = ends.dtype.element_ty
    batch, walk, chunk = _place(walks, chunks)
    step, channel = _steps(chunk, GROUPS, STEPS, BACKWARDS=True), _lanes(LANES)
    parameter = walk * channels + channel  # where it is in (K, D)
    place = tl.program_id(0).to(tl.int64) * channels + channel  # in (B, K, S, D)
    lane = channel < channels
    inside = (step < length) & lane
    i = _token(order, order_b, batch, walk, step, length)
    j = i if source is None else _token(source, source_b, batch, walk, step, length)

    raw = delta + batch * delta_b + j * delta_l + walk * delta_k + channel
    raw = _argument(raw, delta_bias, parameter, lane, inside, dtype)
    size = _size(raw, inside, SOFTPLUS)
    time = _time(size, gap, gap_b, rest, parameter, lane, batch, walk, step, length)
    drive = size * _load(u + batch * u_b + i * u_l + walk * u_k + channel, inside, dtype)

    tl.store(times + place, _sum_steps(time), lane)
    time_after = _time_before(time)
    for n in range(N):
        a = _load(A + parameter * N + n, lane, dtype)
        b = _load(B + batch * B_b + j * B_l + walk * B_k + n, step < length, dtype)
        tl.store(ends + place * N + n, _sum_steps(tl.exp(time_after * a) * drive * b), lane)


@_kernel
def chunk_adjoint_ends(
    dy, delta, A, C, delta_bias, order, source, gap, rest, ends, times,
    dy_b, dy_l, dy_k, delta_b, delta_l, delta_k, C_b, C_l, C_k, order_b, source_b, gap_b,
    length, walks, channels, chunks,
    N: tl.constexpr, SOFTPLUS: tl.constexpr, GROUPS: tl.constexpr, STEPS: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """``ends (B, K, S, D, N)``: the adjoint ``q`` of each chunk's first step, were nothing to follow the chunk."""
    dtype: tl.constexpr = ends.dtype.element_ty
    batch, walk, chunk = _place(walks, chunks)
    step, channel = _steps(chunk, GROUPS, STEPS), _lanes(LANES)
    parameter = walk * channels + channel  # where it is in (K, D)
    place = tl.program_id(0).to(tl.int64) * channels + channel  # in (B, K, S, D)
    lane = channel < channels
    inside = (step < length) & lane
    i = _token(order, order_b, batch, walk, step, length)
    j = i if source is None else _token(source, source_b, batch, walk, step, length)

    raw = delta + batch * delta_b + j * delta_l + walk * delta_k + channel
    raw = _argument(raw, delta_bias, parameter, lane, inside, dtype)
    size = _size(raw, inside, SOFTPLUS)
    time = _time(size, gap, gap_b, rest, parameter, lane, batch, walk, step, length)
    grad_y = _load(dy + batch * dy_b + i * dy_l + walk * dy_k + channel, inside, dtype)

    tl.store(times + place, _sum_steps(time), lane)
    time_until = _time_before(time) + time
    for n in range(N):
        a = _load(A + parameter * N + n, lane, dtype)
        c = _load(C + batch * C_b + j * C_l + walk * C_k + n, step < length, dtype)
        tl.store(ends + place * N + n, _sum_steps(tl.exp(time_until * a) * grad_y * c), lane)


# -------------------------------------------------------------------------------------------- launch 2


@_kernel
def hand_over(
    ends, times, A, entries, walks, channels, columns, chunks,
    N: tl.constexpr, BACKWARDS: tl.constexpr, GROUPS: tl.constexpr, STEPS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """``entries (B, K, S, D, N)``: what each chunk takes over, the first (``BACKWARDS`` the last) one zero.

    The next entry is ``end + exp(A * time) * entry``: a scan whose steps are the chunks. A program takes some columns
    of the states ``(D, N)`` of one walk through all of them.
    """
    dtype: tl.constexpr = ends.dtype.element_ty
    walk = tl.program_id(0).to(tl.int64)  # of all walks of all images
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)[None, None, :]
    a = _load(A + walk % walks * columns + column, column < columns, dtype)
    taken_over = tl.zeros((1, 1, COLUMNS), dtype)
    for tile in range(0, tl.cdiv(chunks, GROUPS * STEPS)):
        turn = _steps(tile, GROUPS, STEPS)
        inside = (turn < chunks) & (column < columns)
        chunk = walk * chunks + turn
        if BACKWARDS:
            chunk = walk * chunks + (chunks - 1 - turn)
        keep = tl.exp(a * _load(times + chunk * channels + column // N, inside, dtype))
        end = _load(ends + chunk * columns + column, inside, dtype)
        entry = _state_before(keep, end, taken_over, BACKWARDS=False)
        tl.store(entries + chunk * columns + column, entry, inside)
        is_last = turn == (tile + 1) * GROUPS * STEPS - 1
        taken_over = _sum_steps(tl.where(is_last, end + keep * entry, 0.0))


# -------------------------------------------------------------------------------------------- launch 3


@_kernel
def chunk_outputs(
    u, delta, A, B, C, D, delta_bias, order, source, gap, rest, states, y,
    u_b, u_l, u_k, delta_b, delta_l, delta_k, B_b, B_l, B_k, C_b, C_l, C_k, order_b, source_b, gap_b,
    length, walks, channels, chunks,
    N: tl.constexpr, SOFTPLUS: tl.constexpr, GROUPS: tl.constexpr, STEPS: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """``y (B, L, K, D)`` from ``states (B, K, S, D, N)``, those before each chunk."""
    dtype: tl.constexpr = states.dtype.element_ty
    batch, walk, chunk = _place(walks, chunks)
    step, channel = _steps(chunk, GROUPS, STEPS), _lanes(LANES)
    parameter = walk * channels + channel  # where it is in (K, D)
    place = tl.program_id(0).to(tl.int64) * channels + channel  # in (B, K, S, D)
    lane = channel < channels
    inside = (step < length) & lane
    i = _token(order, order_b, batch, walk, step, length)
    j = i if source is None else _token(source, source_b, batch, walk, step, length)

    raw = delta + batch * delta_b + j * delta_l + walk * delta_k + channel
    raw = _argument(raw, delta_bias, parameter, lane, inside, dtype)
    size = _size(raw, inside, SOFTPLUS)
    time = _time(size, gap, gap_b, rest, parameter, lane, batch, walk, step, length)
    value = _load(u + batch * u_b + i * u_l + walk * u_k + channel, inside, dtype)

    output = tl.zeros_like(value)
    if D is not None:
        output += value * _load(D + parameter, lane, dtype)
    drive = size * value
    for n in range(N):
        a = _load(A + parameter * N + n, lane, dtype)
        b = _load(B + batch * B_b + j * B_l + walk * B_k + n, step < length, dtype)
        c = _load(C + batch * C_b + j * C_l + walk * C_k + n, step < length, dtype)
        entry = _load(states + place * N + n, lane, dtype)
        decay = tl.exp(time * a)
        output += c * (decay * _state_before(decay, drive * b, entry, BACKWARDS=False) + drive * b)
    tl.store(y + ((batch * length + i) * walks + walk) * channels + channel, output, inside)


@_kernel
def chunk_gradients(
    dy, u, delta, A, B, C, D, delta_bias, order, source, gap, rest, states, adjoints,
    du, ddelta, dA, dB, dC, dD, ddelta_bias, drest,
    dy_b, dy_l, dy_k, u_b, u_l, u_k, delta_b, delta_l, delta_k, B_b, B_l, B_k, C_b, C_l, C_k,
    order_b, source_b, gap_b, images, length, walks, channels, chunks,
    N: tl.constexpr, SOFTPLUS: tl.constexpr, GROUPS: tl.constexpr, STEPS: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """All gradients, from the ``states`` before each chunk and the ``adjoints`` after it, both ``(B, K, S, D, N)``.

    ``du`` and ``ddelta`` are complete, ``(B, L, K, D)``. To be added up, in a fixed order, remain the chunks' parts of
    ``dA (B, K, S, D, N)`` and of ``dD``, ``ddelta_bias`` and ``drest (B, K, S, D)``, and the channel blocks' parts of
    ``dB`` and ``dC (blocks, B, L, K, N)``.
    """
    dtype: tl.constexpr = states.dtype.element_ty
    batch, walk, chunk = _place(walks, chunks)
    step, channel = _steps(chunk, GROUPS, STEPS), _lanes(LANES)
    parameter = walk * channels + channel  # where it is in (K, D)
    place = tl.program_id(0).to(tl.int64) * channels + channel  # in (B, K, S, D)
    lane = channel < channels
    inside = (step < length) & lane
    i = _token(order, order_b, batch, walk, step, length)
    j = i if source is None else _token(source, source_b, batch, walk, step, length)

    raw = delta + batch * delta_b + j * delta_l + walk * delta_k + channel
    raw = _argument(raw, delta_bias, parameter, lane, inside, dtype)
    size = _size(raw, inside, SOFTPLUS)
    time = _time(size, gap, gap_b, rest, parameter, lane, batch, walk, step, length)
    value = _load(u + batch * u_b + i * u_l + walk * u_k + channel, inside, dtype)
    grad_y = _load(dy + batch * dy_b + i * dy_l + walk * dy_k + channel, inside, dtype)

    part = ((tl.program_id(1) * images + batch) * length + j) * walks + walk
    drive = size * value
    nothing = tl.zeros_like(value)
    grad_value, grad_size, grad_time = nothing, nothing, nothing
    for n in range(N):
        a = _load(A + parameter * N + n, lane, dtype)
        b = _load(B + batch * B_b + j * B_l + walk * B_k + n, step < length, dtype)
        c = _load(C + batch * C_b + j * C_l + walk * C_k + n, step < length, dtype)
        entry = _load(states + place * N + n, lane, dtype)
        leave = _load(adjoints + place * N + n, lane, dtype)

        decay = tl.exp(time * a)
        h_kept = decay * _state_before(decay, drive * b, entry, BACKWARDS=False)
        g = c * grad_y
        g += _state_before(decay, decay * g, leave, BACKWARDS=True)

        grad_time += g * h_kept * a
        grad_size += g * b * value
        grad_value += g * b * size
        tl.store(dA + place * N + n, _sum_steps(g * h_kept * time), lane)
        tl.store(dB + part * N + n, _sum_lanes(g * drive), step < length)
        tl.store(dC + part * N + n, _sum_lanes(grad_y * (h_kept + drive * b)), step < length)

    if D is not None:
        grad_value += grad_y * _load(D + parameter, lane, dtype)
        tl.store(dD + place, _sum_steps(grad_y * value), lane)
    grad_raw = grad_size + grad_time
    if SOFTPLUS:
        grad_raw *= _slope(raw)
    grad_raw = tl.where(inside, grad_raw, 0.0)
    if delta_bias is not None:
        tl.store(ddelta_bias + place, _sum_steps(grad_raw), lane)
    if gap is not None:
        absent = _absent(gap, gap_b, batch, walk, step, length, dtype)
        tl.store(drest + place, _sum_steps(grad_time * absent), lane)
    tl.store(du + ((batch * length + i) * walks + walk) * channels + channel, grad_value, inside)
    tl.store(ddelta + ((batch * length + j) * walks + walk) * channels + channel, grad_raw, inside)
