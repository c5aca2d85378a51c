"""The selective scan as an operator of onnxruntime, against the definition."""

import ctypes
import os
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from scan_cases import CASES, Case, make_inputs

from mmvssm.ops import backend, onnxruntime_library
from mmvssm.ops.selective_scan import cpu
from mmvssm.ops.selective_scan.inputs import ScanInputs
from mmvssm.ops.selective_scan.naive import selective_scan_naive

try:
    LIBRARY, REASON = onnxruntime_library(), ""
except RuntimeError as error:
    LIBRARY, REASON = None, str(error)
needs_library = pytest.mark.skipif(LIBRARY is None, reason=REASON or "loaded")

NAMES = ("u", "delta", "A", "B", "C", "D", "delta_bias", "order", "source", "gap", "rest")
INDICES = ("order", "source", "gap")
WALK_DIM = dict(u=2, delta=2, A=0, B=2, C=2, D=0, delta_bias=0, rest=0)


@pytest.fixture(scope="module")
def onnx():
    return pytest.importorskip("onnx", reason="onnx is not installed")


@pytest.fixture(scope="module")
def onnxruntime():
    if LIBRARY is None:
        pytest.skip(REASON)
    return pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")


@pytest.fixture(scope="module")
def make_model(onnx):
    """A model, as bytes, that is one node with the inputs named, of any shapes."""

    def make(names, attributes=None, functions=(), overload="", ir_version=8, **types):
        helper, Type = onnx.helper, onnx.TensorProto
        node_inputs = [name if name in names else "" for name in NAMES]
        while not node_inputs[-1]:  # missing at the end
            node_inputs.pop()
        node = helper.make_node(
            "SelectiveScan", node_inputs, ["y"], domain="mmvssm", overload=overload
        )
        attributes = {"delta_softplus": 1} if attributes is None else attributes
        node.attribute.extend(helper.make_attribute(*item) for item in attributes.items())
        type_of = {name: Type.INT64 if name in INDICES else Type.FLOAT for name in NAMES} | types
        value = helper.make_tensor_value_info
        graph = helper.make_graph(
            [node],
            "scan",
            [value(name, type_of[name], None) for name in NAMES if name in names],
            [value("y", Type.FLOAT, None)],
        )
        opsets = [helper.make_opsetid("", 18), helper.make_opsetid("mmvssm", 1)]
        # IR version 8 and opset 18 are what onnxruntime 1.17 knows.
        return helper.make_model(
            graph, opset_imports=opsets, ir_version=ir_version, functions=list(functions)
        ).SerializeToString()

    return make


@pytest.fixture(scope="module")
def make_session(onnxruntime, make_model):
    def make(names, threads=1, library=LIBRARY, **model):
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4  # errors are raised too
        options.intra_op_num_threads = threads
        if library:
            options.register_custom_ops_library(library)
        return onnxruntime.InferenceSession(
            make_model(names, **model), options, providers=["CPUExecutionProvider"]
        )

    return make


@pytest.fixture(scope="module")
def scan(make_session):
    """The operator as a function of tensors by name."""

    def run(inputs, threads=1, softplus=True):
        feeds = feeds_of(inputs)
        session = make_session(feeds, threads, attributes={"delta_softplus": int(softplus)})
        return torch.from_numpy(session.run(["y"], feeds)[0])

    return run


def feeds_of(inputs):
    feeds = {name: x for name, x in inputs.items() if x is not None and name in NAMES}
    return {
        name: (x.long() if name in INDICES else x.float()).contiguous().numpy()
        for name, x in feeds.items()
    }


def definition(inputs, softplus=True):
    """In float64, with what the walks share repeated for each."""
    inputs = {name: x for name, x in inputs.items() if name in NAMES and x is not None}
    walks = max(x.shape[WALK_DIM.get(name, -2)] for name, x in inputs.items())
    wide = {}
    for name, x in inputs.items():
        if name in WALK_DIM and x.shape[WALK_DIM[name]] == 1:
            x = x.repeat_interleave(walks, WALK_DIM[name])
        wide[name] = x.double() if x.is_floating_point() else x
    return selective_scan_naive(**wide, delta_softplus=softplus)


def assert_close(actual, expected):
    assert actual.shape == expected.shape
    assert actual.dtype == torch.float32
    error = (actual.double() - expected).abs().max() / expected.abs().max()
    assert error < 1e-5, f"relative error {error:.1e}"


def sharing(case, *names):
    """Inputs of a case in which the walks share those named."""
    inputs = make_inputs(case)
    for name in names:
        if inputs[name] is not None:
            inputs[name] = inputs[name].narrow(WALK_DIM[name], 0, 1)
    return inputs


# ------------------------------------------------------------------------------------------------------------
# The same as the definition
# ------------------------------------------------------------------------------------------------------------

