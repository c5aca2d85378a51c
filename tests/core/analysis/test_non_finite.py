"""Find the module where NaN or infinity begins."""

import math

import pytest
import torch
from mmengine.registry import MODEL_WRAPPERS

from mmvssm.analysis.non_finite import find_origin
from support.toy_training import toy_runner

NAN = math.nan


@pytest.mark.parametrize(
    ("where", "factor", "words"),
    [
        ("forward", NAN, "the first module with such numbers is middle.1, in its output"),
        ("forward", math.inf, "the first module with such numbers is middle.1, in its output"),
        ("loss", NAN, "the loss loss_penalty is not"),
        ("backward", NAN, "the first gradient that is not finite is that of stem.1.bias"),
        ("images", NAN, "the first module with such numbers is stem, in its input"),
        ("parameter", NAN, "the parameter head.bias is not finite itself"),
        ("forward", 1.0, None),
    ],
)
def test_the_first_place_is_named(tmp_path, where, factor, words):
    changes = (
        {"model.explode": {0: (where, factor)}} if where in ("forward", "loss", "backward") else {}
    )
    runner = toy_runner(tmp_path, **changes)
    runner.model.iteration = 0
    batch = next(iter(runner.train_dataloader))
    if where == "images":
        batch["inputs"][0].fill_(factor)
    elif where == "parameter":
        torch.nn.init.constant_(runner.model.head.bias, factor)
    found = find_origin(runner.model.train(), batch)
    assert found is None if words is None else words in found
    assert not any(module._forward_hooks for module in runner.model.modules())


def test_the_model_of_a_distributed_run(tmp_path):
    runner = toy_runner(tmp_path, **{"model.explode": {0: ("forward", NAN)}})
    runner.model.iteration = 0
    wrapped = torch.nn.Module()
    wrapped.module = runner.model.train()
    MODEL_WRAPPERS.register_module(name="Wrapper", module=torch.nn.Module, force=True)
    try:
        found = find_origin(wrapped, next(iter(runner.train_dataloader)))
    finally:
        MODEL_WRAPPERS._module_dict.pop("Wrapper")
    assert "middle.1, in its output" in found
