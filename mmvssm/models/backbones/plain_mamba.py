"""PlainMamba (BMVC 2024, arXiv 2403.17695), with token pruning (NeurIPS 2024, arXiv 2409.18962).

Tokens are ``(B, L, C)`` from the patch embedding to the last layer. Unpruned tokens fill a grid row by row, so their
memory is that of a channels-last image. A :class:`Layout` holds the positions of pruned ones.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple, Optional, Union

import torch
import torch.nn.functional as F
from mmcv.cnn.bricks import DropPath
from mmcv.cnn.bricks.transformer import PatchEmbed
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ...ops import (
    SnakeWalks,
    depthwise_conv,
    neighbor_table,
    selective_scan,
    snake_walks,
    sparse_depthwise_conv,
)
from ...registry import MODELS
from ..pruning import PrunedTokens, TokenPruning, packed_grid, take
from .common import (
    check_rates,
    convolve,
    drop_path_schedule,
    init_parameters,
    init_step_size_bias,
    resolve_arch,
    resolve_out_indices,
)
from .fast_paths import bias_of, folded_stem, is_plain_depthwise, linear, linear_without_bias
from .token_backbone import TokenBackbone, as_output

NUM_WALKS = 4
OUTPUT_EPS = 1e-6
"""LayerNorm epsilon of the outputs; inside layers it is PyTorch's default, 1e-5."""


