"""Custom operators for the steps of a detector that ``torch.export`` and ONNX's exporter cannot trace.

They compute what mmcv and mmdet do; ``translations.py`` translates them to ONNX.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


@torch.library.custom_op("mmvssm::highest", mutates_args=())
def highest(scores: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """Return up to ``most`` highest of ``scores (n,)``, descending, and their indices."""
    ranked = scores.sort(descending=True, stable=True)
    return ranked.values[:most].clone(), ranked.indices[:most].clone()


@highest.register_fake
def _(scores, most):
    # Otherwise every later step would have to test at run time whether there are none.
    count = torch.library.get_ctx().new_dynamic_size(min=1)
    return scores.new_empty(count), scores.new_empty(count, dtype=torch.int64)


@torch.library.custom_op("mmvssm::grouped_nms", mutates_args=())
def grouped_nms(
    boxes: Tensor, scores: Tensor, iou_threshold: float, score_threshold: float, most: int
) -> Tensor:
    """Non-maximum suppression within each group.

    Args:
        boxes: ``(G, n, 4)``: x1, y1, x2, y2.
        scores: ``(G, n)``.
        iou_threshold: Of two boxes that overlap more, the one with the lower score is dropped.
        score_threshold: Boxes with this score or less are dropped.
        most: Most boxes that each group keeps.

    Returns:
        Group and index of each kept box, int64 ``(m, 2)``.
    """
    from mmcv.ops import nms  # not at the top: segmenters do not need mmcv's operators

    kept = []
    for group in range(len(boxes)):
        candidates = (scores[group] > score_threshold).nonzero().squeeze(1)
        if len(candidates):
            _, index = nms(boxes[group][candidates], scores[group][candidates], iou_threshold)
            candidates = candidates[index[:most]]
        kept.append(torch.stack([torch.full_like(candidates, group), candidates], 1))
    return torch.cat(kept)


@grouped_nms.register_fake
def _(boxes, scores, iou_threshold, score_threshold, most):
    count = torch.library.get_ctx().new_dynamic_size(min=1)
    return boxes.new_empty(count, 2, dtype=torch.int64)


@torch.library.custom_op("mmvssm::pyramid_roi_align", mutates_args=())
def pyramid_roi_align(
    maps: Sequence[Tensor],
    boxes: Tensor,
    levels: Tensor,
    scales: Sequence[float],
    size: Sequence[int],
    sampling_ratio: int,
    aligned: bool,
) -> Tensor:
    """RoIAlign of each box on its own level of a feature pyramid.

    Args:
        maps: Levels ``(1, C, h, w)`` of one image.
        boxes: Boxes in pixels of the image ``(n, 4)``.
        levels: Index into ``maps`` for each box, int64 ``(n,)``.
        scales: Pixels of each map per pixel of the image.
        size: Height and width of the output.
        sampling_ratio: Samples per bin and direction; 0 for one per pixel of the bin.
        aligned: Whether to shift coordinates by half a pixel.

    Returns:
        ``(n, C, *size)``.
    """
    from mmcv.ops import roi_align

    rois = torch.cat([boxes.new_zeros(len(boxes), 1), boxes], 1)
    y = maps[0].new_zeros(len(boxes), maps[0].shape[1], *size)
    for i, (x, scale) in enumerate(zip(maps, scales)):
        here = levels == i
        if here.any():
            y[here] = roi_align(x, rois[here], tuple(size), scale, sampling_ratio, "avg", aligned)
    return y


@pyramid_roi_align.register_fake
def _(maps, boxes, levels, scales, size, sampling_ratio, aligned):
    return maps[0].new_empty(boxes.shape[0], maps[0].shape[1], *size)


@torch.library.custom_op("mmvssm::paste_masks", mutates_args=())
def paste_masks(masks: Tensor, boxes: Tensor, height: int, width: int, threshold: float) -> Tensor:
    """Paste masks of boxes into masks of the image.

    Args:
        masks: Probabilities ``(n, h, w)``.
        boxes: Boxes ``(n, 4)``.
        height: Height of the image.
        width: Width of the image.
        threshold: Least probability of an object's pixels.

    Returns:
        bool ``(n, height, width)``.
    """
    rows = _interpolation(boxes[:, 1], boxes[:, 3], masks.shape[1], height)
    columns = _interpolation(boxes[:, 0], boxes[:, 2], masks.shape[2], width)
    return rows @ masks @ columns.transpose(1, 2) >= threshold


def _interpolation(start: Tensor, end: Tensor, cells: int, size: int) -> Tensor:
    """Compute weights ``(n, size, cells)`` of a mask's cells at each pixel, bilinear and zero outside."""
    pixels = torch.arange(size) + 0.5
    place = (pixels - start[:, None]) / (end - start)[:, None] * cells - 0.5
    return (1 - (place[..., None] - torch.arange(cells)).abs()).clamp(min=0)


@paste_masks.register_fake
def _(masks, boxes, height, width, threshold):
    return masks.new_empty(masks.shape[0], height, width, dtype=torch.bool)
