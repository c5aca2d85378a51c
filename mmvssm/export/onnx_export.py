"""Convert a model to ONNX."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import onnx
import onnx_ir as ir
import torch
from torch import nn
from torch.export import Dim

from . import functions, scan_function
from .preparation import UnsupportedModelError
from .scan_function import DOMAIN, DOMAIN_VERSION
from .translations import TRANSLATIONS

LOWEST_OPSET = 18
IR_VERSION = 10
"""The first opset whose functions have overloads."""

_HEIGHT, _WIDTH = 96, 128
"""Size of the exporter's example images; the exported model takes any size."""


def build_onnx(
    graph: nn.Module,
    metadata: Mapping[str, str],
    opset: int = LOWEST_OPSET,
    report: Callable[[str], None] = lambda step: None,
) -> onnx.ModelProto:
    """Export a model for images of any size.

    Args:
        graph: A graph of :mod:`~.segmenter`, :mod:`~.detector` or :mod:`~.classifier`, in evaluation mode.
        metadata: Metadata of the file.
        opset: Version of the standard operators.
        report: Called before each slow step, with its description.

    Raises:
        UnsupportedModelError: If the model has a part that cannot be exported, or the opset is not supported.
    """
    if not LOWEST_OPSET <= opset <= graph.highest_opset:
        raise UnsupportedModelError(
            f"opset {opset} is not supported; choose one from {LOWEST_OPSET} to {graph.highest_opset}"
        )
    names = {2: "height", 3: "width"}
    if graph.any_batch:
        names[0] = "batch"
    images = torch.zeros(2 if graph.any_batch else 1, 3, _HEIGHT, _WIDTH)
    try:
        exported = _export(graph, images, list(names), opset, report)
    except Exception as error:  # a model's code may fail under export in any way
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        raise UnsupportedModelError(
            f"PyTorch's exporter cannot follow what the model does: {reason:.200}"
        ) from error
    model = exported.model
    shape = model.graph.inputs[0].shape
    exported.rename_axes({shape[axis]: name for axis, name in names.items()})
    if not graph.any_batch:
        exported.rename_axes({model.graph.outputs[0].shape[0]: "detections"})
    model.ir_version = max(model.ir_version, IR_VERSION)
    _add_functions(model, opset)
    model.metadata_props.update(metadata)
    proto = ir.to_proto(model)
    for output in proto.graph.output:
        for dim in output.type.tensor_type.shape.dim:
            if dim.dim_param and not dim.dim_param.isidentifier():  # drop unreadable formulas
                dim.ClearField("dim_param")
    return proto


def _export(
    graph: nn.Module,
    images: torch.Tensor,
    dynamic: list[int],
    opset: int,
    report: Callable[[str], None],
) -> torch.onnx.ONNXProgram:
    dims = dict.fromkeys(dynamic, Dim.DYNAMIC)  # the exporter raises if it must fix one
    with torch.no_grad(), _quiet():
        report("trace the model, which takes a minute or more for a detector")
        program = torch.export.export(graph, (images,), dynamic_shapes=(dims,), strict=False)
        report("translate it to ONNX, which takes two to three times as long")
        return torch.onnx.export(
            program,
            input_names=["images"],
            output_names=list(graph.outputs),
            opset_version=opset,
            custom_translation_table=TRANSLATIONS,
            verbose=False,
        )


@contextmanager
def _quiet() -> Iterator[None]:
    """Suppress the exporter's warnings about optional packages, and libraries' warnings about their own code."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def _add_functions(model: ir.Model, opset: int) -> None:
    """Add a function for each kind of node of mmvssm's domain in the model."""
    for node in model.graph.all_nodes():
        if node.domain != DOMAIN:
            continue
        if node.op_type == scan_function.NAME:
            _share_walks(node)
        function = ir.serde.deserialize_function(_function_of(node, opset))
        node.overload = function.overload
        model.functions[function.identifier()] = function
    for x in [x for x in model.graph.initializers.values() if not x.uses()]:
        del model.graph.initializers[x.name]
    model.opset_imports[DOMAIN] = DOMAIN_VERSION
    model.opset_imports[""] = opset


def _function_of(node: ir.Node, opset: int) -> onnx.FunctionProto:
    if node.op_type == functions.PASTE_MASKS:
        return functions.paste_masks_function(opset)
    if node.op_type == functions.SPARSE_CONV:
        with_bias = len(node.inputs) > 3 and node.inputs[3] is not None
        return functions.sparse_conv_function(with_bias, opset)
    named = dict(zip(scan_function.INPUTS, node.inputs))
    given = [name for name in scan_function.OPTIONAL if named.get(name) is not None]
    one_state = named["A"].shape[2] == 1
    delta_softplus = bool(node.attributes["delta_softplus"].as_int())
    return scan_function.scan_function(given, one_state, delta_softplus, opset)


_WALK_AXIS = {"u": 2, "delta": 2, "B": 2, "C": 2, "A": 0, "D": 0, "delta_bias": 0, "rest": 0}


def _share_walks(node: ir.Node) -> None:
    """Undo copies along the walks: connect the node to the tensors before them."""
    for i, (name, x) in enumerate(zip(scan_function.INPUTS, node.inputs)):
        if name not in _WALK_AXIS or x is None:
            continue
        if x.const_value is not None and x.producer() is None:
            once = _once(node.graph, x, _WALK_AXIS[name])
        else:
            once = _before_expand(x, _WALK_AXIS[name])
        node.replace_input_with(i, once)


def _before_expand(x: ir.Value, axis: int) -> ir.Value:
    """Return the tensor that was expanded along an axis to ``x``, or ``x``."""
    copy = x.producer()
    if copy is None or copy.op_type != "Expand":
        return x
    before = copy.inputs[0]
    if before.shape is None or len(before.shape) != len(x.shape):
        return x
    same = all(a == b for j, (a, b) in enumerate(zip(before.shape, x.shape)) if j != axis)
    return before if same and before.shape[axis] == 1 else x


def _once(graph: ir.Graph, x: ir.Value, axis: int) -> ir.Value:
    """Return a constant of size 1 along an axis if ``x`` repeats itself there, or ``x``."""
    array = x.const_value.numpy()
    first = array.take([0], axis)
    if array.shape[axis] == 1 or not (array == first).all():
        return x
    name = f"{x.name}_once"
    if name not in graph.initializers:
        value = ir.Value(
            name=name, shape=ir.Shape(first.shape), type=x.type, const_value=ir.tensor(first)
        )
        graph.register_initializer(value)
    return graph.initializers[name]
