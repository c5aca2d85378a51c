r"""Triton kernels of the selective scan's backward pass, for any number of states.

The adjoint ``q_t = dL/dh_{t-1}`` is the recurrence walked backwards. With ``size_t`` the softplus and
``time_t = size_t + gap_t rest``::

    g_t = dL/dh_t = C_t dy_t + q_{t+1}                 q_t = exp(time_t A) g_t

It gives every gradient::

    du_t    = D dy_t + size_t ddrive_t        ddrive_t = sum over states of g_t B_t
    dsize_t = dtime_t + u_t ddrive_t          dtime_t  = sum over states of q_t h_{t-1} A
    dB_t    = sum over channels of g_t size_t u_t       dC_t = sum over channels of dy_t h_t
    dA      = sum over t of q_t h_{t-1} time_t

A walk is cut into chunks. ``run_ends`` or ``sweep`` computes each chunk's adjoint with zero after the chunk,
:func:`hand_over` computes the adjoint that really follows each chunk, and :func:`gradients` runs every chunk again.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .triton_functions import (
    LN_2,
    LOG2_E,
    at,
    bytes_of,
    compose,
    indices,
    kernel,
    parameter,
    rows,
    step_size_and_slope,
)


@kernel
def hand_over(
    ends, times, A, entries, A_k, walks, channels, columns, spans,
    N: tl.constexpr, BACKWARDS: tl.constexpr, GROUPS: tl.constexpr, STEPS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Write ``entries (B, K, S, D, N)``, the state before each of ``S`` spans; after each span if ``BACKWARDS``.

    The first entry is zero, the next is ``end + exp(A time) entry``, from ``ends (B, K, S, D, N)`` and ``times (B, K,
    S, D)``. A program takes some columns of the states ``(D, N)`` of one walk through all spans.
    """
    dtype: tl.constexpr = ends.dtype.element_ty
    place = tl.program_id(0)
    group = tl.arange(0, GROUPS)[:, None]
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    before = tl.broadcast_to(tl.maximum(group - 1, 0), (GROUPS, COLUMNS))
    last = tl.full((GROUPS, COLUMNS), GROUPS - 1, tl.int32)
    here = column < columns
    a = tl.load(A + place % walks * A_k + column, here, other=0.0).to(dtype) * LOG2_E
    first_span = place.to(tl.int64) * spans
    entry = tl.zeros((GROUPS, COLUMNS), dtype)
    for tile in range(0, spans, GROUPS * STEPS):
        keeps = ()
        adds = ()
        keep = tl.full((GROUPS, COLUMNS), 1.0, dtype)
        add = tl.zeros((GROUPS, COLUMNS), dtype)
        for s in tl.static_range(STEPS):
            turn = tile + group * STEPS + s
            span = first_span + (spans - 1 - turn if BACKWARDS else turn)
            there = (turn < spans) & here
            k = tl.exp2(tl.load(times + span * channels + column // N, there, other=0.0) * a)
            x = tl.load(ends + span * columns + column, there, other=0.0)
            add = add * k + x
            keep *= k
            keeps = keeps + (k,)
            adds = adds + (x,)
        keep, add = tl.associative_scan((keep, add), 0, compose)
        after = keep * entry + add
        h = tl.where(group == 0, entry, tl.gather(after, before, 0))
        entry = tl.gather(after, last, 0)
        for s in tl.static_range(STEPS):
            turn = tile + group * STEPS + s
            span = first_span + (spans - 1 - turn if BACKWARDS else turn)
            tl.store(entries + span * columns + column, h, (turn < spans) & here)
            h = keeps[s] * h + adds[s]


@triton.jit
def _weights_of_steps(index, index_b, index_k, length, walks, tiles, ROWS: tl.constexpr):
    """Return image and walk, and for ``ROWS`` steps the token, the place in ``(B, K, L)`` and a mask."""
    program = tl.program_id(0)
    place = program // tiles
    batch = (place // walks).to(tl.int64)
    walk = (place % walks).to(tl.int64)
    step = program % tiles * ROWS + tl.arange(0, ROWS)[:, None]
    j = tl.minimum(step, length - 1)
    if index is not None:
        j = tl.load(index + batch * index_b + walk * index_k + j)
    return batch, walk, j.to(tl.int64), place.to(tl.int64) * length + step, step < length


@kernel
def weights_by_step(
    B, C, index, by_step, B_b, B_l, B_k, C_b, C_l, C_k, index_b, index_k, length, walks, tiles, half,
    N: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Write ``by_step (2, B, K, L, N)``: ``B`` and ``C`` in step order, in the dtype of the states."""
    batch, walk, j, row, inside = _weights_of_steps(
        index, index_b, index_k, length, walks, tiles, ROWS
    )
    n = tl.arange(0, COLUMNS)[None, :]
    inside = inside & (n < N)
    dtype: tl.constexpr = by_step.dtype.element_ty
    b = tl.load(at(bytes_of(B + (batch * B_b + walk * B_k)), j, B_l, B) + n, inside, other=0.0)
    c = tl.load(at(bytes_of(C + (batch * C_b + walk * C_k)), j, C_l, C) + n, inside, other=0.0)
    tl.store(by_step + row * N + n, b.to(dtype), inside)
    tl.store(by_step + half + row * N + n, c.to(dtype), inside)


@kernel
def weights_by_token(
    parts, index, dB, dC, index_b, index_k, length, walks, tiles, half, blocks,
    N: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Write ``dB, dC (B, L, K, N)``: the sums of ``parts (2, blocks, B, K, L, N)`` over blocks."""
    batch, walk, j, row, inside = _weights_of_steps(
        index, index_b, index_k, length, walks, tiles, ROWS
    )
    n = tl.arange(0, COLUMNS)[None, :]
    inside = inside & (n < N)
    b = tl.zeros((ROWS, COLUMNS), parts.dtype.element_ty)
    c = tl.zeros((ROWS, COLUMNS), parts.dtype.element_ty)
    part = parts + row * N + n
    to_c = tl.full((), 1, tl.int64) * half * blocks
    for _ in range(blocks):
        b += tl.load(part, inside, other=0.0)
        c += tl.load(part + to_c, inside, other=0.0)
        part += half
    to = ((batch * length + j) * walks + walk) * N + n
    tl.store(dB + to, b, inside)
    tl.store(dC + to, c, inside)


@triton.jit
def _sum_channels(x):
    """Sum ``(CHANNELS, LANES, GROUPS)`` to ``(1, 1, GROUPS)``."""
    return tl.sum(tl.sum(x, 0), 0)[None, None, :]


@triton.jit
def _sum_steps(x):
    """Sum ``(CHANNELS, LANES, GROUPS)`` to ``(CHANNELS, LANES, 1)``."""
    return tl.sum(x, 2)[:, :, None]


@triton.jit
def _tiles(found, shape: tl.constexpr, STEPS: tl.constexpr):
    """Reshape what threads loaded for each step to tiles."""
    tiles = ()
    for s in tl.static_range(STEPS):
        tiles = tiles + (tl.reshape(found[s], shape),)
    return tiles


@kernel
def gradients(
    dy, u, delta, A, by_step, D, delta_bias, order, source, gap, rest, states, adjoints,
    du, ddelta, dA, parts, dD, ddelta_bias, drest,
    dy_b, dy_l, dy_k, u_b, u_l, u_k, delta_b, delta_l, delta_k, du_l, ddelta_l,
    A_k, D_k, delta_bias_k, rest_k, order_b, order_k, source_b, source_k, gap_b, gap_k,
    length, walks, channels, chunks, rounds, half,
    N: tl.constexpr, SOFTPLUS: tl.constexpr, ALIGNED: tl.constexpr,
    CHANNELS: tl.constexpr, GROUPS: tl.constexpr, STEPS: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """Compute all gradients from ``states`` before and ``adjoints`` after each chunk, both ``(B, K, S, D, N)``.

    A warp takes one chunk (``GROUPS`` runs of ``STEPS`` steps) and a block of channels, ``CHANNELS`` times ``LANES`` at
    a time. Each thread takes one run of ``CHANNELS`` channels.

    ``du`` and ``ddelta (B, L, K, D)`` are complete. The caller still sums, in a fixed order, ``dA (B, K, S, D, N)`` and
    ``dD``, ``ddelta_bias`` and ``drest (B, K, S, D)`` over chunks, and ``dB`` and ``dC``, in step order in
    ``parts (2, blocks, B, K, L, N)``, over blocks of channels.
    """
    dtype: tl.constexpr = states.dtype.element_ty
    program = tl.program_id(0)
    chunk = program % chunks
    place = program // chunks
    batch = (place // walks).to(tl.int64)
    walk = (place % walks).to(tl.int64)
    block = tl.program_id(1)
    group = tl.arange(0, GROUPS)[None, None, :]
    first = (chunk * GROUPS + group) * STEPS
    shape: tl.constexpr = (CHANNELS, LANES, GROUPS)
    before = tl.broadcast_to(tl.maximum(group - 1, 0), shape)
    mirrored = tl.broadcast_to(GROUPS - 1 - group, shape)
    behind = tl.broadcast_to(tl.maximum(GROUPS - 2 - group, 0), shape)
    # Loads and stores use flat lists of threads, since Triton's layout of tiles differs between versions.
    threads = tl.arange(0, CHANNELS * LANES * GROUPS)
    begin = (chunk * GROUPS + threads % GROUPS) * STEPS
    warp = tl.arange(0, LANES * GROUPS)
    begin_of_warp = (chunk * GROUPS + warp % GROUPS) * STEPS

    if order is not None:
        order += batch * order_b + walk * order_k
    if source is not None:
        source += batch * source_b + walk * source_k
    if gap is not None:
        gap += batch * gap_b + walk * gap_k
    row = (place.to(tl.int64) * length + first) * N  # of the chunk's weights
    parts_b = parts + block.to(tl.int64) * half + row
    parts_c = parts_b + tl.num_programs(1).to(tl.int64) * half
    row_b = by_step + (place.to(tl.int64) * length + begin_of_warp) * N
    row_c = row_b + half
    part_of_chunk = program.to(tl.int64) * channels  # in (B, K, S, D)

    for turn in range(rounds):
        channel = (block * rounds + turn) * CHANNELS * LANES
        channel += tl.arange(0, CHANNELS)[:, None, None] * LANES + tl.arange(0, LANES)[None, :, None]  # fmt: skip
        here = channel < channels
        channel_of = (block * rounds + turn) * CHANNELS * LANES + threads // GROUPS
        there = channel_of < channels
        lanes = tl.minimum(channel_of, channels - 1)  # loads need no mask
        i = indices(order, begin, length, STEPS, ALIGNED, False)
        j = i
        if source is not None:
            j = indices(source, begin, length, STEPS, ALIGNED, False)
        if gap is not None:
            absent = _tiles(indices(gap, begin, length, STEPS, ALIGNED, False), shape, STEPS)
        bias = tl.reshape(parameter(delta_bias, walk * delta_bias_k + lanes, dtype), shape)
        raw = _tiles(
            rows(delta + (batch * delta_b + walk * delta_k) + lanes, delta_l, j, STEPS),
            shape,
            STEPS,
        )
        value = _tiles(rows(u + (batch * u_b + walk * u_k) + lanes, u_l, i, STEPS), shape, STEPS)
        grad = _tiles(rows(dy + (batch * dy_b + walk * dy_k) + lanes, dy_l, i, STEPS), shape, STEPS)
        grads_y = ()
        times = ()
        drives = ()
        grads_drive = ()
        grads_time = ()
        pace = 0.0
        if gap is not None:
            pace = tl.reshape(parameter(rest, walk * rest_k + lanes, dtype), shape)
        for s in tl.static_range(STEPS):
            inside = (first + (0 if ALIGNED else s) < length) & here
            size, _ = step_size_and_slope(raw[s].to(dtype) + bias, SOFTPLUS)
            time = size
            if gap is not None:
                time += absent[s].to(dtype) * pace
                time = tl.where(inside, time, 0.0)
            size = tl.where(inside, size, 0.0)
            times = times + (time if gap is not None else size,)
            drives = drives + (size * value[s].to(dtype),)
            grads_y = grads_y + (tl.where(inside, grad[s].to(dtype), 0.0),)
            grads_drive = grads_drive + (tl.zeros(shape, dtype),)
            grads_time = grads_time + (tl.zeros(shape, dtype),)

        for n in range(N):
            # Everything but the weights is a tile ``(CHANNELS, LANES, GROUPS)``.
            a = tl.reshape(parameter(A, walk * A_k + lanes * N + n, dtype), shape) * LOG2_E
            place_of = (part_of_chunk + channel) * N + n
            place_in = (part_of_chunk + channel_of) * N + n
            entry = tl.reshape(tl.load(states + place_in, there, other=0.0), shape)
            leave = tl.reshape(tl.load(adjoints + place_in, there, other=0.0), shape)
            b = ()
            c = ()
            for s in tl.static_range(STEPS):
                exists = begin_of_warp + (0 if ALIGNED else s) < length
                weight = tl.load(row_b + n + s * N, exists, other=0.0)
                b = b + (tl.reshape(weight, (1, LANES, GROUPS)),)
                weight = tl.load(row_c + n + s * N, exists, other=0.0)
                c = c + (tl.reshape(weight, (1, LANES, GROUPS)),)
            keeps = ()
            keep = tl.full(shape, 1.0, dtype)
            add = tl.zeros(shape, dtype)
            for s in tl.static_range(STEPS):
                k = tl.exp2(times[s] * a)
                add = add * k + drives[s] * b[s]
                keep *= k
                keeps = keeps + (k,)
            grad_add = tl.zeros(shape, dtype)
            for r in tl.static_range(STEPS - 1, -1, -1):
                grad_add = (grad_add + c[r] * grads_y[r]) * keeps[r]

            # The state before each run, and the adjoint after it: a scan with mirrored time.
            mirrored_keep = tl.gather(keep, mirrored, 2)
            keep, add = tl.associative_scan((keep, add), 2, compose)
            h = tl.where(group == 0, entry, tl.gather(keep * entry + add, before, 2))
            keep, add = tl.associative_scan((mirrored_keep, tl.gather(grad_add, mirrored, 2)), 2, compose)  # fmt: skip
            q = tl.where(group == GROUPS - 1, leave, tl.gather(keep * leave + add, behind, 2))

            kept = ()  # of the state before each step
            for s in tl.static_range(STEPS):
                kept = kept + (keeps[s] * h,)
                h = keeps[s] * h + drives[s] * b[s]
            grad_a = tl.zeros(shape, dtype)
            new_drive = ()
            new_time = ()
            for r in tl.static_range(STEPS - 1, -1, -1):
                exists_too = first + (0 if ALIGNED else r) < length
                g = c[r] * grads_y[r] + q
                q = keeps[r] * g
                with_h = g * kept[r]
                grad_a += with_h * times[r]
                new_drive = (grads_drive[r] + g * b[r],) + new_drive
                new_time = (grads_time[r] + with_h * a,) + new_time
                to_b = parts_b + n + r * N
                to_c = parts_c + n + r * N
                more = (turn > 0) & exists_too
                grad_b = _sum_channels(g * drives[r]) + tl.load(to_b, more, other=0.0)
                grad_c = _sum_channels(grads_y[r] * (kept[r] + drives[r] * b[r]))
                grad_c += tl.load(to_c, more, other=0.0)
                tl.store(to_b, grad_b, exists_too)
                tl.store(to_c, grad_c, exists_too)
            grads_drive = new_drive
            grads_time = new_time
            tl.store(dA + place_of, _sum_steps(grad_a), here)

        skip = tl.reshape(parameter(D, walk * D_k + lanes, dtype), shape)
        grad_skip = tl.zeros(shape, dtype)
        grad_bias = tl.zeros(shape, dtype)
        grad_rest = tl.zeros(shape, dtype)
        if N > 1:  # reload the inputs instead of holding them in registers during the loop above
            i = indices(order, begin, length, STEPS, ALIGNED, False)
            j = i
            if source is not None:
                j = indices(source, begin, length, STEPS, ALIGNED, False)
            if gap is not None:
                absent = _tiles(indices(gap, begin, length, STEPS, ALIGNED, False), shape, STEPS)
            raw = _tiles(
                rows(delta + (batch * delta_b + walk * delta_k) + lanes, delta_l, j, STEPS),
                shape,
                STEPS,
            )
            value = _tiles(
                rows(u + (batch * u_b + walk * u_k) + lanes, u_l, i, STEPS), shape, STEPS
            )
        to_u = bytes_of(du + (batch * length * walks + walk) * channels + lanes)
        to_delta = bytes_of(ddelta + (batch * length * walks + walk) * channels + lanes)
        for s in tl.static_range(STEPS):
            inside = (first + (0 if ALIGNED else s) < length) & here
            v = value[s].to(dtype)
            size, slope = step_size_and_slope(raw[s].to(dtype) + bias, SOFTPLUS)
            grad_time = grads_time[s] * LN_2
            grad_raw = (grads_drive[s] * v + grad_time) * slope
            grad_raw = tl.where(inside, grad_raw, 0.0)
            grad_skip += grads_y[s] * v
            grad_bias += grad_raw
            if gap is not None:
                grad_rest += grad_time * absent[s].to(dtype)
            exists = (begin + (0 if ALIGNED else s) < length) & there
            grad_value = grads_drive[s] * size + grads_y[s] * skip
            tl.store(
                at(to_u, i[s], du_l, du),
                tl.reshape(grad_value, (CHANNELS * LANES * GROUPS,)),
                exists,
            )
            tl.store(
                at(to_delta, j[s], ddelta_l, ddelta),
                tl.reshape(grad_raw, (CHANNELS * LANES * GROUPS,)),
                exists,
            )
        if D is not None:
            tl.store(dD + part_of_chunk + channel, _sum_steps(grad_skip), here)
        if delta_bias is not None:
            tl.store(ddelta_bias + part_of_chunk + channel, _sum_steps(grad_bias), here)
        if gap is not None:
            tl.store(drest + part_of_chunk + channel, _sum_steps(grad_rest), here)
        tl.debug_barrier()  # in the next turn other threads read these parts of dB and dC
