"""What is written of predictions: pictures, videos, label maps, COCO's JSON."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
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
from .predictor import Predictor
from .sources import Source

RESULTS = "predictions.json"
INDEX = "images.json"
_CODEC = "mp4v"


class Outputs(AbstractContextManager):
    """A folder of predictions, in order at any moment that they are cut short.

    It gets ``pictures``, of a detector ``predictions.json`` (COCO's results format, with three keys more: the
    file's name, the frame of a video and the class's name), of a segmenter ``labels`` (PNG), where asked
    for ``tokens``, and ``images.json``, which is a data set file of COCO's without annotations: the
    images by their ids, and the categories.

    Args:
        folder: Made if it is not there.
        cfg: The model's config, whose visualizer draws.
        predictor: The model.
        score_thr: Detections of lower scores are left out everywhere.
        info: Put into ``images.json``.
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
        self._results: Optional[JsonList] = None
        self._video: Optional[VideoFile] = None

    def __enter__(self) -> Outputs:
        with user_mistakes(f"cannot write to the folder {self.folder}", (OSError,)):
            self.folder.mkdir(parents=True, exist_ok=True)
            if self._predictor.is_detector:
                self._results = JsonList(self.folder / RESULTS)
        return self

    def __exit__(self, *exception: object) -> None:
        if self._results:
            self._results.close()
        with open(self.folder / INDEX, "w", encoding="utf-8") as file:
            json.dump(self._index, file, indent=1)
        self.end_video()

    def add(
        self,
        source: Source,
        frame: Optional[int],
        pixels: np.ndarray,
        sample: BaseDataElement,
        tokens: Optional[Figure] = None,
    ) -> None:
        """Write what was predicted of an image.

        Args:
            source: Its file.
            frame: Which frame of a video it is, counted from 0.
            pixels: RGB, uint8 ``(H, W, 3)``.
            sample: The prediction.
            tokens: A picture of the tokens that were kept.

        Raises:
            UserError: If the model predicts neither instances nor label maps.
        """
        self.num_written += 1
        height, width = pixels.shape[:2]
        record = {
            "id": self.num_written,
            "file_name": source.path,
            "width": width,
            "height": height,
            **({} if frame is None else {"frame": frame}),
        }
        name = source.name if frame is None else f"{source.name}/{frame:06d}"
        if self._predictor.is_detector:
            sample = self._write_instances(record, sample)
        else:
            record["label_map"] = self._write_labels(name, sample)
        drawn = draw(self._visualizer, pixels, sample)
        if frame is None:
            record["picture"] = self._write_picture(f"pictures/{name}.jpg", drawn)
        else:
            record["picture"] = self._video_of(source.name, drawn).add(drawn)
        if tokens is not None:
            record["tokens"] = f"tokens/{name}.png"
            tokens.savefig(self._place(record["tokens"]))
        self._index["images"].append(record)

    def start_video(self, fps: float) -> None:
        """Say that the frames that come next are of one video, to be written as such."""
        self.end_video()
        self._video = VideoFile(self.folder, fps)

    def end_video(self) -> None:
        """Finish the video under way, if there is one."""
        video, self._video = self._video, None
        if video:
            video.close()

    def _place(self, name: str) -> str:
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        return str(path)

    def _video_of(self, name: str, drawn: np.ndarray) -> VideoFile:
        assert self._video is not None, "frames come after start_video"
        if not self._video.name:
            self._place(f"pictures/{name}.mp4")
            self._video.open(f"pictures/{name}.mp4", drawn.shape)
        return self._video

    def _write_picture(self, name: str, drawn: np.ndarray) -> str:
        mmcv.imwrite(mmcv.rgb2bgr(drawn), self._place(name))
        return name

    def _write_labels(self, name: str, sample: BaseDataElement) -> str:
        if "pred_sem_seg" not in sample:
            raise UserError("this config's model predicts no label maps (pred_sem_seg)")
        labels = sample.pred_sem_seg.data.squeeze(0).numpy()
        small = len(self._predictor.classes) <= 256
        name = f"labels/{name}.png"
        Image.fromarray(labels.astype(np.uint8 if small else np.uint16)).save(self._place(name))
        return name

    def _write_instances(self, record: dict[str, Any], sample: BaseDataElement) -> BaseDataElement:
        """Write detections, and return them without those of low scores."""
        if "pred_instances" not in sample:
            raise UserError("this config's model predicts no instances (pred_instances)")
        sample = sample.clone()
        instances = sample.pred_instances
        sample.pred_instances = instances[instances.scores >= self._score_thr]
        assert self._results is not None
        for detection in self._detections(sample.pred_instances):
            extra = {key: record[key] for key in ("file_name", "frame") if key in record}
            self._results.add({"image_id": record["id"], **detection, **extra})
        return sample

    def _detections(self, instances: InstanceData) -> Iterator[dict[str, Any]]:
        """Detections as COCO writes them."""
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
    """Masks ``(N, H, W)`` as COCO's run lengths, as text for JSON."""
    from mmdet.structures.mask import encode_mask_results  # here, as segmentation needs no mmdet

    return [
        {"size": code["size"], "counts": code["counts"].decode()}
        for code in encode_mask_results(masks)
    ]


