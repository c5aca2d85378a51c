"""Vim: Vision Mamba (ICML 2024, arXiv 2401.09417), with token pruning (NeurIPS 2024, arXiv 2409.18962).

Tokens are ``(B, L, C)`` on one line: the grid row by row, and for classification a class token in its middle. Each
layer scans the line forwards and backwards. A :class:`LineLayout` holds the places of pruned tokens.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, Optional, Union

import torch
import torch.nn.functional as F
from mmcv.cnn.bricks import DropPath
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ...ops import (
    Traversal,
    centred,
    line_conv,
    line_walks,
    neighbor_table,
    selective_scan,
    sparse_depthwise_conv,
)
from ...registry import MODELS
from ..pruning import ALIGNMENTS, PrunedTokens, TokenPruning, similarity_to_others, take
from .common import (
    check_rates,
    drop_path_schedule,
    init_step_size_bias,
    resolve_arch,
    resolve_out_indices,
)
from .fast_paths import bias_of, is_plain, linear, linear_without_bias
from .token_backbone import LayerState, TokenBackbone, TokenStream, as_output

OUT_TYPES = ("residual", "mixer", "cls_token")
MIRRORED_GATE = "mirrored_gate"


def _merging(count: int, layers: int = 11, tokens: int = 196) -> dict:
    """After every second of 24 layers, merge ``count`` of an image's tokens."""
    left = [tokens - count * i for i in range(layers + 1)]
    return dict(
        layers=tuple(range(1, 2 * layers, 2)),
        keep_ratio=tuple(after / before for before, after in zip(left, left[1:])),
        alignment="none",
        reduction="merge",
    )


class LinePruning(TokenPruning):
    """:class:`~mmvssm.models.pruning.TokenPruning` for tokens on a line, of which any number can follow each other.

    Two more choices rebuild what the code release of the pruning paper does, which differs from the paper.
    ``metric='mirrored_gate'`` ranks a token by the backward walk's gated output, unclipped, at the mirrored place of
    the line, since the release forgets to turn it round. ``alignment='recentred'`` is ``'none'``, and moves the class
    token to the middle of the tokens that are left. Two details are left out: the release makes the number of tokens
    odd, and it spares the class token in the first image of a batch only.
    """

    metrics = (*TokenPruning.metrics, MIRRORED_GATE)
    alignments = (*ALIGNMENTS, "recentred")
    presets = {
        # Which layers the paper pruned in ViM-T is unknown; these give its FLOPs.
        "T": dict(layers=(9, 19), keep_ratio=0.84),
        "S": dict(layers=(4, 9, 14), keep_ratio=0.8),
        "S-released": dict(
            layers=(4, 9, 14), keep_ratio=0.8, metric=MIRRORED_GATE, alignment="recentred"
        ),
        # As many as R-MeeTo (arXiv 2412.12496) merges at 224 pixels.
        "T-merge": _merging(5),
        "S-merge": _merging(11),
    }
    needs_grid = ()