CASES = [
    *(case for case in CASES if case.dtype == torch.float32 and case.layout == "plain"),
    Case(1, 1, 4, 7, 16),
    Case(2, 65, 3, 19, 8),
    Case(1, 300, 4, 48, 16, walk="order"),
    Case(1, 66, 1, 5, 20),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_equals_the_definition(scan, case):
    inputs = make_inputs(case)
    assert_close(scan(inputs, softplus=case.softplus), definition(inputs, case.softplus))


@pytest.mark.parametrize("name", WALK_DIM)
@pytest.mark.parametrize("states", [1, 16])
def test_walks_may_share_any_input(scan, name, states):
    inputs = sharing(Case(2, 70, 3, 5, states), name)
    assert_close(scan(inputs), definition(inputs))


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("kept", ["", "source", "gap", "order"])
@pytest.mark.parametrize("channels", [5, 87])
def test_walks_that_share_all_but_their_order(scan, batch, kept, channels):
    # Where there is no source or all walks have the same, exp(step A) is computed once for all of them.
    inputs = sharing(
        Case(batch, 130, 4, channels, 16), "u", "delta", "C", "A", "D", "delta_bias", "rest"
    )
    if kept != "source":
        inputs["source"] = inputs["source"][:1].expand(4, 130)
    if kept != "gap":
        inputs["gap"] = None
    if kept == "order":
        inputs["source"] = None
    assert_close(scan(inputs), definition(inputs))


def test_what_walks_share_is_computed_once(scan):
    # exp(step A) exp(gap rest A) is rounded otherwise than exp((step + gap rest) A), so that bits tell them apart.
    channels = 16 * os.cpu_count()  # fewer are divided by walks, so as to give all processors work
    shared = ("u", "delta", "C", "A", "D", "delta_bias", "rest")
    inputs = sharing(Case(1, 70, 4, channels, 16), *shared)
    inputs["source"] = inputs["source"][:1].expand(4, 70)
    kernel = {name: inputs[name] for name in NAMES}
    for name in shared:
        size = list(kernel[name].shape)
        size[WALK_DIM[name]] = 4
        kernel[name] = kernel[name].expand(size)
    together, _ = cpu.forward(ScanInputs(**kernel))
    assert cpu.runs_walks_together(ScanInputs(**kernel))
    assert torch.equal(scan(inputs), together)
    apart = scan(kernel)
    assert_close(apart, together.double())
    assert not torch.equal(apart, together)


def test_walks_that_share_everything(scan):
    every = sharing(Case(1, 70, 2, 5, 3, walk=None), *WALK_DIM)
    assert scan(every).shape == (1, 70, 1, 5)
    every["order"] = make_inputs(Case(1, 70, 4, 5, 3, walk="order"))["order"]
    assert_close(scan(every), definition(every))


# ------------------------------------------------------------------------------------------------------------
# Threads
# ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "case",
    [Case(1, 2000, 4, 64, 1), Case(1, 2000, 1, 200, 16), Case(1, 5000, 1, 3, 2)],
    ids=str,
)
def test_any_number_of_threads_gives_the_same_bits(scan, case):
    inputs = make_inputs(case)
    one = scan(inputs, threads=1)
    for threads in (2, 3, 8):
        assert torch.equal(scan(inputs, threads=threads), one)


def test_sessions_at_once(make_session):
    cases = [Case(1, 1000, 4, 33, 1), Case(2, 700, 2, 20, 16)]
    runs = []
    for case in cases:
        inputs = make_inputs(case)
        feeds = feeds_of(inputs)
        session = make_session(feeds, threads=2)
        runs.append((session, feeds, session.run(["y"], feeds)[0]))
        assert_close(torch.from_numpy(runs[-1][2]), definition(inputs))
    equal = []

    def repeat(session, feeds, expected):
        equal.extend(np.array_equal(session.run(["y"], feeds)[0], expected) for _ in range(20))

    # Each session also by two threads: its nodes keep nothing from one run to the next.
    threads = [threading.Thread(target=repeat, args=run) for run in runs * 2]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert equal == [True] * 80


ALONE = """
import os, sys
import numpy, onnxruntime
library, model, threads = sys.argv[1:]
options = onnxruntime.SessionOptions()
options.intra_op_num_threads = int(threads)
options.register_custom_ops_library(library)
session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
ones = lambda *shape: numpy.ones(shape, numpy.float32)
u = ones(1, 4096, 4, 64)
before = len(os.listdir("/proc/self/task"))
(y,) = session.run(["y"], dict(u=u, delta=u, A=-ones(4, 64, 1), B=u[..., :1], C=u[..., :1]))
assert y.shape == u.shape and "torch" not in sys.modules and "mmvssm" not in sys.modules
print(len(os.listdir("/proc/self/task")) - before)
"""


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="threads are counted in /proc")
@pytest.mark.parametrize("threads", [1, 2])
def test_the_library_alone_runs_on_the_session_s_threads(
    onnxruntime, make_model, tmp_path, threads
):
    model = tmp_path / "scan.onnx"
    model.write_bytes(make_model(NAMES[:5]))
    command = [sys.executable, "-c", ALONE, LIBRARY, model, str(threads)]
    environment = {"OMP_NUM_THREADS": "8", "PYTHONPATH": ":".join(sys.path)}
    started = subprocess.check_output(command, env=environment, text=True)
    assert int(started) == 0


