"""GroupMamba: Efficient Group-Based Visual State Space Model (CVPR 2025, arXiv 2407.13772).

Feature maps are ``(B, H, W, C)``, channels last, from the stem to the last stage. A convolution
sees the same memory through :func:`convolve` as a channels-last image, so nothing is copied between
layers.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple, Optional, Union

import torch
import torch.nn as nn
import torch.nn.functional as F
from mmcv.cnn.bricks import DropPath
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ...ops import Traversal, cross_traversal, selective_scan
from ...registry import MODELS
from .base import Backbone, stage_prefixes
from .common import (
    DownSample,
    accept_published_names,
    check_rates,
    convolve,
    drop_path_schedule,
    init_parameters,
    init_step_size_bias,
    resolve_arch,
    resolve_out_indices,
)
from .fast_paths import (
    conv_silu,
    feed_forward,
    folded_stem,
    gated_norm,
    linear,
    modulated_norm,
)

NUM_GROUPS = 4
"""Groups of channels, one for each direction of the scan (paper, section 3.2)."""

NUM_WALKS = 4
"""Directions of the scan: by rows, by columns, and both backwards."""

SCANS = {"grouped": NUM_GROUPS, "cross": 1}
"""Groups of channels by the name of the scan."""

BLOCK_EPS = 1e-6
"""LayerNorm epsilon in blocks and on stage outputs; all other LayerNorms use PyTorch's default, 1e-5."""

OUT_TYPES = ("featmap", "unnormed")


class UnnormedTokens(NamedTuple):
    """What a stage leaves before its output norm.

    Attributes:
        tokens: ``(B, h, w, C)``.
        norm: The norm, whose weights stay the backbone's.
    """

    tokens: Tensor
    norm: nn.Module


