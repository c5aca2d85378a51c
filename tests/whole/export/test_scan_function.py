"""The scan as an ONNX function, against the operator's definition."""

import itertools

import numpy as np
import pytest
import torch

pytest.importorskip("onnxruntime")
pytest.importorskip("onnx")

import onnx
import onnxruntime
import scan_cases

from mmvssm.export.scan_function import DOMAIN, INPUTS, NAME, OPTIONAL, scan_function
from mmvssm.ops.selective_scan.naive import selective_scan_naive
from support.onnx_models import model_of, session

# Sums over walks are ReduceSum after the function, as tests of whole models show.
CASES = [c for c in scan_cases.CASES if c.dtype == torch.float32 and not c.sum_walks]
CASES += [
    scan_cases.Case(2, 1, 4, 3, 1),
    scan_cases.Case(1, 600, 2, 2, 3),
    scan_cases.Case(2, 300, 4, 4, 1, walk="order"),
    # So many states that there is one chunk, and few enough for several.
    scan_cases.Case(1, 33, 4, 512, 65, walk="source"),
    scan_cases.Case(1, 33, 1, 512, 64, walk="images"),
]
WALK_AXIS = dict(u=2, delta=2, A=0, B=2, C=2, D=0, delta_bias=0, rest=0)


def run(inputs, softplus, opset=18):
    given = {name: x.numpy() for name, x in inputs.items() if x is not None}
    given = {name: x.astype(np.int64) if x.dtype == np.int32 else x for name, x in given.items()}
    optional = [name for name in OPTIONAL if name in given]
    function = scan_function(optional, inputs["A"].shape[-1] == 1, softplus, opset)
    model = model_of(function, INPUTS, given, opset, delta_softplus=int(softplus))
    onnx.checker.check_model(model, full_check=True)
    (y,) = session(model).run(None, given)
    return torch.from_numpy(y)


def check(inputs, softplus=True, opset=18):
    """Against the definition in float64."""
    expected = selective_scan_naive(
        **{
            k: x.double() if x is not None and x.is_floating_point() else x
            for k, x in inputs.items()
        },
        delta_softplus=softplus,
    )
    actual = run(inputs, softplus, opset)
    assert actual.shape == expected.shape and actual.isfinite().all()
    error = (actual - expected).abs().max() / expected.abs().max()
    assert error < scan_cases.TOLERANCE[torch.float32], f"relative error {error:.1e}"


def inputs_of(case):
    inputs = scan_cases.make_inputs(case)
    del inputs["grad_y"]
    return inputs


@pytest.mark.parametrize("case", CASES, ids=str)
def test_equals_the_definition(case):
    check(inputs_of(case), case.softplus)


@pytest.mark.parametrize("states", [1, 3])
@pytest.mark.parametrize("opset", [18, 21, 26])
def test_opsets(opset, states):
    try:
        check(inputs_of(scan_cases.Case(2, 70, 2, 3, states)), opset=opset)
    except onnxruntime.capi.onnxruntime_pybind11_state.Fail as error:
        if "official support for domain ai.onnx is till opset" not in str(error):
            raise
        pytest.skip(f"onnxruntime {onnxruntime.__version__} does not know opset {opset}")


@pytest.mark.parametrize("states", [1, 3])
@pytest.mark.parametrize("given", list(itertools.product([False, True], repeat=5)))
def test_every_optional_input_left_out(given, states):
    inputs = inputs_of(scan_cases.Case(2, 20, 2, 3, states))
    for name, there in zip(("D", "delta_bias", "order", "source", "gap"), given):
        if not there:
            inputs[name] = None
    if inputs["gap"] is None:
        inputs["rest"] = None
    check(inputs)


@pytest.mark.parametrize("states", [1, 3])
@pytest.mark.parametrize("shared", [[name] for name in WALK_AXIS] + [list(WALK_AXIS)], ids="-".join)
def test_walks_share_what_has_size_one_along_them(shared, states):
    """The node takes them as they are; the definition takes them expanded."""
    inputs = inputs_of(scan_cases.Case(2, 40, 4, 3, states))
    narrow = {name: inputs[name].narrow(WALK_AXIS[name], 0, 1) for name in shared}
    wide = inputs | {name: x.expand_as(inputs[name]) for name, x in narrow.items()}
    expected = selective_scan_naive(**wide)
    torch.testing.assert_close(run(inputs | narrow, True), expected, rtol=1e-4, atol=1e-5)


def test_no_tensor_of_tokens_channels_and_states():
    inputs = inputs_of(scan_cases.Case(1, 2000, 1, 8, 64, walk="order"))
    given = {k: x.numpy() for k, x in inputs.items() if x is not None}
    given["order"] = given["order"].astype(np.int64)
    function = scan_function(["D", "delta_bias", "order"], False, True, 18)
    sizes = largest_tensors(function, given)
    assert max(sizes.values()) < 2000 * 8 * 64 / 2, sizes


def largest_tensors(function, given):
    """Elements of every tensor that a function's body makes outside its loops."""
    names = [name for node in function.node for name in node.output if name]
    graph = onnx.helper.make_graph(
        function.node,
        "body",
        [
            onnx.helper.make_tensor_value_info(
                name, onnx.helper.np_dtype_to_tensor_dtype(x.dtype), x.shape
            )
            for name, x in given.items()
        ],
        [onnx.ValueInfoProto(name=name) for name in names],
    )
    model = onnx.helper.make_model(graph, opset_imports=function.opset_import, ir_version=10)
    outputs = session(model).run(None, given)
    return {name: x.size for name, x in zip(names, outputs)}


def test_one_node():
    inputs = inputs_of(scan_cases.Case(1, 20, 2, 3, 1))
    given = {k: x.numpy() for k, x in inputs.items() if x is not None}
    function = scan_function([n for n in OPTIONAL if n in given], True, True, 18)
    model = model_of(function, INPUTS, given, 18, delta_softplus=1)
    assert [(node.domain, node.op_type) for node in model.graph.node] == [(DOMAIN, NAME)]


def test_gap_without_rest_is_refused():
    with pytest.raises(ValueError, match="gap needs rest"):
        scan_function(["gap"], True, True, 18)
