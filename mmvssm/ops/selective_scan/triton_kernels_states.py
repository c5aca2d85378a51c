r"""Triton kernel of the selective scan with several states for each channel.

Per channel and state, with ``time_t = size_t + gap_t rest``::

    h_t = exp(time_t A) h_{t-1} + size_t B_t u_t            y_t = D u_t + sum over states of C_t h_t

The adjoint is the same recurrence walked backwards: ``q_t = dL/dh_{t-1} = exp(time_t A) (q_{t+1} + C_t dy_t)``.

A warp takes the steps of some channels in sequence, with all their states in registers, and loads one step ahead. If
the walks of a batch fill a GPU, one launch suffices. Otherwise walks are cut into spans. The first launch computes each
span's final state from zero, ``hand_over`` the state before each span, and a third launch the outputs.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .triton_functions import LOG2_E, at, bytes_of, kernel, parameter, step_size


@triton.jit
def _token(index, step):
    if index is not None:
        step = tl.load(index + step)
    return step


@triton.jit
def _of_walks(x, x_k, x_l, tokens, WALKS: tl.constexpr):
    """Load one row of each walk."""
    found = ()
    for w in tl.static_range(WALKS):
        found = found + (tl.load(at(bytes_of(x + w * x_k), tokens[w], x_l, x)),)
    return found


@triton.jit
def _weights(
    x, x_k, x_l, tokens, row,
    N: tl.constexpr, STATES: tl.constexpr, ROWS: tl.constexpr, WALKS: tl.constexpr,
):  # fmt: skip
    """Load one weight per walk and state, 0 beyond the last state."""
    found = ()
    for w in tl.static_range(WALKS):
        pointer = at(bytes_of(x + w * x_k), tokens[w], x_l, x)
        for p in tl.static_range(STATES):
            if ROWS == 1:
                found = found + (tl.load(pointer + p),)
            else:
                n = row * STATES + p
                found = found + (tl.load(pointer + n, n < N, other=0.0),)
    return found


@kernel
def sweep(
    values, delta, A, B, C, D, delta_bias, order, source, gap, rest, entries, y, ends, times,
    values_b, values_l, values_k, delta_b, delta_l, delta_k, B_b, B_l, B_k, C_b, C_l, C_k, y_l,
    A_k, D_k, delta_bias_k, rest_k, order_b, order_k, source_b, source_k, gap_b, gap_k,
    length, walks, channels, chunks, spans, steps,
    N: tl.constexpr, SOFTPLUS: tl.constexpr, OUTPUTS: tl.constexpr, ADJOINT: tl.constexpr, CHUNK: tl.constexpr,
    STATES: tl.constexpr, ROWS: tl.constexpr, LANES: tl.constexpr, WALKS: tl.constexpr,
):  # fmt: skip
    """Sweep over spans of ``steps`` steps: ``ROWS`` times ``STATES`` states of ``LANES`` channels.

    With ``OUTPUTS``, write ``y (B, L, K, D)``, and the states before every ``CHUNK`` steps to ``ends (B, K, S, D, N)``.
    Spans begin with ``entries (B, K, spans, D, N)``; None means one span that begins with 0.

    Otherwise write ``ends (B, K, spans, D, N)``, the state after each span if it begins with 0, and its time, ``times
    (B, K, spans, D)``. ``ADJOINT``: the same for the adjoint; pass ``dy`` as ``values`` and ``C`` as ``B``.

    A program takes ``WALKS`` walks that share ``delta``, its tokens and ``A``, hence the decays.
    """
    dtype: tl.constexpr = ends.dtype.element_ty
    program = tl.program_id(0)
    span = program % spans
    place = program // spans
    groups = walks // WALKS
    image = place // groups
    batch = image.to(tl.int64)
    walk = (place % groups * WALKS).to(tl.int64)
    first_place = batch * walks + walk  # in (B, K)
    row = tl.arange(0, ROWS)[:, None]
    channel = tl.program_id(1) * LANES + tl.arange(0, LANES)[None, :]
    here = channel < channels
    lane = tl.minimum(channel, channels - 1)  # no mask for loads; stores are masked
    values += batch * values_b + walk * values_k + lane
    delta += batch * delta_b + walk * delta_k + lane
    B += batch * B_b + walk * B_k
    if OUTPUTS:
        C += batch * C_b + walk * C_k
        y += (batch * length * walks + walk) * channels + lane
    if order is not None:
        order += batch * order_b + walk * order_k
    if source is not None:
        source += batch * source_b + walk * source_k
    bias = parameter(delta_bias, walk * delta_bias_k + lane, dtype)
    pace = 0.0
    if gap is not None:
        gap += batch * gap_b + walk * gap_k
        pace = parameter(rest, walk * rest_k + lane, dtype)
    a = ()
    for p in tl.static_range(STATES):
        n = tl.minimum(row * STATES + p, N - 1)
        a = a + (tl.load(A + walk * A_k + lane * N + n).to(dtype) * LOG2_E,)
    h = ()
    skip = ()
    for w in tl.static_range(WALKS):
        if OUTPUTS:
            skip = skip + (parameter(D, (walk + w) * D_k + lane, dtype),)
        for p in tl.static_range(STATES):
            n = row * STATES + p
            if OUTPUTS and entries is not None:
                at_entry = ((first_place + w) * spans + span) * channels + channel
                h = h + (tl.load(entries + at_entry * N + n, here & (n < N), other=0.0),)
            else:
                h = h + (tl.zeros((ROWS, LANES), dtype),)
    total = tl.zeros((1, LANES), dtype)

    # The adjoint takes the span's steps in reverse.
    count = tl.minimum(steps, length - span * steps)
    begin = span * steps + (count - 1 if ADJOINT else 0)
    way = -1 if ADJOINT else 1
    i = ()
    for w in tl.static_range(WALKS):
        i = i + (_token(None if order is None else order + w * order_k, begin),)
    j = i
    if source is not None:
        shared = _token(source, begin)
        j = ()
        for w in tl.static_range(WALKS):
            j = j + (shared,)
    raw = tl.load(at(bytes_of(delta), j[0], delta_l, delta))
    value = _of_walks(values, values_k, values_l, i, WALKS)
    b = _weights(B, B_k, B_l, j, row, N, STATES, ROWS, WALKS)
    c = b
    if OUTPUTS:
        c = _weights(C, C_k, C_l, j, row, N, STATES, ROWS, WALKS)
    for turn in range(0, count):
        step = begin + way * turn
        following = begin + way * tl.minimum(turn + 1, count - 1)
        i1 = ()
        for w in tl.static_range(WALKS):
            i1 = i1 + (_token(None if order is None else order + w * order_k, following),)
        j1 = i1
        if source is not None:
            shared = _token(source, following)
            j1 = ()
            for w in tl.static_range(WALKS):
                j1 = j1 + (shared,)
        raw1 = tl.load(at(bytes_of(delta), j1[0], delta_l, delta))
        value1 = _of_walks(values, values_k, values_l, i1, WALKS)
        b1 = _weights(B, B_k, B_l, j1, row, N, STATES, ROWS, WALKS)
        c1 = b1
        if OUTPUTS:
            c1 = _weights(C, C_k, C_l, j1, row, N, STATES, ROWS, WALKS)

        if OUTPUTS:
            if step % CHUNK == 0:
                for w in tl.static_range(WALKS):
                    to = ((first_place + w) * chunks + step // CHUNK) * channels + channel  # fmt: skip
                    for p in tl.static_range(STATES):
                        n = row * STATES + p
                        tl.store(ends + to * N + n, h[w * STATES + p], here & (n < N))
        size = step_size(raw.to(dtype) + bias, SOFTPLUS)
        time = size
        if gap is not None:
            time += tl.load(gap + step).to(dtype) * pace
        decays = ()
        for p in tl.static_range(STATES):
            decays = decays + (tl.exp2(time * a[p]),)
        new = ()
        for w in tl.static_range(WALKS):
            v = value[w].to(dtype)
            drive = v if ADJOINT else size * v
            output = tl.zeros((ROWS, LANES), dtype)
            for p in tl.static_range(STATES):
                weight = b[w * STATES + p].to(dtype)
                if ADJOINT:
                    state = decays[p] * (h[w * STATES + p] + drive * weight)
                else:
                    state = decays[p] * h[w * STATES + p] + drive * weight
                new = new + (state,)
                if OUTPUTS:
                    output += c[w * STATES + p].to(dtype) * state
            if OUTPUTS:
                if ROWS > 1:
                    output = tl.sum(output, 0)[None, :]
                to_y = at(bytes_of(y + w * channels), i[w], y_l, y)
                tl.store(to_y, output + v * skip[w], here)
        h = new
        total += time
        i = i1
        j = j1
        raw = raw1
        value = value1
        b = b1
        c = c1
    if not OUTPUTS:
        for w in tl.static_range(WALKS):
            to = ((first_place + w) * spans + span) * channels + channel
            for p in tl.static_range(STATES):
                n = row * STATES + p
                tl.store(ends + to * N + n, h[w * STATES + p], here & (n < N))
            tl.store(times + to, total, here)
