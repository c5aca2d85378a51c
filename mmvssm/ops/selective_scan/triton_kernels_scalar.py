r"""Triton kernels of the selective scan with one state for each channel.

Per channel, with ``time_t = size_t + gap_t rest``::

    h_t = keep_t h_{t-1} + add_t        keep_t = exp(time_t A)    add_t = size_t B_t u_t        y_t = C_t h_t + D u_t

The adjoint, ``q_t = dL/dh_{t-1} = keep_t (q_{t+1} + C_t dy_t)``, is the same recurrence walked backwards.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .triton_functions import (
    LOG2_E,
    at,
    bytes_of,
    compose,
    indices,
    kernel,
    parameter,
    rows,
    step_size,
)


@triton.jit
def _ends_of_runs(
    values, delta, weights, a, bias, pace, order, source, gap, values_l, delta_l, weights_l, begin, length, steps,
    SOFTPLUS: tl.constexpr, ADJOINT: tl.constexpr, ALIGNED: tl.constexpr, STEPS: tl.constexpr, dtype: tl.constexpr,
):  # fmt: skip
    """Return ``keep, add``, the effect of each thread's run on a state; for ``ADJOINT``, its time and ``add``."""
    keep = tl.full(values.shape, 0.0 if ADJOINT else 1.0, dtype)
    add = tl.zeros(values.shape, dtype)
    for turn in range(0, steps, STEPS):
        first = begin + (steps - STEPS - turn if ADJOINT else turn)
        i = indices(order, first, length, STEPS, ALIGNED, ADJOINT)
        j = i
        if source is not None:
            j = indices(source, first, length, STEPS, ALIGNED, ADJOINT)
        raw = rows(delta, delta_l, j, STEPS)
        value = rows(values, values_l, i, STEPS)
        weight = rows(weights, weights_l, j, STEPS)
        if gap is not None:
            absent = indices(gap, first, length, STEPS, ALIGNED, ADJOINT)
        keep_before = keep
        add_before = add
        for s in tl.static_range(STEPS):
            size = step_size(raw[s].to(dtype) + bias, SOFTPLUS)
            time = size
            if gap is not None:
                time += absent[s].to(dtype) * pace
            v = value[s].to(dtype)
            if not ALIGNED:
                inside = first + (STEPS - 1 - s if ADJOINT else s) < length
                size = tl.where(inside, size, 0.0)
                time = tl.where(inside, time, 0.0)
                v = tl.where(inside, v, 0.0)
            k = tl.exp2(time * a)
            if ADJOINT:
                add = (v * weight[s].to(dtype) + add) * k
                keep += time
            else:
                add = add * k + size * v * weight[s].to(dtype)
                keep *= k
        if ALIGNED:
            keep = tl.where(first < length, keep, keep_before)
            add = tl.where(first < length, add, add_before)
    return keep, add


