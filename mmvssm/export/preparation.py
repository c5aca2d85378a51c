"""Normalise and pad images, extract features, and report models that cannot be exported."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Optional

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..models.pruning import PrunedTokens


class UnsupportedModelError(ValueError):
    """The model cannot be exported; the message names the part that prevents it."""


def extract(model: nn.Module, images: Tensor) -> tuple[Sequence[Tensor], Optional[Tensor]]:
    """Run the backbone and the neck.

    Returns:
        Feature maps, and for a pruned backbone the tokens kept to its end, bool ``(B, h, w)``, else None.
    """
    features = model.backbone(images)
    maps = model.neck(features) if model.with_neck else features
    last = features[-1]
    if not isinstance(last, PrunedTokens):
        return maps, None
    height, width = last.grid
    kept = torch.zeros((images.shape[0], height * width), dtype=torch.bool, device=images.device)
    return maps, kept.scatter(1, last.positions, True).unflatten(1, (height, width))


def prunes(model: nn.Module) -> bool:
    """Whether the last of a backbone's outputs lacks tokens.

    Raises:
        UnsupportedModelError: If it packs the kept tokens, which an exported model for all image sizes cannot do.
    """
    pruning = getattr(model.backbone, "pruning", None)
    if pruning is None:
        return False
    if pruning.alignment in pruning.needs_grid:
        raise UnsupportedModelError(
            "pruning with alignment='none' cannot be exported: its grid of packed tokens depends on the image's size, "
            "and an exported model takes any size; use 'decay' or 'hold'"
        )
    last = model.backbone.out_indices[-1]
    if pruning.rejoin is not None and pruning.rejoin <= last:
        return False  # the last map has all tokens
    return any(layer < last and ratio < 1 for layer, ratio in pruning.keep_ratios.items())


class ImagePreparation(nn.Module):
    """Normalise and pad images as a model's ``data_preprocessor`` does.

    Args:
        preprocessor: The data preprocessor of mmdet, mmseg or mmpretrain.
        settings: Its config.
    """

    def __init__(self, preprocessor: nn.Module, settings: dict) -> None:
        super().__init__()
        # Files are read as BGR; models without a conversion were trained on that order.
        self.to_bgr = not settings.get("bgr_to_rgb", settings.get("to_rgb", False))
        normalizes = settings.get("mean") is not None
        self.register_buffer("mean", preprocessor.mean if normalizes else None)
        self.register_buffer("std", preprocessor.std if normalizes else None)
        if "pad_size_divisor" in settings:  # mmdet's and mmpretrain's
            self.divisor, fixed = settings["pad_size_divisor"], None
            self.pad_value = settings.get("pad_value", 0)
        else:  # mmseg's
            at_test = settings.get("test_cfg") or {}
            self.divisor, fixed = at_test.get("size_divisor") or 1, at_test.get("size")
            self.pad_value = settings.get("pad_val", 0)
        if fixed is not None:
            raise UnsupportedModelError(
                "data_preprocessor.test_cfg.size pads every image to one size, but an exported model takes any size; "
                "use size_divisor or none"
            )

    def forward(self, images: Tensor) -> Tensor:
        """Normalise ``(B, 3, H, W)``, RGB from 0 to 255, and pad it at the bottom and on the right."""
        x = images.flip(1) if self.to_bgr else images
        if self.mean is not None:
            x = (x - self.mean) / self.std
        if self.divisor == 1:
            return x
        right, bottom = -x.shape[3] % self.divisor, -x.shape[2] % self.divisor
        return F.pad(x, (0, right, 0, bottom), value=self.pad_value)