@MODELS.register_module()
class GroupMamba(Backbone):
    """GroupMamba backbone.

    Args:
        arch: ``'tiny'``, ``'small'``, ``'base'`` (paper, table 1), or a dict with
            ``stem_hidden_dim``, and four values each of ``embed_dims`` (multiples of 4, at least
            16), ``depths`` and ``mlp_ratios``.
        in_channels: Channels of the image.
        out_indices: Stages whose feature maps are returned, counted from 0; their strides are 4, 8, 16 and 32.
        out_type: ``'featmap'`` for maps; ``'unnormed'`` for what :class:`~mmvssm.models.classifiers.ClassBlock` takes,
            a stage's tokens before its output norm, and that norm.
        drop_path_rate: Stochastic depth of the last block; it grows linearly from 0 at the first.
        frozen_stages: -1 freezes nothing, 0 the stem, ``n`` the stem and the first ``n`` stages. Frozen parts stay in
            evaluation mode.
        with_cp: Whether to recompute each block's activations in the backward pass instead of storing them.
        init_cfg: mmengine initialisation, for example
            ``dict(type='Pretrained', checkpoint='groupmamba_tiny.pth', prefix='backbone.')``.
        unwrap_single: Whether to return the map itself, in place of a tuple of one, for projects that expect that. It
            needs exactly one of ``out_indices``.
        scan: ``'grouped'``, or ``'cross'`` for an ablation: each direction scans all channels, as in VMamba.
        channel_affinity: Whether to modulate channels by their affinity; the paper's ablation leaves that out.

    Raises:
        ValueError: If ``arch``, ``out_indices``, ``out_type``, ``drop_path_rate``, ``frozen_stages``,
            ``unwrap_single`` or ``scan`` is not as described.
    """

    arch_settings = {
        "tiny": dict(
            stem_hidden_dim=32,
            embed_dims=(64, 128, 348, 448),
            depths=(3, 4, 9, 3),
            mlp_ratios=(8, 8, 4, 4),
        ),
        "small": dict(
            stem_hidden_dim=64,
            embed_dims=(64, 128, 348, 512),
            depths=(3, 4, 16, 3),
            mlp_ratios=(8, 8, 4, 4),
        ),
        "base": dict(
            stem_hidden_dim=64,
            embed_dims=(96, 192, 424, 512),
            depths=(3, 6, 21, 3),
            mlp_ratios=(8, 8, 4, 4),
        ),
    }

    def __init__(
        self,
        arch: Union[str, dict] = "tiny",
        in_channels: int = 3,
        out_indices: Sequence[int] = (0, 1, 2, 3),
        drop_path_rate: float = 0.0,
        frozen_stages: int = -1,
        with_cp: bool = False,
        init_cfg: Optional[dict] = None,
        out_type: str = "featmap",
        unwrap_single: bool = False,
        scan: str = "grouped",
        channel_affinity: bool = True,
    ) -> None:
        super().__init__(init_cfg)
        if scan not in SCANS:
            raise ValueError(
                f"GroupMamba: unknown scan {scan!r}; known are {', '.join(map(repr, SCANS))}."
            )
        if out_type not in OUT_TYPES:
            raise ValueError(
                f"GroupMamba: unknown out_type {out_type!r}; known are {', '.join(map(repr, OUT_TYPES))}."
            )
        self.out_type = out_type
        arch = self._resolve_arch(arch)
        depths = arch["depths"]
        self.embed_dims = tuple(arch["embed_dims"])
        self.mlp_ratios = tuple(arch["mlp_ratios"])
        self.out_indices = resolve_out_indices("GroupMamba", out_indices, len(depths), "stages")
        check_rates("GroupMamba", drop_path_rate, frozen_stages, len(depths))
        self.describe_outputs(
            (self.embed_dims[i] for i in self.out_indices),
            (4 * 2**i for i in self.out_indices),
            (f"stages.{i}" for i in self.out_indices),
            unwrap_single,
        )
        self.in_channels = in_channels
        self.frozen_stages = frozen_stages
        self.with_cp = with_cp

        drop_path_rates = drop_path_schedule(drop_path_rate, sum(depths))
        self.stages = nn.ModuleList()
        for i in range(max(self.out_indices) + 1):
            dim = self.embed_dims[i]
            if i == 0:
                embed = Stem(in_channels, arch["stem_hidden_dim"], dim)
            else:
                embed = DownSample(self.embed_dims[i - 1], dim)
            first = sum(depths[:i])
            rates = drop_path_rates[first : first + depths[i]]
            blocks = [
                Block(dim, self.mlp_ratios[i], rate, SCANS[scan], channel_affinity)
                for rate in rates
            ]
            self.stages.append(Stage(embed, blocks, dim))
        self.apply(init_parameters)
        accept_published_names(self)
        self._freeze_stages()

    def forward(
        self, x: Tensor
    ) -> Union[tuple[Union[Tensor, UnnormedTokens], ...], Tensor, UnnormedTokens]:
        """Compute the feature maps.

        Args:
            x: Images ``(B, in_channels, H, W)``, of any size; for programs made by ``torch.export`` with all three
                sizes dynamic, larger than 32x32.

        Returns:
            For each of ``out_indices`` a map ``(B, embed_dims[i], h, w)``, contiguous in memory,
            where ``h`` and ``w`` are ``H`` and ``W`` halved, rounding up, as often as the stride
            says; or :class:`UnnormedTokens`, as ``out_type`` says. A tuple, but for ``unwrap_single``.

        Raises:
            ValueError: If ``x`` has another number of dimensions or channels.
        """
        if self.out_type == "unnormed":
            return self.pack(
                UnnormedTokens(raw, self.stages[i].norm)
                for i, (raw, _) in enumerate(self.walk_stages(x))
                if i in self.out_indices
            )
        # mmcv's RoIAlign and its like read memory as if every tensor were contiguous, and go wrong
        # without a word on a channels-last one.
        return self.pack(
            x.permute(0, 3, 1, 2).contiguous()
            for i, (_, x) in enumerate(self.walk_stages(x))
            if i in self.out_indices
        )

    def walk_stages(self, x: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield each stage's map ``(B, h, w, C)`` before and after its output norm."""
        if x.dim() != 4 or x.shape[1] != self.in_channels:
            raise ValueError(
                f"GroupMamba: expected images (B, {self.in_channels}, H, W); got {tuple(x.shape)}."
            )
        x = x.contiguous(memory_format=torch.channels_last).permute(0, 2, 3, 1)
        for stage in self.stages:
            raw, x = stage(x, with_cp=self.with_cp)
            yield raw, x

    def layer_prefixes(self) -> list[tuple[str, ...]]:
        """See :func:`stage_prefixes`."""
        return stage_prefixes(self.stages)

    def train(self, mode: bool = True) -> GroupMamba:
        """Set the training mode of all but the frozen stages."""
        super().train(mode)
        self._freeze_stages()
        return self

    def _freeze_stages(self) -> None:
        frozen = [self.stages[0].embed] if self.frozen_stages >= 0 else []
        for module in (*frozen, *self.stages[: max(self.frozen_stages, 0)]):
            module.eval()
            module.requires_grad_(False)

    @classmethod
    def _resolve_arch(cls, arch: Union[str, dict]) -> dict:
        keys = ("stem_hidden_dim", "embed_dims", "depths", "mlp_ratios")
        arch = resolve_arch("GroupMamba", arch, cls.arch_settings, keys)
        for key in ("embed_dims", "depths", "mlp_ratios"):
            if len(arch[key]) != 4:
                raise ValueError(
                    f"GroupMamba: arch[{key!r}] needs four values, one a stage; got {arch[key]}."
                )
        if any(dim % NUM_GROUPS or dim < 16 for dim in arch["embed_dims"]):
            raise ValueError(
                "GroupMamba: every embed_dim must be a multiple of 4, for the four groups, and at least 16; got "
                f"{arch['embed_dims']}."
            )
        return arch


class Stem(nn.Module):
    """Three convolutions and a strided one: an image to tokens at stride 4."""

    def __init__(self, in_channels: int, hidden_dim: int, dim: int) -> None:
        super().__init__()
        layers = []
        for kernel_size, stride in ((7, 2), (3, 1), (3, 1)):
            layers += [
                nn.Conv2d(
                    in_channels, hidden_dim, kernel_size, stride, kernel_size // 2, bias=False
                ),
                nn.BatchNorm2d(hidden_dim),
                nn.ReLU(inplace=True),
            ]
            in_channels = hidden_dim
        self.conv = nn.Sequential(*layers)
        self.down = DownSample(hidden_dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """``(B, H, W, in_channels)`` to ``(B, H / 4, W / 4, dim)``."""
        return self.down(folded_stem(self.conv, x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))


class Stage(nn.Module):
    """Down-sampling, blocks and a norm. All of it runs in ``forward``, so that FSDP can shard a stage as a whole."""

    def __init__(self, embed: nn.Module, blocks: Sequence[nn.Module], dim: int) -> None:
        super().__init__()
        self.embed = embed
        self.blocks = nn.ModuleList(blocks)
        self.norm = nn.LayerNorm(dim, eps=BLOCK_EPS)

    def forward(self, x: Tensor, with_cp: bool = False) -> tuple[Tensor, Tensor]:
        """``(B, H, W, in_dim)`` to ``(B, h, w, dim)``, before and after ``norm``."""
        x = self.embed(x)
        traversal = cross_traversal(x.shape[1], x.shape[2], x.device)
        for block in self.blocks:
            if with_cp and torch.is_grad_enabled():
                x = checkpoint(block, x, traversal, use_reentrant=False)
            else:
                x = block(x, traversal)
        return x, self.norm(x)


class Block(nn.Module):
    """Modulated group mamba and feed-forward network, each with a residual connection (paper, figure 2)."""

    def __init__(
        self,
        dim: int,
        mlp_ratio: float,
        drop_path_rate: float,
        num_groups: int = NUM_GROUPS,
        channel_affinity: bool = True,
    ) -> None:
        super().__init__()
        self.mixer = ModulatedGroupMamba(dim, num_groups, channel_affinity)
        self.norm = nn.LayerNorm(dim, eps=BLOCK_EPS)
        self.ffn = ConvFFN(dim, round(dim * mlp_ratio))
        self.drop_path = DropPath(drop_path_rate)

    def forward(self, x: Tensor, traversal: Traversal) -> Tensor:
        """``(B, H, W, dim)`` to the same shape."""
        x = x + self.drop_path(self.mixer(x, traversal))
        return x + self.drop_path(self.ffn(self.norm(x)))


class ConvFFN(nn.Module):
    """Feed-forward network with a depthwise convolution between its linear layers (PVT v2, section 3.3)."""

    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden_dim)
        self.conv = nn.Conv2d(hidden_dim, hidden_dim, kernel_size=3, padding=1, groups=hidden_dim)
        self.fc2 = nn.Linear(hidden_dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """``(B, H, W, dim)`` to the same shape."""
        return feed_forward(self.fc1, self.conv, self.fc2, x)


class ModulatedGroupMamba(nn.Module):
    """Grouped scan with channel affinity modulation (paper, sections 3.2 and 3.3)."""

    def __init__(
        self,
        dim: int,
        num_groups: int = NUM_GROUPS,
        channel_affinity: bool = True,
        reduction: int = 16,
    ) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        affinity = nn.Sequential(
            nn.Linear(dim, dim // reduction),
            nn.ReLU(inplace=True),
            nn.Linear(dim // reduction, dim),
            nn.Sigmoid(),
        )
        self.affinity = affinity if channel_affinity else None
        self.scan = GroupedVSSS(dim, num_groups=num_groups)
        self.skip_scale = nn.Parameter(torch.ones(1))
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, traversal: Traversal) -> Tensor:
        """``(B, H, W, dim)`` to the same shape."""
        x = self.norm(x)
        if self.affinity is None:
            affinity = self.skip_scale.expand(x.shape[0], 1, 1, x.shape[3])
        else:
            affinity = self.affinity(x.mean((1, 2), keepdim=True)) * self.skip_scale
        scanned = self.scan(x, traversal)
        # The same norm once more, as published.
        return linear(self.proj, modulated_norm(self.norm, scanned, affinity, x))


class GroupedVSSS(nn.Module):
    """Visual single selective scan on each of four groups of channels, all groups at once (paper, figure 2c).

    With ``d = dim / 4`` channels a group, every projection is a 1x1 convolution in four groups. With ``num_groups=1``
    each of the four walks goes over all channels, with projections to scan parameters of its own, and their outputs are
    summed, as in VMamba.
    """

    def __init__(self, dim: int, d_state: int = 1, num_groups: int = NUM_GROUPS) -> None:
        super().__init__()
        d = dim // num_groups
        self.num_groups = num_groups
        self.dt_rank = math.ceil(d / 16)
        self.d_state = d_state
        self.in_proj = grouped_linear(dim, dim, num_groups)
        self.gate_proj = grouped_linear(dim, dim, num_groups)
        self.conv = nn.Conv2d(dim, dim, kernel_size=3, padding=1, groups=dim)
        self.x_proj = grouped_linear(dim, NUM_WALKS * (self.dt_rank + 2 * d_state), num_groups)
        self.dt_proj = grouped_linear(NUM_WALKS * self.dt_rank, NUM_WALKS * d, NUM_WALKS)
        # What training starts from is drawn by reset_scan_parameters, through init_parameters.
        self.dt_bias = nn.Parameter(torch.zeros(NUM_WALKS, d))
        self.A_log = nn.Parameter(torch.arange(1, d_state + 1).log().repeat(NUM_WALKS, d, 1))
        self.D = nn.Parameter(torch.ones(NUM_WALKS, d))
        self.norm = GroupedLayerNorm(num_groups, d)
        self.out_proj = grouped_linear(dim, dim, num_groups)
        self._register_load_state_dict_pre_hook(_rename_scan_parameters)

    def reset_scan_parameters(self) -> None:
        """Step sizes log-uniform in [0.001, 0.1], ``A = -(1 .. d_state)``, ``D = 1`` (Mamba, section 3.6)."""
        init_step_size_bias(self.dt_bias)
        with torch.no_grad():
            self.A_log.copy_(torch.arange(1, self.d_state + 1).log())
            self.D.fill_(1.0)
        bound = self.dt_rank**-0.5
        nn.init.uniform_(self.dt_proj.weight, -bound, bound)
        nn.init.kaiming_uniform_(self.x_proj.weight, a=math.sqrt(5))
        for proj in (self.in_proj, self.gate_proj, self.out_proj):
            nn.init.trunc_normal_(proj.weight, std=0.02)

    def forward(self, x: Tensor, traversal: Traversal) -> Tensor:
        """``(B, H, W, dim)`` to the same shape."""
        gate = convolve(self.gate_proj, x)
        x = conv_silu(self.conv, convolve(self.in_proj, x))
        dt, B, C = split_groups(convolve(self.x_proj, x)).split(
            (self.dt_rank, self.d_state, self.d_state), dim=-1
        )
        delta = convolve(self.dt_proj, dt.flatten(2).unflatten(1, x.shape[1:3]))
        y = selective_scan(
            split_groups(x, self.num_groups),
            split_groups(delta),
            -torch.exp(self.A_log),
            B,
            C,
            self.D,
            self.dt_bias,
            traversal=traversal,
            sum_walks=self.num_groups == 1,
        )
        gate = split_groups(gate, self.num_groups)
        y = gated_norm(self.norm, GroupedLayerNorm, y.view(gate.shape), gate)
        return convolve(self.out_proj, y.view(x.shape))


class GroupedLayerNorm(nn.LayerNorm):
    """A LayerNorm of its own on each group of channels.

    It is an ``nn.LayerNorm`` so that rules for norms, such as mmengine's ``norm_decay_mult``, hold for it.
    """

    def __init__(self, groups: int, channels: int, eps: float = 1e-5) -> None:
        super().__init__(channels, eps)
        self.weight = nn.Parameter(torch.ones(groups, channels))
        self.bias = nn.Parameter(torch.zeros(groups, channels))

    def forward(self, x: Tensor) -> Tensor:
        """``(..., groups, channels)`` to the same shape."""
        return self.normalize(x, self.weight, self.bias)

    def normalize(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        """The same with a weight and a bias ``(groups, channels)`` that are given."""
        return F.layer_norm(x, self.normalized_shape, eps=self.eps) * weight + bias


def _rename_scan_parameters(state_dict: dict, prefix: str, *args) -> None:
    """Accept the names that version 0.1 saved."""
    for before, now in (("A_logs", "A_log"), ("Ds", "D")):
        if prefix + before in state_dict:
            state_dict[prefix + now] = state_dict.pop(prefix + before)


def grouped_linear(in_features: int, out_features: int, num_groups: int) -> nn.Conv2d:
    """A linear layer without bias of its own for each group of channels."""
    return nn.Conv2d(in_features, out_features, kernel_size=1, groups=num_groups, bias=False)


def split_groups(x: Tensor, num_groups: int = NUM_GROUPS) -> Tensor:
    """``(B, H, W, num_groups * d)`` to tokens in groups ``(B, H * W, num_groups, d)``."""
    return x.flatten(1, 2).unflatten(-1, (num_groups, -1))