@MODELS.register_module()
class PlainMamba(TokenBackbone):
    """PlainMamba backbone, dense or pruned.

    Args:
        arch: ``'L1'``, ``'L2'``, ``'L3'``, the paper's, or a dict with ``embed_dims``, ``num_layers``,
            ``patch_size`` (an even number), ``num_convs_patch_embed``, ``layers_with_dwconv`` (which layers a
            depthwise convolution follows, counted from 0) and ``d_state``.
        img_size: The size, or height and width, of the images that the position embedding is made for; it is resized
            for others.
        in_channels: Channels of the image.
        out_indices: Layers whose feature maps are returned, counted from 0; by default the last.
        drop_path_rate: Stochastic depth of the last layer; it grows linearly from 0 at the first.
        frozen_stages: -1 freezes nothing, 0 the embeddings, ``n`` the embeddings and the first ``n`` layers. Frozen
            parts stay in evaluation mode.
        with_cp: Whether to recompute each layer's activations in the backward pass instead of storing them. Those of
            ``layers_with_dwconv``'s convolutions are stored: their BatchNorm would count each batch twice.
        pruning: None for the dense model; or ``dict(layers=..., keep_ratio=..., metric='clip', alignment='decay',
            reduction='prune', rejoin=None, follow=False)``, see
            :class:`~mmvssm.models.pruning.TokenPruning`; or the name of one of its presets, ``'L1'``, ``'L2'`` or
            ``'L3'``, and for a pyramid of four maps ``'L1-pyramid'`` and so on. ``layers`` are those after which tokens
            are dropped.
        raster_source: Whether step ``i`` of every walk reads ``delta``, ``B`` and ``C`` from the ``i``-th token in
            raster order, as the published weights expect, instead of from the token that it visits.
        double_step_bias: Whether the bias of ``dt_proj`` counts twice, as the published weights expect.
        init_cfg: mmengine initialisation, for example
            ``dict(type='Pretrained', checkpoint='mmvssm://plainmamba_l1', prefix='backbone.')``. The checkpoint's
            position embedding is resized where ``img_size`` differs. Its grid is noted in state dicts of ours, but not
            in published ones, and ``prefix`` loses the note. Without it, an embedding with as many positions as this
            model's has this model's grid, and any other is square.
        unwrap_single: Whether to return the map itself, in place of a tuple of one, for projects that expect that. It
            needs exactly one of ``out_indices``.

    Without ``init_cfg``, step sizes start log-uniform in [0.001, 0.1], as Mamba's. The published layer does the same
    and marks the bias of ``dt_proj`` as not to be initialised again (``plain_mamba_layer.py``, ``_no_reinit``). But
    mmengine's ``init_weights`` ignores the mark, and the published classification configs set the biases of all linear
    layers to zero (``plain_mamba_l1_in1k_300e.py``): that training started with all step sizes near ln 2 = 0.69. We
    keep the start that the layer's code describes, and measured all our figures with it. For the other, pass
    ``init_cfg=dict(type='TruncNormal', layer='Linear', std=0.02, bias=0.0)``. Convolutions start as GroupMamba's, the
    published ones as PyTorch's.

    Raises:
        ValueError: If an argument is not as described.
    """

    arch_settings = {
        "L1": dict(
            embed_dims=192,
            num_layers=24,
            patch_size=16,
            num_convs_patch_embed=1,
            layers_with_dwconv=(0,),
            d_state=16,
        ),
        "L2": dict(
            embed_dims=384,
            num_layers=24,
            patch_size=16,
            num_convs_patch_embed=2,
            layers_with_dwconv=(),
            d_state=16,
        ),
        "L3": dict(
            embed_dims=448,
            num_layers=36,
            patch_size=16,
            num_convs_patch_embed=2,
            layers_with_dwconv=(),
            d_state=16,
        ),
    }

    def __init__(
        self,
        arch: Union[str, dict] = "L1",
        img_size: Union[int, Sequence[int]] = 224,
        in_channels: int = 3,
        out_indices: Optional[Union[int, Sequence[int]]] = None,
        drop_path_rate: float = 0.0,
        frozen_stages: int = -1,
        with_cp: bool = False,
        pruning: Optional[Union[str, dict]] = None,
        raster_source: bool = True,
        double_step_bias: bool = True,
        init_cfg: Optional[dict] = None,
        unwrap_single: bool = False,
    ) -> None:
        super().__init__(init_cfg)
        arch = resolve_arch("PlainMamba", arch, self.arch_settings, tuple(self.arch_settings["L1"]))
        num_layers, patch_size = arch["num_layers"], arch["patch_size"]
        if patch_size % 2:
            raise ValueError(f"PlainMamba: patch_size must be even; got {patch_size}.")
        if any(not 0 <= i < num_layers for i in arch["layers_with_dwconv"]):
            raise ValueError(
                f"PlainMamba: layers_with_dwconv must be from 0 to {num_layers - 1}; got "
                f"{list(arch['layers_with_dwconv'])}."
            )
        self.embed_dims = arch["embed_dims"]
        self.patch_size = self.stride = patch_size
        self.out_indices = resolve_out_indices(
            "PlainMamba",
            num_layers - 1 if out_indices is None else out_indices,
            num_layers,
            "layers",
        )
        check_rates("PlainMamba", drop_path_rate, frozen_stages, num_layers)
        count = len(self.out_indices)
        modules = (f"layers.{i}" for i in self.out_indices)
        self.describe_outputs(
            [self.embed_dims] * count, [patch_size] * count, modules, unwrap_single
        )
        self.in_channels = in_channels
        self.frozen_stages = frozen_stages
        self.with_cp = with_cp
        self.raster_source = raster_source
        self.pruning = None if pruning is None else TokenPruning.of(pruning, num_layers)

        img_size = (img_size, img_size) if isinstance(img_size, int) else tuple(img_size)
        self.patch_embed = ConvPatchEmbed(
            in_channels, self.embed_dims, patch_size, arch["num_convs_patch_embed"]
        )
        rates = drop_path_schedule(drop_path_rate, num_layers)
        self.layers = nn.ModuleList(
            PlainMambaLayer(
                self.embed_dims,
                arch["d_state"],
                rates[i],
                with_dwconv=i in arch["layers_with_dwconv"],
                double_step_bias=double_step_bias,
            )
            for i in range(max(self.out_indices) + 1)
        )
        self.norms = nn.ModuleDict(
            {str(i): nn.LayerNorm(self.embed_dims, eps=OUTPUT_EPS) for i in self.out_indices}
        )
        self.apply(init_parameters)
        self.add_pos_embed(tuple(math.ceil(size / patch_size) for size in img_size))

    def forward(
        self, x: Tensor
    ) -> Union[tuple[Union[Tensor, PrunedTokens], ...], Tensor, PrunedTokens]:
        """Compute the feature maps.

        Args:
            x: Images ``(B, in_channels, H, W)``, of any size; for programs made by ``torch.export`` with all three
                sizes dynamic, higher and wider than a patch. Where tokens are pruned, zeros at the bottom and on the
                right are taken for padding, see :func:`~mmvssm.models.pruning.padding_tokens`: it goes first.

        Returns:
            For each of ``out_indices`` a map ``(B, embed_dims, ceil(H / patch_size), ceil(W / patch_size))``,
            contiguous in memory; or, from the first layer on that had fewer tokens to work on than there are
            positions, :class:`~mmvssm.models.pruning.PrunedTokens`, which
            :class:`~mmvssm.models.necks.TokenRestoration` turns into maps. A tuple, but for ``unwrap_single``.

        Raises:
            ValueError: If ``x`` has another number of dimensions or channels.
            PruningError: If ``alignment='none'`` cannot pack the tokens that remain. It asks for their number, so
                ``torch.export`` fixes the sizes of the images.
        """
        return self.pack(
            as_output(state, self.norms[str(i)])
            for i, state in enumerate(self.walk_layers(x))
            if i in self.out_indices
        )

    def dense_layout(self, grid: tuple[int, int], device: torch.device) -> Layout:
        """Walks over the whole grid."""
        walks = snake_walks(*grid, raster_source=self.raster_source, device=device)
        return Layout(walks, grid)

    def pruned_layout(self, pruned: PrunedTokens) -> Layout:
        """Walks over the tokens that are left."""
        if self.pruning.alignment == "none":
            grid = packed_grid(pruned.tokens.shape[1], pruned.grid)
            return self.dense_layout(grid, pruned.tokens.device)
        walks = snake_walks(
            *pruned.grid,
            pruned.positions,
            raster_source=self.raster_source,
            with_gaps=self.pruning.alignment == "decay",
        )
        return Layout(walks, pruned.grid, pruned.positions, {})


