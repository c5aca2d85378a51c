"""Write predictions: pictures, videos, label maps and COCO's JSON."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Optional

import cv2
import mmcv
import numpy as np
from matplotlib.figure import Figure
from mmengine.config import Config
from mmengine.registry import VISUALIZERS
from mmengine.structures import BaseDataElement, InstanceData
from mmengine.visualization import Visualizer
from PIL import Image

from ...errors import UserError, user_mistakes
from ...files import replacing, write_whole
from ...private_names import place_class_names
from .predictor import Item, Predictor

RESULTS = "predictions.json"
INDEX = "images.json"
_CODEC = "mp4v"
_RANKS = 5  # of an image's classes that we list
_SAVE_SECONDS = 60  # a killed run loses the records of at most so long


class Outputs(AbstractContextManager):
    """A folder of predictions; its JSON files are complete at any time.

    It contains ``pictures``, for detectors and classifiers ``predictions.json`` (detectors: COCO's results format), for
    segmenters ``labels`` (PNG), and ``tokens`` if there are any. ``images.json`` is a COCO data set file without
    annotations: the images by id, and the categories.

    Args:
        folder: The folder; it is made if it does not exist.
        cfg: The model's config, whose visualizer draws.
        predictor: The model.
        score_thr: Detections with lower scores are neither drawn nor listed.
        info: The ``info`` of ``images.json``.

    Attributes:
        num_written: Number of images and frames written.
    """

    def __init__(
        self,
        folder: str,
        cfg: Config,
        predictor: Predictor,
        score_thr: float,
        info: dict[str, Any],
    ) -> None:
        self.folder = Path(folder)
        self.num_written = 0
        self._predictor = predictor
        self._score_thr = score_thr
        self._visualizer = build_visualizer(cfg, predictor)
        # COCO counts categories from 1; label maps hold the labels as they are.
        self._first_id = 1 if predictor.is_detector else 0
        self._index: dict[str, Any] = {
            "info": info,
            "images": [],
            "annotations": [],
            "categories": [
                {"id": label + self._first_id, "name": name, "color": list(color)}
                for label, (name, color) in enumerate(zip(predictor.classes, predictor.palette))
            ],
        }
        self._results: list[str] = []  # as JSON, which takes less memory than dictionaries
        self._video: Optional[VideoFile] = None
        self._saved = time.monotonic()

    def __enter__(self) -> Outputs:
        with user_mistakes(f"cannot write to the folder {self.folder}", (OSError,)):
            self.folder.mkdir(parents=True, exist_ok=True)
            try:
                (self.folder / INDEX).touch(exist_ok=False)
            except FileExistsError:
                raise UserError(
                    f"another run writes to --out-dir {self.folder}; name another folder"
                ) from None
            self._save()
        return self

    def __exit__(self, *exception: object) -> None:
        self._save()
        self._end_video()

    def _save(self) -> None:
        if self._predictor.is_detector or self._predictor.is_classifier:
            write_whole(self.folder / RESULTS, "[\n" + ",\n".join(self._results) + "\n]\n")
        write_whole(self.folder / INDEX, json.dumps(self._index, indent=1))
        self._saved = time.monotonic()

    def add(self, item: Item, sample: BaseDataElement, tokens: Optional[Figure] = None) -> None:
        """Write the prediction of an image or frame; frames of a video must follow each other.

        Args:
            item: The image or frame.
            sample: The prediction.
            tokens: Picture of the kept tokens.

        Raises:
            UserError: If the model predicts neither instances nor label maps, or a video cannot be written.
        """
        source, frame, pixels = item.source, item.frame, item.image.pixels
        height, width = pixels.shape[:2]
        number = self.num_written + 1
        record = {"id": number, "file_name": source.path, "width": width, "height": height}
        name = source.name
        if frame is not None:
            record["frame"] = frame
            name = f"{name}/{frame:06d}"
        found: Iterable[dict[str, Any]] = ()
        if self._predictor.is_detector:
            sample = self._confident(sample)
            found = self._detections(sample.pred_instances)
        elif self._predictor.is_classifier:
            found = [self._ranking(sample)]
        else:
            record["label_map"] = self._write_labels(f"labels/{name}.png", sample)
        extra = {key: record[key] for key in ("file_name", "frame") if key in record}
        results = [json.dumps({"image_id": number, **result, **extra}) for result in found]
        drawn = draw(self._visualizer, pixels, sample)
        if frame is None:
            record["picture"] = f"pictures/{name}.jpg"
            with replacing(self.folder / record["picture"]) as picture:
                mmcv.imwrite(mmcv.rgb2bgr(drawn), picture)
        else:
            record["picture"] = f"pictures/{source.name}.mp4"
            self._video_at(self.folder / record["picture"], item.fps, drawn).add(drawn)
        if tokens is not None:
            record["tokens"] = f"tokens/{name}.png"
            with replacing(self.folder / record["tokens"]) as picture:
                tokens.savefig(picture)
        # Last, so that the JSON files only list what was written.
        self._index["images"].append(record)
        self._results += results
        self.num_written = number
        if time.monotonic() - self._saved >= _SAVE_SECONDS:
            self._save()

    def _video_at(self, path: Path, fps: float, drawn: np.ndarray) -> VideoFile:
        """Return the video at a path; open it, and end the one before, if it is not the current one."""
        if self._video is None or self._video.path != str(path):
            self._end_video()
            path.parent.mkdir(parents=True, exist_ok=True)
            self._video = VideoFile(str(path), fps, drawn.shape)
        return self._video

    def _end_video(self) -> None:
        video, self._video = self._video, None
        if video:
            video.close()

    def _write_labels(self, name: str, sample: BaseDataElement) -> str:
        if "pred_sem_seg" not in sample:
            raise UserError("this config's model predicts no label maps (pred_sem_seg)")
        labels = sample.pred_sem_seg.data.squeeze(0).numpy()
        dtype = np.uint8 if len(self._predictor.classes) <= 256 else np.uint16
        with replacing(self.folder / name) as picture:
            Image.fromarray(labels.astype(dtype)).save(picture)
        return name

    def _confident(self, sample: BaseDataElement) -> BaseDataElement:
        """Return a sample without the detections of low scores."""
        if "pred_instances" not in sample:
            raise UserError("this config's model predicts no instances (pred_instances)")
        sample = sample.clone()
        instances = sample.pred_instances
        sample.pred_instances = instances[instances.scores >= self._score_thr]
        return sample

    def _ranking(self, sample: BaseDataElement) -> dict[str, Any]:
        """Return the most likely class of an image, and the five most likely ones with their scores."""
        if "pred_score" not in sample:
            raise UserError("this config's model predicts no classes (pred_score)")
        scores, labels = sample.pred_score.sort(descending=True)
        ranking = [
            {"category_id": label, "category_name": self._predictor.classes[label], "score": score}
            for label, score in zip(labels[:_RANKS].tolist(), scores[:_RANKS].tolist())
        ]
        return {**ranking[0], "ranking": ranking}

    def _detections(self, instances: InstanceData) -> Iterator[dict[str, Any]]:
        """Yield detections in COCO's results format, with the class's name."""
        instances = instances.numpy()
        masks = encode_masks(instances.masks) if "masks" in instances else None
        for index, (label, score) in enumerate(zip(instances.labels, instances.scores)):
            left, top, right, bottom = map(float, instances.bboxes[index])
            detection = {
                "category_id": int(label) + self._first_id,
                "category_name": self._predictor.classes[label],
                "score": float(score),
                "bbox": [left, top, right - left, bottom - top],
            }
            if masks is not None:
                detection["segmentation"] = masks[index]
            yield detection


def encode_masks(masks: np.ndarray) -> list[dict[str, Any]]:
    """Encode masks ``(N, H, W)`` as COCO's run lengths, as text for JSON."""
    from mmdet.structures.mask import encode_mask_results  # here, as segmentation needs no mmdet

    return [
        {"size": code["size"], "counts": code["counts"].decode()}
        for code in encode_mask_results(masks)
    ]


class VideoFile:
    """A video that is written frame by frame.

    Args:
        path: The file.
        fps: Frames per second.
        shape: ``(H, W, 3)`` of all its frames.

    Raises:
        UserError: If OpenCV cannot encode it.
    """

    def __init__(self, path: str, fps: float, shape: tuple[int, ...]) -> None:
        self.path = path
        self._num_frames = 0
        height, width = shape[:2]
        codec = cv2.VideoWriter_fourcc(*_CODEC)
        self._writer = cv2.VideoWriter(path, codec, fps, (width, height))
        if not self._writer.isOpened():
            raise UserError(
                f"cannot write the video {path} of {width}x{height} pixels: this build of OpenCV "
                "has no encoder for it; predict on the frames as images"
            )

    def add(self, drawn: np.ndarray) -> None:
        """Append a frame, RGB, uint8 ``(H, W, 3)``."""
        self._writer.write(mmcv.rgb2bgr(drawn))
        self._num_frames += 1

    def close(self) -> None:
        """Finish the file.

        Raises:
            UserError: If frames are missing, as on a full disk; OpenCV itself does not raise then.
        """
        self._writer.release()
        written = mmcv.VideoReader(self.path).frame_cnt if os.path.isfile(self.path) else 0
        if written != self._num_frames:
            raise UserError(
                f"the video {self.path} is incomplete: it has {written} of {self._num_frames} frames; "
                "is the disk full?"
            )


def build_visualizer(cfg: Config, predictor: Predictor) -> Visualizer:
    """Build the config's visualizer, for drawing only."""
    kind = "DetLocalVisualizer" if predictor.is_detector else "SegLocalVisualizer"
    kind = "UniversalVisualizer" if predictor.is_classifier else kind
    settings = {"type": kind, **(cfg.get("visualizer") or {})}
    # Without backends it writes no logs; a new name keeps mmengine from returning an older instance.
    for name in ("vis_backends", "save_dir"):
        settings.pop(name, None)
    settings["name"] = f"predictions-{time.monotonic_ns()}"
    if not predictor.is_detector and not predictor.is_classifier:
        settings.setdefault("alpha", 0.5)  # mmseg's default hides most of the image
    with user_mistakes("cannot build the config's visualizer"):
        visualizer = VISUALIZERS.build(settings)
    visualizer.dataset_meta = {"classes": predictor.classes, "palette": predictor.palette}
    place_class_names(visualizer, place_name)
    return visualizer


def place_name(mask: np.ndarray) -> np.ndarray:
    """Return where mmseg writes the name of a class: the middle pixel in the fullest row of its mask.

    Args:
        mask: ``(H, W)``, 1 at pixels of the class.

    Returns:
        ``(x, y)``.
    """
    row = mask.sum(axis=1, dtype=np.int64).argmax()
    columns = np.flatnonzero(mask[row])
    return np.array([columns[len(columns) // 2], row])


def draw(visualizer: Visualizer, pixels: np.ndarray, sample: BaseDataElement) -> np.ndarray:
    """Draw a prediction on its image; both are RGB, uint8 ``(H, W, 3)``."""
    if "pred_score" in sample:
        return visualizer.visualize_cls(pixels, sample, draw_gt=False)
    every_score = {"pred_score_thr": -1.0} if "pred_instances" in sample else {}
    if "pred_sem_seg" in sample:
        sample = (
            sample.numpy()
        )  # NumPy, which mmseg's drawing indexes, takes a tensor of one pixel for a number
    visualizer.add_datasample("", pixels, sample, draw_gt=False, **every_score)
    return visualizer.get_image()
