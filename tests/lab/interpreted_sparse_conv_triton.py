"""The Triton kernels in Triton's interpreter, on the CPU; only ``test_sparse_depthwise_conv.py`` collects this file.

See ``interpreted_scan_triton.py`` for why they have a process of their own.
"""

import importlib

import pytest
import torch
from sparse_conv_cases import CASES, Case, check, make_inputs, run_backend

from mmvssm.ops.sparse_depthwise_conv import triton_launch as sparse_depthwise_conv_triton
from support.triton_interpreter import patch_languages_once

run = run_backend(sparse_depthwise_conv_triton)


@pytest.fixture(autouse=True)
def _quicker_interpreter(monkeypatch):
    patch_languages_once(monkeypatch)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_agrees_with_the_definition(case):
    check(case, run)


def test_two_runs_agree_bit_for_bit():
    inputs = make_inputs(Case(2, (10, 30), 260, 33, kernel=3))
    first, second = run(inputs), run(inputs)
    for name, x in first.items():
        assert torch.equal(x, second[name]), name


def test_passes_opcheck(monkeypatch):
    """With these kernels behind the public operator: strides, dtypes, aliasing and fake tensors are as declared."""
    # The package's attribute of that name is the function.
    module = importlib.import_module("mmvssm.ops.sparse_depthwise_conv")
    monkeypatch.setattr(module, "_backend", lambda x: sparse_depthwise_conv_triton)
    inputs = make_inputs(Case(2, (3, 4), 5, 3, kernel=3))
    floating = [inputs[name].requires_grad_() for name in ("x", "weight", "bias")]
    arguments = (*floating[:2], inputs["neighbors"], floating[2])
    torch.library.opcheck(torch.ops.mmvssm.sparse_depthwise_conv.default, arguments)