class Layout(NamedTuple):
    """Positions of the tokens of a layer.

    Attributes:
        walks: Orders in which to scan them.
        grid: Height and width of their grid.
        positions: Their row-major positions, int64 ``(B, L)``; None where they fill the grid.
        neighbors: With positions, the neighbour tables by kernel size, filled when a size is first needed.
    """

    walks: SnakeWalks
    grid: tuple[int, int]
    positions: Optional[Tensor] = None
    neighbors: Optional[dict[int, Tensor]] = None

    def convolve(self, conv: nn.Module, x: Tensor) -> Tensor:
        """Apply a depthwise convolution to tokens ``(B, L, C)``; pruned positions count as zero."""
        if not is_plain_depthwise(conv):
            return self._call(conv, x)
        if self.positions is None:
            return depthwise_conv(x, conv.weight, self.grid, conv.bias)
        size = conv.kernel_size[0]
        if size not in self.neighbors:
            self.neighbors[size] = neighbor_table(self.positions, self.grid, size)
        return sparse_depthwise_conv(x, conv.weight, self.neighbors[size], conv.bias)

    def _call(self, conv: nn.Module, x: Tensor) -> Tensor:
        """Call any other module, on a map of the whole grid."""
        if self.positions is None:
            return convolve(conv, x.unflatten(1, self.grid)).flatten(1, 2)
        maps = x.new_zeros(x.shape[0], self.grid[0] * self.grid[1], x.shape[2])
        maps = maps.scatter(1, self.positions[..., None].expand_as(x), x)
        return take(convolve(conv, maps.unflatten(1, self.grid)).flatten(1, 2), self.positions)


