"""Token pruning for vision state-space models (NeurIPS 2024, arXiv 2409.18962).

What is kept, when, and what travels from a pruned backbone to the neck that rebuilds its maps.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Callable, NoReturn, Optional, Union

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import UserError

METRICS: dict[str, Callable[[Tensor], Tensor]] = {
    "clip": lambda y: y.clamp(min=0).mean(-1),
    "value": lambda y: y.mean(-1),
    "l1": lambda y: y.abs().mean(-1),
    "l2": lambda y: y.square().mean(-1).sqrt(),
}
"""Importance of tokens ``(B, L)`` from the scan's output ``(B, L, D)``: the paper's, and those of its ablation."""

RANDOM = "random"
"""Instead of a metric: any tokens, the baseline that says what a metric is worth.

While training they are drawn anew for each image and step; in evaluation they are the same ones for all images.
"""

REDUCTIONS = ("prune", "merge")
"""What becomes of tokens that leave.

``'prune'``: the least important ones are dropped. ``'merge'``, a baseline that needs no training: each is averaged into
the most similar of its neighbours, see :func:`similarity_to_neighbors`, whatever the metric.
"""

ALIGNMENTS = ("decay", "hold", "none")
"""What becomes of the hidden state where a walk passes a pruned position.

``'decay'``: what a token of value zero would make of it; ``'hold'``: nothing; ``'none'``: there are no such positions,
since the kept tokens are packed row by row into a smaller grid, and walked there.

Whether the published method decays the state or holds it is not settled: no code of the alignment came with the paper,
and what others write about it describes it both ways.
"""

PRESETS: dict[str, dict] = {
    "L1": dict(layers=(3, 7, 11), keep_ratio=0.6),
    "L2": dict(layers=(3, 7, 11), keep_ratio=0.65),
    "L3": dict(layers=(5, 11, 17), keep_ratio=0.7),
}
"""Settings for PlainMamba's sizes that save 40 % of its FLOPs or more."""


class PruningError(UserError, ValueError):
    """Pruned tokens met a setting or a neck that does not go with them. The message says what to do."""


class NotAMapError(PruningError, AttributeError):
    """Pruned tokens were asked for what only maps have. An ``AttributeError``, so that ``hasattr`` answers."""


