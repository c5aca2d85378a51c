"""The Triton kernels in Triton's interpreter, on the CPU; only ``test_scan_triton.py`` collects this file.

The interpreter has to be chosen, by TRITON_INTERPRET=1, before triton is first imported, and then holds for the whole
process: hence a process of its own.
"""

import importlib

import numpy as np
import pytest
import torch
from scan_cases import CASES, GRADIENTS, Case, _defined, check, make_inputs
from triton.runtime import interpreter

from mmvssm.ops.selective_scan import pytorch, triton_launch
from mmvssm.ops.selective_scan.inputs import ScanInputs
from support.masked_scan import compare as compare_with_masked
from support.triton_interpreter import patch_languages_once


@pytest.fixture(autouse=True)
def _quicker_interpreter(monkeypatch):
    patch_languages_once(monkeypatch)


@pytest.fixture(autouse=True)
def _scan_whole_slices(monkeypatch):
    """Triton's interpreter applies a scan's operator to one element after the other; slices give the same, sooner."""

    def generic_scan(self, inputs):
        columns = [np.moveaxis(x.handle.data, self.axis, 0) for x in inputs]
        totals = [[column[0]] for column in columns]
        for t in range(1, len(columns[0])):
            earlier = [self.to_tensor(total[-1], x.dtype) for total, x in zip(totals, inputs)]
            now = [self.to_tensor(column[t], x.dtype) for column, x in zip(columns, inputs)]
            for total, x in zip(totals, self.combine_fn.fn(*earlier, *now)):
                total.append(x.handle.data)
        return [
            self.to_tensor(np.moveaxis(np.stack(total), 0, self.axis), x.dtype)
            for total, x in zip(totals, inputs)
        ]

    if hasattr(interpreter, "ScanOps"):
        monkeypatch.setattr(interpreter.ScanOps, "generic_scan", generic_scan)


@pytest.fixture(autouse=True)
def _prepare_afresh(monkeypatch):
    """Larger tiles, for the interpreter takes time per operation; and nothing kept from other sizes of tiles."""
    monkeypatch.setattr(triton_launch, "_GRADIENT_LANES", 16)
    monkeypatch.setattr(triton_launch, "_plans", {})


def run(inputs, delta_softplus):
    grad_y = inputs.pop("grad_y")
    inputs = ScanInputs(**inputs, delta_softplus=delta_softplus)
    y, states = triton_launch.forward(inputs)
    gradients = triton_launch.backward(inputs.grad_of_each_walk(grad_y), inputs, states)
    return dict(y=y, **dict(zip(GRADIENTS, gradients)))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_agrees_with_the_definition(case):
    check(case, run)


def test_saves_the_states_that_the_contract_asks_for():
    inputs = make_inputs(Case(2, 130, 2, 3, 2, dtype=torch.float64))
    del inputs["grad_y"]
    _, states = triton_launch.forward(ScanInputs(**inputs))
    _, expected = pytorch.forward(ScanInputs(**inputs))
    torch.testing.assert_close(states, expected)


def test_hands_over_in_rounds(monkeypatch):
    """With one group of chunks a round, 600 steps take two rounds."""
    monkeypatch.setattr(triton_launch, "_GROUPS", 1)
    check(Case(1, 600, 1, 1, 2, walk="order"), run)


@pytest.mark.parametrize("length", [520, 523])
def test_spans_of_one_state(length, monkeypatch):
    """Programs of 32 threads: many spans, composed in two rounds; with whole batches of steps, and without."""
    monkeypatch.setattr(triton_launch, "_THREADS", 32)
    check(Case(1, length, 1, 7, 1), run)
    (forward,) = (x for x in triton_launch._plans.values() if "y_l" in x.launches[-1].values)
    assert [x.kernel.__name__ for x in forward.launches] == ["run_ends", "outputs"]
    assert forward.launches[-1].values["spans"] > 4 * forward.launches[-1].values["GROUPS"]


