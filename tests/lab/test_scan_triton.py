"""The scan's Triton kernels in Triton's interpreter, compiled for absent GPUs, and on a GPU."""

import functools
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from scan_cases import CASES, GRADIENTS, Case, check, make_inputs

from mmvssm.ops import Traversal, backend, selective_scan
from mmvssm.ops.selective_scan import cpu, pytorch, triton_launch
from mmvssm.ops.selective_scan.inputs import ScanInputs
from mmvssm.ops.triton_launcher import recorded_launches

REPOSITORY = Path(__file__).parents[2]
needs_triton = pytest.mark.skipif(not backend.triton_available(), reason="triton is not installed")
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")


def test_mmvssm_imports_where_triton_does_not():
    without_triton = (
        "import sys\n"
        "sys.modules['triton'] = None  # makes importing it an ImportError\n"
        "import mmvssm\n"
        "from mmvssm.ops import backend\n"
        "assert not backend.triton_available()"
    )
    subprocess.run([sys.executable, "-c", without_triton], check=True, cwd=REPOSITORY)


@needs_triton
def test_without_a_compiler_it_says_so_once_and_falls_back(monkeypatch, tmp_path):
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(backend.shutil, "which", lambda name: None)
    on_gpu = type("OnGpu", (), dict(is_cuda=True, device=torch.device("cuda")))
    choose = functools.partial(backend.choose, on_gpu, gpu=triton_launch, cpu=cpu, fallback=pytorch)
    backend.triton_works.cache_clear()
    try:
        with pytest.warns(RuntimeWarning, match="no C compiler") as said:
            assert choose() is pytorch
            assert choose() is pytorch
        assert len(said) == 1
        monkeypatch.undo()
        monkeypatch.setattr(backend.sysconfig, "get_path", lambda *names: "/nowhere")
        monkeypatch.setenv("CC", "cc")
        assert "Python.h" in backend.missing_for_triton()
        (tmp_path / "Python.h").touch()
        monkeypatch.setenv("CPATH", f":{tmp_path}")
        assert not backend.missing_for_triton()
    finally:
        backend.triton_works.cache_clear()


@needs_triton
def test_one_state_takes_two_launches_and_a_plan_that_is_kept():
    """The second call with inputs of the same shapes and strides works out nothing."""
    before = dict(triton_launch._plans)
    first = [
        x for x in launches_of(1, torch.float32) if x.kernel.__name__ in ("run_ends", "outputs")
    ]
    assert [x.kernel.__name__ for x in first] == ["run_ends", "outputs", "run_ends"]
    plans = triton_launch._plans.keys() - before.keys()
    launches_of(1, torch.float32)
    assert triton_launch._plans.keys() - before.keys() == plans


@needs_triton
@pytest.mark.parametrize("images", [1, 16])
def test_partial_sums_of_weights_take_no_more_than_u_of_an_image(images):
    inputs = make_inputs(Case(1, 4, 4, 896, 16, walk="order", optional=False))
    inputs = {k: None if x is None else x.to("meta") for k, x in inputs.items()}
    grad_y = inputs.pop("grad_y")
    big = {k: inputs[k].expand(images, *inputs[k].shape[1:]) for k in ("u", "delta", "B", "C")}
    scan = ScanInputs(**{**inputs, **big})
    plan = triton_launch._plan_backward(scan, grad_y.expand_as(scan.u))
    parts = plan.workspace["parts"]
    assert parts[1] == 1 or math.prod(parts) <= scan.u[0].numel()


