"""Token pruning for vision state-space models (NeurIPS 2024, arXiv 2409.18962).

Which tokens a backbone keeps after which layers, and what it passes to the neck that rebuilds its maps.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Callable, NoReturn, Optional, Union

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import UserError
from .interpolation import interpolate_known

METRICS: dict[str, Callable[[Tensor], Tensor]] = {
    "clip": lambda y: y.clamp(min=0).mean(-1),
    "value": lambda y: y.mean(-1),
    "l1": lambda y: y.abs().mean(-1),
    "l2": lambda y: y.square().mean(-1).sqrt(),
}
"""Importance of tokens ``(B, L)`` from the scan's output ``(B, L, D)``: the paper's, and those of its ablation."""

RANDOM = "random"
"""Baseline without a metric: random tokens.

Training draws them anew for each image and step; evaluation keeps the same ones in all images.
"""

REDUCTIONS = ("prune", "merge")
"""How the number of tokens is reduced.

``'prune'`` drops the least important tokens. ``'merge'``, a baseline that needs no training, ignores the metric and
averages each dropped token into the most similar of its neighbours (:func:`similarity_to_neighbors`).
"""

ALIGNMENTS = ("decay", "hold", "none")
"""How the hidden state changes where a walk passes a pruned position.

``'decay'``: as at a token of value zero. ``'hold'``: not at all. ``'none'``: walks pass no such positions, because the
kept tokens are packed row by row into a smaller grid.

It is unclear whether the published method decays or holds the state: its release lacks the alignment, and descriptions
of it differ.
"""

_MERGING = dict(reduction="merge", follow=True)
PRESETS: dict[str, dict] = {
    "L1": dict(layers=(3, 7, 11), keep_ratio=0.6),
    "L2": dict(layers=(3, 7, 11), keep_ratio=0.65),
    "L3": dict(layers=(5, 11, 17), keep_ratio=0.7),
    "L1-pyramid": dict(layers=(5, 8, 11, 17), keep_ratio=(0.6, 0.6, 0.5, 0.5), **_MERGING),
    "L2-pyramid": dict(layers=(5, 8, 11, 17), keep_ratio=(0.7, 0.65, 0.5, 0.5), **_MERGING),
    "L3-pyramid": dict(layers=(8, 13, 17, 26), keep_ratio=(0.75, 0.7, 0.6, 0.5), **_MERGING),
}
"""Settings that save at least 40 % of the FLOPs of PlainMamba's sizes.

