"""Count and draw the annotations of a data set, and compare objects with a detector's anchors."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Optional

import cv2
import numpy as np
import torch
from mmengine.registry import TASK_UTILS, TRANSFORMS, VISUALIZERS
from prettytable import PrettyTable
from torch import Tensor

from ..datasets.root import make_palette

_QUANTILES = {"smallest": 0.0, "5 %": 0.05, "median": 0.5, "95 %": 0.95, "largest": 1.0}
_SHORT_SIDE = 512  # pixels at least of a panel, so that class names are legible
_BAR = 28  # pixels above a panel, for its title
_FONT = (cv2.FONT_HERSHEY_SIMPLEX, 0.5)

# ------------------------------------------------------------------------------------------ objects


@dataclass
class ObjectCounts:
    """Objects of a detection data set.

    Attributes:
        classes: Names of the classes.
        objects: Objects per class, without crowds.
        crowds: Crowds and ignored objects per class.
        images_with: Images per class that contain it.
        images: Number of images.
        empty: Number of images without an object.
        sizes: For each object the square root of its box's area, in pixels of the image file.
    """

    classes: Sequence[str]
    objects: np.ndarray
    crowds: np.ndarray
    images_with: np.ndarray
    images: int = 0
    empty: int = 0
    sizes: list[float] = field(default_factory=list)


def count_objects(records: Iterable[dict], classes: Sequence[str]) -> ObjectCounts:
    """Count the objects of a data set.

    Args:
        records: mmdet's records: ``instances``, each with ``bbox`` (x1, y1, x2, y2), ``bbox_label`` and
            optionally ``ignore_flag``.
        classes: Names of the classes.
    """
    counts = ObjectCounts(classes, *(np.zeros(len(classes), dtype=np.int64) for _ in range(3)))
    for record in records:
        here = set()
        for instance in record.get("instances", []):
            label = instance["bbox_label"]
            if instance.get("ignore_flag"):
                counts.crowds[label] += 1
                continue
            counts.objects[label] += 1
            here.add(label)
            x1, y1, x2, y2 = instance["bbox"]
            counts.sizes.append(math.sqrt(max(0.0, x2 - x1) * max(0.0, y2 - y1)))
        counts.images_with[list(here)] += 1
        counts.images += 1
        counts.empty += not here
    return counts


def table_of_objects(counts: ObjectCounts) -> PrettyTable:
    """Tabulate the objects per class."""
    has_crowds = bool(counts.crowds.any())
    table = _table(["class", "objects", "share", "images with it", *["crowds"] * has_crowds])
    total = counts.objects.sum()
    for name, objects, images, crowds in zip(
        counts.classes, counts.objects, counts.images_with, counts.crowds
    ):
        row = [name, f"{objects:,}", _percent(objects, total), f"{images:,}", f"{crowds:,}"]
        table.add_row(row if has_crowds else row[:-1])
    return table


# ------------------------------------------------------------------------------------------ anchors


class Anchors:
    """The anchors of a detector's config.

    Args:
        head: The config of the head that has the ``anchor_generator``.
        assigner: The config of the assigner that matches objects to anchors.
        divisor: Batches are padded to a multiple of it in height and width.

    Attributes:
        smallest: Square root of the smallest anchor's area, in pixels.
        largest: The same of the largest anchor.
        positive: An anchor that overlaps an object by at least this much is positive.
        least: An object's best anchor is positive from this overlap on.
    """

    def __init__(self, head: dict, assigner: Optional[dict], divisor: int = 1) -> None:
        self._generator = TASK_UTILS.build(head["anchor_generator"])
        self._divisor = divisor
        boxes = torch.cat(list(self._generator.base_anchors))
        sizes = (boxes[:, 2:] - boxes[:, :2]).prod(1).sqrt()
        self.smallest, self.largest = sizes.min().item(), sizes.max().item()
        assigner = assigner or {}
        rules = str(assigner.get("type")).endswith("MaxIoUAssigner")
        self.positive = assigner["pos_iou_thr"] if rules else 0.5
        matches_best = rules and assigner.get("match_low_quality", True)
        self.least = (
            min(assigner.get("min_pos_iou", 0.0), self.positive) if matches_best else self.positive
        )

    def best_overlaps(self, boxes: Tensor, shape: tuple[int, int]) -> Tensor:
        """Return the overlap of each box with its best anchor.

        Args:
            boxes: ``(N, 4)``, in pixels: x1, y1, x2, y2.
            shape: Height and width of their image, without padding.

        Returns:
            Intersection over union ``(N,)``.
        """
        from mmdet.structures.bbox import bbox_overlaps

        padded = [math.ceil(side / self._divisor) * self._divisor for side in shape]
        grids = [
            tuple(math.ceil(side / s) for side, s in zip(padded, stride[::-1]))
            for stride in self._generator.strides
        ]
        anchors = torch.cat(self._generator.grid_priors(grids, device="cpu"))
        chunks = [bbox_overlaps(chunk, anchors).max(1).values for chunk in boxes.split(16)]
        return torch.cat(chunks) if chunks else boxes.new_zeros(0)


def table_of_sizes(sizes: Sequence[float], what: str) -> PrettyTable:
    """Tabulate quantiles of object sizes.

    Args:
        sizes: Square roots of areas, in pixels.
        what: Heading that says in which images.
    """
    table = _table([what, *_QUANTILES])
    values = np.quantile(sizes if len(sizes) else [math.nan], list(_QUANTILES.values()))
    table.add_row(["objects, square root of area", *(f"{value:.1f}" for value in values)])
    return table


def table_of_anchors(sizes: np.ndarray, overlaps: np.ndarray, anchors: Anchors) -> PrettyTable:
    """Compare the sizes ``(N,)`` and best overlaps ``(N,)`` of objects with the anchors."""
    total = len(sizes)
    positive, least = anchors.positive, anchors.least
    best_only = (overlaps >= least) & (overlaps < positive)
    rows = [
        (
            f"smaller than the smallest anchor ({anchors.smallest:.0f} pixels)",
            sizes < anchors.smallest,
        ),
        (f"larger than the largest anchor ({anchors.largest:.0f} pixels)", sizes > anchors.largest),
        (f"matched: an anchor overlaps them by {positive:g} or more", overlaps >= positive),
        (f"matched by their best anchor only, from {least:g} on", best_only),
        ("not matched by any anchor", overlaps < least),
    ]
    if least == positive:
        del rows[3]
    table = _table(["objects against the anchors", "objects", "share"])
    for name, found in rows:
        table.add_row([name, f"{found.sum():,}", _percent(found.sum(), total)])
    return table


# ------------------------------------------------------------------------------------------- pixels


@dataclass
class PixelCounts:
    """Pixels of label maps.

    Attributes:
        classes: Names of the classes.
        pixels: Pixels per class.
        images_with: Images per class that contain it.
        ignored: Number of pixels of no class.
        images: Number of label maps.
        empty: Number of label maps with ignored pixels only.
        uniform: Number of label maps with a single class.
    """

    classes: Sequence[str]
    pixels: np.ndarray
    images_with: np.ndarray
    ignored: int = 0
    images: int = 0
    empty: int = 0
    uniform: int = 0

    @classmethod
    def of(cls, classes: Sequence[str]) -> PixelCounts:
        """Start counting from zero."""
        return cls(classes, *(np.zeros(len(classes), dtype=np.int64) for _ in range(2)))

    def add(self, labels: np.ndarray) -> None:
        """Count the pixels of a label map ``(H, W)``; labels outside the classes are ignored pixels."""
        known = labels[(labels >= 0) & (labels < len(self.classes))]
        counts = np.bincount(known, minlength=len(self.classes))
        self.pixels += counts
        self.images_with += counts > 0
        self.ignored += labels.size - known.size
        self.images += 1
        self.empty += known.size == 0
        self.uniform += np.count_nonzero(counts) == 1


def table_of_pixels(counts: PixelCounts) -> PrettyTable:
    """Tabulate the pixels per class and the ignored pixels."""
    total = counts.pixels.sum() + counts.ignored
    table = _table(["class", "pixels", "share", "images with it"])
    for name, pixels, images in zip(counts.classes, counts.pixels, counts.images_with):
        table.add_row([name, f"{pixels:,}", _percent(pixels, total), f"{images:,}"])
    table.add_row(["ignored", f"{counts.ignored:,}", _percent(counts.ignored, total), ""])
    return table


def _table(columns: Sequence[str]) -> PrettyTable:
    table = PrettyTable(columns, align="r")
    table.align[columns[0]] = "l"
    return table


def _percent(part: float, whole: float) -> str:
    return f"{100 * part / whole:.1f} %" if whole else "-"


# ----------------------------------------------------------------------------------------- pictures


class SampleDrawer:
    """Draws samples with the visualizers of mmdet and mmseg.

    Args:
        scope: ``"mmdet"`` or ``"mmseg"``.
        metainfo: The data set's, with ``classes`` and optionally ``palette``.
    """

    def __init__(self, scope: str, metainfo: dict) -> None:
        self._is_detection = scope == "mmdet"
        name = "DetLocalVisualizer" if self._is_detection else "SegLocalVisualizer"
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that no save_dir is set; we do not save with it
            config = {"alpha": 0.5, **({"line_width": 1} if self._is_detection else {})}
            self._visualizer = VISUALIZERS.build(dict(type=name, name="browse", **config))
        meta = dict(metainfo)
        if not meta.get("palette"):
            meta["palette"] = make_palette(meta["classes"])
        self._visualizer.dataset_meta = meta
        pack = "PackDetInputs" if self._is_detection else "PackSegInputs"
        self._pack = TRANSFORMS.build(dict(type=pack, meta_keys=("img_path",)))

    def draw(self, results: dict[str, Any]) -> np.ndarray:
        """Draw annotations on their image; small images are enlarged.

        Args:
            results: The output of a pipeline without its packing step.

        Returns:
            RGB, uint8 ``(H, W, 3)``.
        """
        short = min(results["img"].shape[:2])
        if short < _SHORT_SIDE:
            scale = math.ceil(_SHORT_SIDE / short)
            resize = dict(type="Resize", scale_factor=float(scale), keep_ratio=True)
            results = TRANSFORMS.build(resize)(dict(results))
        sample = self._pack(dict(results))["data_samples"]
        if self._is_detection:
            _as_arrays(sample)
        image, settings = _as_rgb(results["img"]), {"draw_pred": False}
        if not self._is_detection:
            # To place a label, mmseg sorts all pixels of its class, which takes seconds.
            settings["with_labels"] = False
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about boxes that reach beyond the image
            self._visualizer.add_datasample("", image, sample, **settings)
        return self._visualizer.get_image()

    def legend(self, labels: Iterable[int], width: int) -> np.ndarray:
        """Draw the colours and names of classes, RGB, uint8 ``(h, width, 3)``."""
        meta = self._visualizer.dataset_meta
        rows, x = [_white(_BAR, width)], 6
        for label in labels:
            name, colour = meta["classes"][label], tuple(map(int, meta["palette"][label]))
            (length, _), _ = cv2.getTextSize(name, *_FONT, 1)
            if x > 6 and x + length + 20 > width:
                rows, x = [*rows, _white(_BAR, width)], 6
            cv2.rectangle(rows[-1], (x, 9), (x + 12, 21), colour, cv2.FILLED)
            _write(rows[-1], name, x + 18)
            x += length + 36
        return np.vstack(rows)


def _as_arrays(sample: Any) -> None:
    """Convert boxes and masks to the types that mmdet's visualizer draws."""
    from mmdet.models.utils import mask2ndarray

    instances = sample.gt_instances
    if "bboxes" in instances and hasattr(instances.bboxes, "tensor"):
        instances.bboxes = instances.bboxes.tensor
    if "masks" in instances:
        instances.masks = mask2ndarray(instances.masks).astype(bool)


