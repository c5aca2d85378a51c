"""Score and draw what runs predicted of test images, from the files that mmseg's and mmdet's metrics write."""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from functools import cache
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from campaign import damaged
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from mmseg.evaluation import IoUMetric
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch import Tensor

MAPS, BOXES = "predictions", "predictions.bbox.json"  # in a run's folder
UNLABELLED = 255
_SURE = 0.5  # least score of a box that is drawn, and counts for an image's F1


def read_map(path: Path) -> np.ndarray:
    """Read a label map ``(H, W)``, uint8."""
    with damaged(path), Image.open(path) as picture:
        return np.array(picture)


def segment_areas(predicted: Path, labels: Path, num_classes: int) -> tuple[Tensor, ...]:
    """Return the pixels of each class ``(num_classes,)``: intersection, union, predicted, labelled."""
    maps = (torch.from_numpy(read_map(path)) for path in (predicted, labels))
    return IoUMetric.intersect_and_union(*maps, num_classes, UNLABELLED)


def evaluate_boxes(predicted: Path, labels: Path) -> COCOeval:
    """Match the boxes that a run wrote with those of an annotation file."""
    with redirect_stdout(StringIO()):
        truth = read_annotations(labels)
        with damaged(predicted):
            boxes = json.loads(predicted.read_text())
        # loadRes does not take an empty list.
        evaluation = COCOeval(truth, truth.loadRes(boxes) if boxes else COCO(), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
    return evaluation


@cache
def read_annotations(path: Path) -> COCO:
    """Read an annotation file."""
    with redirect_stdout(StringIO()):
        return COCO(str(path))


def score_maps(folder: Path, labels: Path, num_classes: int) -> dict[str, float]:
    """Return the mean IoU of each test image, of the classes that it has, by file name."""
    scores = {}
    for path in sorted((folder / MAPS).glob("*.png")):
        intersection, union, _, labelled = segment_areas(path, labels / path.name, num_classes)
        there = labelled > 0
        scores[path.name] = float((intersection[there] / union[there]).mean())
    return scores


def score_boxes(folder: Path, labels: Path) -> dict[str, float]:
    """Return the F1 of each test image at an IoU of 0.5, of boxes with a score of 0.5, by file name."""
    evaluation = evaluate_boxes(folder / BOXES, labels)
    hits, boxes = Counter(), Counter()
    for part in evaluation.evalImgs:
        if part is not None and part["aRng"] == evaluation.params.areaRng[0]:
            sure = np.array(part["dtScores"]) >= _SURE
            hits[part["image_id"]] += int((part["dtMatches"][0][sure] > 0).sum())
            boxes[part["image_id"]] += int(sure.sum()) + len(part["gtIds"])
    names = {image["id"]: image["file_name"] for image in evaluation.cocoGt.dataset["images"]}
    return {names[number]: 2 * hits[number] / count for number, count in boxes.items() if count}


def draw_maps(axes: Axes, image: np.ndarray, labels: np.ndarray, palette: Sequence) -> None:
    """Draw a label map over an image ``(H, W, 3)``; what is unlabelled is black."""
    colours = np.zeros((256, 3), np.uint8)
    colours[: len(palette)] = palette
    axes.imshow((0.35 * image + 0.65 * colours[labels]).astype(np.uint8))


def draw_boxes(axes: Axes, image: np.ndarray, boxes: Sequence[Mapping], palette: Sequence) -> None:
    """Draw COCO's annotations or results over an image ``(H, W, 3)``; of results, those with a score of 0.5."""
    axes.imshow(image)
    for box in boxes:
        if box.get("score", 1.0) >= _SURE:
            x, y, width, height = box["bbox"]
            colour = np.array(palette[box["category_id"] - 1]) / 255
            axes.add_patch(Rectangle((x, y), width, height, fill=False, color=colour))


def draw_predictions(
    folders: Mapping[str, Path], names: Sequence[str], images: Path, labels: Path, metainfo: Any
) -> Figure:
    """Draw test images, a row each: the image, its labels, and what runs predicted.

    Args:
        folders: Folder of each run, by the title of its column.
        names: File names of images; of segmentation those of the label maps.
        images: Folder of the images.
        labels: Folder of the label maps, or annotation file.
        metainfo: With the ``palette``.
    """
    titles = ["image", "labels", *folders]
    size = (2.6 * len(titles), 2.1 * len(names))
    figure = Figure(size, dpi=100, layout="constrained")
    for axes, name in zip(figure.subplots(len(names), len(titles), squeeze=False), names):
        picture = next(images.glob(f"{Path(name).with_suffix('')}.*"))
        image = np.array(Image.open(picture).convert("RGB"))
        axes[0].imshow(image)
        if labels.is_dir():
            for ax, folder in zip(axes[1:], (labels, *(f / MAPS for f in folders.values()))):
                draw_maps(ax, image, read_map(folder / name), metainfo.palette)
        else:
            for ax, file in zip(axes[1:], (labels, *(f / BOXES for f in folders.values()))):
                draw_boxes(ax, image, _boxes_of(file, labels, name), metainfo.palette)
        for ax in axes:
            ax.set(xticks=[], yticks=[])
    for ax, title in zip(figure.axes, titles):
        ax.set_title(title)
    return figure


def _boxes_of(file: Path, labels: Path, name: str) -> list[dict]:
    truth = read_annotations(labels)
    (number,) = (i["id"] for i in truth.dataset["images"] if i["file_name"] == name)
    boxes = truth.dataset["annotations"] if file == labels else json.loads(file.read_text())
    return [box for box in boxes if box["image_id"] == number]
