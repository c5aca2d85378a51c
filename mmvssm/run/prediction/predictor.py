"""Prepare images for a detector, segmenter or classifier, run it, and name its classes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Optional, Union

import cv2
import numpy as np
import torch
from matplotlib.figure import Figure
from mmengine.config import Config
from mmengine.dataset import Compose
from mmengine.model import revert_sync_batchnorm
from mmengine.structures import BaseDataElement

from ...analysis.pruning_view import (
    as_backbone_sees,
    count_tokens,
    draw_pruning,
    observe_pruning,
    patch_size_of,
    pruned_backbone,
)
from ...datasets.pictures import Loading
from ...datasets.root import make_palette, num_classes_of
from ...datasets.walk import inference_pipeline
from ...errors import UserError, user_mistakes
from ..checkpoints import Checkpoint
from ..failures import is_out_of_memory
from ..resuming import metainfo_of_data
from ..setup import build_model
from .sources import Source, UnreadableError

_READER = "LoadImageFromFile"


@dataclass(frozen=True)
class Prepared:
    """An image, ready for a model.

    Attributes:
        pixels: The image as read, RGB, uint8 ``(H, W, 3)``; predictions refer to it and are drawn on it.
        data: The output of the test pipeline.
    """

    pixels: np.ndarray
    data: dict[str, Any]

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Shape of the model's input, ``(C, H, W)``."""
        return tuple(self.data["inputs"].shape)


class Item(NamedTuple):
    """An image, or a frame of a video.

    Attributes:
        source: Its file.
        image: The prepared image.
        frame: Index of the frame, from 0; None for an image.
        fps: Frames per second of the video.
    """

    source: Source
    image: Prepared
    frame: Optional[int] = None
    fps: float = 0.0


class Predictor:
    """A detector, segmenter or classifier in evaluation mode.

    The libraries' inferencers load checkpoints that do not fit with only a warning, catch no errors per
    file and read no videos. So we use the parts below them: the config's test pipeline, ``test_step`` and the
    visualizers.

    Args:
        cfg: The config, whose test pipeline is used.
        checkpoint: The weights.
        device: The device to run on, such as ``"cuda:1"``.

    Attributes:
        model: The model.
        classes: Names of the labels 0, 1 ...
        palette: Their colours, RGB, 0 to 255.
        is_detector: True for detectors (mmdet).
        is_classifier: True for classifiers (mmpretrain).
        loading: How images are decoded.

    Raises:
        UserError: If the checkpoint does not fit the model, or the config or device cannot be used.
    """

    def __init__(
        self, cfg: Config, checkpoint: Checkpoint, device: Union[str, torch.device]
    ) -> None:
        model = build_model(cfg)
        checkpoint.check_fits(model)
        with user_mistakes(f"cannot use --device {device}"):
            self.model = revert_sync_batchnorm(model).to(device).eval()
        self.classes, self.palette = name_classes(cfg, checkpoint)
        self.is_detector = cfg.default_scope == "mmdet"
        self.is_classifier = cfg.default_scope == "mmpretrain"
        pipeline = inference_pipeline(cfg)
        self.loading = Loading.of(dict(pipeline=pipeline))
        if not pipeline or str(pipeline[0].type).rsplit(".", 1)[-1] != _READER:
            raise UserError(
                f"the config's test pipeline does not begin with {_READER}; put it first, so that we "
                "know how to read an image file"
            )
        self._dtype = np.float32 if pipeline[0].get("to_float32") else np.uint8
        with user_mistakes("cannot build the config's test pipeline"):
            self._load, self._prepare = Compose(pipeline[:1]), Compose(pipeline[1:])

    def prepare(self, image: Union[str, np.ndarray]) -> Prepared:
        """Read an image and apply the test pipeline.

        Args:
            image: A file, or pixels, BGR, uint8 ``(H, W, 3)``.

        Raises:
            UnreadableError: If the image cannot be decoded or resized.
        """
        results = {"img_id": 0, "img_path": image}
        if isinstance(image, str):
            # Any error is about this image: the loader has no other input.
            try:
                results = self._load(results)
            except Exception as error:
                reader = self.loading.backend
                raise UnreadableError(f"cannot be decoded by mmcv's {reader} reader") from error
        else:
            size, pixels = image.shape[:2], image.astype(self._dtype)
            results.update(img_path=None, img=pixels, img_shape=size, ori_shape=size)
        pixels = _rgb(results["img"])
        try:
            return Prepared(pixels, self._prepare(results))
        except (cv2.error, ValueError, AssertionError, ZeroDivisionError) as error:
            height, width = pixels.shape[:2]
            raise UnreadableError(
                f"has {width}x{height} pixels, which the config's test pipeline cannot resize"
            ) from error

    @torch.no_grad()
    def __call__(self, batch: Sequence[Prepared]) -> list[BaseDataElement]:
        """Predict on a batch.

        Args:
            batch: Images of one ``input_shape``.

        Returns:
            One ``DetDataSample`` (mmdet), ``SegDataSample`` (mmseg) or ``DataSample`` (mmpretrain) per image, on the
            CPU.

        Raises:
            UserError: If memory runs out.
        """
        data = dict(
            inputs=[image.data["inputs"] for image in batch],
            data_samples=[image.data["data_samples"] for image in batch],
        )
        try:
            return [sample.cpu() for sample in self.model.test_step(data)]
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            _, height, width = batch[0].input_shape
            raise UserError(
                f"out of memory with a batch of {len(batch)} x {height} x {width} pixels; use a "
                "smaller --batch-size, or a smaller scale in the config's test pipeline"
            ) from error

    def draw_tokens(self, image: Prepared, title: str) -> Optional[Figure]:
        """Draw the tokens that a pruned backbone keeps; return None if it keeps all of them.

        Args:
            image: The image to draw on.
            title: The title, to which we add the token counts.

        Raises:
            UserError: If the backbone prunes nothing at all.
        """
        backbone = pruned_backbone(self.model)
        resized, x = as_backbone_sees(self.model, image.data)
        try:
            layers = observe_pruning(backbone, x)
        except UserError:
            return None
        numbers = count_tokens(layers)
        return draw_pruning(resized, layers, patch_size_of(backbone), f"{title}\n{numbers}")