The first three prune as published, for classification. The others are for a pyramid of four maps, ``out_indices=(5, 11,
17, 23)`` or ``(8, 17, 26, 35)``: a map of a coarser level needs fewer tokens, so none goes before the first map.
"""

_OPTIONAL = ("metric", "alignment", "reduction", "rejoin", "follow")


class PruningError(UserError, ValueError):
    """Raise where pruned tokens meet a setting or a neck that cannot take them. The message says what to do."""


class NotAMapError(PruningError, AttributeError):
    """Raise where a caller asks pruned tokens for what only maps have; ``hasattr`` then returns False."""


class TokenPruning:
    """After which layers a backbone prunes, and how many tokens.

    Args:
        layers: Layers after which tokens are dropped, counted from 0, increasing.
        keep_ratio: Share of tokens, in (0, 1], that each of these layers keeps: one number, or one for each layer.
        metric: Importance of a token: one of :data:`METRICS`, or :data:`RANDOM`.
        alignment: See :data:`ALIGNMENTS`.
        reduction: See :data:`REDUCTIONS`. Merging keeps at least half of the tokens at a time.
        follow: Whether dropped tokens go on changing, by the mean of what kept tokens around them change by. Otherwise
            they keep their last values.
        rejoin: Layer before which all dropped tokens return with their last values, counted from 0, as SViT (WACV
            2024) lets them for dense tasks; from there on the backbone is dense. None: they never return.
        num_layers: Number of layers.

    Attributes:
        progress: Share of the pruning, from 0 to 1, that takes place while training: the keep ratio is
            ``1 - progress * (1 - keep_ratio)``. Evaluation always prunes fully.

    Raises:
        ValueError: If one of the arguments is not as described.
    """

    metrics = (*METRICS, RANDOM)
    alignments = ALIGNMENTS
    presets = PRESETS
    needs_grid = ("none",)
    """Alignments that pack tokens into a smaller grid, which not every number of them fills."""

    def __init__(
        self,
        layers: Sequence[int],
        keep_ratio: Union[float, Sequence[float]],
        metric: str = "clip",
        alignment: str = "decay",
        reduction: str = "prune",
        rejoin: Optional[int] = None,
        follow: bool = False,
        *,
        num_layers: int,
    ) -> None:
        layers = (layers,) if isinstance(layers, int) else tuple(layers)
        # Dropping tokens after the last layer would save nothing.
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
            ("metric", metric, self.metrics),
            ("alignment", alignment, self.alignments),
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
        if rejoin is not None and not (
            isinstance(rejoin, int) and layers[-1] + 1 < rejoin < num_layers
        ):
            raise ValueError(
                f"pruning: rejoin must be a layer from {layers[-1] + 2} to {num_layers - 1}, so that one layer at "
                f"least works on what is left; got {rejoin}."
            )
        self.keep_ratios = dict(zip(layers, map(float, ratios)))
        self.metric = metric
        self.alignment = alignment
        self.reduction = reduction
        self.rejoin = rejoin
        self.follow = follow
        self.progress = 1.0

    @classmethod
    def of(cls, settings: Union[str, dict], num_layers: int) -> TokenPruning:
        """Build from a config: a dict of arguments, or the name of one of the presets."""
        if isinstance(settings, str):
            if settings not in cls.presets:
                raise ValueError(
                    f"pruning: unknown preset {settings!r}; known are {', '.join(map(repr, cls.presets))}, or a dict "
                    f"with layers and keep_ratio, and perhaps {', '.join(_OPTIONAL)}."
                )
            settings = cls.presets[settings]
        known = {"layers", "keep_ratio", *_OPTIONAL}
        if not {"layers", "keep_ratio"} <= set(settings) <= known:
            raise ValueError(
                f"pruning: expected a dict with layers and keep_ratio, and perhaps {', '.join(_OPTIONAL)}; got the "
                f"keys {sorted(settings)}."
            )
        return cls(**settings, num_layers=num_layers)

    def num_kept(self, layer: int, num_tokens: int, training: bool = False) -> int:
        """Number of ``num_tokens`` tokens that ``layer`` keeps: all, where it does not prune."""
        if layer not in self.keep_ratios:
            return num_tokens
        ratio = self._warmed_up(self.keep_ratios[layer]) if training else self.keep_ratios[layer]
        numerator, denominator = _as_fraction(ratio)
        # Positive numbers only, because ONNX rounds the division of negative ones differently.
        return (num_tokens * numerator + denominator - 1) // denominator

    def training_keep_ratio(self) -> float:
        """The current keep ratio in training; the smallest where layers differ."""
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
    """The fraction nearest to a ratio, as numerator and denominator.

    In floating point, 0.1 * 30 exceeds 3, so 4 tokens would be kept. Whole numbers also suit torch.export's symbols.
    """
    fraction = Fraction(ratio).limit_denominator(1_000_000)
    return fraction.numerator, fraction.denominator


def select(importance: Tensor, num_kept: int) -> tuple[Tensor, Tensor]:
    """Split tokens into the most important ones and the rest, each in their old order.

    Args:
        importance: ``(B, L)``. Of two equally important tokens, the first is kept.
        num_kept: Number of tokens to keep.

    Returns:
        Indices of the kept ``(B, num_kept)`` and the dropped ``(B, L - num_kept)`` tokens, int64, increasing.
    """
    ranked = importance.sort(dim=-1, descending=True, stable=True).indices
    return ranked[:, :num_kept].sort(-1).values, ranked[:, num_kept:].sort(-1).values


def similarity_to_neighbors(
    tokens: Tensor, positions: Optional[Tensor], grid: tuple[int, int], absent: Tensor
) -> tuple[Tensor, Tensor]:
    """Match each token that may be merged with its most similar neighbour.

    This is the matching of ToMe (ICLR 2023, arXiv 2210.09461) among neighbours of a grid. Every second token along the
    snake walk through the rows may be merged: on a full grid, the black squares of a chessboard. Its candidates are the
    tokens before and after it along this walk and along the walk through the columns: on a full grid, the white squares
    around it. The candidate with the largest cosine similarity is taken.

    Args:
        tokens: ``(B, L, C)``.
        positions: Their row-major positions in the grid, int64 ``(B, L)``; None if they fill it.
        grid: Height and width of the grid.
        absent: Tokens that no other may join, bool ``(B, L)``.

    Returns:
        Importance ``(B, L)``: minus the similarity, or at least 2 for tokens that cannot be merged. And the index of
        the token to join, int64 ``(B, L)``; a token's own index where there is none.
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
    mergeable = ranks[0] % 2 == 1
    unit = F.normalize(tokens.detach().float(), dim=-1)
    best = unit.new_full((batch, count), -math.inf)
    target = torch.arange(count, device=tokens.device).expand(batch, count)
    for order, rank in zip(orders, ranks):
        for step in (-1, 1):
            there = (rank + step >= 0) & (rank + step < count)
            other = order.gather(1, (rank + step).clamp(0, count - 1))
            there &= mergeable & ~mergeable.gather(1, other) & ~absent.gather(1, other)
            similarity = (unit * take(unit, other)).sum(-1).masked_fill(~there, -math.inf)
            target = torch.where(similarity > best, other, target)
            best = torch.maximum(best, similarity)
    alone = torch.where(mergeable, 2.0, 3.0)  # above minus any cosine
    return torch.where(best == -math.inf, alone, -best), target