@needs_triton
@pytest.mark.slow
@pytest.mark.parametrize("which", ["definition", "not definition"])  # two can run at a time
def test_kernels_in_the_interpreter(which):
    file = "tests/lab/interpreted_scan_triton.py"
    command = [sys.executable, "-m", "pytest", "-x", file, "-k", which]
    done = subprocess.run(
        [*command, "-p", "no:cacheprovider"],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr


# ----------------------------------------------------------------------------------- compiled, not run

# What the models pass, at sizes at which every kernel is launched.
SHAPES = {1: (1, 64000, 4, 16), 3: (1, 5000, 2, 40), 16: (1, 16000, 4, 384)}


def launches_of(states, dtype, gap=False):
    """Record the launches of a forward and a backward pass."""
    batch, length, walks, channels = SHAPES[states]

    def meta(*shape, dtype=torch.float32):
        return torch.empty(shape, dtype=dtype, device="meta")

    order = meta(walks, length, dtype=torch.int32)
    inputs = ScanInputs(
        *(meta(batch, length, walks, channels, dtype=dtype) for _ in range(2)),
        meta(walks, channels, states),
        *(meta(batch, length, walks, states, dtype=dtype) for _ in range(2)),
        *(meta(walks, channels) for _ in range(2)),
        *(order, order if gap else None, order if gap else None),
        meta(walks, channels) if gap else None,
    )
    with recorded_launches() as launches:
        y, saved = triton_launch.forward(inputs)
        triton_launch.backward(y, inputs, saved)
    return launches


KINDS = {torch.bfloat16: "*bf16", torch.float32: "*fp32", torch.int32: "*i32"}


@needs_triton
@pytest.mark.slow
@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="triton interprets")
@pytest.mark.parametrize(
    ("states", "dtype", "gap", "capability"),
    # Without gaps, in both dtypes and for both capabilities: see test_triton_cost.py.
    [
        (1, torch.float32, True, 90),
        (3, torch.bfloat16, True, 90),
        (16, torch.bfloat16, True, 80),
    ],
)
def test_compiles_without_spills(states, dtype, gap, capability, tmp_path, monkeypatch):
    triton = pytest.importorskip("triton", minversion="3.3")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    for launch in launches_of(states, dtype, gap):
        signature, constants, aligned = {}, {}, {}
        for i, parameter in enumerate(launch.kernel.params):
            name, x = parameter.name, launch.arguments[parameter.name]
            if parameter.is_constexpr or x is None:
                signature[name], constants[name] = "constexpr", x
            elif isinstance(x, torch.Tensor):
                signature[name], aligned[(i,)] = KINDS[x.dtype], [["tt.divisibility", 16]]
            else:
                assert parameter.do_not_specialize, f"{name} would be compiled anew for every size"
                signature[name] = "i32"
        compiled = triton.compile(
            ASTSource(launch.kernel, signature, constants, aligned),
            target=GPUTarget("cuda", capability, 32),
            options=launch.options,
        )
        registers, stack = _resources(triton, compiled.asm["cubin"], tmp_path)
        assert stack == 0, f"{launch.kernel.__name__} spills registers"
        assert registers * launch.options["num_warps"] * 32 <= 65536, launch.kernel.__name__


def _resources(triton, cubin: bytes, folder: Path) -> tuple[int, int]:
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


# ------------------------------------------------------------------------------------------- on a GPU


def run_on_gpu(inputs, delta_softplus):
    inputs = {
        name: x.detach().requires_grad_() if x is not None and x.is_floating_point() else x
        for name, x in inputs.items()
    }
    leaves = {name: inputs[name] for name in GRADIENTS if inputs[name] is not None}
    walk = [inputs.pop(name) for name in ("order", "source", "gap")]
    grad_y = inputs.pop("grad_y").detach()
    traversal = None if all(x is None for x in walk) else Traversal(*walk)
    y = selective_scan(**inputs, traversal=traversal, delta_softplus=delta_softplus)
    gradients = torch.autograd.grad(y, list(leaves.values()), grad_y)
    return dict(y=y.detach(), **dict(zip(leaves, gradients)))


@needs_triton
@needs_gpu
@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES, ids=str)
def test_agrees_with_the_definition_on_a_gpu(case):
    check(case, run_on_gpu, device="cuda")


@needs_triton
@needs_gpu
@pytest.mark.gpu
@pytest.mark.parametrize("case", [Case(2, 20000, 4, 16, 1), Case(1, 17000, 2, 40, 16)], ids=str)
def test_two_long_runs_agree_bit_for_bit_and_with_pytorch(case):
    inputs = make_inputs(case)
    on_gpu = {name: x if x is None else x.cuda() for name, x in inputs.items()}
    first, second = (run_on_gpu(dict(on_gpu), True) for _ in range(2))
    expected = run_on_gpu(
        {
            name: x.double() if x is not None and x.is_floating_point() else x
            for name, x in inputs.items()
        },
        True,
    )
    for name, x in first.items():
        assert torch.equal(x, second[name]), name
        error = (x.double().cpu() - expected[name]).abs().max() / expected[name].abs().max()
        assert error < 1e-5, name