# ------------------------------------------------------------------------------------------------------------
# Files that run without the operator too
# ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("overload", ["", "one_of_many"])
def test_the_operator_takes_the_place_of_a_function(onnx, onnxruntime, make_session, overload):
    if overload and tuple(map(int, onnxruntime.__version__.split(".")[:2])) < (1, 18):
        pytest.skip("onnxruntime before 1.18 knows no overloads of functions")
    # The function is another one than the operator, so as to see which of them runs.
    helper = onnx.helper
    function = helper.make_function(
        "mmvssm",
        "SelectiveScan",
        list(NAMES),
        ["y"],
        [helper.make_node("Neg", ["u"], ["y"])],
        [helper.make_opsetid("", 18)],
        ["delta_softplus"],
        overload=overload,
    )
    inputs = make_inputs(Case(1, 70, 2, 5, 2))
    feeds = feeds_of(inputs)
    model = dict(functions=[function], overload=overload, ir_version=10 if overload else 8)
    (portable,) = make_session(feeds, library=None, **model).run(["y"], feeds)
    assert np.array_equal(portable, -feeds["u"])
    (native,) = make_session(feeds, **model).run(["y"], feeds)
    assert_close(torch.from_numpy(native), definition(inputs))


def test_other_functions_of_the_domain_stay_what_they_are(onnx, onnxruntime):
    # As the files of pruned models have them.
    helper, value = onnx.helper, onnx.helper.make_tensor_value_info
    function = helper.make_function(
        "mmvssm",
        "Another",
        ["u"],
        ["y"],
        [helper.make_node("Neg", ["u"], ["y"])],
        [helper.make_opsetid("", 18)],
    )
    names = NAMES[:5]
    scan = helper.make_node("SelectiveScan", names, ["v"], domain="mmvssm", delta_softplus=1)
    graph = helper.make_graph(
        [scan, helper.make_node("Another", ["v"], ["y"], domain="mmvssm")],
        "both",
        [value(name, onnx.TensorProto.FLOAT, None) for name in names],
        [value("y", onnx.TensorProto.FLOAT, None)],
    )
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid("mmvssm", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=8, functions=[function])
    options = onnxruntime.SessionOptions()
    options.register_custom_ops_library(LIBRARY)
    session = onnxruntime.InferenceSession(model.SerializeToString(), options)
    inputs = {name: make_inputs(Case(1, 70, 2, 5, 2))[name] for name in names}
    y = torch.from_numpy(session.run(["y"], feeds_of(inputs))[0])
    assert_close(-y, definition(inputs))


# ------------------------------------------------------------------------------------------------------------
# What is refused
# ------------------------------------------------------------------------------------------------------------


def shortened(name, dim):
    def change(inputs):
        inputs[name] = inputs[name].narrow(dim, 0, inputs[name].shape[dim] - 1)

    return change


def without_dim(name):
    def change(inputs):
        inputs[name] = inputs[name].select(0, 0)

    return change


def empty(*names):
    def change(inputs):
        for name in names:
            inputs[name] = inputs[name][:0]

    return change


def with_index(name, at, value):
    def change(inputs):
        inputs[name] = inputs[name].long()
        inputs[name][at] = value

    return change


def without_rest(inputs):
    inputs["rest"] = None


