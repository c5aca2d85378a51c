"""Spatial-Mamba: Effective Visual State Space Models via Structure-Aware State Fusion (ICLR 2025, arXiv 2410.15091).

One scan by rows computes a state for each position and channel, dilated convolutions fuse it with its neighbours'
states, and only then it is observed. Feature maps are ``(B, H, W, C)``, channels last, from the stem to the last stage.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Optional, Union

import torch
import torch.nn as nn
import torch.nn.functional as F
from mmcv.cnn.bricks import DropPath
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ...ops import selective_scan
from ...registry import MODELS
from .common import (
    accept_published_names,
    check_rates,
    convolve,
    drop_path_schedule,
    init_step_size_bias,
    resolve_out_indices,
)
from .fast_paths import conv_norm, conv_silu, fused_states, linear, mlp
from .staged_backbone import StagedBackbone, resolve_staged_arch

DILATIONS = (1, 3, 5)
"""Distances, in positions, of the neighbours whose states are fused."""


@MODELS.register_module()
class SpatialMamba(StagedBackbone):
    """Spatial-Mamba backbone.

    The stem and the down-sampling have BatchNorm, trained as published; freeze them where batches are too small.

    Args:
        arch: ``'T'``, ``'S'``, ``'B'``, or a dict with four values each of ``embed_dims`` and ``depths``, and one of
            ``mlp_ratio``.
        in_channels: Channels of the image.
        out_indices: Stages whose feature maps are returned, counted from 0; their strides are 4, 8, 16 and 32. Each map
            passes a LayerNorm of its own; the next stage continues from the map before it.
        drop_path_rate: Stochastic depth of the last block; it grows linearly from 0 at the first.
        frozen_stages: -1 freezes nothing, 0 the stem, ``n`` the stem and the first ``n`` stages with their output
            norms. Frozen parts stay in evaluation mode.
        with_cp: Whether to recompute each block's activations in the backward pass instead of storing them. Blocks have
            no BatchNorm, whose statistics would be updated twice.
        init_cfg: mmengine initialisation, for example
            ``dict(type='Pretrained', checkpoint='spatialmamba_tiny.pth', prefix='backbone.')``.
        unwrap_single: Whether to return the map itself, in place of a tuple of one, for projects that expect that. It
            needs exactly one of ``out_indices``.

    Raises:
        ValueError: If ``arch``, ``out_indices``, ``drop_path_rate``, ``frozen_stages`` or ``unwrap_single`` is not as
            described.
    """

    arch_settings = {
        "T": dict(embed_dims=(64, 128, 256, 512), depths=(2, 4, 8, 4), mlp_ratio=4),
        "S": dict(embed_dims=(64, 128, 256, 512), depths=(2, 4, 21, 5), mlp_ratio=4),
        "B": dict(embed_dims=(96, 192, 384, 768), depths=(2, 4, 21, 5), mlp_ratio=4),
    }

    def __init__(
        self,
        arch: Union[str, dict] = "T",
        in_channels: int = 3,
        out_indices: Sequence[int] = (0, 1, 2, 3),
        drop_path_rate: float = 0.0,
        frozen_stages: int = -1,
        with_cp: bool = False,
        init_cfg: Optional[dict] = None,
        unwrap_single: bool = False,
    ) -> None:
        super().__init__(init_cfg)
        arch = resolve_staged_arch(
            "SpatialMamba", arch, self.arch_settings, ("embed_dims", "depths", "mlp_ratio")
        )
        depths = arch["depths"]
        self.embed_dims = tuple(arch["embed_dims"])
        self.out_indices = resolve_out_indices("SpatialMamba", out_indices, len(depths), "stages")
        check_rates("SpatialMamba", drop_path_rate, frozen_stages, len(depths))
        self.describe_outputs(
            (self.embed_dims[i] for i in self.out_indices),
            (4 * 2**i for i in self.out_indices),
            (f"stages.{i}" for i in self.out_indices),
            unwrap_single,
        )
        self.in_channels = in_channels
        self.frozen_stages = frozen_stages
        self.with_cp = with_cp

        rates = drop_path_schedule(drop_path_rate, sum(depths))
        self.stages = nn.ModuleList()
        for i in range(max(self.out_indices) + 1):
            dim = self.embed_dims[i]
            embed = Stem(in_channels, dim) if i == 0 else Merging(self.embed_dims[i - 1], dim)
            first = sum(depths[:i])
            blocks = [
                Block(dim, arch["mlp_ratio"], rate) for rate in rates[first : first + depths[i]]
            ]
            self.stages.append(Stage(embed, blocks))
        self.norms = nn.ModuleDict(
            {str(i): nn.LayerNorm(self.embed_dims[i]) for i in self.out_indices}
        )
        self.apply(_init_parameters)
        accept_published_names(self)
        self._freeze_stages()


class Stem(nn.Module):
    """Five convolutions, each with BatchNorm: an image to tokens at stride 4."""

    def __init__(self, in_channels: int, dim: int) -> None:
        super().__init__()
        sizes = ((dim // 2, 3, 2), (dim // 2, 3, 1), (dim // 2, 3, 1), (4 * dim, 3, 2), (dim, 1, 1))
        for i, (channels, kernel_size, stride) in enumerate(sizes, start=1):
            conv = nn.Conv2d(
                in_channels, channels, kernel_size, stride, padding=kernel_size // 2, bias=False
            )
            self.add_module(f"conv{i}", conv)
            self.add_module(f"norm{i}", nn.BatchNorm2d(channels))
            in_channels = channels

    def forward(self, x: Tensor) -> Tensor:
        """``(B, H, W, in_channels)`` to ``(B, H / 4, W / 4, dim)``."""
        x = x.permute(0, 3, 1, 2)
        x = F.relu(conv_norm(self.conv1, self.norm1, x))
        residual = F.relu(conv_norm(self.conv2, self.norm2, x))
        x = x + conv_norm(self.conv3, self.norm3, residual)
        x = F.relu(conv_norm(self.conv4, self.norm4, x))
        return conv_norm(self.conv5, self.norm5, x).permute(0, 2, 3, 1)


class Merging(nn.Module):
    """Halve the resolution by an inverted bottleneck, whose BatchNorm comes last."""

    def __init__(self, in_dim: int, dim: int) -> None:
        super().__init__()
        wide = 4 * dim
        self.expand = nn.Conv2d(in_dim, wide, kernel_size=1)
        self.conv = nn.Conv2d(wide, wide, kernel_size=3, stride=2, padding=1, groups=wide)
        # In training the bias gets no gradient, since BatchNorm subtracts it; in evaluation it counts.
        self.proj = nn.Conv2d(wide, dim, kernel_size=1)
        self.norm = nn.BatchNorm2d(dim)

    def forward(self, x: Tensor) -> Tensor:
        """``(B, H, W, in_dim)`` to ``(B, H / 2, W / 2, dim)``."""
        x = F.relu(self.expand(x.permute(0, 3, 1, 2)))
        x = F.relu(self.conv(x))
        return conv_norm(self.proj, self.norm, x).permute(0, 2, 3, 1)


class Stage(nn.Module):
    """Down-sampling and blocks. Norms of outputs are the backbone's, since a stage without output has none."""

    def __init__(self, embed: nn.Module, blocks: Sequence[nn.Module]) -> None:
        super().__init__()
        self.embed = embed
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x: Tensor, with_cp: bool = False) -> Tensor:
        """``(B, H, W, in_dim)`` to ``(B, h, w, dim)``."""
        x = self.embed(x)
        recompute = with_cp and torch.is_grad_enabled()
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False) if recompute else block(x)
        return x


