"""Test inputs for the sparse depthwise convolution, for every backend, and the comparison with its definition.

The definition: scatter the kept tokens into a map of zeros, convolve the map, gather at the kept positions.
"""

from __future__ import annotations

from typing import Callable, NamedTuple, Optional

import torch
import torch.nn.functional as F
from torch import Tensor

from mmvssm.ops import neighbor_table

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}
GRADIENTS = ("x", "weight", "bias")


class Case(NamedTuple):
    """One set of inputs; ``layout`` is the memory layout of ``x`` and ``grad_y``: see :func:`make_inputs`."""

    batch: int
    grid: tuple[int, int]
    kept: int
    channels: int
    kernel: int = 7
    layout: str = "plain"
    bias: bool = True
    dtype: torch.dtype = torch.float32

    def __str__(self):
        height, width = self.grid
        words = f"{self.batch}x{self.kept}of{height}x{width}x{self.channels}-k{self.kernel}-{self.layout}"
        return f"{words}-{str(self.dtype).removeprefix('torch.')}" + (
            "" if self.bias else "-no_bias"
        )


CASES = [
    # Channels around one vector and several, of every instruction set.
    *(Case(1, (5, 7), 20, channels) for channels in (1, 5, 16, 33, 64, 87)),
    Case(3, (9, 6), 31, 33, kernel=3),
    Case(3, (9, 6), 31, 130, bias=False),
    # Grids narrower than the kernel, single tokens, nothing pruned.
    Case(1, (1, 1), 1, 5),
    Case(3, (1, 9), 6, 5),
    Case(2, (11, 2), 9, 87, kernel=3),
    Case(3, (8, 5), 1, 5),
    Case(1, (6, 8), 48, 33),
    Case(2, (6, 5), 30, 5, kernel=3),
    Case(2, (6, 5), 18, 5, kernel=1),
    Case(2, (11, 12), 90, 5, kernel=9),  # more than 64 taps
    # More tokens than one task handles.
    Case(1, (24, 32), 601, 20),
    # Memory layouts of tokens.
    Case(2, (7, 5), 21, 33, layout="sliced"),
    Case(2, (7, 5), 21, 33, layout="channels_first"),
    Case(2, (7, 5), 21, 33, layout="expanded"),
    # Dtypes.
    *(
        Case(2, (7, 9), 40, channels, dtype=dtype)
        for dtype in (torch.float64, torch.bfloat16, torch.float16)
        for channels in (5, 87)
    ),
    Case(2, (7, 9), 40, 33, kernel=3, layout="sliced", dtype=torch.bfloat16),
]


def random_positions(batch: int, grid: tuple[int, int], kept: int, seed: int = 0) -> Tensor:
    """Choose random positions ``(B, K)``, different for each image."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(batch, grid[0] * grid[1], generator=generator)
    return scores.topk(kept, dim=1).indices.sort(1).values


def make_inputs(case: Case) -> dict[str, Optional[Tensor]]:
    """Make ``x, weight, bias, grad_y``, ``positions`` and ``neighbors``."""
    generator = torch.Generator().manual_seed(1)
    rows = (case.batch, case.kept, case.channels)

    def randn(*shape):
        return torch.randn(shape, generator=generator).to(case.dtype)

    x, grad_y = randn(*rows), randn(*rows)
    if case.layout == "sliced":  # out of a wider tensor, as a projection's halves are
        x, grad_y = torch.cat([x, grad_y], -1).split(case.channels, -1)
    elif case.layout == "channels_first":
        x, grad_y = (t.transpose(1, 2).contiguous().transpose(1, 2) for t in (x, grad_y))
    elif case.layout == "expanded":  # what the gradient of a sum is
        grad_y = grad_y[:1, :1, :1].expand(rows)
    positions = random_positions(case.batch, case.grid, case.kept)
    return dict(
        x=x,
        weight=randn(case.channels, 1, case.kernel, case.kernel),
        bias=randn(case.channels) if case.bias else None,
        grad_y=grad_y,
        positions=positions,
        neighbors=neighbor_table(positions, case.grid, case.kernel),
    )


def defined(inputs: dict[str, Optional[Tensor]], grid: tuple[int, int]) -> dict[str, Tensor]:
    """Compute ``y`` and the gradients by name, in float64."""
    wide = {
        name: None if inputs[name] is None else inputs[name].detach().double()
        for name in (*GRADIENTS, "grad_y")
    }
    names = [name for name in GRADIENTS if wide[name] is not None]
    leaves = [wide[name].requires_grad_() for name in names]
    y = scatter_convolve_gather(wide["x"], wide["weight"], wide["bias"], inputs["positions"], grid)
    gradients = torch.autograd.grad(y, leaves, wide["grad_y"])
    return dict(y=y.detach(), **dict(zip(names, gradients)))


def scatter_convolve_gather(x, weight, bias, positions, grid):
    """Convolve ``(B, K, C)`` at ``positions (B, K)`` of ``grid`` as a whole map: the definition."""
    batch, _, channels = x.shape
    index = positions[:, :, None].expand(-1, -1, channels)
    dense = x.new_zeros(batch, grid[0] * grid[1], channels).scatter(1, index, x)
    dense = dense.transpose(1, 2).unflatten(2, grid)
    y = F.conv2d(dense, weight, bias, padding=weight.shape[-1] // 2, groups=channels)
    return y.flatten(2).transpose(1, 2).gather(1, index)


def run_backend(backend) -> Callable[[dict[str, Optional[Tensor]]], dict[str, Tensor]]:
    """Return a function that computes ``y`` and the gradients by name with a backend's functions."""

    def run(inputs):
        x, weight, bias, grad_y = (inputs[name] for name in ("x", "weight", "bias", "grad_y"))
        neighbors = inputs["neighbors"]
        grad_weight = backend.weight_gradient(grad_y, x, neighbors)
        assert grad_weight.dtype == (torch.float64 if x.dtype == torch.float64 else torch.float32)
        return dict(
            y=backend.convolve(x, weight, neighbors, bias),
            x=backend.convolve(grad_y, weight, neighbors, None, reverse=True),
            weight=grad_weight.view(weight.shape).to(weight.dtype),
        )

    return run


def check(case: Case, run: Callable[[dict], dict[str, Tensor]], device: str = "cpu") -> None:
    """Compare the results of ``run(inputs)`` with the definition, relative to the largest value."""
    inputs = make_inputs(case)
    expected = defined(inputs, case.grid)
    inputs = {name: t if t is None else t.to(device) for name, t in inputs.items()}
    results = run(inputs)
    assert {"y", "x", "weight"} <= results.keys() <= expected.keys()
    for name, result in results.items():
        assert result.shape == expected[name].shape, name
        assert result.is_contiguous(), name
        assert result.dtype == case.dtype, name
        result = result.double().cpu()
        scale = expected[name].abs().max().clamp_min(1e-30)
        error = (result - expected[name]).abs().max() / scale
        assert error < TOLERANCE[case.dtype], f"{name}: relative error {error:.1e}"