@pytest.mark.parametrize("length, block", [(264, 4), (259, 3), (30, 16)])
def test_single_pass(length, block, monkeypatch):
    """Programs of 8 threads: many blocks of tiles, and more of both than one look back takes; and less than a block."""
    monkeypatch.setattr(triton_launch, "SINGLE_PASS", True)
    monkeypatch.setattr(triton_launch, "_TILE_THREADS", 8)
    monkeypatch.setattr(triton_launch, "_TILE_STEPS", 4)
    monkeypatch.setattr(triton_launch, "_BLOCK", block)
    monkeypatch.setattr(triton_launch, "_plans", {})
    check(Case(1, length, 1, 7, 1), run)
    (launch,) = next(iter(triton_launch._plans.values())).launches
    tiles, fold = (launch.values[name] for name in ("tiles", "FOLD"))
    assert tiles < block if block == 16 else tiles // block > fold


@pytest.mark.parametrize("wanted", [1, 4])
def test_one_span_or_several_of_more_states(wanted, monkeypatch):
    monkeypatch.setattr(triton_launch, "_WARPS_WANTED", wanted)
    check(Case(1, 230, 1, 3, 3), run)


def test_walks_that_decay_alike(monkeypatch):
    """If everything that decays depend on has stride 0 along the walks, a program takes two walks."""
    inputs = make_inputs(Case(1, 66, 4, 3, 2, walk="order", layout="expanded"))
    inputs["source"] = inputs["order"][:1].expand(4, -1)
    for name in ("A", "D", "delta_bias"):
        inputs[name] = inputs[name][:1].expand(4, *inputs[name].shape[1:])
    expected = _defined(inputs, True)
    for name, x in run(dict(inputs), True).items():
        if name in expected:
            torch.testing.assert_close(x.double(), expected[name], rtol=1e-5, atol=1e-5)
    launches = [x for plan in triton_launch._plans.values() for x in plan.launches]
    assert any(x.values.get("WALKS") == 2 for x in launches)


@pytest.mark.parametrize("states, length", [(17, 66), (64, 9)])
def test_more_states_than_a_thread_holds(states, length):
    check(Case(1, length, 1, 3, states), run)


def test_absent_arguments_have_empty_gradients():
    inputs = make_inputs(Case(1, 3, 1, 1, 1, walk=None, optional=False))
    results = run(inputs, True)
    for name in ("D", "delta_bias", "rest"):
        assert results[name].shape == (0,)


def test_rest_without_gaps_has_a_zero_gradient():
    inputs = make_inputs(Case(1, 70, 1, 2, 1))
    inputs["gap"] = None
    assert torch.equal(run(inputs, True)["rest"], torch.zeros(1, 2))


def test_two_runs_agree_bit_for_bit():
    first, second = (run(make_inputs(Case(1, 65, 1, 33, 1)), True) for _ in range(2))
    for name, x in first.items():
        assert torch.equal(x, second[name]), name


@pytest.mark.parametrize(
    "grid, batch, dtype", [((1, 7), 2, torch.float64), ((6, 12), 1, torch.float32)]
)
def test_pruned_walks_equal_the_masked_dense_scan(grid, batch, dtype, monkeypatch):
    module = importlib.import_module("mmvssm.ops.selective_scan")
    monkeypatch.setattr(module, "_backend", lambda u: triton_launch)
    compare_with_masked(module.selective_scan, grid, batch, keep=0.4, dtype=dtype)


def test_passes_opcheck(monkeypatch):
    """With these kernels behind the public operator: strides, dtypes, aliasing and fake tensors are as declared."""
    # The package's attribute of that name is the function.
    module = importlib.import_module("mmvssm.ops.selective_scan")
    monkeypatch.setattr(module, "_backend", lambda u: triton_launch)
    inputs = make_inputs(Case(1, 3, 1, 33, 1))
    grad_y = inputs.pop("grad_y")
    names = ("u", "delta", "A", "B", "C", "D", "delta_bias", "order", "source", "gap", "rest")
    arguments = [
        inputs[name].requires_grad_() if inputs[name].is_floating_point() else inputs[name]
        for name in names
    ]
    torch.library.opcheck(torch.ops.mmvssm.selective_scan.default, (*arguments, True))
    arguments = [x.detach() for x in arguments]  # differentiable once
    _, states = torch.ops.mmvssm.selective_scan(*arguments, True)
    torch.library.opcheck(
        torch.ops.mmvssm.selective_scan_backward.default, (grad_y, *arguments, True, states)
    )