class Block(nn.Module):
    """Mixer and feed-forward network, each after a convolution that encodes positions."""

    def __init__(self, dim: int, mlp_ratio: float, drop_path_rate: float) -> None:
        super().__init__()
        self.pos1 = nn.Conv2d(dim, dim, kernel_size=3, padding=1, groups=dim)
        self.norm1 = nn.LayerNorm(dim)
        self.mixer = StructureAwareSSM(dim)
        self.pos2 = nn.Conv2d(dim, dim, kernel_size=3, padding=1, groups=dim)
        self.norm2 = nn.LayerNorm(dim)
        hidden_dim = round(dim * mlp_ratio)
        self.ffn = nn.Sequential(nn.Linear(dim, hidden_dim), nn.GELU(), nn.Linear(hidden_dim, dim))
        self.drop_path = DropPath(drop_path_rate)

    def forward(self, x: Tensor) -> Tensor:
        """``(B, H, W, dim)`` to the same shape."""
        x = x + convolve(self.pos1, x)
        x = x + self.drop_path(self.mixer(self.norm1(x)))
        x = x + convolve(self.pos2, x)
        return x + self.drop_path(mlp(self.ffn, self.norm2(x)))


class StructureAwareSSM(nn.Module):
    """State space model in the paper's three stages: states, their fusion, their observation."""

    def __init__(self, dim: int, expand: int = 2) -> None:
        super().__init__()
        inner_dim = expand * dim
        self.dt_rank = math.ceil(dim / 16)
        self.in_proj = nn.Linear(dim, 2 * inner_dim, bias=False)
        self.conv = nn.Conv2d(inner_dim, inner_dim, kernel_size=3, padding=1, groups=inner_dim)
        self.x_proj = nn.Linear(inner_dim, self.dt_rank + 2, bias=False)
        self.dt_proj = nn.Linear(self.dt_rank, inner_dim, bias=False)
        self.dt_bias = nn.Parameter(torch.zeros(inner_dim))
        self.A_log = nn.Parameter(torch.zeros(inner_dim, 1))
        self.D = nn.Parameter(torch.ones(inner_dim))
        self.fusion = StateFusion(inner_dim)
        self.norm = nn.LayerNorm(inner_dim)
        self.out_proj = nn.Linear(inner_dim, dim, bias=False)

    def reset_scan_parameters(self) -> None:
        """Step sizes log-uniform in [0.001, 0.1], ``A = -1``, ``D = 1`` (Mamba, section 3.6)."""
        init_step_size_bias(self.dt_bias)
        bound = self.dt_rank**-0.5
        nn.init.uniform_(self.dt_proj.weight, -bound, bound)
        nn.init.kaiming_uniform_(self.x_proj.weight, a=math.sqrt(5))
        nn.init.zeros_(self.A_log)
        nn.init.ones_(self.D)

    def forward(self, x: Tensor) -> Tensor:
        """``(B, H, W, dim)`` to the same shape."""
        x, gate = linear(self.in_proj, x).chunk(2, dim=-1)
        x = conv_silu(self.conv, x)
        dt, B, C = linear(self.x_proj, x).split((self.dt_rank, 1, 1), dim=-1)
        u, delta, B = (t.flatten(1, 2)[:, :, None] for t in (x, linear(self.dt_proj, dt), B))
        # With one state and an output projection of ones, the scan's output is its state.
        states = selective_scan(
            u,
            delta,
            -torch.exp(self.A_log)[None],
            B,
            torch.ones_like(B),
            delta_bias=self.dt_bias[None],
        )
        states = self.fusion(states.view(x.shape))
        y = C * states + self.D * x
        return linear(self.out_proj, self.norm(y) * F.silu(gate))


class StateFusion(nn.Module):
    """Weighted sum of depthwise convolutions of several dilations (paper, "structure-aware state fusion").

    A position outside the map counts as the nearest one inside.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.convs = nn.ModuleList(
            nn.Conv2d(
                dim,
                dim,
                kernel_size=3,
                padding=dilation,
                dilation=dilation,
                groups=dim,
                bias=False,
                padding_mode="replicate",
            )
            for dilation in DILATIONS
        )
        self.alpha = nn.Parameter(torch.ones(len(DILATIONS)))

    def forward(self, x: Tensor) -> Tensor:
        """``(B, H, W, dim)`` to the same shape."""
        return fused_states(self.convs, self.alpha, x)


def _init_parameters(module: nn.Module) -> None:
    """Initialise one module's own parameters as the published code does; for ``nn.Module.apply``.

    Other convolutions keep PyTorch's initialisation.
    """
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, StateFusion):
        for conv in module.convs:
            nn.init.ones_(conv.weight)
    elif isinstance(
        module, StructureAwareSSM
    ):  # after its own linear layers, two of which it initialises otherwise
        module.reset_scan_parameters()
