"""The convolution over kept tokens equals scatter, dense convolution, gather: for every backend, and every gradient."""

import importlib
import os
import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sparse_conv_cases import (
    CASES,
    GRADIENTS,
    Case,
    check,
    defined,
    make_inputs,
    random_positions,
    run_backend,
    scatter_convolve_gather,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from mmvssm.analysis.flops import count
from mmvssm.ops import backend as ops_backend
from mmvssm.ops import neighbor_table, sparse_depthwise_conv, triton_launcher
from mmvssm.ops.sparse_depthwise_conv import cpu as sparse_depthwise_conv_cpu
from mmvssm.ops.sparse_depthwise_conv import pytorch as sparse_depthwise_conv_torch
from mmvssm.ops.sparse_depthwise_conv import triton_launch as sparse_depthwise_conv_triton

REPOSITORY = Path(__file__).parents[3]
LIBRARY, REASON = sparse_depthwise_conv_cpu._load()
needs_library = pytest.mark.skipif(LIBRARY is None, reason=f"no compiled kernel: {REASON}")
needs_triton = pytest.mark.skipif(
    not ops_backend.triton_available(), reason="triton is not installed"
)
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")


@pytest.fixture
def instruction_set():
    yield LIBRARY.sparse_depthwise_conv_limit_instruction_set
    LIBRARY.sparse_depthwise_conv_limit_instruction_set(2)


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture
def torch_backend(monkeypatch):
    # By name, since the package exports the function of the same name.
    module = importlib.import_module("mmvssm.ops.sparse_depthwise_conv")
    monkeypatch.setattr(module, "_backend", lambda x: sparse_depthwise_conv_torch)


def run_public(inputs):
    leaves = {
        name: inputs[name].detach().requires_grad_()
        for name in GRADIENTS
        if inputs[name] is not None
    }
    y = sparse_depthwise_conv(
        leaves["x"], leaves["weight"], inputs["neighbors"], leaves.get("bias")
    )
    gradients = torch.autograd.grad(y, list(leaves.values()), inputs["grad_y"])
    return dict(y=y.detach(), **dict(zip(leaves, gradients)))


# ------------------------------------------------------------------------------------ the neighbours


def table_by_search(positions, grid, kernel_size):
    """The definition, place by place."""
    height, width = grid
    reach = range(-(kernel_size // 2), kernel_size // 2 + 1)
    table = []
    for kept in positions.tolist():
        number = {position: i for i, position in enumerate(kept)}
        for position in kept:
            row, column = divmod(position, width)
            table += [
                number[(row + dy) * width + column + dx]
                if 0 <= row + dy < height
                and 0 <= column + dx < width
                and (row + dy) * width + column + dx in number
                else -1
                for dy in reach
                for dx in reach
            ]
    return torch.tensor(table, dtype=torch.int32).view(*positions.shape, kernel_size**2)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("kernel_size", [1, 3, 7])
@pytest.mark.parametrize(
    "batch, grid, kept", [(1, (1, 1), 1), (3, (5, 8), 13), (2, (9, 2), 18), (2, (2, 6), 5)]
)
def test_neighbor_table(batch, grid, kept, kernel_size, dtype):
    positions = random_positions(batch, grid, kept).to(dtype)
    table = neighbor_table(positions, grid, kernel_size)
    assert table.is_contiguous()
    assert table.dtype == torch.int32
    assert torch.equal(table, table_by_search(positions, grid, kernel_size))


@pytest.mark.parametrize("kernel_size", [3, 7])
def test_neighbors_are_symmetric(kernel_size):
    """On which the gradient of x relies."""
    table = neighbor_table(random_positions(2, (6, 9), 30), (6, 9), kernel_size)
    image, i, t = (table >= 0).nonzero(as_tuple=True)
    j = table[image, i, t].long()
    assert torch.equal(table[image, j, kernel_size**2 - 1 - t].long(), i)


@pytest.mark.parametrize("kernel_size", [0, 2, -3])
def test_a_kernel_without_a_centre_is_refused(kernel_size):
    with pytest.raises(ValueError, match="kernel_size must be odd"):
        neighbor_table(torch.zeros(1, 1, dtype=torch.int64), (2, 2), kernel_size)


@pytest.mark.parametrize(
    "positions", [torch.zeros(3, dtype=torch.int64), torch.zeros(1, 3)], ids=["shape", "dtype"]
)
def test_wrong_positions_are_refused(positions):
    with pytest.raises(ValueError, match=r"positions must have shape \(B, K\)"):
        neighbor_table(positions, (2, 2), 3)


# --------------------------------------------------------------------------- the backends, one by one


@pytest.mark.parametrize("case", CASES, ids=str)
def test_public_function(case):
    check(case, run_public)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_pytorch_backend(case, torch_backend):
    check(case, run_public)
    check(case, run_backend(sparse_depthwise_conv_torch))


@needs_library
@pytest.mark.parametrize("limit", [0, 1, 2])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_compiled_backend(case, limit, instruction_set):
    if instruction_set(limit) != limit:
        pytest.skip("this processor has no such instructions")
    check(case, run_backend(sparse_depthwise_conv_cpu))


@needs_triton
@pytest.mark.parametrize(
    "which",
    [
        pytest.param(
            "x33-k3 or expanded or x5-k7-plain-bfloat16", marks=pytest.mark.slow, id="few"
        ),
        pytest.param("", marks=pytest.mark.nightly, id="all"),
    ],
)
def test_triton_kernels_in_the_interpreter(which):
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-x",
        "tests/lab/interpreted_sparse_conv_triton.py",
        *("-k", which),
    ]
    done = subprocess.run(
        [*command, "-p", "no:cacheprovider"],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr


@needs_triton
@needs_gpu
@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES, ids=str)
def test_on_a_gpu(case):
    check(case, run_public, device="cuda")


@settings(max_examples=60, deadline=None)
@given(
    grid=st.tuples(st.integers(1, 12), st.integers(1, 12)),
    batch=st.integers(1, 3),
    share=st.floats(0, 1),
    channels=st.integers(1, 40),
    kernel=st.sampled_from([1, 3, 5, 7]),
    seed=st.integers(0, 2**16),
)
def test_any_grid_and_mask(grid, batch, share, channels, kernel, seed):
    kept = max(1, round(share * grid[0] * grid[1]))
    inputs = make_inputs(Case(batch, grid, kept, channels, kernel, dtype=torch.float64))
    inputs["positions"] = random_positions(batch, grid, kept, seed)
    inputs["neighbors"] = neighbor_table(inputs["positions"], grid, kernel)
    expected = defined(inputs, grid)
    for name, result in run_public(inputs).items():
        torch.testing.assert_close(result, expected[name], rtol=0, atol=1e-10)


# ----------------------------------------------------------------------------------- more on numbers


def test_gradcheck():
    inputs = make_inputs(Case(2, (4, 3), 7, 3, kernel=3, dtype=torch.float64))
    leaves = [inputs[name].requires_grad_() for name in GRADIENTS]

    def conv(x, weight, bias):
        return sparse_depthwise_conv(x, weight, inputs["neighbors"], bias)

    assert torch.autograd.gradcheck(conv, leaves)


@pytest.mark.parametrize("backend", [sparse_depthwise_conv_cpu, sparse_depthwise_conv_torch])
@pytest.mark.parametrize("batch, kept", [(1, 3000), (40, 90)])
def test_two_runs_give_the_same_bits(backend, batch, kept, threads):
    if backend is sparse_depthwise_conv_cpu and LIBRARY is None:
        pytest.skip("no compiled kernel")
    inputs = make_inputs(Case(batch, (50, 80), kept, 40, kernel=3))
    run, runs = run_backend(backend), []
    for number in (2, 2, 1, 3) if backend is sparse_depthwise_conv_cpu else (2, 2):
        threads(number)
        runs.append(run(inputs))
    for other in runs[1:]:
        for name, x in other.items():
            assert torch.equal(x, runs[0][name]), name


def test_gradients_that_nobody_needs_are_not_computed():
    inputs = make_inputs(Case(1, (4, 4), 9, 3, kernel=3))
    called = []

    class Spy(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if func is torch.ops.mmvssm.sparse_depthwise_conv_backward.default:
                called.append([grad.numel() > 0 for grad in out])
            return out

    for wanted in GRADIENTS:
        leaves = {name: inputs[name].detach() for name in GRADIENTS}
        leaves[wanted].requires_grad_()
        y = sparse_depthwise_conv(
            leaves["x"], leaves["weight"], inputs["neighbors"], leaves["bias"]
        )
        with Spy():
            y.backward(inputs["grad_y"])
        torch.testing.assert_close(
            leaves[wanted].grad.double(), defined(inputs, (4, 4))[wanted], rtol=1e-5, atol=1e-5
        )
    assert called == [[True, False, False], [False, True, False], [False, False, True]]


@pytest.mark.parametrize("backend", ["default", "torch"])
def test_narrow_dtypes_accumulate_in_float32(backend, request):
    """Terms so small that a sum in bfloat16 would lose them."""
    if backend == "torch":
        request.getfixturevalue("torch_backend")
    kept, grid = 2401, (49, 49)
    inputs = make_inputs(Case(1, grid, kept, 4, bias=False, dtype=torch.bfloat16))
    inputs["x"].fill_(1)
    inputs["weight"].fill_(1 / 512)
    inputs["weight"][:, :, 0, 0] = 1
    inputs["grad_y"] = torch.ones_like(inputs["x"])
    expected = defined(inputs, grid)
    for name, result in run_public(inputs).items():
        assert ((result.double() - expected[name]) / expected[name]).abs().max() < 2**-8, name


def test_mixed_dtypes():
    inputs = make_inputs(Case(1, (5, 6), 20, 19, kernel=3))
    expected = defined(inputs, (5, 6))["y"]
    x, weight, neighbors, bias = (inputs[k] for k in ("x", "weight", "neighbors", "bias"))
    y = sparse_depthwise_conv(x.double(), weight, neighbors, bias)
    assert y.dtype == torch.float64
    torch.testing.assert_close(y, expected, rtol=0, atol=1e-10)
    narrow = sparse_depthwise_conv(x.bfloat16(), weight, neighbors, bias)
    assert narrow.dtype == torch.bfloat16
    torch.testing.assert_close(narrow.double(), expected, rtol=0, atol=5e-2)


def test_a_pruned_token_s_value_is_never_read():
    """A neighbour that is absent is left out rather than multiplied by zero: NaN stays where it is."""
    positions = torch.tensor([[0, 2, 20]])
    x = torch.tensor([1.0, torch.nan, 3.0])[None, :, None]
    y = sparse_depthwise_conv(x, torch.ones(1, 1, 3, 3), neighbor_table(positions, (5, 5), 3))
    torch.testing.assert_close(y.flatten(), x.flatten(), equal_nan=True)


@needs_library
def test_a_token_without_any_neighbor():
    """No table of neighbor_table has one, for every token is its own neighbour."""
    x, weight = torch.randn(1, 3, 5), torch.randn(5, 1, 3, 3)
    neighbors = torch.full((1, 3, 9), -1, dtype=torch.int32)
    bias = torch.randn(5)
    assert torch.equal(sparse_depthwise_conv(x, weight, neighbors, bias)[0], bias.expand(3, 5))
    grad = sparse_depthwise_conv_cpu.weight_gradient(x, x, neighbors)
    assert torch.equal(grad, torch.zeros(5, 9))


@needs_library
@pytest.mark.parametrize("wrong", [-2, 20, 2**31 - 1, -(2**31)])
def test_index_out_of_range(wrong):
    inputs = make_inputs(Case(2, (5, 6), 20, 5))
    inputs["neighbors"][1, 19, 48] = wrong
    for function in (
        lambda x, w, n: sparse_depthwise_conv(x, w, n),
        lambda x, w, n: sparse_depthwise_conv_cpu.weight_gradient(x, x, n),
    ):
        with pytest.raises(IndexError, match="neighbors is not a token"):
            function(inputs["x"], inputs["weight"], inputs["neighbors"])


def test_nothing_of_size_tokens_times_taps_times_channels(torch_backend):
    case = Case(1, (10, 10), 60, 64)
    inputs, largest = make_inputs(case), 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            for x in out if isinstance(out, (tuple, list)) else [out]:
                if isinstance(x, torch.Tensor):
                    largest = max(largest, x.numel())
            return out

    with Watch():
        run_public(inputs)
    assert largest <= 61 * 64


# ---------------------------------------------------------------------------- the operator in PyTorch


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("backend", ["default", "torch"])
def test_opcheck(backend, dtype, bias, request):
    if backend == "torch":
        request.getfixturevalue("torch_backend")
    inputs = make_inputs(Case(2, (4, 3), 7, 3, kernel=3, layout="sliced", bias=bias, dtype=dtype))
    x, weight = inputs["x"].clone().requires_grad_(), inputs["weight"].requires_grad_()
    bias = inputs["bias"].requires_grad_() if bias else None
    torch.library.opcheck(
        torch.ops.mmvssm.sparse_depthwise_conv.default, (x, weight, inputs["neighbors"], bias)
    )
    tensors = (inputs["grad_y"], x, weight, inputs["neighbors"], bias)
    torch.library.opcheck(
        torch.ops.mmvssm.sparse_depthwise_conv_backward.default,
        (*(None if t is None else t.detach() for t in tensors), True, True, bias is not None),
    )


def test_compile_and_export():
    inputs = make_inputs(Case(2, (4, 5), 11, 6, kernel=3))

    def model(x, positions):
        neighbors = neighbor_table(positions, (4, 5), 3)
        return sparse_depthwise_conv(x, inputs["weight"], neighbors, inputs["bias"]).square()

    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    x, positions = inputs["x"].requires_grad_(), inputs["positions"]
    torch.testing.assert_close(compiled(x, positions), model(x, positions))
    (actual,) = torch.autograd.grad(compiled(x, positions).sum(), x)
    (expected,) = torch.autograd.grad(model(x, positions).sum(), x)
    torch.testing.assert_close(actual, expected)

    class Module(torch.nn.Module):
        def forward(self, x, positions):
            return model(x, positions)

    arguments = (x.detach(), positions)
    exported = torch.export.export(Module(), arguments)
    torch.testing.assert_close(exported.module()(*arguments), model(*arguments))


def test_autocast():
    inputs = make_inputs(Case(1, (5, 6), 20, 19))
    weight = inputs["weight"].requires_grad_()
    x = inputs["x"].requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = sparse_depthwise_conv(x, weight, inputs["neighbors"], inputs["bias"])
    assert y.dtype == torch.bfloat16
    expected = sparse_depthwise_conv(
        x.bfloat16(), weight.bfloat16(), inputs["neighbors"], inputs["bias"]
    )
    assert torch.equal(y, expected)
    y.sum().backward()
    assert x.grad.dtype == weight.grad.dtype == torch.float32


def test_flops():
    batch, kept, channels, kernel = 2, 9, 5, 3
    inputs = make_inputs(Case(batch, (4, 4), kept, channels, kernel))
    x, weight = inputs["x"].requires_grad_(), inputs["weight"].requires_grad_()
    multiply_adds = batch * kept * kernel**2 * channels
    with FlopCounterMode(display=False) as counter:
        y = sparse_depthwise_conv(x, weight, inputs["neighbors"], inputs["bias"])
    assert counter.get_total_flops() == 2 * multiply_adds
    with FlopCounterMode(display=False) as counter:
        y.sum().backward()
    assert counter.get_total_flops() == 4 * multiply_adds
    y = sparse_depthwise_conv(x.detach(), weight, inputs["neighbors"])
    with FlopCounterMode(display=False) as counter:
        y.sum().backward()
    assert counter.get_total_flops() == 2 * multiply_adds


def test_flops_with_nothing_pruned_are_the_dense_convolution_s():
    inputs = make_inputs(Case(2, (4, 5), 20, 3))
    with FlopCounterMode(display=False) as sparse:
        sparse_depthwise_conv(inputs["x"], inputs["weight"], inputs["neighbors"])
    with FlopCounterMode(display=False) as dense:
        scatter_convolve_gather(
            inputs["x"], inputs["weight"], None, inputs["positions"], grid=(4, 5)
        )
    assert sparse.get_total_flops() == dense.get_total_flops()


def test_counted_as_the_papers_count():
    """A multiply-add once, and not as part of the scan."""
    inputs = make_inputs(Case(2, (4, 5), 11, 3))

    class Conv(torch.nn.Module):
        def forward(self):
            return sparse_depthwise_conv(inputs["x"], inputs["weight"], inputs["neighbors"])

    model = Conv()
    assert count(model, model)["total"] == (0, 2 * 11 * 3 * 49, 0)


@pytest.mark.parametrize(
    "change, words",
    [
        (dict(x=torch.zeros(2, 3)), r"x must have shape \(B, K, C\)"),
        (dict(x=torch.zeros(2, 0, 3)), "each at least 1"),
        (dict(x=torch.zeros(2, 6, 3, dtype=torch.int64)), "x must be floating point"),
        (dict(weight=torch.zeros(3, 3, 3)), r"weight must have shape \(C, 1, h, w\)"),
        (dict(weight=torch.zeros(4, 1, 3, 3)), r"= \(3, 1, h, w\), .* got \(4, 1, 3, 3\)"),
        (dict(weight=torch.zeros(3, 1, 3, 5)), r"neighbors must have shape .* \(2, 6, 15\)"),
        (dict(weight=torch.zeros(3, 1, 2, 3)), "h and w odd"),
        (dict(weight=torch.zeros(3, 1, 3, 3, dtype=torch.int64)), "weight must be floating point"),
        (dict(weight=torch.zeros(3, 1, 3, 3, device="meta")), "weight must be on the device of x"),
        (dict(neighbors=torch.zeros(2, 6, 49, dtype=torch.int32)), r"\(2, 6, 9\)"),
        (dict(neighbors=torch.zeros(2, 6, 9, dtype=torch.int64)), "neighbors must be int32"),
        (dict(bias=torch.zeros(4)), r"bias must have shape \(C,\) = \(3,\)"),
    ],
)
def test_wrong_input_is_named(change, words):
    inputs = make_inputs(Case(2, (4, 3), 6, 3, kernel=3))
    inputs = {name: inputs[name] for name in ("x", "weight", "neighbors", "bias")} | change
    with pytest.raises(ValueError, match=words) as error:
        sparse_depthwise_conv(**inputs)
    assert "\n" not in str(error.value)


# ------------------------------------------------------------------------- without the compiled kernel


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """The module as if the library belonged into an empty folder."""
    monkeypatch.setattr(ops_backend, "_LIBRARY", tmp_path / "_kernels.so")
    for cached in (sparse_depthwise_conv_cpu._load, ops_backend.warn_no_library):
        cached.cache_clear()
    yield tmp_path
    monkeypatch.undo()
    for cached in (sparse_depthwise_conv_cpu._load, ops_backend.warn_no_library):
        cached.cache_clear()


def test_missing_library_warns_once_and_pytorch_takes_over(elsewhere):
    case = Case(2, (5, 4), 11, 5)
    with pytest.warns(RuntimeWarning, match=r"were not built.*many times slower.*reinstall"):
        check(case, run_public)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check(case, run_public)


@needs_library
def test_library_of_another_version_is_not_used(elsewhere, monkeypatch):
    monkeypatch.undo()
    monkeypatch.setattr(sparse_depthwise_conv_cpu, "_INTERFACE_VERSION", -1)
    with pytest.warns(RuntimeWarning, match="built from another version"):
        assert not sparse_depthwise_conv_cpu.available()


# ------------------------------------------------------------------------------- compiled, not run


@needs_triton
@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="triton interprets")
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kernel", ["convolve", "weight_gradient"])
def test_triton_kernels_compile_without_spills(kernel, dtype, capability, tmp_path, monkeypatch):
    triton = pytest.importorskip("triton", minversion="3.6")
    from offline import compile_launch

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    x = torch.empty(2, 3200, 384, dtype=dtype, device="meta")
    neighbors = torch.empty(2, 3200, 49, dtype=torch.int32, device="meta")
    with triton_launcher.recorded_launches() as launches:
        if kernel == "convolve":
            weight = torch.empty(384, 1, 7, 7, device="meta")
            sparse_depthwise_conv_triton.convolve(x, weight, neighbors, None, reverse=True)
        else:
            sparse_depthwise_conv_triton.weight_gradient(x, x, neighbors)
    (launch,) = launches
    assert launch.kernel.__name__ == kernel
    compiled = compile_launch(launch, capability)
    registers, stack = resources(triton, compiled.asm["cubin"], tmp_path)
    print(f"{kernel}, {dtype}, sm_{capability}: {registers} registers")
    assert stack == 0, "registers were spilled"
    assert registers <= 128, "fewer than four warps in each quarter of a multiprocessor"


@needs_triton
@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="triton interprets")
@pytest.mark.parametrize(
    "case",
    [
        Case(1, (5, 7), 20, 5),
        Case(3, (9, 6), 31, 130, kernel=3),
        pytest.param(Case(1, (24, 32), 601, 20), marks=pytest.mark.slow),
        pytest.param(Case(2, (11, 12), 90, 5, kernel=9), marks=pytest.mark.slow),
        pytest.param(
            Case(2, (7, 5), 21, 33, layout="sliced", dtype=torch.bfloat16), marks=pytest.mark.slow
        ),
    ],
    ids=str,
)
def test_triton_kernels_emulated(case):
    """Their compiled code, executed: see ``ptx_emulator.py``."""
    pytest.importorskip("triton", minversion="3.6")
    from emulated_gpu import emulated_gpu

    with emulated_gpu(90) as launches:
        check(case, run_backend(sparse_depthwise_conv_triton))
    assert [launch.kernel.__name__ for launch in launches] == [
        "weight_gradient",
        "convolve",
        "convolve",
    ]


@needs_triton
@pytest.mark.parametrize("kernel, reads", [(1, 1), (3, 1), (7, 7)])
def test_weight_gradient_reads_the_gradient_once_for_each_row_of_taps(kernel, reads):
    inputs = make_inputs(Case(2, (7, 9), 40, 33, kernel=kernel))
    with triton_launcher.recorded_launches() as launches:
        sparse_depthwise_conv_triton.weight_gradient(
            inputs["grad_y"], inputs["x"], inputs["neighbors"]
        )
    (launch,) = launches
    assert launch.grid[2] == reads


def resources(triton, cubin, folder):
    """Registers per thread and bytes of stack, which is where registers are spilled."""
    cuobjdump = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    if not cuobjdump.exists():
        pytest.skip("triton came without cuobjdump")
    (folder / "kernel.cubin").write_bytes(cubin)
    report = subprocess.run(
        [cuobjdump, "-res-usage", folder / "kernel.cubin"], capture_output=True, text=True
    ).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", report)
    assert found, report
    return int(found[1]), int(found[2])
