"""What backbones on one grid of tokens share: position embedding, the walk over layers, and pruning after them."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, Optional, Union

import torch
from torch import Tensor, nn

from ..interpolation import resize_bicubic
from ..pruning import (
    PrunedTokens,
    TokenPruning,
    drop_tokens,
    follow,
    merge,
    padding_tokens,
    select,
    similarity_to_neighbors,
    with_dropped,
)
from .base import Backbone
from .common import accept_published_names


class LayerState(NamedTuple):
    """The output of a layer.

    Attributes:
        tokens: ``(B, L, C)``, before this layer drops any.
        grid: The full grid.
        pruned: Positions of these tokens, and what earlier layers dropped; its own ``tokens`` are those that the last
            of these layers kept. None if nothing was dropped.
        importance: ``(B, L)``, where this layer prunes: it drops the least important tokens, padding first.
    """

    tokens: Tensor
    grid: tuple[int, int]
    pruned: Optional[PrunedTokens] = None
    importance: Optional[Tensor] = None


class TokenStream(NamedTuple):
    """The input of a layer.

    Attributes:
        tokens: ``(B, L, C)``.
        grid: The full grid.
        layout: Positions of the tokens.
        padding: Positions of the full grid that see nothing but padding, bool ``(B, h * w)``; None for a dense model.
        pruned: Positions of these tokens, and what earlier layers dropped; None if nothing was dropped.
        sizes: Number of tokens that each stands for ``(B, L)``, once tokens were merged.
    """

    tokens: Tensor
    grid: tuple[int, int]
    layout: Any
    padding: Optional[Tensor] = None
    pruned: Optional[PrunedTokens] = None
    sizes: Optional[Tensor] = None


class TokenBackbone(Backbone):
    """Layers on one grid of tokens, which may drop some of them.

    A subclass sets ``embed_dims``, ``stride``, ``in_channels``, ``out_indices``, ``frozen_stages``, ``with_cp`` and
    ``pruning``, builds ``patch_embed`` and ``layers``, and calls :meth:`add_pos_embed` last. It defines
    :meth:`dense_layout` and :meth:`pruned_layout`; how it ranks tokens, it may change.

    ``patch_embed`` returns tokens ``(B, L, C)`` and their grid. A layer takes tokens, layout and ``with_cp``; it
    returns tokens, and what tokens are ranked by.
    """

    pruning: Optional[TokenPruning]

    def add_pos_embed(self, grid: tuple[int, int]) -> None:
        """Make the position embedding of a grid, let published weights load, and freeze stages."""
        self.embed_grid = grid
        self.pos_embed = nn.Parameter(torch.zeros(1, math.prod(grid), self.embed_dims))
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        accept_published_names(self)  # before the position embedding is resized
        self.register_state_dict_post_hook(_note_embed_grid)
        self._register_load_state_dict_pre_hook(self._resize_loaded_pos_embed)
        self._freeze_stages()

    def dense_layout(self, grid: tuple[int, int], device: torch.device) -> Any:
        """What a layer needs to know of tokens that fill a grid."""
        raise NotImplementedError

    def pruned_layout(self, pruned: PrunedTokens) -> Any:
        """What a layer needs to know of the tokens that are left."""
        raise NotImplementedError

    def num_kept(self, layer: int, num_tokens: int) -> int:
        """How many of ``num_tokens`` tokens a layer keeps."""
        return self.pruning.num_kept(layer, num_tokens, self.training)

    def importance(self, y: Any, grid: tuple[int, int], pruned: Optional[PrunedTokens]) -> Tensor:
        """Rank tokens.

        Args:
            y: What the layer returned beside the tokens.
            grid: The full grid.
            pruned: Positions of the tokens; None if they fill it.

        Returns:
            ``(B, L)``.
        """
        return self.pruning.importance(y, self.training)

    def match(
        self,
        tokens: Tensor,
        y: Any,
        grid: tuple[int, int],
        pruned: Optional[PrunedTokens],
        absent: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """Rank tokens that may be merged, and find the token that each would join.

        See :func:`~mmvssm.models.pruning.similarity_to_neighbors`.
        """
        positions = None if pruned is None else pruned.positions
        return similarity_to_neighbors(tokens, positions, grid, absent)

    def choose(
        self,
        importance: Tensor,
        num_kept: int,
        pruned: Optional[PrunedTokens],
        grid: tuple[int, int],
    ) -> tuple[Tensor, Tensor]:
        """Choose the tokens to keep and to drop, see :func:`~mmvssm.models.pruning.select`."""
        return select(importance, num_kept)

    def output_tokens(self, tokens: Tensor, y: Any) -> Tensor:
        """What leaves the backbone of what a layer returned."""
        return tokens

    def layer_prefixes(self) -> list[tuple[str, ...]]:
        """The embeddings, and each layer."""
        layers = ((f"layers.{i}.",) for i in range(len(self.layers)))
        return [("patch_embed.", "pos_embed"), *layers]

    def walk_layers(self, x: Tensor) -> Iterator[LayerState]:
        """Yield the output of each layer, before the output norm."""
        stream = self.embed(x)
        for i in range(len(self.layers)):
            state, stream = self.run_layer(i, stream)
            yield state

    def embed(self, x: Tensor) -> TokenStream:
        """The tokens that enter the first layer, of images ``(B, in_channels, H, W)``."""
        if x.dim() != 4 or x.shape[1] != self.in_channels:
            raise ValueError(
                f"{type(self).__name__}: expected images (B, {self.in_channels}, H, W); got {tuple(x.shape)}."
            )
        tokens, grid = self.patch_embed(x)
        tokens = tokens + self._pos_embed_for(grid)
        padding = None if self.pruning is None else padding_tokens(x, self.stride, grid)
        return TokenStream(tokens, grid, self.dense_layout(grid, x.device), padding)

    def run_layer(self, i: int, stream: TokenStream) -> tuple[LayerState, TokenStream]:
        """Run layer ``i``, on all tokens where dropped ones rejoin, and prune after it, where it prunes.

        Args:
            i: The layer, counted from 0.
            stream: The layer's input.

        Returns:
            The layer's output, and the next layer's input.
        """
        if self.pruning is not None and i == self.pruning.rejoin:
            stream = self._rejoin(stream)
        grid, pruned = stream.grid, stream.pruned
        num_tokens = num_kept = stream.tokens.shape[1]
        if self.pruning is not None:
            num_kept = self.num_kept(i, num_tokens)
        tokens, y = self.layers[i](stream.tokens, stream.layout, self.with_cp)
        leaving = self.output_tokens(tokens, y)
        if i in self.out_indices or num_kept < num_tokens:
            pruned = self._followed(pruned, tokens)
        if num_kept == num_tokens:
            return LayerState(leaving, grid, pruned), stream._replace(tokens=tokens)
        padding = stream.padding if pruned is None else stream.padding.gather(1, pruned.positions)
        merges = self.pruning.reduction == "merge"
        if merges:
            importance, target = self.match(tokens, y, grid, pruned, padding)
        else:
            importance = self.importance(y, grid, pruned)
        state = LayerState(leaving, grid, pruned, importance)
        ranked = importance.masked_fill(padding, -math.inf)
        kept, dropped = self.choose(ranked, num_kept, pruned, grid)
        sizes = stream.sizes
        if merges:
            if sizes is None:
                sizes = importance.new_ones(importance.shape)
            tokens, sizes = merge(tokens, sizes, dropped, target)
            sizes = sizes.gather(1, kept)
        pruned = drop_tokens(tokens, pruned, grid, kept, dropped)
        layout = self.pruned_layout(pruned)
        return state, TokenStream(pruned.tokens, grid, layout, stream.padding, pruned, sizes)

    def _rejoin(self, stream: TokenStream) -> TokenStream:
        """The stream with all dropped tokens back in their places."""
        if stream.pruned is None:  # in training, before the first ratio falls below 1
            return stream
        tokens = self.full_map(stream).flatten(2).transpose(1, 2)
        layout = self.dense_layout(stream.grid, tokens.device)
        return TokenStream(tokens, stream.grid, layout, stream.padding)

    def full_map(self, stream: TokenStream) -> Tensor:
        """All tokens as a map ``(B, C, h, w)``, dropped ones with their last values, or as they follow the others."""
        if stream.pruned is None:
            return stream.tokens.transpose(1, 2).unflatten(2, stream.grid)
        return with_dropped(stream.tokens, self._followed(stream.pruned, stream.tokens))

    def _followed(self, pruned: Optional[PrunedTokens], tokens: Tensor) -> Optional[PrunedTokens]:
        if pruned is None or not self.pruning.follow:
            return pruned
        return follow(pruned, tokens)

    def train(self, mode: bool = True) -> TokenBackbone:
        """Set the training mode of all but the frozen stages."""
        super().train(mode)
        self._freeze_stages()
        return self

    def _freeze_stages(self) -> None:
        if self.frozen_stages >= 0:
            self.patch_embed.eval()
            self.patch_embed.requires_grad_(False)
            self.pos_embed.requires_grad_(False)
        for layer in self.layers[: max(self.frozen_stages, 0)]:
            layer.eval()
            layer.requires_grad_(False)

    def _pos_embed_for(self, grid: tuple[int, int]) -> Tensor:
        # Comparing sizes under a compiler would fix them. Resizing to the same size changes nothing.
        if not torch.compiler.is_compiling() and grid == self.embed_grid:
            return self.pos_embed
        return _resize_pos_embed(self.pos_embed, self.embed_grid, grid)

    def _resize_loaded_pos_embed(self, state_dict, prefix, local_metadata, *args) -> None:
        loaded = state_dict.get(prefix + "pos_embed")
        if loaded is None or loaded.dim() != 3 or loaded.shape[2] != self.embed_dims:
            return  # torch reports another model's embedding like any other weight
        source = local_metadata.get("embed_grid") or self._likely_grid(loaded.shape[1])
        if tuple(source) != self.embed_grid:
            state_dict[prefix + "pos_embed"] = _resize_pos_embed(loaded, source, self.embed_grid)

    def _likely_grid(self, count: int) -> tuple[int, int]:
        """The grid of a loaded position embedding of ``count`` positions without a note of its grid."""
        name = type(self).__name__
        side = math.isqrt(count)
        square = (side, side) if side * side == count else None
        same = self.embed_grid if math.prod(self.embed_grid) == count else None
        likely = same or square
        advice = "build the model with the img_size of that training; other images may have any size all the same"
        if likely is None:
            raise ValueError(
                f"{name}: the checkpoint's position embedding has {count} positions and does not say of what grid, and "
                f"they are no square: {advice}."
            )
        if square and self.embed_grid[0] != self.embed_grid[1]:
            warnings.warn(
                f"{name}: the checkpoint's position embedding has {count} positions and does not say of what grid; it "
                f"is taken for {likely[0]}x{likely[1]}. If it was trained on another one, {advice}.",
                stacklevel=2,
            )
        return likely


def as_output(state: LayerState, norm: Callable[[Tensor], Tensor]) -> Union[Tensor, PrunedTokens]:
    """What a backbone returns of a layer's output: a map, or tokens where some were dropped."""
    tokens = norm(state.tokens)
    if state.pruned is None:
        # mmcv's RoIAlign and its like read memory as if every tensor were contiguous.
        return tokens.transpose(1, 2).contiguous().unflatten(2, state.grid)
    return PrunedTokens(
        tokens,
        state.pruned.positions,
        state.grid,
        norm(state.pruned.departed),
        state.pruned.departed_positions,
    )


def _note_embed_grid(model: TokenBackbone, state_dict, prefix: str, local_metadata: dict) -> None:
    """Say beside the weights, as modules say their version, what grid the position embedding is of."""
    local_metadata["embed_grid"] = model.embed_grid


def _resize_pos_embed(pos_embed: Tensor, source: tuple[int, int], grid: tuple[int, int]) -> Tensor:
    """``(1, L, C)`` of one grid to another, bicubic."""
    return resize_bicubic(pos_embed.unflatten(1, source), grid).flatten(1, 2)
