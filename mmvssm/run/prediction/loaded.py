"""Load a model and predict with it from Python: :func:`mmvssm.load`."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Optional, Union

import mmcv
import numpy as np
import torch
from mmengine.registry import DefaultScope
from mmengine.structures import BaseDataElement
from PIL import Image

from ...datasets.pictures import path_or_pixels
from ...errors import UserError, user_mistakes
from ...models.blueprint import SCOPES, register_library
from ..checkpoints import Checkpoint, read_config
from .outputs import build_visualizer, draw
from .predictor import Predictor
from .sources import UnreadableError

Picture = Union[str, os.PathLike, np.ndarray, Image.Image]


def load(
    checkpoint: Union[str, os.PathLike],
    config: Union[str, os.PathLike, None] = None,
    device: Union[str, torch.device, None] = None,
) -> LoadedModel:
    """Load a detector, segmenter or classifier for prediction.

    It imports :mod:`mmvssm.run`, which makes all checkpoints of the process load with ``weights_only=True``.

    Args:
        checkpoint: File that ``tools/train.py`` wrote, or any other one with its ``config``.
        config: Config file; needed if the checkpoint does not say how to build its model.
        device: Device to run on; defaults to a GPU if there is one.

    Raises:
        UserError: If the files cannot be used or do not fit each other. Nothing in a checkpoint is run.

    Example:
        >>> model = mmvssm.load("best.pth")
        >>> model("photo.jpg").save("out.jpg")
    """
    loaded = Checkpoint.load(os.fspath(checkpoint))
    cfg = read_config(os.fspath(config)) if config else loaded.config()
    if cfg.get("default_scope") not in SCOPES or "model" not in cfg:
        raise UserError(f"{config} needs a model, and a default_scope of {' or '.join(SCOPES)}")
    register_library(cfg.default_scope)
    return LoadedModel(cfg, loaded, device or ("cuda" if torch.cuda.is_available() else "cpu"))


class LoadedModel:
    """A model that predicts on pictures; see :func:`load`.

    Attributes:
        model: The PyTorch module, in evaluation mode.
        classes: Names of the labels 0, 1 ...
        palette: Their colours, RGB.
    """

    def __init__(self, cfg: Any, checkpoint: Checkpoint, device: Union[str, torch.device]) -> None:
        self._cfg = cfg
        with DefaultScope.overwrite_default_scope(cfg.default_scope):
            self._predictor = Predictor(cfg, checkpoint, device)
        self.model = self._predictor.model
        self.classes, self.palette = self._predictor.classes, self._predictor.palette

    def __call__(self, pictures: Union[Picture, Sequence[Picture]]) -> Union[Result, list[Result]]:
        """Predict on a picture, or on each of a list of pictures.

        Args:
            pictures: Files, PIL images, or arrays uint8 ``(H, W, 3)`` in the order BGR, as OpenCV and mmcv read them,
                or grey ``(H, W)``.

        Raises:
            UserError: If a picture cannot be read.
        """
        if isinstance(pictures, (list, tuple)):
            return [self(picture) for picture in pictures]
        name = pictures if isinstance(pictures, (str, os.PathLike)) else "the picture"
        with DefaultScope.overwrite_default_scope(self._cfg.default_scope):
            try:
                prepared = self._predictor.prepare(path_or_pixels(pictures))
            except UnreadableError as error:
                raise UserError(f"{name} {error}") from error
            (sample,) = self._predictor([prepared])
        return Result(prepared.pixels, sample, self)

    @cached_property
    def _visualizer(self) -> Any:
        with DefaultScope.overwrite_default_scope(self._cfg.default_scope):
            return build_visualizer(self._cfg, self._predictor)


@dataclass(frozen=True, eq=False)
class Result:
    """The prediction on a picture; what the model does not predict is None.

    Attributes:
        image: The picture, RGB, uint8 ``(H, W, 3)``.
        sample: The library's own data sample.
        boxes: float32 ``(N, 4)``: x1, y1, x2, y2 in pixels.
        scores: Of boxes, float32 ``(N,)``; of a classifier, of all classes.
        labels: Of boxes, int64 ``(N,)``: indices of the model's ``classes``.
        masks: bool ``(N, H, W)``.
        class_map: Label of each pixel, int64 ``(H, W)``.
        label: Most likely label of the picture.
        score: Its score.
    """

    image: np.ndarray
    sample: BaseDataElement
    _model: LoadedModel = field(repr=False)
    boxes: Optional[np.ndarray] = None
    scores: Optional[np.ndarray] = None
    labels: Optional[np.ndarray] = None
    masks: Optional[np.ndarray] = None
    class_map: Optional[np.ndarray] = None
    label: Optional[int] = None
    score: Optional[float] = None

    def __post_init__(self) -> None:
        found: dict[str, Any] = {}
        if "pred_instances" in self.sample:
            instances = self.sample.pred_instances.numpy()
            found.update(boxes=instances.bboxes, scores=instances.scores, labels=instances.labels)
            found["masks"] = instances.get("masks")
        if "pred_sem_seg" in self.sample:
            found["class_map"] = self.sample.pred_sem_seg.data.squeeze(0).numpy()
        if "pred_score" in self.sample:
            scores = self.sample.pred_score.numpy()
            found.update(scores=scores, label=int(scores.argmax()), score=float(scores.max()))
        vars(self).update(found)

    def save(self, path: Union[str, os.PathLike], score_thr: float = 0.3) -> None:
        """Draw the prediction and write the picture to a file.

        Args:
            path: The file; its suffix says which format.
            score_thr: Boxes with lower scores are not drawn.

        Raises:
            UserError: If it cannot be written.
        """
        sample = self.sample.clone()
        if "pred_instances" in sample:
            sample.pred_instances = sample.pred_instances[sample.pred_instances.scores >= score_thr]
        with user_mistakes(f"cannot write {path}"):
            mmcv.imwrite(
                mmcv.rgb2bgr(draw(self._model._visualizer, self.image, sample)), os.fspath(path)
            )
