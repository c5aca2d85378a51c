"""Translate operators that PyTorch's ONNX exporter lacks: mmvssm's, and a few of PyTorch's.

The exporter traces each function: it passes the symbolic inputs of a node, and the function records ONNX operators.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Callable, Optional

import onnx.defs
import torch
from onnxscript import FLOAT, INT64, values
from onnxscript import opset18 as op

from . import detection_ops  # noqa: F401  (operators that are translated here)
from .functions import PASTE_MASKS, SPARSE_CONV
from .scan_function import DOMAIN, DOMAIN_VERSION, INPUTS, NAME, OPTIONAL

_OPSET = values.Opset(DOMAIN, DOMAIN_VERSION)
_Parameter = onnx.defs.OpSchema.FormalParameter
_INTEGERS = ("order", "source", "gap", "neighbors", "height", "width")
_Option = onnx.defs.OpSchema.FormalParameterOption


def _operator(
    name: str,
    inputs: Sequence[str],
    optional: Sequence[str] = (),
    attributes: Sequence[str] = (),
    output: str = "tensor(float)",
) -> values.Op:
    """Describe an operator of mmvssm's domain with one output to the exporter."""
    types = {x: "tensor(int64)" if x in _INTEGERS else "tensor(float)" for x in inputs}
    schema = onnx.defs.OpSchema(
        name,
        DOMAIN,
        DOMAIN_VERSION,
        inputs=[
            _Parameter(
                x,
                types[x],
                param_option=_Option.Optional if x in optional else _Option.Single,
            )
            for x in inputs
        ],
        outputs=[_Parameter("y", output)],
        attributes=[
            onnx.defs.OpSchema.Attribute(x, onnx.defs.OpSchema.AttrType.INT, required=True)
            for x in attributes
        ],
    )
    return values.Op(_OPSET, name, schema)


_SCAN = _operator(NAME, INPUTS, OPTIONAL, ("delta_softplus",))
_CONV = _operator(SPARSE_CONV, ("x", "weight", "neighbors", "bias"), ("bias",))
_PASTE = _operator(
    PASTE_MASKS,
    ("masks", "boxes", "height", "width", "threshold"),
    output="tensor(bool)",
)


def _selective_scan(
    u: FLOAT,
    delta: FLOAT,
    A: FLOAT,
    B: FLOAT,
    C: FLOAT,
    D: Optional[FLOAT] = None,
    delta_bias: Optional[FLOAT] = None,
    order: Optional[INT64] = None,
    source: Optional[INT64] = None,
    gap: Optional[INT64] = None,
    rest: Optional[FLOAT] = None,
    delta_softplus: bool = True,
    sum_walks: bool = False,
):
    indices = (
        None if x is None else op.Cast(x, to=onnx.TensorProto.INT64) for x in (order, source, gap)
    )
    y = _SCAN(u, delta, A, B, C, D, delta_bias, *indices, rest, delta_softplus=int(delta_softplus))
    if sum_walks:
        y = op.ReduceSum(y, [2], keepdims=0)
    return y, op.Constant(value_float=0.0)  # in place of the states, which only backward uses


def _sparse_depthwise_conv(x: FLOAT, weight: FLOAT, neighbors: INT64, bias: Optional[FLOAT] = None):
    return _CONV(x, weight, op.Cast(neighbors, to=onnx.TensorProto.INT64), bias)


def _stable_sort(
    self: FLOAT, stable: Optional[bool] = None, dim: int = -1, descending: bool = False
):
    """Sort by TopK, which is stable: it puts the lower index first among equal values."""
    size = op.Reshape(op.Gather(op.Shape(self), op.Constant(value_int=dim)), [1])
    return op.TopK(self, size, axis=dim, largest=int(descending), sorted=1)


def _index_copy(self: FLOAT, dim: int, index: INT64, source: FLOAT):
    if dim != 0:
        raise NotImplementedError("index_copy is supported along the first dimension only")
    return op.ScatterND(self, op.Unsqueeze(index, [-1]), source)


def _adaptive_avg_pool2d(self: FLOAT, output_size: Sequence[int]):
    """Multiply by a matrix for the rows and one for the columns, since the map may have any size."""
    height, width = (int(x) for x in output_size)
    rows = _pooling_matrix(op.Shape(self, start=2, end=3), height)
    columns = _pooling_matrix(op.Shape(self, start=3, end=4), width)
    return op.MatMul(op.MatMul(rows, self), op.Transpose(columns, perm=[1, 0]))


