"""Define the node ``mmvssm::SelectiveScan`` as a function of ONNX's standard operators.

A runtime with a kernel of that name runs the kernel, any other runs the function. Its body cuts walks into chunks. The
first ``Scan`` steps through all chunks at once, each from a zero state. The second goes from chunk to chunk and finds
the state before each. The third steps through all chunks again, from those states. With several states per channel,
each step computes its own decay and drive, so no tensor has tokens, channels and states.
"""

from __future__ import annotations

from collections.abc import Sequence

import onnx
import onnx.parser

DOMAIN = "mmvssm"
DOMAIN_VERSION = 1
NAME = "SelectiveScan"

INPUTS = ("u", "delta", "A", "B", "C", "D", "delta_bias", "order", "source", "gap", "rest")
"""The node's inputs; optional from ``D`` on. ``K`` is the first dimension after ``B, L``, or the first."""

OPTIONAL = INPUTS[5:]


def overload_name(given: Sequence[str], one_state: bool, delta_softplus: bool) -> str:
    """Name the function for a set of optional inputs; a function body cannot test for them.

    Args:
        given: The inputs of :data:`OPTIONAL` that the node has.
        one_state: Whether there is one state per channel.
        delta_softplus: The node's attribute.
    """
    words = [name for name in OPTIONAL if name in given]
    words += ["softplus"] * delta_softplus + ["one_state"] * one_state
    return "_".join(words)


def scan_function(
    given: Sequence[str], one_state: bool, delta_softplus: bool, opset: int
) -> onnx.FunctionProto:
    """Build the function for nodes with a set of optional inputs.

    It computes :func:`mmvssm.ops.selective_scan.naive.selective_scan_naive` in float32. Inputs other than ``order``,
    ``source`` and ``gap`` may have size 1 in place of ``K``; all walks then share them.

    Args:
        given: The inputs of :data:`OPTIONAL` that the node has.
        one_state: Whether there is one state per channel.
        delta_softplus: The node's attribute.
        opset: Version of the standard operators.
    """
    missing = set(given) - set(OPTIONAL)
    if missing or ("gap" in given) > ("rest" in given):
        raise ValueError(f"no such scan: {sorted(given)}; gap needs rest")
    return onnx.parser.parse_function(
        f'<domain: "{DOMAIN}", overload: "{overload_name(given, one_state, delta_softplus)}", '
        f'opset_import: ["" : {opset}]>\n'
        f"{NAME} <delta_softplus> ({', '.join(INPUTS)}) => (y)\n{{\n"
        + _step_sizes(given, delta_softplus)
        + _steps(given)
        + _terms(given)
        + (_ONE_STATE if one_state else _STATES)
        + _outputs(given)
        + "}"
    )


# Shapes in comments: step in its chunk T, batch B, chunk S, walk K, state N, channel D. Parameters come as (K, D).


def _step_sizes(given: Sequence[str], delta_softplus: bool) -> str:
    """Compute ``step_size (B, L, K, D)`` by token, so that shared values are computed once."""
    text, raw = "", "delta"
    if "delta_bias" in given:
        text, raw = "    delta_raw = Add (delta, delta_bias)\n", "delta_raw"
    return text + f"    step_size = {'Softplus' if delta_softplus else 'Identity'} ({raw})\n"


