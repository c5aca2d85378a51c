"""VMamba: Visual State Space Model (NeurIPS 2024, arXiv 2401.10166).

The released models, which the paper calls VMamba-T, S and B: state 1, no gate, no bias in the mixer. Feature maps are
``(B, H, W, C)``, channels last, from the stem to the last stage.
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

from ...ops import Traversal, cross_traversal, selective_scan
from ...registry import MODELS
from .common import (
    DownSample,
    accept_published_names,
    check_rates,
    convolve,
    drop_path_schedule,
    init_step_size_bias,
    resolve_out_indices,
)
from .fast_paths import conv_silu, linear, mlp
from .staged_backbone import StagedBackbone, resolve_staged_arch

NUM_WALKS = 4
"""Walks over each map: by rows, by columns, and both backwards (paper, section 4.2, "cross-scan")."""


@MODELS.register_module()
class VMamba(StagedBackbone):
    """VMamba backbone.

    Args:
        arch: ``'T'``, ``'S'``, ``'B'``, or a dict with four values each of ``embed_dims`` and ``depths``, and one
            each of ``ssm_ratio``, by which the mixer widens its channels, and ``mlp_ratio``.
        in_channels: Channels of the image.
        out_indices: Stages whose feature maps are returned, counted from 0; their strides are 4, 8, 16 and 32. Each map
            passes a LayerNorm of its own; the next stage continues from the map before it.
        drop_path_rate: Stochastic depth of the last block; it grows linearly from 0 at the first.
        frozen_stages: -1 freezes nothing, 0 the stem, ``n`` the stem and the first ``n`` stages with their output
            norms. Frozen parts stay in evaluation mode.
        with_cp: Whether to recompute each block's activations in the backward pass instead of storing them.
        init_cfg: mmengine initialisation, for example
            ``dict(type='Pretrained', checkpoint='vmamba_tiny.pth', prefix='backbone.')``.
        unwrap_single: Whether to return the map itself, in place of a tuple of one, for projects that expect that. It
            needs exactly one of ``out_indices``.

    Raises:
        ValueError: If ``arch``, ``out_indices``, ``drop_path_rate``, ``frozen_stages`` or ``unwrap_single`` is not as
            described.
    """

    arch_settings = {
        "T": dict(embed_dims=(96, 192, 384, 768), depths=(2, 2, 8, 2), ssm_ratio=1, mlp_ratio=4),
        "S": dict(embed_dims=(96, 192, 384, 768), depths=(2, 2, 15, 2), ssm_ratio=2, mlp_ratio=4),
        "B": dict(embed_dims=(128, 256, 512, 1024), depths=(2, 2, 15, 2), ssm_ratio=2, mlp_ratio=4),
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
            "VMamba", arch, self.arch_settings, ("embed_dims", "depths", "ssm_ratio", "mlp_ratio")
        )
        depths = arch["depths"]
        self.embed_dims = tuple(arch["embed_dims"])
        self.out_indices = resolve_out_indices("VMamba", out_indices, len(depths), "stages")
        check_rates("VMamba", drop_path_rate, frozen_stages, len(depths))
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
            embed = Stem(in_channels, dim) if i == 0 else DownSample(self.embed_dims[i - 1], dim)
            first = sum(depths[:i])
            blocks = [
                Block(dim, arch["ssm_ratio"], arch["mlp_ratio"], rate)
                for rate in rates[first : first + depths[i]]
            ]
            self.stages.append(Stage(embed, blocks))
        self.norms = nn.ModuleDict(
            {str(i): nn.LayerNorm(self.embed_dims[i]) for i in self.out_indices}
        )
        self.apply(_init_parameters)
        accept_published_names(self)
        self._freeze_stages()


class Stem(nn.Module):
    """Two strided convolutions: an image to tokens at stride 4."""

    def __init__(self, in_channels: int, dim: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, dim // 2, kernel_size=3, stride=2, padding=1)
        self.norm1 = nn.LayerNorm(dim // 2)
        self.conv2 = nn.Conv2d(dim // 2, dim, kernel_size=3, stride=2, padding=1)
        self.norm2 = nn.LayerNorm(dim)

    def forward(self, x: Tensor) -> Tensor:
        """``(B, H, W, in_channels)`` to ``(B, H / 4, W / 4, dim)``."""
        x = F.gelu(self.norm1(convolve(self.conv1, x)))
        return self.norm2(convolve(self.conv2, x))


class Stage(nn.Module):
    """Down-sampling and blocks. Norms of outputs are the backbone's, since a stage without output has none."""

    def __init__(self, embed: nn.Module, blocks: Sequence[nn.Module]) -> None:
        super().__init__()
        self.embed = embed
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x: Tensor, with_cp: bool = False) -> Tensor:
        """``(B, H, W, in_dim)`` to ``(B, h, w, dim)``."""
        x = self.embed(x)
        traversal = cross_traversal(x.shape[1], x.shape[2], x.device)
        for block in self.blocks:
            if with_cp and torch.is_grad_enabled():
                x = checkpoint(block, x, traversal, use_reentrant=False)
            else:
                x = block(x, traversal)
        return x


