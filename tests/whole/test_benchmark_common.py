"""Shared parts of the benchmarks."""

from functools import partial

import pytest
import torch
from backbones import SummedOutside
from timing import time_side_by_side
from torch.utils._python_dispatch import TorchDispatchMode

from mmvssm.models import PlainMamba, Vim, VMamba
from support.tiny_backbones import PLAIN, VIM, V


def test_candidates_take_turns_and_none_always_follows_the_same():
    ran = []
    names = ["a", "b", "c", "d"]
    times = time_side_by_side(
        {name: partial(ran.append, name) for name in names}, "cpu", seconds=0.0, min_runs=20
    )
    assert {name: len(values) for name, values in times.items()} == dict.fromkeys(names, 20)
    rounds = [ran[i : i + 4] for i in range(0, len(ran), 4)]
    assert len(rounds) == 21 and all(sorted(turns) == names for turns in rounds)  # one warms up
    before = {name: {ran[i - 1] for i in range(1, len(ran)) if ran[i] == name} for name in names}
    assert all(len(others) >= 3 for others in before.values())


class Sizes(TorchDispatchMode):
    """Collects the shapes of scans' outputs."""

    def __init__(self):
        super().__init__()
        self.shapes = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func is torch.ops.mmvssm.selective_scan.default:
            self.shapes.append(result[0].shape)
        return result


@pytest.mark.parametrize(
    "build, walks",
    [(lambda: VMamba(V), 4), (lambda: PlainMamba(PLAIN), 4), (lambda: Vim(VIM), 2)],
    ids=["vmamba", "plainmamba", "vim"],
)
def test_sums_outside_of_the_scan_are_those_inside(build, walks):
    inside = build().eval()
    x = torch.rand(2, 3, 48, 64)
    found = []
    for model, rows in ((inside, ()), (SummedOutside(inside), (walks,))):
        inside.zero_grad()
        with Sizes() as sizes:
            y = model(x)[-1]
            y.square().sum().backward()
        assert sizes.shapes and all(shape[2:-1] == rows for shape in sizes.shapes)
        found.append(
            {name: p.grad.clone() for name, p in inside.named_parameters() if p.grad is not None}
        )
        found[-1]["y"] = y.detach()
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)
