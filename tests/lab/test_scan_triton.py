"""The scan's Triton kernels: what is launched, in Triton's interpreter, and on a GPU."""

import functools
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import scan_inputs
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
def test_one_state_takes_two_launches_and_a_plan_that_is_plans():
    """The second call with inputs of the same shapes and strides works out nothing."""

    def launch_both_passes():
        inputs = scan_inputs.make_inputs(scan_inputs.STAGE_1, 1, torch.float32, "meta")
        with recorded_launches() as launches:
            y, states = triton_launch.forward(inputs)
            triton_launch.backward(y, inputs, states)
        return [x.kernel.__name__ for x in launches]

    before = dict(triton_launch._plans)
    scans = [name for name in launch_both_passes() if name in ("run_ends", "outputs")]
    assert scans == ["run_ends", "outputs", "run_ends"]
    plans = triton_launch._plans.keys() - before.keys()
    launch_both_passes()
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


FEW = "definition and (1x65x1x3x2 or 1x66x1x5x16 or 2x70x2x3x1 or 1x77x4x3x1 or 2x21x4x3x1)"


@needs_triton
@pytest.mark.parametrize(
    "which",
    [
        pytest.param(FEW, marks=pytest.mark.slow, id="few"),
        pytest.param("definition", marks=pytest.mark.nightly),  # two, which can run at a time
        pytest.param("not definition", marks=pytest.mark.nightly),
    ],
)
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


# ------------------------------------------------------------------------------------------- on a GPU


def run_on_gpu(inputs, delta_softplus):
    inputs = {
        name: x.detach().requires_grad_()
        if isinstance(x, torch.Tensor) and x.is_floating_point()
        else x
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
