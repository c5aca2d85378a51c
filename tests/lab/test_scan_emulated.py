"""The scan's Triton kernels, compiled for absent GPUs and executed in NumPy: see ``ptx_emulator.py``.

Unlike in Triton's interpreter, what runs is the compilers' work, and accesses outside tensors and races are errors.
"""

import os

import pytest
import torch

pytest.importorskip("triton", minversion="3.6")

import offline
import triton_cost
from emulated_gpu import emulated_gpu
from scan_cases import GRADIENTS, Case, check, make_inputs

from mmvssm.ops.selective_scan import triton_launch
from mmvssm.ops.selective_scan.inputs import ScanInputs

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="triton interprets"
)

# Odd channels, a different walk for each image, gaps and sources, unless a case says otherwise.
CASES = [
    # Compiled as for the models, with the capability. Without gaps: see test_triton_cost.py.
    (Case(2, 72, 2, 13, 1), 90),
    (Case(1, 72, 1, 35, 3, dtype=torch.bfloat16), 90),
    (Case(1, 72, 2, 35, 16, dtype=torch.bfloat16), 80),
]
MORE_CASES = [
    Case(2, 70, 2, 5, 1),
    Case(1, 1, 1, 3, 1),
    Case(1, 1, 1, 1, 16),
    Case(1, 66, 1, 5, 3),
    Case(1, 66, 2, 13, 16),
    # Several tiles and blocks of channels.
    Case(1, 600, 1, 1, 1),
    Case(1, 66, 2, 87, 1),
    Case(1, 130, 1, 3, 16, dtype=torch.float64),
    # What may be left out, how tokens lie in memory, and what they are stored in.
    Case(2, 70, 2, 3, 1, walk=None, optional=False),
    Case(2, 70, 2, 3, 2, walk=None, optional=False, softplus=False),
    Case(2, 100, 2, 5, 16, walk="order", dtype=torch.bfloat16),
    Case(2, 70, 2, 3, 1, walk="source", layout="sliced"),
    Case(2, 100, 2, 5, 1, walk="gap", optional=False, dtype=torch.float64),
    Case(2, 98, 2, 33, 1, walk="grid", dtype=torch.bfloat16),
    Case(2, 66, 4, 3, 16, layout="expanded"),
    Case(2, 100, 2, 5, 2, layout="channels_first", dtype=torch.float16),
    Case(1, 200, 1, 5, 1, extreme=True),
    Case(1, 200, 1, 5, 16, extreme=True),
    Case(1, 200, 1, 5, 2, dtype=torch.bfloat16, extreme=True),
]


@pytest.fixture
def fewer_steps(monkeypatch):
    """Threads load 4 steps at a time in place of 8: the time that Triton's compiler takes grows with their square."""
    monkeypatch.setattr(triton_launch, "_STEPS", 4)
    monkeypatch.setattr(triton_launch, "_GRADIENT_LANES", 2)  # still a tile of one warp
    monkeypatch.setattr(triton_launch, "_plans", {})


def run_on(capability, launches=None):
    """Passes that are emulated. What they launch is added to ``launches``."""

    def run(inputs, delta_softplus):
        grad_y = inputs.pop("grad_y")
        inputs = ScanInputs(**inputs, delta_softplus=delta_softplus)
        with emulated_gpu(capability) as launched:
            y, states = triton_launch.forward(inputs)
            assert launched
            gradients = triton_launch.backward(inputs.grad_of_each_walk(grad_y), inputs, states)
        if launches is not None:
            launches.extend(launched)
        return dict(y=y, **dict(zip(GRADIENTS, gradients)))

    return run


@pytest.mark.parametrize(
    "case, capability",
    [
        pytest.param(*case, marks=pytest.mark.nightly if i else pytest.mark.slow)
        for i, case in enumerate(CASES)
    ],
    ids=str,
)
def test_agrees_with_the_definition_without_spills(case, capability):
    launches = []
    check(case, run_on(capability, launches))
    for launch in launches:
        name, warps = launch.kernel.__name__, launch.options["num_warps"]
        cubin = offline.compile_launch(launch, capability).asm["cubin"]
        registers, stack = triton_cost.resources(triton_cost.disassemble(cubin))
        assert stack == 0, f"{name} spills registers"
        assert registers * warps * 32 <= 65536, name


@pytest.mark.nightly
@pytest.mark.parametrize("case", MORE_CASES, ids=str)
def test_agrees_with_the_definition_in_more_cases(case, fewer_steps):
    check(case, run_on(90))


@pytest.mark.nightly
def test_single_pass_agrees_with_the_definition_as_it_is_launched(monkeypatch):
    """What takes longest to compile, and test_triton_cost.py compiles, too: in the case of its shape."""
    monkeypatch.setattr(triton_launch, "SINGLE_PASS", True)
    check(Case(1, 800, 2, 16, 1, walk="order"), run_on(90))


@pytest.mark.nightly
@pytest.mark.parametrize(
    "case",
    [
        Case(2, 300, 2, 13, 1),
        Case(1, 1, 1, 3, 1),
        Case(1, 2000, 1, 5, 1),
        Case(1, 600, 1, 35, 1, dtype=torch.bfloat16),
        Case(1, 600, 1, 5, 1, extreme=True),
    ],
    ids=str,
)
def test_single_pass_agrees_with_the_definition(case, fewer_steps, monkeypatch):
    """Its programs wait for each other; here they run in their order."""
    monkeypatch.setattr(triton_launch, "SINGLE_PASS", True)
    monkeypatch.setattr(triton_launch, "_TILE_STEPS", 8)
    monkeypatch.setattr(triton_launch, "_BLOCK", 4)
    check(case, run_on(90))


@pytest.mark.nightly
@pytest.mark.parametrize("case", [Case(1, 520, 1, 5, 1), Case(1, 515, 2, 7, 1)], ids=str)
def test_single_pass_of_many_blocks_agrees_with_the_definition(case, fewer_steps, monkeypatch):
    """Blocks of two tiles, more than one look back takes; tiles of 16 steps, which do not decay to nothing."""
    monkeypatch.setattr(triton_launch, "SINGLE_PASS", True)
    monkeypatch.setattr(triton_launch, "_TILE_STEPS", 2)
    monkeypatch.setattr(triton_launch, "_TILE_THREADS", 64)
    monkeypatch.setattr(triton_launch, "_BLOCK", 2)
    check(case, run_on(90))


@pytest.mark.nightly
def test_agrees_with_the_definition_on_older_gpus(fewer_steps):
    check(Case(2, 70, 2, 5, 1), run_on(80))


@pytest.mark.nightly
def test_two_runs_agree_bit_for_bit(fewer_steps):
    first, second = (run_on(90)(make_inputs(Case(1, 65, 1, 33, 1)), True) for _ in range(2))
    for name, x in first.items():
        assert torch.equal(x, second[name]), name
