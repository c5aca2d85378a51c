"""A model with its weights: what it is given of an image, what it answers, and what its numbers mean."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Optional, Union

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
from .sources import UnreadableError

_READER = "LoadImageFromFile"


@dataclass(frozen=True)
class Prepared:
    """An image, ready for a model.

    Attributes:
        pixels: As read, RGB, uint8 ``(H, W, 3)``: what predictions refer to, and are drawn on.
        data: What the test pipeline made of it.
    """

    pixels: np.ndarray
    data: dict[str, Any]

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Of what the model is given, ``(C, H, W)``."""
        return tuple(self.data["inputs"].shape)


class Predictor:
    """A detector or segmenter in evaluation mode.

    Args:
        cfg: Its config, whose test pipeline is used.
        checkpoint: Its weights.
        device: What to run on, such as ``"cuda:1"``.

    Attributes:
        model: The model.
        classes: What its labels 0, 1 ... are called.
        palette: Their colours, RGB, 0 to 255.
        is_detector: Whether it predicts instances (mmdet), or label maps (mmseg).
        loading: How images are decoded.

    Raises:
        UserError: If the checkpoint belongs to another model, or the config or device will not do.
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
        pipeline = inference_pipeline(cfg)
        self.loading = Loading.of(dict(pipeline=pipeline))
        if not pipeline or str(pipeline[0].type).rsplit(".", 1)[-1] != _READER:
            raise UserError(
                f"the config's test pipeline does not begin with {_READER}, so it does not say how "
                "an image file is read"
            )
        # The libraries' own, for files and for frames of videos.
        pipeline[0].type = f"{cfg.default_scope}.InferencerLoader"
        with user_mistakes("cannot build the config's test pipeline"):
            self._load, self._prepare = Compose(pipeline[:1]), Compose(pipeline[1:])

    def prepare(self, image: Union[str, np.ndarray]) -> Prepared:
        """Read an image as testing would, and make of it what the model is given.

        Args:
            image: A file, or pixels, BGR, uint8 ``(H, W, 3)``.

        Raises:
            UnreadableError: If that is not possible.
        """
        key = "img_path" if isinstance(image, str) else "img"
        # Whatever goes wrong is about this image: the pipeline has no other input.
        try:
            results = self._load({key: image, "img_id": 0})
        except Exception as error:
            reader = self.loading.backend
            raise UnreadableError(f"cannot be decoded by mmcv's {reader} reader") from error
        pixels = _rgb(results["img"])
        try:
            return Prepared(pixels, self._prepare(results))
        except (cv2.error, ValueError, AssertionError, ZeroDivisionError) as error:
            height, width = pixels.shape[:2]
            raise UnreadableError(
                f"has {width}x{height} pixels, of which the config's test pipeline can make nothing"
            ) from error

    @torch.no_grad()
    def __call__(self, batch: Sequence[Prepared]) -> list[BaseDataElement]:
        """What the model predicts.

        Args:
            batch: Images of one ``input_shape``.

        Returns:
            mmdet's ``DetDataSample`` or mmseg's ``SegDataSample`` of each, on the CPU.
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
        """A picture of the tokens that a pruned backbone keeps; None if it keeps all of them.

        Args:
            image: What to draw on.
            title: Put above, with the numbers.

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
    """Pixels in mmcv's order, grey or of a floating-point type perhaps, as a picture."""
    if pixels.ndim == 2:
        pixels = pixels[..., None]
    shape = (*pixels.shape[:2], 3)
    return np.ascontiguousarray(
        np.broadcast_to(pixels[..., 2::-1], shape).clip(0, 255).astype(np.uint8)
    )


def name_classes(cfg: Config, checkpoint: Checkpoint) -> tuple[list[str], list[tuple]]:
    """What a model's labels are called, and their colours.

    Args:
        cfg: Its config; it tells where the checkpoint does not.
        checkpoint: Its own words come first.

    Returns:
        Names, and RGB colours, 0 to 255. Where neither tells, or not as many as there are: "class 0" ...

    Raises:
        UserError: If nothing tells how many there are.
    """
    count = num_classes_of(cfg.model)
    metainfo = metainfo_of_data(cfg, "test_dataloader")
    named = [(checkpoint.classes, checkpoint.dataset_meta.get("palette"))]
    named.append((metainfo.get("classes"), metainfo.get("palette")))
    for classes, palette in named:
        if classes and count in (None, len(classes)):
            return list(map(str, classes)), _colors(palette, len(classes)) or make_palette(classes)
    if count is None:
        raise UserError("neither the checkpoint nor the config says which classes there are")
    classes = [f"class {label}" for label in range(count)]
    return classes, make_palette(classes)


def _colors(palette: Any, count: int) -> Optional[list[tuple]]:
    """A palette, if that is what it is."""
    if not isinstance(palette, (list, tuple)) or len(palette) != count:
        return None
    colors = [tuple(color) if isinstance(color, (list, tuple)) else () for color in palette]
    sound = all(
        len(color) == 3 and all(type(value) is int and 0 <= value <= 255 for value in color)
        for color in colors
    )
    return colors if sound else None
