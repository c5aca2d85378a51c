"""Wrap a detector as a function of an image."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import detection_ops
from .preparation import ImagePreparation, UnsupportedModelError, extract, prunes


class DetectorGraph(nn.Module):
    """A Faster or Mask R-CNN of mmdet that maps an image to boxes, scores, labels and, if it has them, masks.

    Args:
        model: A two-stage detector with mmdet's ``RPNHead`` and ``StandardRoIHead``.
        settings: Its config.

    Raises:
        UnsupportedModelError: If the detector has other parts.
    """

    any_batch = False
    highest_opset = 21  # onnxruntime 1.31 has no RoiAlign of a later opset

    def __init__(self, model: nn.Module, settings: dict) -> None:
        super().__init__()
        _check_detector(model)
        self.prepare = ImagePreparation(model.data_preprocessor, settings["data_preprocessor"])
        self.model = model
        self.outputs = ("boxes", "scores", "labels") + ("masks",) * model.roi_head.with_mask
        self.outputs += ("kept",) * prunes(model)

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Detect.

        Args:
            images: ``(1, 3, H, W)``, RGB from 0 to 255.

        Returns:
            Boxes ``(N, 4)``, x1, y1, x2, y2 in pixels; scores ``(N,)``, descending; labels, int64 ``(N,)``; masks, bool
            ``(N, H, W)``; and of a pruned model which tokens reached the end, bool ``(1, h, w)``.
        """
        size = images.shape[2:]
        maps, kept = extract(self.model, self.prepare(images))
        outputs = self._classify(maps, self._propose(maps, size), size)
        if self.model.roi_head.with_mask:
            boxes, _, labels = outputs
            outputs += (self._mask(maps, boxes, labels, size),)
        return outputs if kept is None else (*outputs, kept)

    def _propose(self, maps: Sequence[Tensor], size: torch.Size) -> Tensor:
        """Propose boxes ``(n, 4)`` that may hold an object."""
        head, settings = self.model.rpn_head, self.model.test_cfg.rpn
        sizes = [x.shape[-2:] for x in maps]
        anchors = head.prior_generator.grid_priors(sizes, device=maps[0].device)
        all_boxes, all_scores = [], []
        for logits, deltas, priors in zip(*head(maps), anchors):
            scores = logits.permute(0, 2, 3, 1).reshape(-1).sigmoid()
            scores, index = detection_ops.highest(scores, settings.nms_pre)
            deltas = deltas.permute(0, 2, 3, 1).reshape(-1, 4)
            boxes = head.bbox_coder.decode(priors[index], deltas[index], max_shape=size)
            width, height = (boxes[:, 2:] - boxes[:, :2]).unbind(1)
            smallest = settings.get("min_bbox_size", -1)
            if smallest >= 0:
                scores = scores.where((width > smallest) & (height > smallest), -1.0)
            kept = detection_ops.grouped_nms(
                boxes[None], scores[None], settings.nms.iou_threshold, 0.0, settings.max_per_img
            )[:, 1]
            all_boxes.append(boxes[kept])
            all_scores.append(scores[kept])
        _, index = detection_ops.highest(torch.cat(all_scores), settings.max_per_img)
        return torch.cat(all_boxes)[index]

    def _classify(
        self, maps: Sequence[Tensor], proposals: Tensor, size: torch.Size
    ) -> tuple[Tensor, Tensor, Tensor]:
        head, settings = self.model.roi_head.bbox_head, self.model.test_cfg.rcnn
        logits, deltas = head(self._look(self.model.roi_head.bbox_roi_extractor, maps, proposals))
        scores = logits.softmax(-1)[:, :-1].t()
        classes = 1 if head.reg_class_agnostic else head.num_classes
        rois = proposals[:, None].expand(-1, classes, -1).reshape(-1, 4)
        boxes = head.bbox_coder.decode(rois, deltas.reshape(-1, 4), max_shape=size)
        boxes = boxes.reshape(-1, classes, 4).transpose(0, 1).expand(head.num_classes, -1, -1)
        labels, index = detection_ops.grouped_nms(
            boxes.contiguous(),
            scores.contiguous(),
            settings.nms.iou_threshold,
            settings.score_thr,
            settings.max_per_img,
        ).unbind(1)
        found, which = detection_ops.highest(scores[labels, index], settings.max_per_img)
        labels, index = labels[which], index[which]
        return boxes[labels, index], found, labels

    def _mask(
        self, maps: Sequence[Tensor], boxes: Tensor, labels: Tensor, size: torch.Size
    ) -> Tensor:
        roi_head = self.model.roi_head
        masks = roi_head.mask_head(self._look(roi_head.mask_roi_extractor, maps, boxes)).sigmoid()
        if roi_head.mask_head.class_agnostic:
            masks = masks[:, 0]
        else:
            masks = masks[torch.arange(boxes.shape[0], device=boxes.device), labels]
        threshold = self.model.test_cfg.rcnn.mask_thr_binary
        return detection_ops.paste_masks(masks, boxes, *size, threshold)

    @staticmethod
    def _look(extractor: nn.Module, maps: Sequence[Tensor], boxes: Tensor) -> Tensor:
        """Extract features ``(n, C, h, w)`` of boxes ``(n, 4)`` from the maps."""
        layers = extractor.roi_layers
        maps = maps[: len(layers)]
        rois = F.pad(boxes, (1, 0))
        return detection_ops.pyramid_roi_align(
            maps,
            boxes,
            extractor.map_roi_levels(rois, len(maps)),
            [layer.spatial_scale for layer in layers],
            layers[0].output_size,
            layers[0].sampling_ratio,
            layers[0].aligned,
        )


