"""ONNX models of one node, and running models."""

import onnx
import onnxruntime
from onnx import helper

from mmvssm.export.scan_function import DOMAIN, DOMAIN_VERSION


def model_of(function, inputs, given, opset, **attributes):
    """A model of one node that a function stands for.

    Args:
        function: The function.
        inputs: The names of all the node's inputs in their order.
        given: The arrays that are there, by name; nothing is fixed of their sizes.
        opset: The version of the standard operators.
        attributes: The node's.
    """
    names = [name if name in given else "" for name in inputs]
    node = helper.make_node(function.name, names, ["y"], domain=DOMAIN, **attributes)
    node.overload = function.overload
    infos = [
        helper.make_tensor_value_info(
            name, helper.np_dtype_to_tensor_dtype(given[name].dtype), [None] * given[name].ndim
        )
        for name in names
        if name
    ]
    output = helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [None] * 4)
    graph = helper.make_graph([node], "test", infos, [output])
    opsets = [helper.make_opsetid("", opset), helper.make_opsetid(DOMAIN, DOMAIN_VERSION)]
    return helper.make_model(graph, functions=[function], opset_imports=opsets, ir_version=10)


def session(model, library=None, optimized=None):
    """Load a model, given as such or as a file's path, on one thread.

    Args:
        model: The model.
        library: Operators that are to be used.
        optimized: Where onnxruntime is to write what it makes of the model.
    """
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    if library:
        options.register_custom_ops_library(library)
    if optimized:
        options.log_severity_level = 3  # it warns that this file is for this machine alone
        options.optimized_model_filepath = str(optimized)
    model = model if isinstance(model, str) else model.SerializeToString()
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
