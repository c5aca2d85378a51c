"""Make the scan's inputs as the backbones do, without other packages than torch."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple, Union
from unittest import mock

import torch
from torch import Tensor

from mmvssm.ops import cross_traversal, line_walks, snake_walks
from mmvssm.ops.selective_scan import triton_launch
from mmvssm.ops.selective_scan.inputs import ScanInputs

WALKS = {"groups": 4, "cross": 4, "snake": 4, "line": 2}


class Shape(NamedTuple):
    """A layer: a grid of tokens, channels of a walk, states, and the kind of its walks.

    With "groups" each walk has its own channels, as in GroupMamba. Other walks are summed: in "cross" they share ``u``,
    as in VMamba; in "snake" all but ``B`` and their order, as in PlainMamba; in "line" nothing, as in Vim.
    """

    grid: tuple[int, int]
    channels: int
    d_state: int
    kind: str = "groups"

    def __str__(self) -> str:
        height, width = self.grid
        return (
            f"{height}x{width} tokens, {WALKS[self.kind]} x {self.channels} channels, "
            f"{self.d_state} states, {self.kind}"
        )


STAGE_1 = Shape((200, 320), 16, 1)
"""Stage 1 of GroupMamba-T at 800x1280."""
STAGE_3 = Shape((50, 80), 87, 1)
"""Stage 3."""
PLAIN = Shape((100, 160), 384, 16, "snake")
"""PlainMamba-L1 at 1600x2560."""
V_STAGE_1 = Shape((200, 320), 96, 1, "cross")
"""Stage 1 of VMamba-T at 800x1280."""
V_STAGE_3 = Shape((50, 80), 384, 1, "cross")
"""Stage 3."""
V_STATES = Shape((50, 80), 384, 16, "cross")
"""Stage 3 with as many states as the first VMamba had."""
VIM = Shape((50, 80), 768, 16, "line")
"""Vim-S at 800x1280."""


def make_inputs(
    shape: Shape, batch: int, dtype: torch.dtype, device: Union[str, torch.device]
) -> ScanInputs:
    """Make random inputs with the backbones' memory layout; without memory on ``meta``."""
    (height, width), channels, d_state, kind = shape
    length, walks = height * width, WALKS[kind]
    generator = None if str(device) == "meta" else torch.Generator(device).manual_seed(0)

    def randn(*size: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(size, generator=generator, device=device).to(dtype)

    own = 1 if kind == "snake" else walks
    rank = -(-channels // 16)
    u = randn(batch, length, own if kind in ("groups", "line") else 1, channels, dtype=dtype)
    delta = randn(batch, length, own, channels, dtype=dtype)
    projected = randn(batch, length, own, rank + 2 * d_state, dtype=dtype)
    _, B, C = projected.split((rank, d_state, d_state), dim=-1)
    A = -randn(own, channels, d_state).exp()
    D, bias = randn(own, channels), randn(own, channels) - 4
    source = None
    if kind == "snake":
        order, source, _ = snake_walks(height, width, device=device).traversal
        B = B + randn(walks, d_state, dtype=dtype)
        C = C.expand(-1, -1, walks, -1)
        A, D, bias = (x.expand(walks, *x.shape[1:]) for x in (A, D, bias))
    elif kind == "line":
        order = line_walks(length, device=device).order
        B, C = B.contiguous(), C.contiguous()
    else:
        order = cross_traversal(height, width, device).order
    summed = kind != "groups"
    return ScanInputs(u, delta, A, B, C, D, bias, order, source, sum_walks=summed)


def elements(inputs: ScanInputs) -> int:
    """Count the channels of the tokens of all walks."""
    batch, length, _, channels = inputs.u.shape
    return batch * length * inputs.A.shape[0] * channels


def bytes_of(x: Tensor) -> int:
    """Count a tensor's bytes; expanded dimensions count once."""
    count = x.element_size()
    for size, stride in zip(x.shape, x.stride()):
        count *= size if stride else 1
    return count if x.numel() else 0


def least_bytes(inputs: ScanInputs) -> dict[str, int]:
    """Count the least bytes that a forward and a backward pass read and write: inputs once, outputs once.

    The saved states are outputs of the forward and inputs of the backward pass.
    """
    given = sum(bytes_of(x) for x in inputs if isinstance(x, Tensor))
    y = math.prod(inputs.y_shape) * inputs.u.element_size()
    y += math.prod(inputs.states_shape) * inputs.accumulation_dtype.itemsize
    gradients = sum(
        x.numel() * x.element_size()
        for x in inputs
        if isinstance(x, Tensor) and x.is_floating_point()
    )
    return {"forward": given + y, "backward": given + y + gradients}


def designs(d_state: int) -> dict[str, Callable[[], AbstractContextManager]]:
    """Return the designs of the forward pass on a GPU for a number of states, the default first."""
    ways: dict[str, Callable[[], AbstractContextManager]] = {"default": nullcontext}
    if d_state == 1:
        ways["single_pass"] = lambda: mock.patch.object(triton_launch, "SINGLE_PASS", True)
    return ways
