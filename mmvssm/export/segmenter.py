"""Wrap a segmenter as a function of images."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .preparation import ImagePreparation, UnsupportedModelError, extract, prunes


class SegmenterGraph(nn.Module):
    """A segmenter of mmseg that maps images to logits and labels.

    Args:
        model: An ``EncoderDecoder`` in mode ``'whole'``.
        settings: Its config.

    Raises:
        UnsupportedModelError: If it is of another class or in another mode.
    """

    any_batch = True
    highest_opset = 26

    def __init__(self, model: nn.Module, settings: dict) -> None:
        super().__init__()
        if not hasattr(model, "decode_head") or isinstance(model.decode_head, nn.ModuleList):
            raise UnsupportedModelError(
                f"{type(model).__name__} cannot be exported: of segmenters, only those with one decode_head can"
            )
        _check_head(model)
        mode = model.test_cfg.get("mode", "whole")
        if mode != "whole":
            raise UnsupportedModelError(
                f"model.test_cfg.mode is {mode!r}, but an exported model sees whole images: add "
                "--cfg-options model.test_cfg.mode=whole"
            )
        self.prepare = ImagePreparation(model.data_preprocessor, settings["data_preprocessor"])
        self.model = model
        self.outputs = ("logits", "labels") + ("kept",) * prunes(model)

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Segment.

        Args:
            images: ``(B, 3, H, W)``, RGB from 0 to 255.

        Returns:
            Logits ``(B, classes, H, W)``; labels, int64 ``(B, H, W)``; and of a pruned model which tokens reached the
            end, bool ``(B, h, w)``.
        """
        head = self.model.decode_head
        x = self.prepare(images)
        maps, kept = extract(self.model, x)
        logits = F.interpolate(
            head(maps), size=x.shape[2:], mode="bilinear", align_corners=head.align_corners
        )
        logits = logits[:, :, : images.shape[2], : images.shape[3]]
        if logits.shape[1] > 1:
            labels = logits.argmax(1)
        else:
            labels = (logits.sigmoid() > head.threshold).squeeze(1).to(torch.int64)
        return (logits, labels) if kept is None else (logits, labels, kept)


def _check_head(model: nn.Module) -> None:
    from mmseg.models.decode_heads.decode_head import BaseDecodeHead  # detectors need no mmseg

    if not isinstance(model.decode_head, BaseDecodeHead):
        raise UnsupportedModelError(
            f"{type(model).__name__} with {type(model.decode_head).__name__} cannot be exported: of segmenters, only "
            "those can whose head turns maps into logits, such as UPerHead, SegformerHead and FCNHead"
        )