WRONG = {
    "u without batch": (without_dim("u"), r"u must have shape \(B, L, K, D\)"),
    "A without walks": (without_dim("A"), r"A must have shape \(K, D, N\)"),
    "nothing in delta": (empty("delta"), r"delta must have shape \("),
    "nothing in D": (empty("D"), r"D must have shape \("),
    "no image": (empty("u", "delta", "B", "C"), "every dimension must be at least 1"),
    **{
        f"{name} too short in {dim}": (shortened(name, dim), rf"{name} must have shape \(")
        for name, dims in [
            ("delta", (0, 1, 2, 3)),
            ("B", (0, 1, 2, 3)),
            ("C", (0, 1, 2, 3)),
            ("D", (0, 1)),
            ("delta_bias", (0, 1)),
            ("rest", (0, 1)),
            ("order", (0, 1, 2)),
            ("source", (0, 1)),
            ("gap", (0, 1, 2)),
        ]
        for dim in dims
    },
    "A too short in 0": (shortened("A", 0), r"A must have shape \("),
    "A too short in 1": (shortened("A", 1), r"A must have shape \("),
    "A too short in 2": (shortened("A", 2), r"B must have shape \("),
    **{
        f"{name} without dimension": (without_dim(name), rf"{name} must have shape \(")
        for name in ("delta", "B", "C", "D", "delta_bias", "source", "rest")
    },
    "order below": (with_index("order", (1, 2, 69), -1), r"index in order .* lie in \[0, 70\)"),
    "order above": (with_index("order", (0, 0, 0), 70), r"index in order .* lie in \[0, 70\)"),
    "source below": (with_index("source", (2, 69), -(2**40)), "index in source"),
    # Its low 32 bits are a token's.
    "source above": (with_index("source", (0, 5), 2**32 + 3), "index in source"),
    "gap": (with_index("gap", (1, 2, 69), 2**31), "gap does not fit in 32 bits"),
    "gap without rest": (without_rest, "gap needs rest"),
}


@pytest.mark.parametrize("change, message", WRONG.values(), ids=WRONG)
def test_wrong_input_is_one_sentence(scan, change, message):
    inputs = make_inputs(Case(2, 70, 3, 5, 4))
    change(inputs)
    with pytest.raises(Exception, match=f"SelectiveScan: .*{message}") as caught:
        scan(inputs)
    assert str(caught.value).split("SelectiveScan: ")[-1].count(". ") == 0


def test_an_order_that_leaves_a_token_out_is_refused(scan):
    inputs = make_inputs(Case(2, 70, 3, 5, 4))
    order = inputs["order"]
    order[1, 2, 3] = order[1, 2, 4]
    with pytest.raises(Exception, match="SelectiveScan: order must visit every token exactly once"):
        scan(inputs)
    # What is only read may be read twice.
    inputs |= dict(order=inputs["source"], source=order)
    assert_close(scan(inputs), definition(inputs))


@pytest.mark.parametrize(
    "attributes", [{}, {"delta_softplus": 2}, {"delta_softplus": "yes"}], ids=str
)
def test_a_wrong_attribute_is_refused_when_the_model_is_loaded(make_session, attributes):
    with pytest.raises(Exception, match="SelectiveScan: the attribute delta_softplus must"):
        make_session(NAMES, attributes=attributes)


@pytest.mark.parametrize("name, kind", [("u", "DOUBLE"), ("D", "FLOAT16"), ("order", "INT32")])
def test_other_types_are_refused_when_the_model_is_loaded(onnx, make_session, name, kind):
    with pytest.raises(
        Exception, match=rf"Type .*\({dict(FLOAT16='float16').get(kind, kind.lower())}\)"
    ):
        make_session(NAMES, **{name: getattr(onnx.TensorProto, kind)})


@needs_library
def test_an_onnxruntime_that_is_too_old_is_one_sentence():
    said = []

    @ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_int, ctypes.c_char_p)
    def create_status(code, message):
        said.append(message.decode())
        return 1

    @ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_uint32)
    def get_api(version):
        return ctypes.addressof(table) if version <= 16 else None

    @ctypes.CFUNCTYPE(ctypes.c_void_p)
    def get_version():
        return ctypes.addressof(version)

    # An entry beyond the first would be none of this table's.
    table = (ctypes.c_void_p * 1)(ctypes.cast(create_status, ctypes.c_void_p).value)
    version = ctypes.create_string_buffer(b"1.16.3")
    base = (ctypes.c_void_p * 2)(
        ctypes.cast(get_api, ctypes.c_void_p).value, ctypes.cast(get_version, ctypes.c_void_p).value
    )
    register = ctypes.CDLL(LIBRARY).RegisterCustomOps
    register.restype = ctypes.c_void_p
    assert register(None, base) == 1
    assert said == [
        "SelectiveScan: onnxruntime is too old, it must be 1.17 or later; this one is 1.16.3."
    ]


def test_without_the_library_a_one_line_error(tmp_path, monkeypatch):
    library = tmp_path / "_kernels.so"
    monkeypatch.setattr(backend, "_LIBRARY", library)
    with pytest.raises(
        RuntimeError, match=r"were not built.*reinstall mmvssm.*without the operator\.$"
    ):
        onnxruntime_library()
    library.write_bytes(b"for another machine")
    with pytest.raises(RuntimeError, match=r"kernels, but they cannot be loaded"):
        onnxruntime_library()


@needs_library
def test_a_library_of_an_earlier_version_is_said_to_be_one(tmp_path, monkeypatch):
    # Any library that has no operators.
    monkeypatch.setattr(backend, "_LIBRARY", Path(torch._C.__file__))
    with pytest.raises(
        RuntimeError, match="kernels, but they were built from another version of mmvssm"
    ):
        onnxruntime_library()