@kernel
def run_ends(
    values, delta, A, weights, delta_bias, order, source, gap, rest, ends, keeps,
    values_b, values_l, values_k, delta_b, delta_l, delta_k, weights_b, weights_l, weights_k,
    A_k, delta_bias_k, rest_k, order_b, order_k, source_b, source_k, gap_b, gap_k,
    length, walks, channels, runs, spans, steps,
    SOFTPLUS: tl.constexpr, ADJOINT: tl.constexpr, ALIGNED: tl.constexpr,
    GROUPS: tl.constexpr, STEPS: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """Write the effect of runs of ``steps`` steps, ``GROUPS`` to a span. ``values, weights``: ``u, B`` or ``dy, C``.

    ``ends, keeps (B, K, runs, D)``: the state after the run if its *span* begins with 0, and the share of the span's
    first state that is left by then. The last span is skipped.

    ``ADJOINT``: ``ends`` is ``q`` of each run's first step with zero after the run, and ``keeps`` is the run's time.
    No span is skipped.
    """
    dtype: tl.constexpr = ends.dtype.element_ty
    program = tl.program_id(0)
    programs = spans if ADJOINT else spans - 1
    place = program // programs
    batch = (place // walks).to(tl.int64)
    walk = (place % walks).to(tl.int64)
    place = place.to(tl.int64)
    run = program % programs * GROUPS + tl.arange(0, GROUPS)[:, None]
    channel = tl.program_id(1) * LANES + tl.arange(0, LANES)[None, :]
    lane = tl.minimum(channel, channels - 1)  # no mask for loads; stores are masked
    lanes = tl.broadcast_to(lane, (GROUPS, LANES))
    if order is not None:
        order += batch * order_b + walk * order_k
    if source is not None:
        source += batch * source_b + walk * source_k
    pace = 0.0
    if gap is not None:
        gap += batch * gap_b + walk * gap_k
        pace = parameter(rest, walk * rest_k + lane, dtype)
    keep, add = _ends_of_runs(
        values + (batch * values_b + walk * values_k) + lanes,
        delta + (batch * delta_b + walk * delta_k) + lanes,
        weights + (batch * weights_b + walk * weights_k),
        parameter(A, walk * A_k + lane, dtype) * LOG2_E,
        parameter(delta_bias, walk * delta_bias_k + lane, dtype),
        pace, order, source, gap, values_l, delta_l, weights_l, run * steps, length, steps,
        SOFTPLUS, ADJOINT, ALIGNED, STEPS, dtype,
    )  # fmt: skip
    if not ADJOINT:
        keep, add = tl.associative_scan((keep, add), 0, compose)
    row = (place * runs + run) * channels + channel
    there = (run < runs) & (channel < channels)
    tl.store(ends + row, add, there)
    tl.store(keeps + row, keep, there)


@triton.jit
def _state_before_span(
    ends, keeps, first_row, span, channels, channel, GROUPS: tl.constexpr, FOLD: tl.constexpr
):
    """Compute the state before this span, ``(GROUPS, LANES)``, equal in all groups."""
    dtype: tl.constexpr = ends.dtype.element_ty
    group = tl.arange(0, GROUPS)[:, None]
    shape: tl.constexpr = (GROUPS, channel.shape[1])
    last = tl.full(shape, GROUPS - 1, tl.int32)
    entry = tl.zeros(shape, dtype)
    for first in range(0, span, GROUPS * FOLD):
        keep = tl.full(shape, 1.0, dtype)
        add = tl.zeros(shape, dtype)
        for f in tl.static_range(FOLD):
            earlier = first + group * FOLD + f
            there = (earlier < span) & (channel < channels)
            row = (first_row + (earlier * GROUPS + GROUPS - 1)) * channels + channel
            k = tl.load(keeps + row, there, other=1.0)
            add = add * k + tl.load(ends + row, there, other=0.0)
            keep = keep * k
        keep, add = tl.associative_scan((keep, add), 0, compose)
        entry = tl.gather(keep * entry + add, last, 0)
    return entry


@kernel
def outputs(
    u, delta, A, B, C, D, delta_bias, order, source, gap, rest, ends, keeps, y, states,
    u_b, u_l, u_k, delta_b, delta_l, delta_k, B_b, B_l, B_k, C_b, C_l, C_k, y_l,
    A_k, D_k, delta_bias_k, rest_k, order_b, order_k, source_b, source_k, gap_b, gap_k,
    length, walks, channels, chunks, runs, spans, steps,
    SOFTPLUS: tl.constexpr, ALIGNED: tl.constexpr, CHUNK: tl.constexpr,
    GROUPS: tl.constexpr, STEPS: tl.constexpr, LANES: tl.constexpr, FOLD: tl.constexpr,
):  # fmt: skip
    """Write ``y (B, L, K, D)`` and ``states (B, K, S, D)`` before every ``CHUNK`` steps.

    Each thread takes a run of ``steps`` steps of one channel. Programs read the effect of their runs from ``ends`` and
    ``keeps`` of :func:`run_ends`; those of a walk's last span compute it themselves.
    """
    dtype: tl.constexpr = states.dtype.element_ty
    program = tl.program_id(0)
    span = program % spans
    place = program // spans
    batch = (place // walks).to(tl.int64)
    walk = (place % walks).to(tl.int64)
    place = place.to(tl.int64)
    group = tl.arange(0, GROUPS)[:, None]
    run = span * GROUPS + group
    channel = tl.program_id(1) * LANES + tl.arange(0, LANES)[None, :]
    lane = tl.minimum(channel, channels - 1)  # no mask for loads; stores are masked
    lanes = tl.broadcast_to(lane, (GROUPS, LANES))
    u += (batch * u_b + walk * u_k) + lanes
    delta += (batch * delta_b + walk * delta_k) + lanes
    B += batch * B_b + walk * B_k
    C += batch * C_b + walk * C_k
    y += (batch * length * walks + walk) * channels + lanes
    states += place * chunks * channels
    if order is not None:
        order += batch * order_b + walk * order_k
    if source is not None:
        source += batch * source_b + walk * source_k
    bias = parameter(delta_bias, walk * delta_bias_k + lane, dtype)
    skip = parameter(D, walk * D_k + lane, dtype)
    a = parameter(A, walk * A_k + lane, dtype) * LOG2_E
    pace = 0.0
    if gap is not None:
        gap += batch * gap_b + walk * gap_k
        pace = parameter(rest, walk * rest_k + lane, dtype)

    begin = run * steps
    h = tl.zeros((GROUPS, LANES), dtype)
    if ends is not None:
        h = _state_before_span(ends, keeps, place * runs, span, channels, channel, GROUPS, FOLD)
    if span == spans - 1:
        keep, add = _ends_of_runs(
            u, delta, B, a, bias, pace, order, source, gap, u_l, delta_l, B_l, begin, length, steps,
            SOFTPLUS, False, ALIGNED, STEPS, dtype,
        )  # fmt: skip
        keep, add = tl.associative_scan((keep, add), 0, compose)
        before = tl.broadcast_to(tl.maximum(group - 1, 0), (GROUPS, LANES))
        h = tl.where(group == 0, h, tl.gather(keep * h + add, before, 0))
    elif ends is not None:
        row = (place * runs + run - 1) * channels + channel
        there = (group > 0) & (channel < channels)
        h = tl.load(keeps + row, there, other=1.0) * h + tl.load(ends + row, there, other=0.0)

    for turn in range(0, steps, STEPS):
        first = begin + turn
        there = (first % CHUNK == 0) & (first < length) & (channel < channels)
        tl.store(states + first // CHUNK * channels + channel, h, there)
        i = indices(order, first, length, STEPS, ALIGNED, False)
        j = i
        if source is not None:
            j = indices(source, first, length, STEPS, ALIGNED, False)
        raw = rows(delta, delta_l, j, STEPS)
        value = rows(u, u_l, i, STEPS)
        b = rows(B, B_l, j, STEPS)
        c = rows(C, C_l, j, STEPS)
        if gap is not None:
            absent = indices(gap, first, length, STEPS, ALIGNED, False)
        pointer = bytes_of(y)
        for s in tl.static_range(STEPS):
            size = step_size(raw[s].to(dtype) + bias, SOFTPLUS)
            time = size
            if gap is not None:
                time += absent[s].to(dtype) * pace
            v = value[s].to(dtype)
            h = tl.exp2(time * a) * h + size * v * b[s].to(dtype)
            output = c[s].to(dtype) * h + v * skip
            inside = (first + (0 if ALIGNED else s) < length) & (channel < channels)
            tl.store(at(pointer, i[s], y_l, y), output, inside)


@triton.jit
def _packed(value):
    """Pack a float32 into the upper half of 64 bits, and a flag into the lower half."""
    return (value.to(tl.int32, bitcast=True).to(tl.int64) << 32) | 1


@triton.jit
def _value_of(packed):
    return (packed >> 32).to(tl.int32).to(tl.float32, bitcast=True)


@triton.jit
def _publish(slot, channels, keep, add, mask):
    tl.atomic_xchg(slot, _packed(keep), mask=mask, sem="relaxed")
    tl.atomic_xchg(slot + channels, _packed(add), mask=mask, sem="relaxed")


@triton.jit
def _look(
    flags, first, end, block, tiles, channels, channel, group, FOLD: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Load ``FOLD`` published items per group, identities from ``end`` on, and count the missing ones.

    The items are the blocks before ``block``, then this block's tiles.
    """
    keeps = ()
    adds = ()
    ready = tl.full((group.shape[0], channel.shape[1]), 1, tl.int64)
    for f in tl.static_range(FOLD):
        item = first + group * FOLD + f
        wanted = (item < end) & (channel < channels)
        item += tl.where(item < block, tiles, block * (BLOCK - 1))
        slot = flags + item * 2 * channels + channel
        k = tl.load(slot, wanted, other=(0x3F800000 << 32) | 1, volatile=True)
        x = tl.load(slot + channels, wanted, other=1, volatile=True)
        keeps = keeps + (k,)
        adds = adds + (x,)
        ready = ready & k & x
    missing = 1 - ready.to(tl.int32)
    return keeps, adds, tl.sum(tl.sum(missing, 1), 0)


@triton.jit
def _wait_for(
    flags, first, end, block, tiles, channels, channel,
    GROUPS: tl.constexpr, FOLD: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Wait for up to ``GROUPS * FOLD`` items from ``first`` on; the last group of ``keep, add`` is their effect."""
    group = tl.arange(0, GROUPS)[:, None]
    keeps, adds, missing = _look(
        flags, first, end, block, tiles, channels, channel, group, FOLD, BLOCK
    )
    while missing > 0:
        keeps, adds, missing = _look(
            flags, first, end, block, tiles, channels, channel, group, FOLD, BLOCK
        )
    keep = _value_of(keeps[0])
    add = _value_of(adds[0])
    for f in tl.static_range(1, FOLD):
        add = add * _value_of(keeps[f]) + _value_of(adds[f])
        keep = keep * _value_of(keeps[f])
    return tl.associative_scan((keep, add), 0, compose)


@kernel
def single_pass(
    u, delta, A, B, C, D, delta_bias, order, source, gap, rest, flags, y, states,
    u_b, u_l, u_k, delta_b, delta_l, delta_k, B_b, B_l, B_k, C_b, C_l, C_k, y_l,
    A_k, D_k, delta_bias_k, rest_k, order_b, order_k, source_b, source_k, gap_b, gap_k,
    length, walks, channels, chunks, tiles,
    SOFTPLUS: tl.constexpr, ALIGNED: tl.constexpr, CHUNK: tl.constexpr,
    GROUPS: tl.constexpr, STEPS: tl.constexpr, LANES: tl.constexpr, FOLD: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Do the work of :func:`outputs` in one launch that reads everything once, with a decoupled look-back.

    ``flags (B * K, tiles + tiles // BLOCK, 2, D)`` must be zero. A program publishes there the effect of its tile of
    ``GROUPS`` times ``STEPS`` steps on a state; the last of each ``BLOCK`` tiles also publishes that of its block. It
    waits for all earlier blocks of its walk and the earlier tiles of its block, so no program needs more than ``BLOCK``
    others to publish. This terminates only if programs start in numeric order, as on today's GPUs; CUDA does not
    guarantee it.
    """
    program = tl.program_id(0)
    tile = program % tiles
    place = program // tiles
    batch = (place // walks).to(tl.int64)
    walk = (place % walks).to(tl.int64)
    place = place.to(tl.int64)
    group = tl.arange(0, GROUPS)[:, None]
    channel = tl.program_id(1) * LANES + tl.arange(0, LANES)[None, :]
    lane = tl.minimum(channel, channels - 1)
    lanes = tl.broadcast_to(lane, (GROUPS, LANES))
    before = tl.broadcast_to(tl.maximum(group - 1, 0), (GROUPS, LANES))
    if order is not None:
        order += batch * order_b + walk * order_k
    bias = parameter(delta_bias, walk * delta_bias_k + lane, tl.float32)
    skip = parameter(D, walk * D_k + lane, tl.float32)
    a = parameter(A, walk * A_k + lane, tl.float32) * LOG2_E

    delta += (batch * delta_b + walk * delta_k) + lanes
    u += (batch * u_b + walk * u_k) + lanes
    B += batch * B_b + walk * B_k
    C += batch * C_b + walk * C_k
    y += (batch * length * walks + walk) * channels + lanes
    if source is not None:
        source += batch * source_b + walk * source_k
    first = (tile * GROUPS + group) * STEPS
    i = indices(order, first, length, STEPS, ALIGNED, False)
    j = i
    if source is not None:
        j = indices(source, first, length, STEPS, ALIGNED, False)
    raw = rows(delta, delta_l, j, STEPS)
    value = rows(u, u_l, i, STEPS)
    b = rows(B, B_l, j, STEPS)
    if gap is not None:
        absent = indices(gap + (batch * gap_b + walk * gap_k), first, length, STEPS, ALIGNED, False)
        pace = parameter(rest, walk * rest_k + lane, tl.float32)
    keeps = ()
    adds = ()
    keep = tl.full((GROUPS, LANES), 1.0, tl.float32)
    add = tl.zeros((GROUPS, LANES), tl.float32)
    for s in tl.static_range(STEPS):
        size = step_size(raw[s].to(tl.float32) + bias, SOFTPLUS)
        time = size
        if gap is not None:
            time += absent[s].to(tl.float32) * pace
        # Steps beyond the walk's end follow all valid steps, so their values do not matter.
        k = tl.exp2(time * a)
        x = size * value[s].to(tl.float32) * b[s].to(tl.float32)
        add = add * k + x
        keep *= k
        keeps = keeps + (k,)
        adds = adds + (x,)

    keep, add = tl.associative_scan((keep, add), 0, compose)
    flags += place * (tiles + tiles // BLOCK) * 2 * channels
    mine = (group == GROUPS - 1) & (channel < channels)
    to = flags + channel + 0 * group
    _publish(to + tile * 2 * channels, channels, keep, add, mine)
    block = tile // BLOCK
    end = block + tile % BLOCK
    if tile % BLOCK == BLOCK - 1:
        all_tiles: tl.constexpr = (BLOCK + GROUPS - 1) // GROUPS
        k, x = _wait_for(
            flags, block, end, block, tiles, channels, channel, GROUPS, all_tiles, BLOCK
        )
        k, x = compose(k, x, keep, add)
        _publish(to + (tiles + block) * 2 * channels, channels, k, x, mine)
    entry = tl.zeros((GROUPS, LANES), tl.float32)
    last = tl.full((GROUPS, LANES), GROUPS - 1, tl.int32)
    for item in range(0, end, GROUPS * FOLD):
        k, x = _wait_for(flags, item, end, block, tiles, channels, channel, GROUPS, FOLD, BLOCK)
        entry = tl.gather(k * entry + x, last, 0)
    h = tl.where(group == 0, entry, tl.gather(keep * entry + add, before, 0))

    there = (first % CHUNK == 0) & (first < length) & (channel < channels)
    tl.store(states + (place * chunks + first // CHUNK) * channels + channel, h, there)
    c = rows(C, C_l, j, STEPS)
    pointer = bytes_of(y)
    for s in tl.static_range(STEPS):
        h = keeps[s] * h + adds[s]
        inside = (first + (0 if ALIGNED else s) < length) & (channel < channels)
        output = c[s].to(tl.float32) * h + value[s].to(tl.float32) * skip
        tl.store(at(pointer, i[s], y_l, y), output, inside)