def similarity_to_others(tokens: Tensor, absent: Tensor) -> tuple[Tensor, Tensor]:
    """Match every second token with the most similar of the others, wherever it is (ToMe, section 3).

    Args:
        tokens: What they are compared by ``(B, L, C)``.
        absent: Tokens that neither merge nor are joined, bool ``(B, L)``.

    Returns:
        As :func:`similarity_to_neighbors`.
    """
    unit = F.normalize(tokens.detach().float(), dim=-1)
    similarity = unit[:, ::2] @ unit[:, 1::2].mT
    similarity = similarity.masked_fill(absent[:, None, 1::2], -math.inf)
    best, joined = similarity.max(-1)
    alone = absent[:, ::2] | (best == -math.inf)
    importance = unit.new_full(absent.shape, 3.0)
    importance[:, ::2] = torch.where(alone, 2.0, -best)
    target = torch.arange(absent.shape[1], device=tokens.device).repeat(absent.shape[0], 1)
    target[:, ::2] = torch.where(alone, target[:, ::2], 2 * joined + 1)
    return importance, target


def merge(tokens: Tensor, sizes: Tensor, leaving: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Average tokens into others.

    Args:
        tokens: ``(B, L, C)``.
        sizes: Number of tokens that each token stands for, which is its weight ``(B, L)``.
        leaving: Indices of the tokens to merge ``(B, K)``, int64.
        target: For each token, the index of the token that it would join ``(B, L)``, int64.

    Returns:
        All tokens and sizes; those of the joined tokens have changed.
    """
    joined = target.gather(1, leaving)
    weighted = tokens * sizes[..., None].to(tokens.dtype)
    index = joined[..., None].expand(-1, -1, tokens.shape[2])
    sums = weighted.scatter_add(1, index, take(weighted, leaving))
    merged = sizes.scatter_add(1, joined, sizes.gather(1, leaving))
    changed = (merged != sizes)[..., None]
    return torch.where(changed, sums / merged[..., None].to(tokens.dtype), tokens), merged


def padding_tokens(images: Tensor, stride: int, grid: tuple[int, int]) -> Tensor:
    """Find the tokens that see nothing but padding.

    mmdet and mmseg pad the normalised images of a batch to one size, with zeros at the bottom and on the right. They
    pass a backbone nothing but the images, so we look for rows and columns of zeros there. Pixels are whole numbers and
    the usual means are not, so no normalised pixel is zero; with other means, black borders count as padding too.

    All images of a batch keep the same number of tokens, a share of the padded grid. So an image beside a larger one
    keeps more of its own tokens, and padding only once it has kept all of them.

    Args:
        images: ``(B, C, H, W)``.
        stride: Pixels from one token to the next.
        grid: Rows and columns of tokens.

    Returns:
        bool ``(B, h * w)``, row by row.
    """
    magnitude = images.abs()
    rows, columns = (magnitude.amax(dims) != 0 for dims in ((1, 3), (1, 2)))
    # All rows up to the last used one count as used; a token is used if its first row or column is.
    rows, columns = (
        used.flip(1).cumsum(1).flip(1)[:, ::stride][:, :count] > 0
        for used, count in zip((rows, columns), grid)
    )
    return ~(rows[:, :, None] & columns[:, None]).flatten(1)


def take(x: Tensor, index: Tensor) -> Tensor:
    """The tokens ``(B, K, C)`` at ``index (B, K)`` of ``x (B, L, C)``."""
    # Copying whole rows is several times as fast as torch.gather, which indexes single elements.
    first = torch.arange(x.shape[0], device=x.device)[:, None] * x.shape[1]
    return x.flatten(0, 1).index_select(0, (index + first).flatten()).unflatten(0, index.shape)


def restore_map(tokens: Tensor, positions: Tensor, grid: tuple[int, int]) -> Tensor:
    """Scatter tokens to their places, with zeros elsewhere.

    Args:
        tokens: ``(B, K, C)``.
        positions: Their row-major positions on the grid, int64 ``(B, K)``.
        grid: ``(h, w)``.

    Returns:
        ``(B, C, h, w)``.
    """
    batch, _, channels = tokens.shape
    first = torch.arange(batch, device=positions.device)[:, None] * (grid[0] * grid[1])
    maps = tokens.new_zeros((batch * grid[0] * grid[1], channels))
    maps = maps.index_copy(0, (positions + first).flatten(), tokens.flatten(0, 1))
    return maps.view(batch, *grid, channels).permute(0, 3, 1, 2)


def with_dropped(tokens: Tensor, pruned: PrunedTokens) -> Tensor:
    """All tokens of the grid as a map ``(B, C, h, w)``, dropped ones with their last values.

    Args:
        tokens: Kept tokens ``(B, K, C)``, perhaps after further layers.
        pruned: Their positions, and the dropped tokens.
    """
    positions = torch.cat([pruned.positions, pruned.departed_positions], 1)
    tokens = torch.cat([tokens, pruned.departed.to(tokens.dtype)], 1)
    return restore_map(tokens, positions, pruned.grid)


def follow(pruned: PrunedTokens, tokens: Tensor) -> PrunedTokens:
    """Change dropped tokens by the mean of what kept ones around them have changed by.

    Args:
        pruned: What the last pruning kept, and what was dropped.
        tokens: What further layers made of the kept tokens ``(B, K, C)``.
    """
    positions, grid = pruned.positions, pruned.grid
    change = tokens - pruned.tokens
    kept = torch.ones_like(change[..., :1])
    maps, known = (restore_map(x, positions, grid).permute(0, 2, 3, 1) for x in (change, kept))
    change = interpolate_known(maps, known).flatten(1, 2)
    change = take(change, pruned.departed_positions).to(pruned.departed.dtype)
    return replace(pruned, departed=pruned.departed + change)


def packed_grid(num_tokens: int, grid: tuple[int, int]) -> tuple[int, int]:
    """The grid of exactly ``num_tokens`` positions whose shape is nearest to that of ``grid``.

    Raises:
        PruningError: If the nearest one is more than twice as long or as wide in proportion.
    """
    height, width = grid

    def distortion(rows: int) -> float:
        # Rounded, so that the flatter of two equally good grids wins.
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
    """A feature map of which a backbone has pruned tokens.

    :class:`~mmvssm.models.necks.TokenRestoration` makes a map ``(B, C, H, W)`` of it. Positions are row-major. Two
    objects are equal only if they are the same object, as with modules.

    Attributes:
        tokens: Kept tokens ``(B, K, C)``.
        positions: Their positions, int64 ``(B, K)``, increasing.
        grid: Height and width of the full grid.
        departed: Last value of each dropped token ``(B, H * W - K, C)``.
        departed_positions: Their positions, int64 ``(B, H * W - K)``, in the order in which they were dropped.
    """

    tokens: Tensor
    positions: Tensor
    grid: tuple[int, int]
    departed: Tensor
    departed_positions: Tensor

    def to(self, *args, **kwargs) -> PrunedTokens:
        """Move to another device or dtype, as ``Tensor.to``; positions stay int64."""
        tokens, departed = (x.to(*args, **kwargs) for x in (self.tokens, self.departed))
        positions, left = (x.to(tokens.device) for x in (self.positions, self.departed_positions))
        return PrunedTokens(tokens, positions, self.grid, departed, left)

    def __getattr__(self, name: str) -> NoReturn:
        # Such as shape or dim, which only tensors have.
        if name.startswith("__"):
            raise AttributeError(name)
        raise NotAMapError(f"PrunedTokens has no {name!r}. {_NO_NECK}")

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None) -> NoReturn:
        raise PruningError(_NO_NECK)


# Its tensors are inputs and outputs of exported programs.
torch.export.register_dataclass(
    PrunedTokens, serialized_type_name="mmvssm.models.pruning.PrunedTokens"
)

_NO_NECK = (
    "A pruned backbone's outputs are tokens, not maps: put dict(type='mmvssm.TokenRestoration') before other necks, "
    "neck=[dict(type='mmvssm.TokenRestoration'), ...]."
)


def drop_tokens(
    tokens: Tensor,
    before: Optional[PrunedTokens],
    grid: tuple[int, int],
    kept: Tensor,
    dropped: Tensor,
) -> PrunedTokens:
    """Drop tokens, and note their last values.

    Args:
        tokens: Those that earlier layers kept ``(B, K, C)``.
        before: What earlier layers have dropped; None if nothing.
        grid: The full grid.
        kept: Indices of ``tokens`` to keep, as returned by :func:`select`.
        dropped: Indices of ``tokens`` to drop.
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