class JsonList:
    """A list in a JSON file that is written entry by entry.

    Args:
        path: The file.
    """

    def __init__(self, path: Path) -> None:
        self._file = open(path, "w", encoding="utf-8")  # noqa: SIM115  (closed by close)
        self._separator = "[\n"

    def add(self, entry: Any) -> None:
        """Append an entry."""
        self._file.write(self._separator + json.dumps(entry))
        self._separator = ",\n"

    def close(self) -> None:
        """End the list and the file."""
        self._file.write("\n]\n" if self._separator == ",\n" else "[]\n")
        self._file.close()


class VideoFile:
    """A video that is written frame by frame.

    Args:
        folder: Where to.
        fps: Frames a second.
    """

    def __init__(self, folder: Path, fps: float) -> None:
        self.name = ""
        self._folder, self._fps = folder, fps
        self._num_frames = 0

    def open(self, name: str, shape: tuple[int, ...]) -> None:
        """Begin the file.

        Args:
            name: Below the folder.
            shape: ``(H, W, 3)`` of all its frames.

        Raises:
            UserError: If OpenCV cannot write one.
        """
        self.name = name
        path, codec = str(self._folder / name), cv2.VideoWriter_fourcc(*_CODEC)
        self._writer = cv2.VideoWriter(path, codec, self._fps, (shape[1], shape[0]))
        if not self._writer.isOpened():
            raise UserError(
                f"cannot write the video {path} of {shape[1]}x{shape[0]} pixels: this build of OpenCV "
                "has no encoder for it; predict on the frames as images"
            )

    def add(self, drawn: np.ndarray) -> str:
        """Append a frame, RGB, uint8 ``(H, W, 3)``.

        Returns:
            The file's name below the folder.
        """
        self._writer.write(mmcv.rgb2bgr(drawn))
        self._num_frames += 1
        return self.name

    def close(self) -> None:
        """Finish the file.

        Raises:
            UserError: If frames are missing from it, of which OpenCV says nothing, as on a full disk.
        """
        if not self.name:
            return
        self._writer.release()
        path = str(self._folder / self.name)
        written = mmcv.VideoReader(path).frame_cnt if os.path.isfile(path) else 0
        if written != self._num_frames:
            raise UserError(
                f"the video {path} was not written whole: it has {written} of {self._num_frames} frames; "
                "is the disk full?"
            )


def build_visualizer(cfg: Config, predictor: Predictor) -> Visualizer:
    """The config's visualizer, for drawing only."""
    kind = "DetLocalVisualizer" if predictor.is_detector else "SegLocalVisualizer"
    settings = {"type": kind, **(cfg.get("visualizer") or {})}
    # Drawing must not log where a training does; and under its name there may be an older one.
    for name in ("vis_backends", "save_dir"):
        settings.pop(name, None)
    settings["name"] = f"predictions-{time.monotonic_ns()}"
    if not predictor.is_detector:
        settings.setdefault("alpha", 0.5)  # mmseg's own covers the picture almost completely
    with user_mistakes("cannot build the config's visualizer"):
        visualizer = VISUALIZERS.build(settings)
    visualizer.dataset_meta = {"classes": predictor.classes, "palette": predictor.palette}
    if hasattr(visualizer, "_get_center_loc"):
        # mmseg's sorts all pixels of a class in Python, which takes longer than predicting them.
        visualizer._get_center_loc = place_name
    return visualizer


def place_name(mask: np.ndarray) -> np.ndarray:
    """Where mmseg writes the name of a class: amid its pixels in the first row that has most of them.

    Args:
        mask: ``(H, W)``, 1 where the class is.

    Returns:
        ``(x, y)``.
    """
    row = mask.sum(axis=1, dtype=np.int64).argmax()
    columns = np.flatnonzero(mask[row])
    return np.array([columns[len(columns) // 2], row])


def draw(visualizer: Visualizer, pixels: np.ndarray, sample: BaseDataElement) -> np.ndarray:
    """A prediction drawn on its image, RGB, uint8 ``(H, W, 3)`` both."""
    every_score = {"pred_score_thr": -1.0} if "pred_instances" in sample else {}
    visualizer.add_datasample("", pixels, sample, draw_gt=False, **every_score)
    return visualizer.get_image()
