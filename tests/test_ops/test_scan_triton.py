"""The Triton kernels: right in Triton's interpreter, compiled for GPUs that are not there, and right on one that is."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mmvssm.ops import Traversal, backend, selective_scan
from mmvssm.ops.selective_scan import triton_launch
from support.scan_cases import CASES, GRADIENTS, Case, check, make_inputs

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
@pytest.mark.slow
def test_kernels_in_the_interpreter():
    command = [sys.executable, "-m", "pytest", "-x", "tests/test_ops/interpreted_scan_triton.py"]
    done = subprocess.run(
        [*command, "-p", "no:cacheprovider"],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr


# ----------------------------------------------------------------------------------- compiled, not run

CHUNKED = dict(STEPS=triton_launch._STEPS, GROUPS=64 // triton_launch._STEPS, LANES=32)
KERNELS = {
    "chunk_ends": CHUNKED,
    "chunk_adjoint_ends": CHUNKED,
    "hand_over": dict(STEPS=triton_launch._STEPS, GROUPS=triton_launch._MAX_GROUPS, COLUMNS=8),
    "chunk_outputs": CHUNKED,
    "chunk_gradients": CHUNKED,
}
INDICES = {"order", "source", "gap"}
ACTIVATIONS = {"u", "delta", "B", "C", "y", "dy", "du", "ddelta", "dB", "dC"}
FLOAT32 = {"A", "D", "delta_bias", "rest", "states", "adjoints", "ends", "times", "entries"}
FLOAT32 |= {"dA", "dD", "ddelta_bias", "drest"}


@needs_triton
@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="triton interprets")
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize(("states", "dtype"), [(1, "bf16"), (16, "fp32")])
@pytest.mark.parametrize("kernel", KERNELS)
def test_compiles_without_spills(
    kernel, states, dtype, capability, tmp_path, record_property, monkeypatch
):
    triton = pytest.importorskip("triton", minversion="3.3")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from mmvssm.ops.selective_scan import triton_kernels

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    function = getattr(triton_kernels, kernel)
    constants = dict(KERNELS[kernel], N=states, SOFTPLUS=True, BACKWARDS=True)
    constants = {name: x for name, x in constants.items() if name in function.arg_names}

    def kind(name):
        if name in constants:
            return "constexpr"
        if name in INDICES:
            return "*i32"
        if name in ACTIVATIONS:
            return f"*{dtype}"
        return "*fp32" if name in FLOAT32 else "i32"

    signature = {name: kind(name) for name in function.arg_names}
    aligned = {
        (i,): [["tt.divisibility", 16]] for i, x in enumerate(signature.values()) if x[0] == "*"
    }
    threads = constants["GROUPS"] * constants.get("LANES", constants.get("COLUMNS"))
    compiled = triton.compile(
        ASTSource(function, signature, constants, aligned),
        target=GPUTarget("cuda", capability, 32),
        options=dict(num_warps=threads // 32, enable_fp_fusion=True),
    )
    registers, stack = _resources(triton, compiled.asm["cubin"], tmp_path)
    record_property("registers", registers)
    print(f"{kernel}, {states} states, {dtype}, sm_{capability}: {registers} registers")
    assert stack == 0, "registers were spilled"
    assert registers * threads <= 65536, "no multiprocessor could hold a program"


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
