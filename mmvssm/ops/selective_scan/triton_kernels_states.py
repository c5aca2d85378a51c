r"""Triton kernel of the selective scan with several states for each channel.

Per channel and state, with ``time_t = size_t + gap_t rest`` the time that step ``t`` takes::

    h_t = exp(time_t A) h_{t-1} + size_t B_t u_t            y_t = D u_t + sum over states of C_t h_t

and its adjoint, the same recurrence walked backwards: ``q_t = dL/dh_{t-1} = exp(time_t A) (q_{t+1} + C_t dy_t)``.

One warp takes some steps of some channels one after the other, with all their states in registers, and loads what a
step needs while it works on the step before. A walk is cut into no more spans than it takes to fill a GPU: where the
walks of a batch do that on their own, one launch does. Otherwise one launch finds the state that each span would end
with had it begun with zero, ``hand_over`` the state that it does begin with, and a third launch the outputs.
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
    """One row of each walk."""
    found = ()
    for w in tl.static_range(WALKS):
        found = found + (tl.load(at(bytes_of(x + w * x_k), tokens[w], x_l, x)),)
    return found


@triton.jit
def _weights(
    x, x_k, x_l, tokens, row,
    N: tl.constexpr, STATES: tl.constexpr, ROWS: tl.constexpr, WALKS: tl.constexpr,
):  # fmt: skip
    """One weight of each walk and state, 0 for states that there are not."""
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

    ``OUTPUTS``: ``y (B, L, K, D)``, and ``ends (B, K, S, D, N)`` before every ``CHUNK`` steps, from
    ``entries (B, K, spans, D, N)``, None where the one span begins with 0.

    Else ``ends (B, K, spans, D, N)`` and ``times (B, K, spans, D)``: the state after each span begun with 0, and the
    time it takes. ``ADJOINT``: the same of the adjoint; ``values`` is ``dy``, and ``C`` is in place of ``B``.

    ``WALKS`` walks that share ``delta``, its tokens and ``A`` go together: they decay alike.
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
    lane = tl.minimum(
        channel, channels - 1
    )  # loads need no mask; what is out of range is not stored
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

    # Steps first to last of the span, for the adjoint in turn from the last.
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