def _steps(given: Sequence[str]) -> str:
    """Compute sizes, chunks, and the row that each step reads: ``order_at`` and ``source_at (T, B, S, K)``."""
    order = "order" if "order" in given else None
    source = "source" if "source" in given else order
    text = """
    zero = Constant <value = int64[1] {0}> ()
    one = Constant <value = int64[1] {1}> ()
    any = Constant <value = int64[1] {-1}> ()
    batch = Shape <start = 0, end = 1> (u)
    length = Shape <start = 1, end = 2> (u)
    channels = Shape <start = 3, end = 4> (u)
    states = Shape <start = 2, end = 3> (A)
    u_walks = Shape <start = 2, end = 3> (u)
    step_size_walks = Shape <start = 2, end = 3> (step_size)
    A_walks = Shape <start = 0, end = 1> (A)
    B_walks = Shape <start = 2, end = 3> (B)
    C_walks = Shape <start = 2, end = 3> (C)
"""
    for name in given:
        text += f"    {name}_walks = Shape <start = -2, end = -1> ({name})\n"
    walks = ", ".join(f"{x}_walks" for x in ("u", "step_size", "A", "B", "C", *given))
    text += f"    walks = Max ({walks})\n"
    # So many chunks that all levels are about equally long, or fewer if a step would exceed a CPU's cache.
    text += f"""
    width_a = Mul (batch, walks)
    width_b = Mul (channels, states)
    width = Mul (width_a, width_b)
    cache = Constant <value = int64[1] {{{CACHED_ELEMENTS}}}> ()
    fitting = Div (cache, width)
    two = Constant <value = int64[1] {{2}}> ()
    length_twice = Mul (length, two)
    length_float = Cast <to = 1> (length_twice)
    root_float = Sqrt (length_float)
    root = Cast <to = 7> (root_float)
    some_chunks = Min (fitting, root)
    at_least_one = Max (some_chunks, one)
    before_chunk = Sub (at_least_one, one)
    rounded_up = Add (length, before_chunk)
    chunk = Div (rounded_up, at_least_one)
    before_step = Sub (chunk, one)
    rounded_up_again = Add (length, before_step)
    chunks = Div (rounded_up_again, chunk)

    zero_scalar = Constant <value = int64 {{0}}> ()
    one_scalar = Constant <value = int64 {{1}}> ()
    num_steps = Mul (chunk, chunks)
    num_steps_scalar = Squeeze (num_steps)
    all_steps = Range (zero_scalar, num_steps_scalar, one_scalar)
    last = Sub (length, one)
    real_steps = Min (all_steps, last)
    chunk_shape = Concat <axis = 0> (chunks, chunk)
    by_chunk = Reshape (real_steps, chunk_shape)
    step = Transpose <perm = [1, 0]> (by_chunk)

    batch_scalar = Squeeze (batch)
    image_numbers = Range (zero_scalar, batch_scalar, one_scalar)
    image_shape = Constant <value = int64[3] {{-1, 1, 1}}> ()
    image = Reshape (image_numbers, image_shape)
    image_start = Mul (image, length)
    walks_scalar = Squeeze (walks)
    walk = Range (zero_scalar, walks_scalar, one_scalar)
    index_shape = Concat <axis = 0> (any, walks, length)
"""
    for name in (n for n in ("order", "source", "gap") if n in given):
        text += f"""
    {name}_by_image = Reshape ({name}, index_shape)
    {name}_of_steps = Gather <axis = 2> ({name}_by_image, step)
    {name}_at = Transpose <perm = [2, 0, 3, 1]> ({name}_of_steps)
"""
    if order is None:
        text += """
    step_axes = Constant <value = int64[2] {1, 3}> ()
    in_memory_at = Unsqueeze (step, step_axes)
"""
    for x, at in (
        ("u", order),
        ("step_size", source),
        ("B", source),
        ("C", source),
    ):
        text += f"""
    {x}_token = Add ({at or "in_memory"}_at, image_start)
    {x}_first = Mul ({x}_token, {x}_walks)
    {x}_walk = Mod (walk, {x}_walks)
    {x}_index = Add ({x}_first, {x}_walk)
    {x}_width = Shape <start = 3, end = 4> ({x})
    {x}_shape = Concat <axis = 0> (any, {x}_width)
    {x}_rows = Reshape ({x}, {x}_shape)
    {x}_at = Gather <axis = 0> ({x}_rows, {x}_index)
"""
    return text


CACHED_ELEMENTS = 1 << 17
"""Most elements of the state of all chunks, images, walks and channels, so that a step fits a CPU's cache."""


def _terms(given: Sequence[str]) -> str:
    """Compute ``driven`` and ``elapsed``, both ``(T, B, S, K, D)``."""
    text = "    driven = Mul (step_size_at, u_at)\n"
    if "gap" not in given:
        return text + "    elapsed = Identity (step_size_at)\n"
    return (
        text
        + """
    gap_float = Cast <to = 1> (gap_at)
    gap_column = Unsqueeze (gap_float, any)
    at_rest = Mul (gap_column, rest)
    elapsed = Add (step_size_at, at_rest)
"""
    )


# One state: decay and drive of all steps are as large as u, so we compute them at once.
_ONE_STATE = """
    A_state = Squeeze (A, any)
    exponent = Mul (elapsed, A_state)
    decay = Exp (exponent)
    drive = Mul (driven, B_at)
    float_zero = Constant <value = float {0.0}> ()
    start_shape = Concat <axis = 0> (batch, chunks, walks, channels)
    start = Expand (float_zero, start_shape)
    end = Scan <num_scan_inputs = 2, body = chunk_ends
        (float[?, ?, ?, ?] h, float[?, ?, ?, ?] decay_t, float[?, ?, ?, ?] drive_t) => (float[?, ?, ?, ?] h_next) {
            h_decayed = Mul (decay_t, h)
            h_next = Add (h_decayed, drive_t)
        }> (start, decay, drive)
    total_exponent = ReduceSum <keepdims = 0> (exponent, zero)
    fade = Exp (total_exponent)
    walk_shape = Concat <axis = 0> (batch, walks, channels)
    walk_start = Expand (float_zero, walk_shape)
    walk_end, entry = Scan <num_scan_inputs = 2, scan_input_axes = [1, 1], scan_output_axes = [1], body = chunk_entries
        (float[?, ?, ?] state, float[?, ?, ?] fade_s, float[?, ?, ?] end_s)
        => (float[?, ?, ?] state_next, float[?, ?, ?] entry_s) {
            entry_s = Identity (state)
            state_decayed = Mul (fade_s, state)
            state_next = Add (state_decayed, end_s)
        }> (walk_start, fade, end)
    last_state, h_all = Scan <num_scan_inputs = 2, body = chunk_steps
        (float[?, ?, ?, ?] g, float[?, ?, ?, ?] decay_u, float[?, ?, ?, ?] drive_u)
        => (float[?, ?, ?, ?] g_next, float[?, ?, ?, ?] g_out) {
            g_decayed = Mul (decay_u, g)
            g_next = Add (g_decayed, drive_u)
            g_out = Identity (g_next)
        }> (entry, decay, drive)
    y_steps = Mul (h_all, C_at)
"""

