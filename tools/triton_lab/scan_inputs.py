"""Make the scan's inputs as the backbones do, without other packages than torch."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple, Union
from unittest import mock

import torch
from torch import Tensor

from mmvssm.ops import cross_traversal, snake_walks
from mmvssm.ops.selective_scan import triton_launch
from mmvssm.ops.selective_scan.inputs import ScanInputs

WALKS = 4


class Shape(NamedTuple):
    """A layer: a grid of tokens, channels of a walk, and states.

    With one state each walk has its own channels, as in GroupMamba. With more, the walks share all but ``B`` and their
    order, as in PlainMamba.
    """

    grid: tuple[int, int]
    channels: int
    d_state: int

    def __str__(self) -> str:
        return f"{self.grid[0]}x{self.grid[1]} tokens, {WALKS} x {self.channels} channels, {self.d_state} states"


STAGE_1 = Shape((200, 320), 16, 1)
"""Stage 1 of GroupMamba-T at 800x1280."""
STAGE_3 = Shape((50, 80), 87, 1)
"""Stage 3."""
PLAIN = Shape((100, 160), 384, 16)
"""PlainMamba-L1 at 1600x2560."""


def make_inputs(
    shape: Shape, batch: int, dtype: torch.dtype, device: Union[str, torch.device]
) -> ScanInputs:
    """Make random inputs with the backbones' memory layout; without memory on ``meta``."""
    (height, width), channels, d_state = shape
    length = height * width
    generator = None if str(device) == "meta" else torch.Generator(device).manual_seed(0)

    def randn(*size: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(size, generator=generator, device=device).to(dtype)

    own = (WALKS,) if d_state == 1 else ()
    rank = -(-channels // 16)
    u, delta = (randn(batch, length, *own, channels, dtype=dtype) for _ in range(2))
    projected = randn(batch, length, *own, rank + 2 * d_state, dtype=dtype)
    _, B, C = projected.split((rank, d_state, d_state), dim=-1)
    A = -randn(*own, channels, d_state).exp()
    D, bias = randn(*own, channels), randn(*own, channels) - 4
    if own:
        order = cross_traversal(height, width, device).order
        return ScanInputs(u, delta, A, B, C, D, bias, order)
    order, source, _ = snake_walks(height, width, device=device).traversal
    direction = randn(WALKS, d_state, dtype=dtype)
    u, delta, C = (x[:, :, None].expand(-1, -1, WALKS, -1) for x in (u, delta, C))
    A, D, bias = (x[None].expand(WALKS, *x.shape) for x in (A, D, bias))
    return ScanInputs(u, delta, A, B[:, :, None] + direction, C, D, bias, order, source)


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
    y = inputs.u.numel() * inputs.u.element_size()
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