def _rgb(pixels: np.ndarray) -> np.ndarray:
    """Convert pixels in mmcv's channel order, ``(H, W[, C])`` of any type, to RGB, uint8 ``(H, W, 3)``."""
    if pixels.ndim == 2:
        pixels = pixels[..., None]
    shape = (*pixels.shape[:2], 3)
    return np.ascontiguousarray(
        np.broadcast_to(pixels[..., 2::-1], shape).clip(0, 255).astype(np.uint8)
    )


def name_classes(cfg: Config, checkpoint: Checkpoint) -> tuple[list[str], list[tuple]]:
    """Return the names and colours of a model's classes.

    Args:
        cfg: The config, which we ask second.
        checkpoint: The checkpoint, which we ask first.

    Returns:
        Names, and RGB colours, 0 to 255. If neither lists as many classes as the model has: "class 0" ...

    Raises:
        UserError: If the number of classes is unknown.
    """
    count = num_classes_of(cfg.model)
    metainfo = metainfo_of_data(cfg, "test_dataloader")
    named = [(checkpoint.classes, checkpoint.dataset_meta.get("palette"))]
    named.append((metainfo.get("classes"), metainfo.get("palette")))
    for classes, palette in named:
        if classes and count in (None, len(classes)):
            return list(map(str, classes)), _colors(palette, len(classes)) or make_palette(classes)
    if count is None:
        raise UserError(
            "neither the checkpoint nor the config lists the classes; set num_classes in the model's heads"
        )
    classes = [f"class {label}" for label in range(count)]
    return classes, make_palette(classes)


def _colors(palette: Any, count: int) -> Optional[list[tuple]]:
    """Return a palette as tuples, or None if it is not a list of ``count`` RGB colours."""
    if not isinstance(palette, (list, tuple)) or len(palette) != count:
        return None
    colors = [tuple(color) if isinstance(color, (list, tuple)) else () for color in palette]
    sound = all(
        len(color) == 3 and all(type(value) is int and 0 <= value <= 255 for value in color)
        for color in colors
    )
    return colors if sound else None