@MODELS.register_module()
class Vim(TokenBackbone):
    """Vim backbone, dense or pruned.

    Args:
        arch: ``'T'``, ``'S'``, ``'B'``; the same with ``+``, whose patches overlap (stride 8); or a dict with
            ``embed_dims``, ``num_layers``, ``patch_size``, ``stride`` and ``d_state``.
        img_size: The size, or height and width, of the images that the position embedding is made for; it is resized
            for others.
        in_channels: Channels of the image.
        out_indices: Layers whose feature maps are returned, counted from 0; by default the last.
        out_type: ``'residual'``, the tokens after a layer, as in the paper's detector and its Vim-S segmenter;
            ``'mixer'``, what the layer adds to them, as in its Vim-T segmenter, for dense models; or ``'cls_token'``,
            the normalised class token ``(B, C)``, for classification.
        drop_path_rate: Stochastic depth of the last layer; it grows linearly from 0 at the first.
        frozen_stages: -1 freezes nothing, 0 the embeddings, ``n`` the embeddings and the first ``n`` layers. Frozen
            parts stay in evaluation mode.
        with_cp: Whether to recompute each layer's activations in the backward pass instead of storing them.
        pruning: None for the dense model; or ``dict(layers=..., keep_ratio=..., metric='clip', alignment='decay',
            reduction='prune', rejoin=None, follow=False)``, or the name of a preset, see
            :class:`LinePruning`. The class token is never pruned; it keeps its place in the line.
        init_cfg: mmengine initialisation, for example
            ``dict(type='Pretrained', checkpoint='mmvssm://vim_tiny', prefix='backbone.')``. The checkpoint's position
            embedding is resized where ``img_size`` differs. Maps need no class token, so a classifier's is ignored.
        unwrap_single: Whether to return the output itself, in place of a tuple of one, for projects that expect that.
            It needs exactly one of ``out_indices``.

    The published code ignores pixels at the bottom and on the right that fill no patch; here zeros complete the patch.
    When it resizes a position embedding, it takes the first entry for the class token's, which is in the middle; here
    the patches keep theirs.

    Raises:
        ValueError: If an argument is not as described.
    """

    arch_settings = {
        name + plus: dict(
            embed_dims=dim, num_layers=24, patch_size=16, stride=8 if plus else 16, d_state=16
        )
        for name, dim in (("T", 192), ("S", 384), ("B", 768))
        for plus in ("", "+")
    }

    def __init__(
        self,
        arch: Union[str, dict] = "T",
        img_size: Union[int, Sequence[int]] = 224,
        in_channels: int = 3,
        out_indices: Optional[Union[int, Sequence[int]]] = None,
        out_type: str = "residual",
        drop_path_rate: float = 0.0,
        frozen_stages: int = -1,
        with_cp: bool = False,
        pruning: Optional[Union[str, dict]] = None,
        init_cfg: Optional[dict] = None,
        unwrap_single: bool = False,
    ) -> None:
        super().__init__(init_cfg)
        arch = resolve_arch("Vim", arch, self.arch_settings, tuple(self.arch_settings["T"]))
        num_layers = arch["num_layers"]
        self.embed_dims, self.stride = arch["embed_dims"], arch["stride"]
        self.out_indices = resolve_out_indices(
            "Vim", num_layers - 1 if out_indices is None else out_indices, num_layers, "layers"
        )
        check_rates("Vim", drop_path_rate, frozen_stages, num_layers)
        self._check_out_type(out_type, num_layers, pruning)
        self.out_type = out_type
        count = len(self.out_indices)
        modules = (f"layers.{i}" for i in self.out_indices)
        self.describe_outputs(
            [self.embed_dims] * count, [self.stride] * count, modules, unwrap_single
        )
        self.in_channels = in_channels
        self.frozen_stages = frozen_stages
        self.with_cp = with_cp
        self.pruning = None if pruning is None else LinePruning.of(pruning, num_layers)

        self.patch_embed = PatchEmbed(in_channels, self.embed_dims, arch["patch_size"], self.stride)
        rates = drop_path_schedule(drop_path_rate, num_layers)
        self.layers = nn.ModuleList(
            VimLayer(self.embed_dims, arch["d_state"], rates[i])
            for i in range(max(self.out_indices) + 1)
        )
        for layer in self.layers:
            layer.mixer.reset_parameters(num_layers)
        if out_type == "cls_token":
            self.cls_token, self.cls_pos_embed = (
                nn.Parameter(torch.zeros(1, 1, self.embed_dims)) for _ in range(2)
            )
            for parameter in (self.cls_token, self.cls_pos_embed):
                nn.init.trunc_normal_(parameter, std=0.02)
            self.norm = RMSNorm(self.embed_dims)
        img_size = (img_size, img_size) if isinstance(img_size, int) else tuple(img_size)
        self.add_pos_embed(self.patch_embed.grid_of(img_size))
        self._register_load_state_dict_pre_hook(self._ignore_class_token)

    def forward(
        self, x: Tensor
    ) -> Union[tuple[Union[Tensor, PrunedTokens], ...], Tensor, PrunedTokens]:
        """Compute the feature maps, or the class token.

        Args:
            x: Images ``(B, in_channels, H, W)``, of any size; for programs made by ``torch.export`` with all three
                sizes dynamic, at least as high and wide as a patch. Where tokens are pruned, zeros at the bottom and on
                the right are taken for padding, see :func:`~mmvssm.models.pruning.padding_tokens`: it goes first.

        Returns:
            For each of ``out_indices`` a map ``(B, embed_dims, h, w)``, contiguous in memory, where ``h`` and ``w`` are
            the numbers of patches that cover ``H`` and ``W``; or
            :class:`~mmvssm.models.pruning.PrunedTokens`, from the first layer on that had fewer tokens to work on; or
            ``(B, embed_dims)``, as ``out_type`` says. A tuple, but for ``unwrap_single``.

        Raises:
            ValueError: If ``x`` has another number of dimensions or channels.
        """
        if self.out_type == "cls_token":
            *_, last = super().walk_layers(x)
            return self.pack([self.norm(_class_token(last))])
        return self.pack(
            as_output(state, nn.Identity())
            for i, state in enumerate(self.walk_layers(x))
            if i in self.out_indices
        )

    def layer_prefixes(self) -> list[tuple[str, ...]]:
        """The embeddings, and each layer."""
        (embeddings, *layers) = super().layer_prefixes()
        return [(*embeddings, "cls_token", "cls_pos_embed"), *layers]

    def walk_layers(self, x: Tensor) -> Iterator[LayerState]:
        """Yield the patches' tokens after each layer."""
        grid = self.patch_embed.grid_of(x.shape[2:])
        for state in super().walk_layers(x):
            yield state if self.out_type != "cls_token" else _without_class_token(state, grid)

    def embed(self, x: Tensor) -> TokenStream:
        """The tokens that enter the first layer, of images ``(B, in_channels, H, W)``."""
        stream = super().embed(x)
        if self.out_type != "cls_token":
            return stream
        middle = _middle(stream.tokens.shape[1] + 1)
        token = (self.cls_token + self.cls_pos_embed).to(stream.tokens.dtype)
        tokens = _insert(stream.tokens, middle, token.expand(x.shape[0], -1, -1))
        padding = stream.padding
        if padding is not None:
            padding = _insert(padding, middle, torch.zeros_like(padding[:, :1]))
        grid = (1, tokens.shape[1])
        return TokenStream(tokens, grid, self.dense_layout(grid, x.device), padding)

    def dense_layout(self, grid: tuple[int, int], device: torch.device) -> LineLayout:
        """Both walks over the whole line."""
        length = grid[0] * grid[1]
        return LineLayout(line_walks(length, device=device), length, apart=self._ranks_one_walk())

    def pruned_layout(self, pruned: PrunedTokens) -> LineLayout:
        """Both walks over the tokens that are left."""
        alignment, positions = self.pruning.alignment, pruned.positions
        if alignment in ("none", "recentred"):
            return self.dense_layout((1, positions.shape[1]), positions.device)
        length = pruned.grid[0] * pruned.grid[1]
        walks = line_walks(length, positions, with_gaps=alignment == "decay")
        table = neighbor_table(positions, (1, length), (1, 2 * VimMixer.conv_size - 1))
        return LineLayout(walks, length, positions, table, self._ranks_one_walk())

    def num_kept(self, layer: int, num_tokens: int) -> int:
        """How many of ``num_tokens`` tokens a layer keeps; the class token does not count."""
        spared = int(self.out_type == "cls_token")
        return super().num_kept(layer, num_tokens - spared) + spared

    def importance(self, y: Mixed, grid: tuple[int, int], pruned: Optional[PrunedTokens]) -> Tensor:
        """Rank tokens by the mean of both walks, the class token before all others."""
        if self._ranks_one_walk():
            backwards = y.scanned[:, :, 1].detach() * y.gate.detach()
            importance = backwards.float().mean(-1).flip(1)
        else:
            importance = super().importance(y.scanned, grid, pruned)
        return self._spare_class_token(importance, grid, pruned)

    def match(
        self,
        tokens: Tensor,
        y: Mixed,
        grid: tuple[int, int],
        pruned: Optional[PrunedTokens],
        absent: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """Rank tokens by what the mixer makes of them, see :func:`~mmvssm.models.pruning.similarity_to_others`."""
        if self.out_type == "cls_token":
            absent = absent | _is_class_token(absent, grid, pruned)
        importance, target = similarity_to_others(y.mixed, absent)
        return self._spare_class_token(importance, grid, pruned), target

    def choose(
        self,
        importance: Tensor,
        num_kept: int,
        pruned: Optional[PrunedTokens],
        grid: tuple[int, int],
    ) -> tuple[Tensor, Tensor]:
        """Choose the tokens to keep and to drop, see :func:`~mmvssm.models.pruning.select`."""
        kept, dropped = super().choose(importance, num_kept, pruned, grid)
        if self.pruning.alignment == "recentred" and self.out_type == "cls_token":
            is_class = _is_class_token(importance, grid, pruned).expand_as(importance)
            order = (
                is_class.gather(1, kept).long().argsort(dim=1, stable=True)
            )  # the class token last
            middle = _middle(num_kept)
            order = _insert(order[:, :-1], middle, order[:, -1:])
            kept = kept.gather(1, order)
        return kept, dropped

    def output_tokens(self, tokens: Tensor, y: Mixed) -> Tensor:
        """What leaves the backbone of what a layer returned."""
        return y.mixed if self.out_type == "mixer" else tokens

    def _ranks_one_walk(self) -> bool:
        return self.pruning is not None and self.pruning.metric == MIRRORED_GATE

    def _spare_class_token(
        self, importance: Tensor, grid: tuple[int, int], pruned: Optional[PrunedTokens]
    ) -> Tensor:
        if self.out_type != "cls_token":
            return importance
        return importance.masked_fill(_is_class_token(importance, grid, pruned), math.inf)

    def _freeze_stages(self) -> None:
        super()._freeze_stages()
        if self.frozen_stages >= 0 and self.out_type == "cls_token":
            self.cls_token.requires_grad_(False)
            self.cls_pos_embed.requires_grad_(False)

    def _ignore_class_token(self, state_dict: dict, prefix: str, *args) -> None:
        if self.out_type != "cls_token":
            for name in ("cls_token", "cls_pos_embed", "norm.weight"):
                state_dict.pop(prefix + name, None)

    def _check_out_type(self, out_type: str, num_layers: int, pruning: Any) -> None:
        if out_type not in OUT_TYPES:
            raise ValueError(
                f"Vim: unknown out_type {out_type!r}; known are {', '.join(map(repr, OUT_TYPES))}."
            )
        if out_type == "cls_token" and self.out_indices != (num_layers - 1,):
            raise ValueError(
                f"Vim: out_type='cls_token' is the last layer's; leave out out_indices, or pass {num_layers - 1}; got "
                f"{self.out_indices}."
            )
        if out_type == "mixer" and pruning is not None:
            raise ValueError(
                "Vim: pruned tokens keep the value that they had after a layer, so pruning needs "
                "out_type='residual' or 'cls_token'; got 'mixer'."
            )


class LineLayout(NamedTuple):
    """Places of the tokens of a layer.

    Attributes:
        walks: Orders in which to scan them.
        length: Places on their line.
        positions: Their places, int64 ``(B, L)``; None where they fill the line.
        neighbors: With positions, the neighbour table of the convolution, both sides together.
        apart: Whether the outputs of the two scans are wanted apart.
    """

    walks: Traversal
    length: int
    positions: Optional[Tensor] = None
    neighbors: Optional[Tensor] = None
    apart: bool = False

    def convolve(self, conv: nn.Module, x: Tensor, backwards: bool) -> Tensor:
        """Apply a one-sided convolution to tokens ``(B, L, C)``; pruned places count as zero."""
        if not is_plain(conv, nn.Conv1d):
            return self._call(conv, x, backwards)
        if self.positions is None:
            return line_conv(x, conv.weight, conv.bias, backwards)
        return sparse_depthwise_conv(x, centred(conv.weight, backwards), self.neighbors, conv.bias)

    def _call(self, conv: nn.Module, x: Tensor, backwards: bool) -> Tensor:
        """Call any other module, on the whole line."""
        line = x
        if self.positions is not None:
            line = x.new_zeros(x.shape[0], self.length, x.shape[2])
            line = line.scatter(1, self.positions[..., None].expand_as(x), x)
        line = line.flip(1) if backwards else line
        line = conv(line.transpose(1, 2))[..., : line.shape[1]].transpose(1, 2)
        line = line.flip(1) if backwards else line
        return line if self.positions is None else take(line, self.positions)


class Mixed(NamedTuple):
    """What a mixer computed.

    Attributes:
        mixed: Its output ``(B, L, dim)``.
        scanned: The mean of both scans' outputs before the gate ``(B, L, 2 * dim)``; if the layout wants them apart,
            its terms ``(B, L, 2, 2 * dim)``, forwards and backwards.
        gate: ``(B, L, 2 * dim)``.
    """

    mixed: Tensor
    scanned: Tensor
    gate: Tensor


class PatchEmbed(nn.Module):
    """Patches, which may overlap: an image to tokens."""

    def __init__(self, in_channels: int, dim: int, patch_size: int, stride: int) -> None:
        super().__init__()
        self.patch_size, self.stride = patch_size, stride
        self.proj = nn.Conv2d(in_channels, dim, patch_size, stride)
        # A normal distribution cut off at two standard deviations has 0.88 of its standard deviation left.
        nn.init.trunc_normal_(self.proj.weight)
        with torch.no_grad():
            self.proj.weight.mul_((in_channels * patch_size**2) ** -0.5 / 0.87962566)
        nn.init.zeros_(self.proj.bias)

    def grid_of(self, size: Sequence[int]) -> tuple[int, int]:
        """Rows and columns of the patches that cover an image."""
        patch, stride = self.patch_size, self.stride
        return tuple((n + m - patch) // stride + 1 for n, m in zip(size, self._missing(size)))

    def forward(self, x: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """``(B, in_channels, H, W)`` to ``(B, h * w, dim)`` and ``(h, w)``."""
        below, right = self._missing(x.shape[2:])
        if torch.compiler.is_compiling() or below or right:
            x = F.pad(x, (0, right, 0, below))
        x = self.proj(x)
        return x.flatten(2).transpose(1, 2), tuple(x.shape[2:])

    def _missing(self, size: Sequence[int]) -> list[int]:
        """Pixels that complete the last patches."""
        patch, stride = self.patch_size, self.stride
        # Under a compiler, comparing sizes would fix them.
        covered = [torch.compiler.is_compiling() or n >= patch for n in size]
        return [(patch - n) % stride if c else patch - n for n, c in zip(size, covered)]


class VimLayer(nn.Module):
    """A mixer with a residual connection (paper, algorithm 1)."""

    def __init__(self, dim: int, d_state: int, drop_path_rate: float) -> None:
        super().__init__()
        self.norm = RMSNorm(dim)
        self.mixer = VimMixer(dim, d_state)
        self.drop_path = DropPath(drop_path_rate)

    def forward(self, x: Tensor, layout: LineLayout, with_cp: bool = False) -> tuple[Tensor, Mixed]:
        """``(B, L, dim)`` to the same shape, and what the mixer computed."""
        if with_cp and torch.is_grad_enabled():
            return checkpoint(self._mix, x, layout, use_reentrant=False)
        return self._mix(x, layout)

    def _mix(self, x: Tensor, layout: LineLayout) -> tuple[Tensor, Mixed]:
        y = self.mixer(self.norm(x), layout)
        return x + self.drop_path(y.mixed), y


class VimMixer(nn.Module):
    """Bidirectional selective scan (paper, section 3.3): two branches that share the projections and the gate."""

    conv_size = 4

    def __init__(self, dim: int, d_state: int = 16, expand: int = 2) -> None:
        super().__init__()
        inner = expand * dim
        self.in_proj = nn.Linear(dim, inner, bias=False)
        self.gate_proj = nn.Linear(dim, inner, bias=False)
        self.branches = nn.ModuleList(
            Branch(inner, math.ceil(dim / 16), d_state, self.conv_size, backwards)
            for backwards in (False, True)
        )
        self.out_proj = nn.Linear(inner, dim, bias=False)

    def reset_parameters(self, num_layers: int) -> None:
        """Initialise what differs from PyTorch's defaults as the published code does."""
        with torch.no_grad():
            self.out_proj.weight.div_(math.sqrt(num_layers))
        for branch in self.branches:
            branch.reset_scan_parameters()

    def forward(self, x: Tensor, layout: LineLayout) -> Mixed:
        """Mix tokens ``(B, L, dim)``."""
        gate = F.silu(linear(self.gate_proj, x))
        x = linear(self.in_proj, x)
        per_token = zip(*(branch(x, layout) for branch in self.branches))
        u, delta, B, C = (torch.stack(both, 2) for both in per_token)
        per_walk = zip(*(branch.scan_parameters(x) for branch in self.branches))
        A, D, step_bias = (torch.stack(both) for both in per_walk)
        # The projections of a token of value zero are zero, so its step is the bias alone.
        rest = None if layout.walks.gap is None else F.softplus(step_bias)
        y = selective_scan(
            u,
            delta,
            A,
            B,
            C / 2,  # halves of both outputs add up to their mean
            D / 2,
            step_bias,
            traversal=layout.walks,
            rest=rest,
            sum_walks=not layout.apart,
        )
        out = linear(self.out_proj, (y.sum(2) if layout.apart else y) * gate)
        return Mixed(out, y, gate)


class Branch(nn.Module):
    """What one direction has of its own: convolution, projections and scan parameters."""

    def __init__(
        self, inner: int, dt_rank: int, d_state: int, conv_size: int, backwards: bool
    ) -> None:
        super().__init__()
        self.dt_rank, self.d_state, self.backwards = dt_rank, d_state, backwards
        self.conv = nn.Conv1d(inner, inner, conv_size, padding=conv_size - 1, groups=inner)
        self.x_proj = nn.Linear(inner, dt_rank + 2 * d_state, bias=False)
        self.dt_proj = nn.Linear(dt_rank, inner)
        self.A_log = nn.Parameter(torch.arange(1, d_state + 1).log().repeat(inner, 1))
        self.D = nn.Parameter(torch.ones(inner))

    def reset_scan_parameters(self) -> None:
        """Step sizes log-uniform in [0.001, 0.1] (Mamba, section 3.6)."""
        init_step_size_bias(self.dt_proj.bias)
        bound = self.dt_rank**-0.5
        nn.init.uniform_(self.dt_proj.weight, -bound, bound)

    def forward(self, x: Tensor, layout: LineLayout) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """What the scan reads for each token: ``u`` and ``delta (B, L, inner)``, ``B`` and ``C (B, L, d_state)``."""
        u = F.silu(layout.convolve(self.conv, x, self.backwards))
        dt, B, C = linear(self.x_proj, u).split((self.dt_rank, self.d_state, self.d_state), dim=-1)
        return u, linear_without_bias(self.dt_proj, dt), B, C

    def scan_parameters(self, like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """``A (inner, d_state)``, ``D (inner,)`` and the bias of the steps ``(inner,)``."""
        return -torch.exp(self.A_log), self.D, bias_of(self.dt_proj, self.dt_rank, like)


class RMSNorm(nn.LayerNorm):
    """Division by the root of the mean square (arXiv 1910.07467).

    It is an ``nn.LayerNorm`` so that rules for norms, such as mmengine's ``norm_decay_mult``, hold for it.
    """

    def __init__(self, channels: int, eps: float = 1e-5) -> None:
        super().__init__(channels, eps, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """``(..., channels)`` to the same shape."""
        return F.rms_norm(x, self.normalized_shape, self.weight, self.eps)


def _middle(num_tokens: int) -> int:
    """The place of the class token among so many tokens."""
    return (num_tokens - 1) // 2


def _insert(x: Tensor, place: int, value: Tensor) -> Tensor:
    """``(B, L, ...)`` with ``value (B, 1, ...)`` put before a place."""
    return torch.cat([x[:, :place], value.to(x.dtype), x[:, place:]], 1)


def _is_class_token(like: Tensor, grid: tuple[int, int], pruned: Optional[PrunedTokens]) -> Tensor:
    """Where the class token is among tokens: bool, of the shape ``(B, L)`` of ``like`` or one that expands to it."""
    if pruned is not None:
        return pruned.positions == _middle(grid[1])
    return torch.arange(grid[1], device=like.device)[None] == _middle(grid[1])


def _class_token(state: LayerState) -> Tensor:
    """``(B, C)``."""
    middle = _middle(state.grid[1])
    if state.pruned is None:
        return state.tokens[:, middle]
    place = (state.pruned.positions == middle).long().argmax(1, keepdim=True)
    return take(state.tokens, place)[:, 0]


def _without_class_token(state: LayerState, grid: tuple[int, int]) -> LayerState:
    """The same of the patches alone, on their grid."""
    tokens, pruned = state.tokens, state.pruned
    batch = tokens.shape[0]
    patches = ~_is_class_token(tokens, state.grid, pruned).expand(tokens.shape[:2])

    def of_patches(x: Tensor) -> Tensor:
        return x[patches].unflatten(0, (batch, -1))

    if pruned is not None:
        middle = _middle(state.grid[1])
        positions, departed = of_patches(pruned.positions), pruned.departed_positions
        pruned = PrunedTokens(
            of_patches(tokens),
            positions - (positions > middle).long(),
            grid,
            pruned.departed,
            departed - (departed > middle).long(),
        )
    importance = None if state.importance is None else of_patches(state.importance)
    return LayerState(of_patches(tokens), grid, pruned, importance)
