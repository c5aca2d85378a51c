"""GroupMamba with its classification parts, as it is pre-trained on ImageNet-1k."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Optional, Union

import torch.nn as nn
from mmengine.model import BaseModule
from torch import Tensor

from ...ops import cross_traversal
from ...registry import MODELS
from ..backbones.common import init_parameters
from ..backbones.group_mamba import BLOCK_EPS, GroupMamba, ModulatedGroupMamba, UnnormedTokens


@MODELS.register_module()
class ClassBlock(BaseModule):
    """A block on the mean token, normalised behind the mixer rather than before it (GroupMamba, section 3.4).

    A neck: in mmpretrain's ``ImageClassifier`` between a GroupMamba with ``out_indices=(3,), out_type='unnormed'`` and
    a head, such as ``LinearClsHead``.

    Args:
        in_channels: Channels of the tokens, the last of ``embed_dims``.
        mlp_ratio: The last of ``mlp_ratios``.
        init_cfg: mmengine initialisation.
    """

    def __init__(
        self, in_channels: int, mlp_ratio: float = 4, init_cfg: Optional[dict] = None
    ) -> None:
        super().__init__(init_cfg)
        self.mixer = ModulatedGroupMamba(in_channels)
        self.norm1 = nn.LayerNorm(in_channels, eps=BLOCK_EPS)
        self.norm2 = nn.LayerNorm(in_channels, eps=BLOCK_EPS)
        hidden = round(in_channels * mlp_ratio)
        self.ffn = nn.Sequential(
            nn.Linear(in_channels, hidden), nn.GELU(), nn.Linear(hidden, in_channels)
        )
        self.apply(init_parameters)

    def forward(self, inputs: Sequence[UnnormedTokens]) -> tuple[Tensor]:
        """Make one token of many.

        Args:
            inputs: What the backbone left, of which the last counts.

        Returns:
            ``(B, C)``, normalised by what also normalises the backbone's last map.
        """
        tokens, norm = inputs[-1]
        token = tokens.mean((1, 2), keepdim=True)
        token = token + self.norm1(self.mixer(token, cross_traversal(1, 1, token.device)))
        token = token + self.ffn(self.norm2(token))
        return (norm(token.flatten(1)),)


@MODELS.register_module()
class GroupMambaClassifier(BaseModule):
    """GroupMamba for image classification without mmpretrain: logits alone (paper, section 3.4).

    Its weights have the names of those of the models in ``configs/groupmamba*_imagenet.py``, which mmpretrain trains
    and evaluates.

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
        self.backbone = GroupMamba(
            arch, out_indices=(3,), drop_path_rate=drop_path_rate, out_type="unnormed"
        )
        dim = self.backbone.embed_dims[-1]
        self.neck = ClassBlock(dim, self.backbone.mlp_ratios[-1])
        heads = ("fc", "distillation_fc")[: 1 + distillation]
        self.head = nn.ModuleDict({name: nn.Linear(dim, num_classes) for name in heads})
        self.head.apply(init_parameters)

    def forward(self, x: Tensor) -> Union[Tensor, tuple[Tensor, Tensor]]:
        """Classify images.

        Args:
            x: Images ``(B, 3, H, W)``.

        Returns:
            Logits ``(B, num_classes)``: those of the one head, or the mean of both. In training, with two heads, both:
            class head, distillation head.
        """
        (token,) = self.neck(self.backbone(x))
        logits = tuple(fc(token) for fc in self.head.values())
        if len(logits) == 1:
            return logits[0]
        return logits if self.training else (logits[0] + logits[1]) / 2
