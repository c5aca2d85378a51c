"""The scan over kept tokens, and the scan over the whole grid with the other tokens set to zero."""

from __future__ import annotations

from typing import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from mmvssm.ops import snake_walks

Scan = Callable[..., Tensor]
"""Called with the arguments of ``mmvssm.ops.selective_scan``."""


def compare(
    scan: Scan, grid: tuple[int, int], batch: int, keep: float, dtype: torch.dtype, seed: int = 0
) -> None:
    """Check outputs and every gradient.

    Everything is computed from the same leaves: values, step sizes, B and C on the grid, and the
    parameters of a layer. ``u``, ``delta``, ``B`` and ``C`` come from the same token.
    """
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    length, channels, states = grid[0] * grid[1], 5, 3
    count = max(1, round(keep * length))
    positions = torch.rand(batch, length, generator=generator).argsort(-1)[:, :count]
    positions = positions.sort(-1).values
    kept = torch.zeros(batch, length, dtype=torch.bool).scatter(1, positions, True)
    leaves = dict(
        u=randn(batch, length, channels),
        delta=randn(batch, length, channels),
        B=randn(batch, length, states),
        C=randn(batch, length, states),
        A=-randn(channels, states).abs(),
        D=randn(channels),
        bias=randn(channels),
        directions=randn(5, states),
    )
    grad_y = randn(batch, count, 4, channels)
    for leaf in leaves.values():
        leaf.requires_grad_()

    def take(x):
        return x.gather(1, positions[..., None].expand(-1, -1, x.shape[-1]))

    def run(u, delta, B, C, walks, rest):
        direction = F.embedding(walks.arrival, leaves["directions"]).transpose(-3, -2)
        return scan(
            *(x[:, :, None].expand(-1, -1, 4, -1) for x in (u, delta)),
            leaves["A"].expand(4, -1, -1),
            B[:, :, None] + direction,
            C[:, :, None].expand(-1, -1, 4, -1),
            *(leaves[name].expand(4, -1) for name in ("D", "bias")),
            traversal=walks.traversal,
            rest=rest,
        )

    activations = [leaves[name] for name in ("u", "delta", "B", "C")]
    walks = snake_walks(*grid, raster_source=False)
    dense = run(*(x * kept[..., None] for x in activations), walks, None)
    dense = dense.gather(1, positions[..., None, None].expand(-1, -1, 4, channels))
    walks = snake_walks(*grid, positions, raster_source=False)
    rest = F.softplus(leaves["bias"]).expand(4, -1)  # what a token of value zero has
    compact = run(*map(take, activations), walks, rest)

    tolerance = 1e-10 if dtype == torch.float64 else 1e-5
    expected = [dense, *torch.autograd.grad(dense, list(leaves.values()), grad_y)]
    actual = [compact, *torch.autograd.grad(compact, list(leaves.values()), grad_y)]
    for name, a, e in zip(["y", *leaves], actual, expected):
        # Relative to the largest value: single elements may cancel.
        error = (a - e).abs().max() / e.abs().max().clamp_min(1e-30)
        assert error < tolerance, f"{name}: relative error {error:.1e}"