class TokenPruning:
    """When to prune, and how much.

    Args:
        layers: After which layers tokens leave, counted from 0, increasing.
        keep_ratio: The share of its tokens, in (0, 1], that each of these layers keeps: one number, or one for each.
        metric: How important a token is: see :data:`METRICS`, and :data:`RANDOM`.
        alignment: See :data:`ALIGNMENTS`.
        reduction: See :data:`REDUCTIONS`. Merging can make no less than half of the tokens at a time.
        num_layers: How many layers there are.

    Attributes:
        progress: From 0 to 1. While training, this much of the pruning takes place: the keep ratio
            is ``1 - progress * (1 - keep_ratio)``. Evaluation always prunes fully.

    Raises:
        ValueError: If one of the arguments is not as described.
    """

    def __init__(
        self,
        layers: Sequence[int],
        keep_ratio: Union[float, Sequence[float]],
        metric: str = "clip",
        alignment: str = "decay",
        reduction: str = "prune",
        *,
        num_layers: int,
    ) -> None:
        layers = (layers,) if isinstance(layers, int) else tuple(layers)
        # Tokens that leave after the last layer would save nothing.
        in_range = all(isinstance(i, int) and 0 <= i < num_layers - 1 for i in layers)
        if not layers or not in_range or list(layers) != sorted(set(layers)):
            raise ValueError(
                f"pruning: layers must be increasing numbers from 0 to {num_layers - 2}, the last layer but one; got "
                f"{list(layers)}."
            )
        ratios = (
            (keep_ratio,) * len(layers)
            if isinstance(keep_ratio, (int, float))
            else tuple(keep_ratio)
        )
        if len(ratios) != len(layers):
            raise ValueError(
                f"pruning: keep_ratio must be one number or as many as there are layers, {len(layers)}; got "
                f"{len(ratios)}: {list(ratios)}."
            )
        if not all(0 < ratio <= 1 for ratio in ratios):
            raise ValueError(f"pruning: keep_ratio must be in (0, 1]; got {keep_ratio}.")
        for what, value, known in (
            ("metric", metric, (*METRICS, RANDOM)),
            ("alignment", alignment, ALIGNMENTS),
            ("reduction", reduction, REDUCTIONS),
        ):
            if value not in known:
                raise ValueError(
                    f"pruning: unknown {what} {value!r}; known are {', '.join(map(repr, known))}."
                )
        if reduction == "merge" and min(ratios) < 0.5:
            raise ValueError(
                "pruning: reduction='merge' merges tokens in pairs, so that keep_ratio must be at least 0.5; got "
                f"{keep_ratio}."
            )
        self.keep_ratios = dict(zip(layers, map(float, ratios)))
        self.metric = metric
        self.alignment = alignment
        self.reduction = reduction
        self.progress = 1.0

    @classmethod
    def of(cls, settings: Union[str, dict], num_layers: int) -> TokenPruning:
        """Build from a config: a dict of arguments, or the name of one of :data:`PRESETS`."""
        if isinstance(settings, str):
            if settings not in PRESETS:
                raise ValueError(
                    f"pruning: unknown preset {settings!r}; known are {', '.join(map(repr, PRESETS))}, or a dict with "
                    "layers and keep_ratio, and perhaps metric, alignment and reduction."
                )
            settings = PRESETS[settings]
        known = {"layers", "keep_ratio", "metric", "alignment", "reduction"}
        if not {"layers", "keep_ratio"} <= set(settings) <= known:
            raise ValueError(
                "pruning: expected a dict with layers and keep_ratio, and perhaps metric, alignment and reduction; got "
                f"the keys {sorted(settings)}."
            )
        return cls(**settings, num_layers=num_layers)

    def num_kept(self, layer: int, num_tokens: int, training: bool = False) -> int:
        """How many of ``num_tokens`` tokens go on after ``layer``: all, where it does not prune."""
        if layer not in self.keep_ratios:
            return num_tokens
        ratio = self._warmed_up(self.keep_ratios[layer]) if training else self.keep_ratios[layer]
        numerator, denominator = _as_fraction(ratio)
        # Of positive numbers only: ONNX, where this may end up, divides negative ones otherwise.
        return (num_tokens * numerator + denominator - 1) // denominator

    def training_keep_ratio(self) -> float:
        """The keep ratio now used in training, the smallest where layers differ."""
        return self._warmed_up(min(self.keep_ratios.values()))

    def _warmed_up(self, ratio: float) -> float:
        return 1 - self.progress * (1 - ratio)

    def importance(self, y: Tensor, training: bool = False) -> Tensor:
        """Importance of tokens ``(B, L)`` from the scan's output, summed over its walks, ``(B, L, D)``."""
        y = y.detach()
        if self.metric == RANDOM:
            if training:
                return torch.rand(y.shape[:2], device=y.device)
            fixed = torch.Generator().manual_seed(y.shape[1])
            return torch.rand(y.shape[1], generator=fixed).to(y.device).expand(y.shape[:2])
        return METRICS[self.metric](y.float() if y.itemsize < 4 else y)


@functools.lru_cache
def _as_fraction(ratio: float) -> tuple[int, int]:
    """The ratio that was meant.

    0.1 * 30 is a little more than 3 in floating point, and 4 would be kept. And whole numbers can be calculated with
    while torch.export doesn't know them yet.
    """
    fraction = Fraction(ratio).limit_denominator(1_000_000)
    return fraction.numerator, fraction.denominator


def select(importance: Tensor, num_kept: int) -> tuple[Tensor, Tensor]:
    """Divide tokens into the most important ones and the rest, each in the order in which they were.

    Args:
        importance: ``(B, L)``. Of two equally important tokens the first is kept.
        num_kept: How many to keep.

    Returns:
        Indices of the kept ``(B, num_kept)`` and the dropped ``(B, L - num_kept)`` tokens, int64, increasing.
    """
    ranked = importance.sort(dim=-1, descending=True, stable=True).indices
    return ranked[:, :num_kept].sort(-1).values, ranked[:, num_kept:].sort(-1).values