_STATES = """
    A_states = Transpose <perm = [0, 2, 1]> (A)
    before_last = Constant <value = int64[1] {-2}> ()
    elapsed_row = Unsqueeze (elapsed, before_last)
    driven_row = Unsqueeze (driven, before_last)
    B_column = Unsqueeze (B_at, any)
    C_row = Unsqueeze (C_at, before_last)
    float_zero = Constant <value = float {0.0}> ()
    start_shape = Concat <axis = 0> (batch, chunks, walks, states, channels)
    start = Expand (float_zero, start_shape)
    end = Scan <num_scan_inputs = 3, body = chunk_ends
        (float[?, ?, ?, ?, ?] h, float[?, ?, ?, ?, ?] elapsed_t, float[?, ?, ?, ?, ?] driven_t,
         float[?, ?, ?, ?, ?] B_t)
        => (float[?, ?, ?, ?, ?] h_next) {
            exponent_t = Mul (elapsed_t, A_states)
            decay_t = Exp (exponent_t)
            h_decayed = Mul (decay_t, h)
            drive_t = Mul (B_t, driven_t)
            h_next = Add (h_decayed, drive_t)
        }> (start, elapsed_row, driven_row, B_column)
    total_elapsed = ReduceSum <keepdims = 0> (elapsed_row, zero)
    total_exponent = Mul (total_elapsed, A_states)
    fade = Exp (total_exponent)
    walk_shape = Concat <axis = 0> (batch, walks, states, channels)
    walk_start = Expand (float_zero, walk_shape)
    walk_end, entry = Scan <num_scan_inputs = 2, scan_input_axes = [1, 1], scan_output_axes = [1], body = chunk_entries
        (float[?, ?, ?, ?] state, float[?, ?, ?, ?] fade_s, float[?, ?, ?, ?] end_s)
        => (float[?, ?, ?, ?] state_next, float[?, ?, ?, ?] entry_s) {
            entry_s = Identity (state)
            state_decayed = Mul (fade_s, state)
            state_next = Add (state_decayed, end_s)
        }> (walk_start, fade, end)
    last_state, y_rows = Scan <num_scan_inputs = 4, body = chunk_steps
        (float[?, ?, ?, ?, ?] g, float[?, ?, ?, ?, ?] elapsed_u, float[?, ?, ?, ?, ?] driven_u,
         float[?, ?, ?, ?, ?] B_u, float[?, ?, ?, ?, ?] C_u)
        => (float[?, ?, ?, ?, ?] g_next, float[?, ?, ?, ?, ?] y_u) {
            exponent_u = Mul (elapsed_u, A_states)
            decay_u = Exp (exponent_u)
            g_decayed = Mul (decay_u, g)
            drive_u = Mul (B_u, driven_u)
            g_next = Add (g_decayed, drive_u)
            y_u = MatMul (C_u, g_next)
        }> (entry, elapsed_row, driven_row, B_column, C_row)
    y_steps = Squeeze (y_rows, before_last)
"""


def _outputs(given: Sequence[str]) -> str:
    """Reorder the steps' outputs to ``y``, by token."""
    text = ""
    if "order" in given:
        text += """
    steps_in_order = Range (zero_scalar, length_scalar, one_scalar)
    order_shape = Shape (order_by_image)
    steps_of_walks = Expand (steps_in_order, order_shape)
    step_by_walk = ScatterElements <axis = 2> (steps_of_walks, order_by_image, steps_of_walks)
    step_at_token = Transpose <perm = [0, 2, 1]> (step_by_walk)
"""
    else:
        text += """
    steps_in_order = Range (zero_scalar, length_scalar, one_scalar)
    token_shape = Constant <value = int64[3] {1, -1, 1}> ()
    step_at_token = Reshape (steps_in_order, token_shape)
"""
    y = "y_tokens" if "D" in given else "y"
    text = f"""
    length_scalar = Squeeze (length)
{text}
    chunk_at_token = Div (step_at_token, chunk)
    before_token = Mul (chunk_at_token, chunk)
    within_chunk = Sub (step_at_token, before_token)
    within_batch = Mul (within_chunk, batch)
    of_image = Add (within_batch, image)
    of_chunks = Mul (of_image, chunks)
    of_chunk = Add (of_chunks, chunk_at_token)
    of_walks = Mul (of_chunk, walks)
    y_row = Add (of_walks, walk)
    y_shape = Concat <axis = 0> (any, channels)
    y_all = Reshape (y_steps, y_shape)
    {y} = Gather <axis = 0> (y_all, y_row)
"""
    if "D" in given:
        text += """
    y_skip = Mul (u, D)
    y = Add (y_tokens, y_skip)
"""
    return text