class ConvPatchEmbed(nn.Module):
    """Convolutions, and then patches: an image to tokens (the convolutional tokenizer of PlainMamba)."""

    hidden_dim = 64

    def __init__(self, in_channels: int, dim: int, patch_size: int, num_convs: int) -> None:
        super().__init__()
        layers = []
        for i in range(1 + num_convs):
            size, stride = (7, 2) if i == 0 else (3, 1)
            layers += [
                nn.Conv2d(in_channels, self.hidden_dim, size, stride, size // 2, bias=False),
                nn.BatchNorm2d(self.hidden_dim),
                nn.ReLU(inplace=True),
            ]
            in_channels = self.hidden_dim
        self.convs = nn.Sequential(*layers)
        self.stride = patch_size // 2
        self.patches = PatchEmbed(
            self.hidden_dim, dim, kernel_size=self.stride, stride=self.stride, padding=0
        )

    def forward(self, x: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """``(B, in_channels, H, W)`` to ``(B, h * w, dim)`` and ``(h, w)``."""
        x = folded_stem(self.convs, x.contiguous(memory_format=torch.channels_last))
        # Not by mmcv's padding="corner": it compares sizes, which torch.export would fix.
        right, bottom = -x.shape[3] % self.stride, -x.shape[2] % self.stride
        if torch.compiler.is_compiling() or right or bottom:
            x = F.pad(x, (0, right, 0, bottom))
        return self.patches(x)


class PlainMambaLayer(nn.Module):
    """A mixer with a residual connection, in some layers followed by a depthwise convolution."""

    def __init__(
        self,
        dim: int,
        d_state: int,
        drop_path_rate: float,
        with_dwconv: bool = False,
        double_step_bias: bool = True,
    ) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.mixer = PlainMambaMixer(dim, d_state, double_step_bias)
        self.drop_path = DropPath(drop_path_rate)
        self.dwconv = None
        if with_dwconv:
            self.dwconv = nn.Conv2d(dim, dim, kernel_size=3, padding=1, groups=dim, bias=False)
            self.dwconv_norm = nn.BatchNorm1d(dim)

    def forward(self, x: Tensor, layout: Layout, with_cp: bool = False) -> tuple[Tensor, Tensor]:
        """``(B, L, dim)`` to the same shape, and the scan's output, see :class:`PlainMambaMixer`."""
        if with_cp and torch.is_grad_enabled():
            x, y = checkpoint(self._mix, x, layout, use_reentrant=False)
        else:
            x, y = self._mix(x, layout)
        if self.dwconv is not None:
            # Outside of the checkpoint, because BatchNorm updates its statistics whenever it runs.
            x = layout.convolve(self.dwconv, x)
            x = F.gelu(self.dwconv_norm(x.flatten(0, 1)).unflatten(0, x.shape[:2]))
        return x, y

    def _mix(self, x: Tensor, layout: Layout) -> tuple[Tensor, Tensor]:
        out, y = self.mixer(self.norm(x), layout)
        return x + self.drop_path(out), y


class PlainMambaMixer(nn.Module):
    """Direction-aware selective scan along four continuous walks (PlainMamba)."""

    def __init__(
        self,
        dim: int,
        d_state: int = 16,
        double_step_bias: bool = True,
        expand: int = 2,
        conv_size: int = 7,
    ) -> None:
        super().__init__()
        inner = expand * dim
        self.d_state = d_state
        self.dt_rank = math.ceil(dim / 16)
        self.double_step_bias = double_step_bias
        self.in_proj = nn.Linear(dim, inner)
        self.gate_proj = nn.Linear(dim, inner)
        self.conv = nn.Conv2d(inner, inner, conv_size, padding=conv_size // 2, groups=inner)
        self.x_proj = nn.Linear(inner, self.dt_rank + 2 * d_state, bias=False)
        self.dt_proj = nn.Linear(self.dt_rank, inner)
        self.A_log = nn.Parameter(torch.arange(1, d_state + 1).log().repeat(inner, 1))
        self.D = nn.Parameter(torch.ones(inner))
        self.direction_Bs = nn.Parameter(torch.zeros(5, d_state))
        self.out_proj = nn.Linear(inner, dim)

    def reset_scan_parameters(self) -> None:
        """Step sizes log-uniform in [0.001, 0.1], ``A = -(1 .. d_state)``, ``D = 1`` (Mamba, section 3.6)."""
        init_step_size_bias(self.dt_proj.bias)
        bound = self.dt_rank**-0.5
        nn.init.uniform_(self.dt_proj.weight, -bound, bound)
        with torch.no_grad():
            self.A_log.copy_(torch.arange(1, self.d_state + 1).log())
            self.D.fill_(1.0)
        nn.init.trunc_normal_(self.direction_Bs, std=0.02)

    def forward(self, x: Tensor, layout: Layout) -> tuple[Tensor, Tensor]:
        """Mix tokens.

        Args:
            x: ``(B, L, dim)``.
            layout: Their positions.

        Returns:
            ``(B, L, dim)``, and the scan's output before the gate, summed over the walks, ``(B, L, 2 * dim)``.
        """
        gate = F.silu(linear(self.gate_proj, x))
        x = F.silu(layout.convolve(self.conv, linear(self.in_proj, x)))
        dt, B, C = linear(self.x_proj, x).split((self.dt_rank, self.d_state, self.d_state), dim=-1)
        delta = linear_without_bias(self.dt_proj, dt)
        y = self.scan(x, delta, B, C, layout.walks)
        return linear(self.out_proj, y * gate), y

    def scan(self, x: Tensor, delta: Tensor, B: Tensor, C: Tensor, walks: SnakeWalks) -> Tensor:
        """Scan along the four walks, which share all but the direction in B, and sum.

        Args:
            x: ``(B, L, 2 * dim)``.
            delta: The same shape, without bias.
            B: ``(B, L, d_state)``.
            C: ``(B, L, d_state)``.
            walks: Over the ``L`` tokens.

        Returns:
            ``(B, L, 2 * dim)``.
        """
        step_bias = bias_of(self.dt_proj, self.dt_rank, x) * (2 if self.double_step_bias else 1)
        # The projections of a token of value zero are their biases.
        rest = None if walks.traversal.gap is None else every_walk(F.softplus(step_bias), 0)
        direction = F.embedding(walks.arrival, self.direction_Bs).transpose(-3, -2)
        return selective_scan(
            x[:, :, None],
            delta[:, :, None],
            every_walk(-torch.exp(self.A_log), 0),
            B[:, :, None] + direction.to(B.dtype),
            every_walk(C, 2),
            every_walk(self.D, 0),
            every_walk(step_bias, 0),
            traversal=walks.traversal,
            rest=rest,
            sum_walks=True,
        )


def every_walk(x: Tensor, dim: int) -> Tensor:
    """The same values for each walk, a new dimension of ``x``, without a copy."""
    shape = list(x.shape)
    shape.insert(dim, NUM_WALKS)
    return x.unsqueeze(dim).expand(shape)