def similarity_to_neighbors(
    tokens: Tensor, positions: Optional[Tensor], grid: tuple[int, int], absent: Tensor
) -> tuple[Tensor, Tensor]:
    """Find out which tokens can be merged at the smallest loss, and into which.

    The matching of ToMe (ICLR 2023, arXiv 2210.09461) among neighbours of a grid. Every second token along the walk
    that goes through the rows like a snake may leave; on a full grid these are the black squares of a chessboard. It
    would join the most similar, by the cosine, of those that come before and after it along this walk and along the
    one through the columns; on a full grid these are the up to four around it, all of them on white squares.

    Args:
        tokens: ``(B, L, C)``.
        positions: Where they are in the grid, row by row, int64 ``(B, L)``; None if they fill it.
        grid: Its height and width.
        absent: Tokens that nothing is to join, bool ``(B, L)``.

    Returns:
        Importance ``(B, L)``, the less the more similar to the other, and 2 or more of tokens that are to stay; and the
        index of the token to join, int64 ``(B, L)``, a token's own where there is none.
    """
    batch, count, _ = tokens.shape
    height, width = grid
    if positions is None:
        positions = torch.arange(count, device=tokens.device).expand(batch, count)
    row, column = positions // width, positions % width
    snakes = (
        row * width + torch.where(row % 2 == 1, width - 1 - column, column),
        column * height + torch.where(column % 2 == 1, height - 1 - row, row),
    )
    orders = [snake.argsort(1) for snake in snakes]
    ranks = [order.argsort(1) for order in orders]
    leaves = ranks[0] % 2 == 1
    unit = F.normalize(tokens.detach().float(), dim=-1)
    best = unit.new_full((batch, count), -math.inf)
    target = torch.arange(count, device=tokens.device).expand(batch, count)
    for order, rank in zip(orders, ranks):
        for step in (-1, 1):
            there = (rank + step >= 0) & (rank + step < count)
            other = order.gather(1, (rank + step).clamp(0, count - 1))
            there &= leaves & ~leaves.gather(1, other) & ~absent.gather(1, other)
            similarity = (unit * take(unit, other)).sum(-1).masked_fill(~there, -math.inf)
            target = torch.where(similarity > best, other, target)
            best = torch.maximum(best, similarity)
    alone = torch.where(leaves, 2.0, 3.0)  # above any cosine, turned round
    return torch.where(best == -math.inf, alone, -best), target