class Block(nn.Module):
    """Selective scan and feed-forward network, each with a residual connection (paper, figure 3d)."""

    def __init__(self, dim: int, ssm_ratio: float, mlp_ratio: float, drop_path_rate: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.mixer = SS2D(dim, round(dim * ssm_ratio))
        self.norm2 = nn.LayerNorm(dim)
        hidden_dim = round(dim * mlp_ratio)
        self.ffn = nn.Sequential(nn.Linear(dim, hidden_dim), nn.GELU(), nn.Linear(hidden_dim, dim))
        self.drop_path = DropPath(drop_path_rate)

    def forward(self, x: Tensor, traversal: Traversal) -> Tensor:
        """``(B, H, W, dim)`` to the same shape."""
        x = x + self.drop_path(self.mixer(self.norm1(x), traversal))
        return x + self.drop_path(mlp(self.ffn, self.norm2(x)))


class SS2D(nn.Module):
    """2D selective scan: four walks over all channels, summed (paper, section 4.2).

    Each walk has projections and scan parameters of its own. Projections commute with the order of tokens, so they are
    computed once, on tokens in memory order.
    """

    def __init__(self, dim: int, inner_dim: int, d_state: int = 1) -> None:
        super().__init__()
        self.dt_rank = math.ceil(dim / 16)
        self.d_state = d_state
        self.in_proj = nn.Linear(dim, inner_dim, bias=False)
        self.conv = nn.Conv2d(
            inner_dim, inner_dim, kernel_size=3, padding=1, groups=inner_dim, bias=False
        )
        self.x_proj = nn.Linear(inner_dim, NUM_WALKS * (self.dt_rank + 2 * d_state), bias=False)
        self.dt_proj = nn.Conv2d(
            NUM_WALKS * self.dt_rank,
            NUM_WALKS * inner_dim,
            kernel_size=1,
            groups=NUM_WALKS,
            bias=False,
        )
        self.dt_bias = nn.Parameter(torch.zeros(NUM_WALKS, inner_dim))
        self.A_log = nn.Parameter(
            torch.arange(1, d_state + 1).log().repeat(NUM_WALKS, inner_dim, 1)
        )
        self.D = nn.Parameter(torch.ones(NUM_WALKS, inner_dim))
        self.norm = nn.LayerNorm(inner_dim)
        self.out_proj = nn.Linear(inner_dim, dim, bias=False)

    def reset_scan_parameters(self) -> None:
        """Step sizes log-uniform in [0.001, 0.1], ``A = -(1 .. d_state)``, ``D = 1`` (Mamba, section 3.6)."""
        init_step_size_bias(self.dt_bias)
        bound = self.dt_rank**-0.5
        nn.init.uniform_(self.dt_proj.weight, -bound, bound)
        nn.init.kaiming_uniform_(self.x_proj.weight, a=math.sqrt(5))
        with torch.no_grad():
            self.A_log.copy_(torch.arange(1, self.d_state + 1).log())
            self.D.fill_(1.0)

    def forward(self, x: Tensor, traversal: Traversal) -> Tensor:
        """``(B, H, W, dim)`` to the same shape."""
        x = conv_silu(self.conv, linear(self.in_proj, x))
        dt, B, C = (
            linear(self.x_proj, x)
            .unflatten(-1, (NUM_WALKS, -1))
            .split((self.dt_rank, self.d_state, self.d_state), dim=-1)
        )
        delta = convolve(self.dt_proj, dt.flatten(-2)).unflatten(-1, (NUM_WALKS, -1))
        y = selective_scan(
            x.flatten(1, 2)[:, :, None],
            delta.flatten(1, 2),
            -torch.exp(self.A_log),
            B.flatten(1, 2),
            C.flatten(1, 2),
            self.D,
            self.dt_bias,
            traversal=traversal,
            sum_walks=True,
        )
        return linear(self.out_proj, self.norm(y)).view(*x.shape[:3], -1)


def _init_parameters(module: nn.Module) -> None:
    """Initialise one module's own parameters as the published code does; for ``nn.Module.apply``."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(
        module, SS2D
    ):  # after its own linear layers, whose x_proj it initialises otherwise
        module.reset_scan_parameters()
