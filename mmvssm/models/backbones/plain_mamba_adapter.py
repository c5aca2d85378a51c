"""PlainMamba-Adapter: the backbone of PlainMamba's published detectors, dense or pruned.

A ViT-Adapter (ICLR 2023, arXiv 2205.08534) around PlainMamba (BMVC 2024, arXiv 2403.17695): a small convolutional
pyramid runs beside the backbone, and the two exchange information by deformable attention.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Sequence
from typing import NamedTuple, Optional

import torch
import torch.nn.functional as F
from mmcv.cnn.bricks import DropPath
from mmcv.ops import MultiScaleDeformableAttention
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ...registry import MODELS
from .common import init_parameters
from .fast_paths import folded_stem, linear
from .plain_mamba import PlainMamba
from .token_backbone import LayerState, TokenStream

NORM_EPS = 1e-6
"""LayerNorm epsilon in injectors and extractors."""

_INTERACTIONS = {
    "L1": ((0, 5), (6, 11), (12, 17), (18, 23)),
    "L2": ((0, 5), (6, 11), (12, 17), (18, 23)),
    "L3": ((0, 8), (9, 17), (18, 26), (27, 35)),
}
_HEADS = {"L1": 6, "L2": 6, "L3": 8}


@MODELS.register_module()
class PlainMambaAdapter(PlainMamba):
    """PlainMamba with a convolutional pyramid beside it.

    It returns four maps of ``embed_dims`` channels, at strides 4, 8, 16 and 32.

    Where tokens are pruned, extractors and the last addition read full maps, in which each dropped token has the value
    that it had when it was dropped; injectors write to the tokens that are left.

    Args:
        arch: As in :class:`~mmvssm.models.backbones.plain_mamba.PlainMamba`. Its ``patch_size`` must be 16.
        conv_inplane: Channels of the pyramid's first convolutions.
        n_points: Points that each head of the deformable attention reads on each level.
        deform_num_heads: Heads of the deformable attention; by default the published number, 8 for ``'L3'``, else 6.
        init_values: Start of the injectors' scale ``gamma``. With 0 the backbone does not see the pyramid at first.
        interaction_indexes: The first and the last layer between an injector and an extractor, for each interaction;
            together all layers. By default the published ones; a dict ``arch`` needs them.
        with_cffn: Whether extractors have a feed-forward network with a depthwise convolution.
        cffn_ratio: Width of that network relative to ``embed_dims``.
        deform_ratio: Width of the attention's values relative to ``embed_dims``.
        add_vit_feature: Whether the last layer's map is added to all four maps.
        use_extra_extractor: Whether two more extractors follow the last layer.
        drop_path_rate: As in PlainMamba; every extractor's feed-forward network uses the full rate.
        kwargs: ``img_size``, ``in_channels``, ``frozen_stages``, ``with_cp``, ``pruning``, ``raster_source``,
            ``double_step_bias`` and ``init_cfg``, as in PlainMamba. ``frozen_stages`` freezes parts of PlainMamba, not
            the pyramid.

    Raises:
        ValueError: If an argument is not as described.
    """

    def __init__(
        self,
        arch="L1",
        conv_inplane: int = 64,
        n_points: int = 4,
        deform_num_heads: Optional[int] = None,
        init_values: float = 0.0,
        interaction_indexes: Optional[Sequence[Sequence[int]]] = None,
        with_cffn: bool = True,
        cffn_ratio: float = 0.25,
        deform_ratio: float = 1.0,
        add_vit_feature: bool = True,
        use_extra_extractor: bool = True,
        drop_path_rate: float = 0.0,
        **kwargs,
    ) -> None:
        if "out_indices" in kwargs:
            raise ValueError(
                "PlainMambaAdapter: out_indices has no meaning here, the four maps are the pyramid's; remove it."
            )
        super().__init__(arch, drop_path_rate=drop_path_rate, **kwargs)
        if self.patch_size != 16:
            raise ValueError(
                "PlainMambaAdapter: the pyramid's third level has stride 16, so patch_size must be 16; got "
                f"{self.patch_size}."
            )
        name = arch if isinstance(arch, str) else None
        self.interaction_indexes = self._check_interactions(
            interaction_indexes if interaction_indexes is not None else _INTERACTIONS.get(name)
        )
        num_heads = deform_num_heads or _HEADS.get(name, 6)
        dim = self.embed_dims
        if dim % num_heads or int(dim * deform_ratio) % num_heads:
            raise ValueError(
                f"PlainMambaAdapter: embed_dims, {dim}, and its deform_ratio must be multiples of "
                f"deform_num_heads={num_heads}."
            )
        levels = range(1, 5)
        self.describe_outputs(
            [dim] * 4, (4, 8, 16, 32), (f"ad_norm{level}" for level in levels), self.unwrap_single
        )
        self.norms = nn.ModuleDict()  # the last layer's tokens leave without a norm
        self.add_vit_feature = add_vit_feature
        self.level_embed = nn.Parameter(torch.zeros(3, dim))
        self.spm = SpatialPriorModule(self.in_channels, conv_inplane, dim)
        last = len(self.interaction_indexes) - 1

        def extractor() -> Extractor:
            return Extractor(
                *(dim, num_heads, n_points, deform_ratio),
                ffn_dim=int(dim * cffn_ratio) if with_cffn else 0,
                drop_path_rate=drop_path_rate,
            )

        self.interactions = nn.ModuleList(
            Interaction(
                Injector(dim, num_heads, n_points, deform_ratio, init_values),
                [extractor() for _ in range(3 if i == last and use_extra_extractor else 1)],
            )
            for i in range(last + 1)
        )
        self.up = nn.ConvTranspose2d(dim, dim, kernel_size=2, stride=2)
        for level in levels:
            setattr(self, f"ad_norm{level}", nn.BatchNorm2d(dim))
        self._init_adapter()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Compute the feature maps.

        Args:
            x: Images ``(B, in_channels, H, W)``, of any size.

        Returns:
            Maps ``(B, embed_dims, ceil(H / s), ceil(W / s))`` for strides ``s`` of 4, 8, 16 and 32, contiguous in
            memory, whether tokens were pruned or not.

        Raises:
            ValueError: If ``x`` has another number of dimensions or channels.
        """
        return self._run(x, [])

    def walk_layers(self, x: Tensor) -> Iterator[LayerState]:
        """Yield what each layer of PlainMamba left."""
        states: list[LayerState] = []
        self._run(x, states)
        yield from states

    def _run(self, x: Tensor, states: list[LayerState]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The maps; what each layer left is appended to ``states``, if anybody keeps that list."""
        stream = self.embed(x)
        c1, pyramid = self._pyramid(x)
        for interaction, (first, last) in zip(self.interactions, self.interaction_indexes):
            stream = stream._replace(
                tokens=self._maybe_recompute(interaction.inject, stream, pyramid)
            )
            for i in range(first, last + 1):
                state, stream = self.run_layer(i, stream)
                states.append(state)
            tokens = self.full_map(stream).flatten(2).transpose(1, 2)
            pyramid = pyramid._replace(
                tokens=self._maybe_recompute(interaction.extract, pyramid, tokens, stream.grid)
            )
        return self._outputs(c1, pyramid, self.full_map(stream))

    def _maybe_recompute(self, function, *args) -> Tensor:
        if self.with_cp and torch.is_grad_enabled():
            return checkpoint(function, *args, use_reentrant=False)
        return function(*args)

    def _pyramid(self, x: Tensor) -> tuple[Tensor, Pyramid]:
        c1, *levels = self.spm(x)
        tokens = [
            level.flatten(2).transpose(1, 2) + embed
            for level, embed in zip(levels, self.level_embed)
        ]
        return c1, Pyramid(torch.cat(tokens, 1), tuple(tuple(c.shape[2:]) for c in levels))

    def _outputs(
        self, c1: Tensor, pyramid: Pyramid, x: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        c2, c3, c4 = pyramid.maps()
        height, width = c1.shape[2:]
        finer = self.up(c2)  # one row or column more, where H or W is odd
        if torch.compiler.is_compiling():  # the layout of a slice would depend on the size
            finer = F.pad(finer, (0, width - finer.shape[3], 0, height - finer.shape[2]))
        else:
            finer = finer[:, :, :height, :width]
        c1 = c1 + finer
        maps = [c1, c2, c3, c4]
        if self.add_vit_feature:
            maps = [c + _resize(x, c.shape[2:]) for c in maps]
        norms = (self.ad_norm1, self.ad_norm2, self.ad_norm3, self.ad_norm4)
        return self.pack(norm(c).contiguous() for norm, c in zip(norms, maps))

    def _check_interactions(
        self, indexes: Optional[Sequence[Sequence[int]]]
    ) -> tuple[tuple[int, int], ...]:
        count = len(self.layers)
        pairs = tuple((int(first), int(last)) for first, last in indexes or ())
        if [i for first, last in pairs for i in range(first, last + 1)] != list(range(count)):
            raise ValueError(
                "PlainMambaAdapter: interaction_indexes must be pairs (first layer, last layer) that cover layers 0 to "
                f"{count - 1} in order; got {indexes}."
            )
        return pairs

    def _init_adapter(self) -> None:
        """Initialise what PlainMamba's own initialisation does not know, as published."""
        attentions = [m for m in self.modules() if isinstance(m, MultiScaleDeformableAttention)]
        for module in (self.spm, self.interactions):
            module.apply(init_parameters)
        for attention in attentions:  # again, since these have linear layers
            attention.init_weights()
        fan_out = 4 * self.embed_dims
        nn.init.normal_(self.up.weight, std=math.sqrt(2.0 / fan_out))
        nn.init.zeros_(self.up.bias)
        nn.init.normal_(self.level_embed)


class Pyramid(NamedTuple):
    """Tokens of the three levels at strides 8, 16 and 32.

    Attributes:
        tokens: ``(B, L, C)``, level by level, row by row.
        grids: Height and width of each level.
    """

    tokens: Tensor
    grids: tuple[tuple[int, int], ...]

    def maps(self) -> list[Tensor]:
        """Each level as a map ``(B, C, h, w)``."""
        lengths = [h * w for h, w in self.grids]
        return [
            part.transpose(1, 2).unflatten(2, grid)
            for part, grid in zip(self.tokens.split(lengths, 1), self.grids)
        ]


class SpatialPriorModule(nn.Module):
    """Convolutions that make a pyramid of an image (ViT-Adapter, figure 4c)."""

    def __init__(self, in_channels: int, hidden_dim: int, dim: int) -> None:
        super().__init__()
        c = hidden_dim
        self.stem = nn.Sequential(
            *_conv_norm(in_channels, c, stride=2),
            *_conv_norm(c, c),
            *_conv_norm(c, c),
            nn.MaxPool2d(kernel_size=3, stride=2, padding=1),
        )
        self.conv2 = nn.Sequential(*_conv_norm(c, 2 * c, stride=2))
        self.conv3 = nn.Sequential(*_conv_norm(2 * c, 4 * c, stride=2))
        self.conv4 = nn.Sequential(*_conv_norm(4 * c, 4 * c, stride=2))
        self.fc1 = nn.Conv2d(c, dim, kernel_size=1)
        self.fc2 = nn.Conv2d(2 * c, dim, kernel_size=1)
        self.fc3 = nn.Conv2d(4 * c, dim, kernel_size=1)
        self.fc4 = nn.Conv2d(4 * c, dim, kernel_size=1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """``(B, in_channels, H, W)`` to four maps with ``dim`` channels, at strides 4, 8, 16 and 32."""
        c1 = self.stem[-1](folded_stem(self.stem[:-1], x))
        c2 = folded_stem(self.conv2, c1)
        c3 = folded_stem(self.conv3, c2)
        c4 = folded_stem(self.conv4, c3)
        return self.fc1(c1), self.fc2(c2), self.fc3(c3), self.fc4(c4)


class Interaction(nn.Module):
    """What goes to PlainMamba before some of its layers, and comes back after them (ViT-Adapter, figure 4)."""

    def __init__(self, injector: Injector, extractors: Sequence[Extractor]) -> None:
        super().__init__()
        self.injector = injector
        self.extractor, *extra = extractors
        self.extra_extractors = nn.ModuleList(extra)

    def inject(self, stream: TokenStream, pyramid: Pyramid) -> Tensor:
        """The tokens ``(B, L, C)`` that are left of the stream, with what they read from the pyramid."""
        points = reference_points([stream.grid], stream.tokens)
        if stream.pruned is not None:
            points = points[0][stream.pruned.positions]
        return self.injector(stream.tokens, points, pyramid)

    def extract(self, pyramid: Pyramid, x: Tensor, grid: tuple[int, int]) -> Tensor:
        """The pyramid's tokens with what they read from all tokens ``(B, h * w, C)`` of the grid."""
        points = reference_points(pyramid.grids, x)
        for extractor in (self.extractor, *self.extra_extractors):
            pyramid = pyramid._replace(tokens=extractor(pyramid, points, x, grid))
        return pyramid.tokens


class Injector(nn.Module):
    """PlainMamba's tokens read from the pyramid."""

    def __init__(
        self, dim: int, num_heads: int, n_points: int, deform_ratio: float, init_values: float
    ) -> None:
        super().__init__()
        self.query_norm = nn.LayerNorm(dim, eps=NORM_EPS)
        self.feat_norm = nn.LayerNorm(dim, eps=NORM_EPS)
        self.attn = _attention(dim, num_heads, 3, n_points, deform_ratio)
        self.gamma = nn.Parameter(torch.full((dim,), float(init_values)))

    def forward(self, x: Tensor, points: Tensor, pyramid: Pyramid) -> Tensor:
        """Read.

        Args:
            x: Tokens ``(B, L, C)``.
            points: Where they are, ``(B or 1, L, 2)``, see :func:`reference_points`.
            pyramid: What they read from.

        Returns:
            ``(B, L, C)``.
        """
        query, values = self.query_norm(x), self.feat_norm(pyramid.tokens)
        read = _attend(self.attn, query, values, torch.zeros_like(x), points, pyramid.grids)
        return x + self.gamma * read


class Extractor(nn.Module):
    """The pyramid reads from PlainMamba's map, and passes a feed-forward network."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        n_points: int,
        deform_ratio: float,
        ffn_dim: int,
        drop_path_rate: float,
    ) -> None:
        super().__init__()
        self.query_norm = nn.LayerNorm(dim, eps=NORM_EPS)
        self.feat_norm = nn.LayerNorm(dim, eps=NORM_EPS)
        self.attn = _attention(dim, num_heads, 1, n_points, deform_ratio)
        self.ffn = None
        if ffn_dim:
            self.ffn_norm = nn.LayerNorm(dim, eps=NORM_EPS)
            self.ffn = PyramidFFN(dim, ffn_dim)
            self.drop_path = DropPath(drop_path_rate)

    def forward(self, pyramid: Pyramid, points: Tensor, x: Tensor, grid: tuple[int, int]) -> Tensor:
        """Read.

        Args:
            pyramid: Its tokens read.
            points: Where they are ``(1, L, 2)``.
            x: What they read from ``(B, h * w, C)``.
            grid: ``(h, w)``.

        Returns:
            The pyramid's tokens ``(B, L, C)``.
        """
        c = pyramid.tokens
        c = _attend(self.attn, self.query_norm(c), self.feat_norm(x), c, points, (grid,))
        if self.ffn is not None:
            c = c + self.drop_path(self.ffn(pyramid._replace(tokens=self.ffn_norm(c))))
        return c


class PyramidFFN(nn.Module):
    """Feed-forward network whose depthwise convolution sees each level as a map of its own."""

    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden_dim)
        self.conv = nn.Conv2d(hidden_dim, hidden_dim, kernel_size=3, padding=1, groups=hidden_dim)
        self.fc2 = nn.Linear(hidden_dim, dim)

    def forward(self, pyramid: Pyramid) -> Tensor:
        """The pyramid's tokens ``(B, L, C)`` to the same shape."""
        hidden = pyramid._replace(tokens=linear(self.fc1, pyramid.tokens))
        levels = [self.conv(level).flatten(2).transpose(1, 2) for level in hidden.maps()]
        return linear(self.fc2, F.gelu(torch.cat(levels, 1)))


def reference_points(grids: Sequence[tuple[int, int]], like: Tensor) -> Tensor:
    """Centres ``(x, y)`` of all positions, as shares of width and height.

    Args:
        grids: Heights and widths.
        like: On whose device they are wanted.

    Returns:
        float32 ``(1, L, 2)``, grid by grid, row by row.
    """
    points = []
    for height, width in grids:
        y = (torch.arange(height, dtype=torch.float32, device=like.device) + 0.5) / height
        x = (torch.arange(width, dtype=torch.float32, device=like.device) + 0.5) / width
        points.append(
            torch.stack([x.expand(height, width), y[:, None].expand(height, width)], -1).flatten(
                0, 1
            )
        )
    return torch.cat(points)[None]


def _attention(
    dim: int, num_heads: int, num_levels: int, n_points: int, ratio: float
) -> MultiScaleDeformableAttention:
    with warnings.catch_warnings():
        # The published L3 has 56 channels a head, and mmcv recommends a power of two each time.
        warnings.filterwarnings("ignore", message="You'd better set embed_dims")
        return MultiScaleDeformableAttention(
            *(dim, num_heads, num_levels, n_points),
            dropout=0.0,
            batch_first=True,
            value_proj_ratio=ratio,
        )


def _attend(
    attention: nn.Module,
    query: Tensor,
    values: Tensor,
    identity: Tensor,
    points: Tensor,
    grids: Sequence[tuple[int, int]],
) -> Tensor:
    """Deformable attention in float32, as published; float64 stays."""
    with torch.autocast(query.device.type, enabled=False):
        query, values, identity = (
            x if x.dtype == torch.float64 else x.float() for x in (query, values, identity)
        )
        points = points.to(query.dtype).expand(query.shape[0], -1, -1)
        if torch.compiler.is_compiling():  # mmcv's loops over the values of a tensor
            return identity + _attend_in_graph(attention, query, values, points, grids)
        shapes = torch.tensor(grids, device=query.device)
        starts = F.pad(shapes.prod(1).cumsum(0)[:-1], (1, 0))
        return attention(
            query,
            value=values,
            identity=identity,
            reference_points=points[:, :, None].expand(-1, -1, len(grids), -1),
            spatial_shapes=shapes,
            level_start_index=starts,
        )


def _attend_in_graph(
    attention: nn.Module,
    query: Tensor,
    values: Tensor,
    points: Tensor,
    grids: Sequence[tuple[int, int]],
) -> Tensor:
    """What mmcv's attention adds to ``identity``, by ``grid_sample`` on grids whose sizes are no tensors."""
    heads, levels = attention.num_heads, attention.num_levels
    offsets = attention.sampling_offsets(query).unflatten(-1, (heads, levels, -1, 2))
    weights = attention.attention_weights(query).unflatten(-1, (heads, -1)).softmax(-1)
    weights = weights.unflatten(-1, (levels, -1))
    values = linear(attention.value_proj, values).unflatten(-1, (heads, -1))
    read = []
    sizes = [height * width for height, width in grids]
    for level, (part, (height, width)) in enumerate(zip(values.split(sizes, 1), grids)):
        maps = part.permute(0, 2, 3, 1).flatten(0, 1).unflatten(2, (height, width))
        x = points[:, :, None, None, 0] + offsets[..., level, :, 0] / width
        y = points[:, :, None, None, 1] + offsets[..., level, :, 1] / height
        where = (2 * torch.stack([x, y], -1) - 1).transpose(1, 2).flatten(0, 1)
        sampled = F.grid_sample(maps, where, align_corners=False)  # (B * heads, C, L, points)
        weight = weights[..., level, :].transpose(1, 2).flatten(0, 1)[:, None]
        read.append((sampled * weight).sum(-1))
    read = sum(read).unflatten(0, (-1, heads)).flatten(1, 2)
    return linear(attention.output_proj, read.transpose(1, 2))


def _resize(x: Tensor, size: Sequence[int]) -> Tensor:
    if tuple(size) == tuple(x.shape[2:]):
        return x
    return F.interpolate(x, size=tuple(size), mode="bilinear", align_corners=False)


def _conv_norm(in_channels: int, channels: int, stride: int = 1) -> list[nn.Module]:
    return [
        nn.Conv2d(in_channels, channels, kernel_size=3, stride=stride, padding=1, bias=False),
        nn.BatchNorm2d(channels),
        nn.ReLU(inplace=True),
    ]