def _check_detector(model: nn.Module) -> None:
    rpn, roi_head = getattr(model, "rpn_head", None), getattr(model, "roi_head", None)
    parts = [(rpn, "RPNHead"), (roi_head, "StandardRoIHead")]
    if type(roi_head).__name__ == "StandardRoIHead":
        parts += [(roi_head.bbox_roi_extractor, "SingleRoIExtractor")]
        parts += [(roi_head.bbox_head.bbox_coder, "DeltaXYWHBBoxCoder")]
        if roi_head.with_mask:
            parts += [
                (roi_head.mask_roi_extractor, "SingleRoIExtractor"),
                (roi_head.mask_head, "FCNMaskHead"),
            ]
    for part, known in parts:
        if type(part).__name__ != known:
            raise UnsupportedModelError(
                f"{type(model).__name__} cannot be exported: it has "
                f"{'no' if part is None else type(part).__name__ + ' for'} {known}; of detectors, only Faster and "
                "Mask R-CNN of mmdet's standard parts can"
            )
    if not rpn.use_sigmoid_cls:
        raise UnsupportedModelError("an rpn_head with use_sigmoid=False cannot be exported")
    if roi_head.bbox_head.custom_activation:
        kind = type(roi_head.bbox_head.loss_cls).__name__
        raise UnsupportedModelError(
            f"a bbox_head with {kind}, whose scores are no softmax, cannot be exported"
        )
    if roi_head.with_shared_head:
        raise UnsupportedModelError("a detector with a shared_head cannot be exported")
    layers = [*roi_head.bbox_roi_extractor.roi_layers]
    layers += [*roi_head.mask_roi_extractor.roi_layers] if roi_head.with_mask else []
    for layer in layers:
        if type(layer).__name__ != "RoIAlign" or layer.pool_mode != "avg":
            raise UnsupportedModelError(
                f"{layer} cannot be exported: of roi_layers, only RoIAlign with pool_mode='avg' can"
            )
    for name in ("rpn", "rcnn"):
        nms = dict(model.test_cfg[name].nms)
        if nms.pop("type", "nms") != "nms" or set(nms) != {"iou_threshold"}:
            raise UnsupportedModelError(
                f"model.test_cfg.{name}.nms={dict(model.test_cfg[name].nms)} cannot be exported: only dict(type='nms', "
                "iou_threshold=...) can"
            )
