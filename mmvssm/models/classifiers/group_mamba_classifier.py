"""GroupMamba with its classification parts, as it is pre-trained on ImageNet-1k."""

from __future__ import annotations

from typing import Optional, Union

import torch.nn as nn
from mmengine.model import BaseModule
from torch import Tensor

from ...ops import cross_traversal
from ...registry import MODELS
from ..backbones.common import init_parameters
from ..backbones.group_mamba import BLOCK_EPS, GroupMamba, ModulatedGroupMamba


@MODELS.register_module()
class GroupMambaClassifier(BaseModule):
    """GroupMamba for image classification (paper, section 3.4).

    Args:
        arch: As in :class:`~mmvssm.models.backbones.group_mamba.GroupMamba`.
        num_classes: Number of classes.
        distillation: Whether there is a second head, trained on a teacher's labels.
        drop_path_rate: As in the backbone.
        init_cfg: mmengine initialisation.
    """

    def __init__(
        self,
        arch: Union[str, dict] = "tiny",
        num_classes: int = 1000,
        distillation: bool = True,
        drop_path_rate: float = 0.0,
        init_cfg: Optional[dict] = None,
    ) -> None:
        super().__init__(init_cfg)
        self.backbone = GroupMamba(arch, out_indices=(3,), drop_path_rate=drop_path_rate)
        dim = self.backbone.embed_dims[-1]
        self.class_block = ClassBlock(dim, self.backbone.mlp_ratios[-1])
        self.head = nn.Linear(dim, num_classes)
        self.distillation_head = nn.Linear(dim, num_classes) if distillation else None
        for module in (self.class_block, self.head, self.distillation_head):
            if module is not None:
                module.apply(init_parameters)

    def forward(self, x: Tensor) -> Union[Tensor, tuple[Tensor, Tensor]]:
        """Classify images.

        Args:
            x: Images ``(B, 3, H, W)``.

        Returns:
            Logits ``(B, num_classes)``: those of the one head, or the mean of both. In training, with two heads, both:
            class head, distillation head.
        """
        *_, (tokens, _) = self.backbone.walk_stages(x)
        token = self.class_block(tokens.mean((1, 2), keepdim=True)).flatten(1)
        # The class token is normalised by what also normalises the last feature map.
        token = self.backbone.stages[-1].norm(token)
        logits = self.head(token)
        if self.distillation_head is None:
            return logits
        distilled = self.distillation_head(token)
        return (logits, distilled) if self.training else (logits + distilled) / 2


class ClassBlock(nn.Module):
    """A block on the mean token, normalised behind the mixer rather than before it."""

    def __init__(self, dim: int, mlp_ratio: float) -> None:
        super().__init__()
        self.mixer = ModulatedGroupMamba(dim)
        self.norm1 = nn.LayerNorm(dim, eps=BLOCK_EPS)
        self.norm2 = nn.LayerNorm(dim, eps=BLOCK_EPS)
        hidden = round(dim * mlp_ratio)
        self.ffn = nn.Sequential(nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, dim))

    def forward(self, token: Tensor) -> Tensor:
        """``(B, 1, 1, dim)`` to the same shape."""
        token = token + self.norm1(self.mixer(token, cross_traversal(1, 1, token.device)))
        return token + self.ffn(self.norm2(token))