def _as_rgb(image: np.ndarray) -> np.ndarray:
    """Convert an image ``(H, W[, C])``, BGR, to RGB, uint8 ``(H, W, 3)``."""
    image = image[..., None] if image.ndim == 2 else image
    image = (
        np.broadcast_to(image, (*image.shape[:2], 3)) if image.shape[2] < 3 else image[..., 2::-1]
    )
    return np.ascontiguousarray(image.clip(0, 255).astype(np.uint8))


def side_by_side(panels: Sequence[tuple[str, np.ndarray]]) -> np.ndarray:
    """Put pictures side by side, each under its title.

    Args:
        panels: Titles and pictures, RGB ``(H, W, 3)``.

    Returns:
        RGB, uint8.
    """
    height = max(picture.shape[0] for _, picture in panels) + _BAR
    columns = []
    for title, picture in panels:
        column = _white(height, picture.shape[1])
        column[_BAR : _BAR + picture.shape[0]] = picture
        _write(column, title, 6)
        columns += [column, _white(height, 8)]
    return np.hstack(columns[:-1])


def _white(height: int, width: int) -> np.ndarray:
    return np.full((height, width, 3), 255, dtype=np.uint8)


def _write(picture: np.ndarray, text: str, x: int) -> None:
    cv2.putText(picture, text, (x, _BAR - 9), *_FONT, (0, 0, 0), 1, cv2.LINE_AA)
