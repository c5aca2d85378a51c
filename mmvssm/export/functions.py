"""Define mmvssm's nodes, except the scan, as functions of ONNX's standard operators."""

from __future__ import annotations

import onnx
import onnx.parser

from .scan_function import DOMAIN

SPARSE_CONV = "SparseDepthwiseConv"
PASTE_MASKS = "PasteMasks"


def sparse_conv_function(with_bias: bool, opset: int) -> onnx.FunctionProto:
    """Build the function for nodes ``(x (B, K, C), weight (C, 1, k, k), neighbors (B, K, k * k), bias (C,))``.

    It computes :func:`mmvssm.ops.sparse_depthwise_conv` tap by tap, so no tensor is larger than the input.

    Args:
        with_bias: Whether the node has its fourth input; a function body cannot test for it.
        opset: Version of the standard operators.
    """
    start = "bias" if with_bias else "float_zero"
    return onnx.parser.parse_function(
        f"""<domain: "{DOMAIN}", overload: "{"bias" if with_bias else "no_bias"}", opset_import: ["" : {opset}]>
{SPARSE_CONV} (x, weight, neighbors, bias) => (y)
{{
    zero = Constant <value = int64[1] {{0}}> ()
    one = Constant <value = int64[1] {{1}}> ()
    any = Constant <value = int64[1] {{-1}}> ()
    zero_scalar = Constant <value = int64 {{0}}> ()
    one_scalar = Constant <value = int64 {{1}}> ()
    float_zero = Constant <value = float {{0.0}}> ()
    batch = Shape <start = 0, end = 1> (x)
    kept = Shape <start = 1, end = 2> (x)
    channels = Shape <start = 2, end = 3> (x)

    # One row of zeros ends each image, for neighbours that are not there.
    zeros_shape = Concat <axis = 0> (batch, one, channels)
    zeros = Expand (float_zero, zeros_shape)
    padded = Concat <axis = 1> (x, zeros)
    rows_shape = Concat <axis = 0> (any, channels)
    rows = Reshape (padded, rows_shape)
    absent = Less (neighbors, zero)
    token = Where (absent, kept, neighbors)
    batch_scalar = Squeeze (batch)
    image = Range (zero_scalar, batch_scalar, one_scalar)
    rows_of_image = Add (kept, one)
    first = Mul (image, rows_of_image)
    image_axes = Constant <value = int64[2] {{1, 2}}> ()
    first_row = Unsqueeze (first, image_axes)
    row = Add (token, first_row)
    row_of_taps = Transpose <perm = [2, 0, 1]> (row)

    taps_shape = Concat <axis = 0> (channels, any)
    weight_by_channel = Reshape (weight, taps_shape)
    weight_by_tap = Transpose <perm = [1, 0]> (weight_by_channel)
    shape = Shape (x)
    start = Expand ({start}, shape)
    y = Scan <num_scan_inputs = 2, body = taps
        (float[?, ?, ?] sum, int64[?, ?] row_t, float[?] weight_t) => (float[?, ?, ?] sum_next) {{
            x_t = Gather <axis = 0> (rows, row_t)
            product = Mul (x_t, weight_t)
            sum_next = Add (sum, product)
        }}> (start, row_of_taps, weight_by_tap)
}}"""
    )


def paste_masks_function(opset: int) -> onnx.FunctionProto:
    """Build the function for nodes ``(masks (n, h, w), boxes (n, 4), height (1,), width (1,), threshold ())``.

    It computes :func:`mmvssm.export.detection_ops.paste_masks`, one mask at a time.

    Args:
        opset: Version of the standard operators.
    """
    return onnx.parser.parse_function(
        f"""<domain: "{DOMAIN}", opset_import: ["" : {opset}]>
{PASTE_MASKS} (masks, boxes, height, width, threshold) => (pasted)
{{
    zero_scalar = Constant <value = int64 {{0}}> ()
    one_scalar = Constant <value = int64 {{1}}> ()
    any = Constant <value = int64[1] {{-1}}> ()
    float_zero = Constant <value = float {{0.0}}> ()
    float_one = Constant <value = float {{1.0}}> ()
    half = Constant <value = float {{0.5}}> ()
    corners = Constant <value = int64[4] {{1, 1, 1, 1}}> ()
    left, top, right, bottom = Split <axis = 1> (boxes, corners)
"""
        + _interpolation("rows", "top", "bottom", "height", axis=1)
        + _interpolation("columns", "left", "right", "width", axis=2)
        + """
    across = Transpose <perm = [0, 2, 1]> (columns)
    count_of_masks = Size (masks)
    some = Greater (count_of_masks, zero_scalar)
    pasted = If (some) <
        then_branch = some_masks () => (bool[?, ?, ?] all_pasted) {
            all_pasted = Scan <num_scan_inputs = 3, body = one_mask
                (float[?, ?] mask, float[?, ?] rows_t, float[?, ?] across_t) => (bool[?, ?] pasted_t) {
                    stretched = MatMul (rows_t, mask)
                    placed = MatMul (stretched, across_t)
                    pasted_t = GreaterOrEqual (placed, threshold)
                }> (masks, rows, across)
        },
        else_branch = no_masks () => (bool[?, ?, ?] none_pasted) {
            nothing = Constant <value = bool {0}> ()
            none = Constant <value = int64[1] {0}> ()
            none_shape = Concat <axis = 0> (none, height, width)
            none_pasted = Expand (nothing, none_shape)
        }>
}"""
    )


def _interpolation(name: str, start: str, end: str, size: str, axis: int) -> str:
    """Write the computation of weights ``(n, size, cells)`` of a mask's cells, bilinear and zero outside."""
    return f"""
    {name}_count = Squeeze ({size})
    {name}_numbers = Range (zero_scalar, {name}_count, one_scalar)
    {name}_corners = Cast <to = 1> ({name}_numbers)
    {name}_pixels = Add ({name}_corners, half)
    {name}_from_start = Sub ({name}_pixels, {start})
    {name}_extent = Sub ({end}, {start})
    {name}_share = Div ({name}_from_start, {name}_extent)
    {name}_cells = Shape <start = {axis}, end = {axis + 1}> (masks)
    {name}_cells_float = Cast <to = 1> ({name}_cells)
    {name}_edge = Mul ({name}_share, {name}_cells_float)
    {name}_flat = Sub ({name}_edge, half)
    {name}_place = Unsqueeze ({name}_flat, any)
    {name}_cell_count = Squeeze ({name}_cells)
    {name}_cell_numbers = Range (zero_scalar, {name}_cell_count, one_scalar)
    {name}_cell = Cast <to = 1> ({name}_cell_numbers)
    {name}_offset = Sub ({name}_place, {name}_cell)
    {name}_distance = Abs ({name}_offset)
    {name}_weight = Sub (float_one, {name}_distance)
    {name} = Relu ({name}_weight)
"""