def _pooling_matrix(size, count: int):
    """Build ``(count, size)``: bin ``i`` averages ``floor(i * size / count)`` to ``ceil((i + 1) * size / count)``."""
    counts = op.Constant(value_ints=[count])
    bins = op.Constant(value_ints=list(range(count)))
    first = op.Div(op.Mul(bins, size), counts)
    after = op.Add(op.Mul(op.Add(bins, [1]), size), op.Constant(value_ints=[count - 1]))
    end = op.Div(after, counts)
    zero, one = op.Constant(value_int=0), op.Constant(value_int=1)
    places = op.Range(zero, op.Squeeze(size), one)
    begun = op.GreaterOrEqual(places, op.Unsqueeze(first, [1]))
    ended = op.GreaterOrEqual(places, op.Unsqueeze(end, [1]))
    inside = op.Cast(op.And(begun, op.Not(ended)), to=onnx.TensorProto.FLOAT)
    sizes = op.Cast(op.Sub(end, first), to=onnx.TensorProto.FLOAT)
    return op.Div(inside, op.Unsqueeze(sizes, [1]))


def _highest(scores: FLOAT, most: int):
    size = op.Min(op.Shape(scores), op.Constant(value_ints=[most]))
    return op.TopK(scores, size, axis=0, largest=1, sorted=1)


def _grouped_nms(
    boxes: FLOAT, scores: FLOAT, iou_threshold: float, score_threshold: float, most: int
):
    """Pass groups as ONNX's batch of images, with one class each."""
    kept = op.NonMaxSuppression(
        boxes,
        op.Unsqueeze(scores, [1]),
        op.Constant(value_ints=[most]),
        op.Constant(value_floats=[iou_threshold]),
        op.Constant(value_floats=[score_threshold]),
    )
    return op.Gather(kept, op.Constant(value_ints=[0, 2]), axis=1)


def _pyramid_roi_align(
    maps: Sequence[FLOAT],
    boxes: FLOAT,
    levels: INT64,
    scales: Sequence[float],
    size: Sequence[int],
    sampling_ratio: int,
    aligned: bool,
):
    """Run RoiAlign on each level for its own boxes and scatter the results to their places."""
    indices, found = [], []
    for i, (x, scale) in enumerate(zip(maps, scales)):
        index = op.Squeeze(op.NonZero(op.Equal(levels, op.Constant(value_int=i))), [0])
        images = op.Sub(index, index)
        indices.append(index)
        found.append(
            op.RoiAlign(
                x,
                op.Gather(boxes, index, axis=0),
                images,
                coordinate_transformation_mode="half_pixel" if aligned else "output_half_pixel",
                mode="avg",
                output_height=size[0],
                output_width=size[1],
                sampling_ratio=sampling_ratio,
                spatial_scale=scale,
            )
        )
    index, found = op.Concat(*indices, axis=0), op.Concat(*found, axis=0)
    # Each box belongs to one level, so the number of boxes stays.
    return op.ScatterND(found, op.Unsqueeze(index, [-1]), found)


def _paste_masks(masks: FLOAT, boxes: FLOAT, height: INT64, width: INT64, threshold: float):
    height, width = (op.Reshape(x, [1]) for x in (height, width))
    return _PASTE(masks, boxes, height, width, op.Constant(value_float=threshold))


TRANSLATIONS: dict[Callable, Callable] = {
    torch.ops.mmvssm.selective_scan.default: _selective_scan,
    torch.ops.mmvssm.sparse_depthwise_conv.default: _sparse_depthwise_conv,
    torch.ops.mmvssm.highest.default: _highest,
    torch.ops.mmvssm.grouped_nms.default: _grouped_nms,
    torch.ops.mmvssm.pyramid_roi_align.default: _pyramid_roi_align,
    torch.ops.mmvssm.paste_masks.default: _paste_masks,
    torch.ops.aten.sort.stable: _stable_sort,
    torch.ops.aten.index_copy.default: _index_copy,
    torch.ops.aten._adaptive_avg_pool2d.default: _adaptive_avg_pool2d,
}
"""For ``torch.onnx.export(custom_translation_table=...)``."""