def merge(tokens: Tensor, sizes: Tensor, leaving: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Average tokens that leave into others.

    Args:
        tokens: ``(B, L, C)``.
        sizes: How many tokens each of them stands for ``(B, L)``, by which it counts.
        leaving: Indices of those that leave ``(B, K)``, int64.
        target: For each token that into which it goes ``(B, L)``, int64.

    Returns:
        Tokens and sizes with those that stay changed.
    """
    joined = target.gather(1, leaving)
    weighted = tokens * sizes[..., None].to(tokens.dtype)
    index = joined[..., None].expand(-1, -1, tokens.shape[2])
    sums = weighted.scatter_add(1, index, take(weighted, leaving))
    merged = sizes.scatter_add(1, joined, sizes.gather(1, leaving))
    changed = (merged != sizes)[..., None]
    return torch.where(changed, sums / merged[..., None].to(tokens.dtype), tokens), merged


def padding_tokens(images: Tensor, patch_size: int) -> Tensor:
    """Which tokens see nothing but padding.

    So that images of a batch have one size, mmdet and mmseg pad them at the bottom and on the right with zeros, after
    they were normalised. That is looked for here, and not asked for, since neither hands a backbone more than the
    images: rows of zeros at the bottom, columns of zeros on the right. Pixels are whole numbers and the usual means are
    not, so after normalisation by those none is zero; where one can be, black borders count as padding too.

    How many tokens are kept is a share of the padded grid's, since images of a batch keep equally many: beside a larger
    neighbour an image keeps more of its tokens, and once it has kept all, padding.

    Args:
        images: ``(B, C, H, W)``.
        patch_size: Height and width of a token in pixels.

    Returns:
        bool ``(B, ceil(H / patch_size) * ceil(W / patch_size))``, row by row.
    """
    magnitude = images.abs()
    rows, columns = (magnitude.amax(dims) != 0 for dims in ((1, 3), (1, 2)))
    # Up to the last one used all count as used, and a token's are if its first is.
    rows, columns = (
        used.flip(1).cumsum(1).flip(1)[:, ::patch_size] > 0 for used in (rows, columns)
    )
    return ~(rows[:, :, None] & columns[:, None]).flatten(1)


def take(x: Tensor, index: Tensor) -> Tensor:
    """The tokens ``(B, K, C)`` at ``index (B, K)`` of ``x (B, L, C)``."""
    # Whole rows: several times as fast as torch.gather, whose index names single elements.
    first = torch.arange(x.shape[0], device=x.device)[:, None] * x.shape[1]
    return x.flatten(0, 1).index_select(0, (index + first).flatten()).unflatten(0, index.shape)


def restore_map(tokens: Tensor, positions: Tensor, grid: tuple[int, int]) -> Tensor:
    """Scatter tokens to their places, with zeros elsewhere.

    Args:
        tokens: ``(B, K, C)``.
        positions: Where they are on the grid, row by row, int64 ``(B, K)``.
        grid: ``(h, w)``.

    Returns:
        ``(B, C, h, w)``.
    """
    batch, _, channels = tokens.shape
    first = torch.arange(batch, device=positions.device)[:, None] * (grid[0] * grid[1])
    maps = tokens.new_zeros((batch * grid[0] * grid[1], channels))
    maps = maps.index_copy(0, (positions + first).flatten(), tokens.flatten(0, 1))
    return maps.view(batch, *grid, channels).permute(0, 3, 1, 2)


def packed_grid(num_tokens: int, grid: tuple[int, int]) -> tuple[int, int]:
    """The grid of exactly ``num_tokens`` positions whose shape is nearest to that of ``grid``.

    Raises:
        PruningError: If the nearest one is more than twice as long or as wide in proportion.
    """
    height, width = grid

    def distortion(rows: int) -> float:
        # Rounded, so that of two equally good grids it is always the flatter one.
        return round(abs(math.log(rows * rows * width / (num_tokens * height))), 9)

    rows = min((r for r in range(1, num_tokens + 1) if num_tokens % r == 0), key=distortion)
    if distortion(rows) > math.log(2) + 1e-9:
        raise PruningError(
            f"pruning: alignment='none' cannot pack the {num_tokens} tokens kept of a {height}x{width} grid into a "
            "smaller grid of a similar shape; choose a keep_ratio that leaves another number of tokens, or "
            "alignment='decay' or 'hold'."
        )
    return rows, num_tokens // rows


@dataclass(frozen=True, eq=False)
class PrunedTokens:
    """A feature map some of whose tokens were pruned on the way.

    :class:`~mmvssm.models.necks.TokenRestoration` makes a map ``(B, C, H, W)`` of it. Positions count row by row. Like
    modules, and unlike tensors, two of them are equal if they are the same one.

    Attributes:
        tokens: What the kept tokens have become ``(B, K, C)``.
        positions: Where they are, int64 ``(B, K)``, increasing.
        grid: Height and width of the full grid.
        departed: What each pruned token was when it left ``(B, H * W - K, C)``.
        departed_positions: Where they were, int64 ``(B, H * W - K)``, in the order in which they left.
    """

    tokens: Tensor
    positions: Tensor
    grid: tuple[int, int]
    departed: Tensor
    departed_positions: Tensor

    def to(self, *args, **kwargs) -> PrunedTokens:
        """The same elsewhere or in another dtype, as ``Tensor.to`` has it; positions stay int64."""
        tokens, departed = (x.to(*args, **kwargs) for x in (self.tokens, self.departed))
        positions, left = (x.to(tokens.device) for x in (self.positions, self.departed_positions))
        return PrunedTokens(tokens, positions, self.grid, departed, left)

    def __getattr__(self, name: str) -> NoReturn:
        # Asked for what only tensors have, such as shape or dim.
        if name.startswith("__"):
            raise AttributeError(name)
        raise NotAMapError(f"PrunedTokens has no {name!r}. {_NO_NECK}")

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None) -> NoReturn:
        raise PruningError(_NO_NECK)


# What it holds are the inputs and outputs of an exported program.
torch.export.register_dataclass(
    PrunedTokens, serialized_type_name="mmvssm.models.pruning.PrunedTokens"
)

_NO_NECK = (
    "A pruned backbone's outputs are tokens, not maps: put dict(type='mmvssm.TokenRestoration') before other necks, "
    "neck=[dict(type='mmvssm.TokenRestoration'), ...]."
)


def leave(
    tokens: Tensor,
    before: Optional[PrunedTokens],
    grid: tuple[int, int],
    kept: Tensor,
    dropped: Tensor,
) -> PrunedTokens:
    """Let tokens leave.

    Args:
        tokens: All that are still there ``(B, K, C)``.
        before: What had left already; None if nothing had.
        grid: The full grid.
        kept: Which of ``tokens`` stay, as returned by :func:`select`.
        dropped: Which leave.
    """
    departed, positions = take(tokens, dropped), dropped
    if before is None:
        return PrunedTokens(take(tokens, kept), kept, grid, departed, positions)
    positions = before.positions.gather(1, dropped)
    return PrunedTokens(
        take(tokens, kept),
        before.positions.gather(1, kept),
        grid,
        torch.cat([before.departed, departed], dim=1),
        torch.cat([before.departed_positions, positions], dim=1),
    )
