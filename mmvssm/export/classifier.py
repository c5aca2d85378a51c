"""Wrap a classifier as a function of images."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .preparation import ImagePreparation, UnsupportedModelError, extract, prunes


class ClassifierGraph(nn.Module):
    """A classifier of mmpretrain that maps images to the scores of its classes.

    Args:
        model: An ``ImageClassifier`` with a head whose scores are a softmax.
        settings: Its config.

    Raises:
        UnsupportedModelError: If it has another head.
    """

    any_batch = True
    highest_opset = 26

    def __init__(self, model: nn.Module, settings: dict) -> None:
        super().__init__()
        from mmpretrain.models import ClsHead, ImageClassifier  # here, as others need no mmpretrain

        predicts = getattr(type(getattr(model, "head", None)), "_get_predictions", None)
        if not isinstance(model, ImageClassifier) or predicts is not ClsHead._get_predictions:
            raise UnsupportedModelError(
                f"{type(model).__name__} cannot be exported: of classifiers, only those with one label an image can"
            )
        self.prepare = ImagePreparation(model.data_preprocessor, settings["data_preprocessor"])
        self.model = model
        self.outputs = ("scores", "labels") + ("kept",) * prunes(model)

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Classify.

        Args:
            images: ``(B, 3, H, W)``, RGB from 0 to 255.

        Returns:
            Scores ``(B, classes)``, which add up to 1; labels, int64 ``(B,)``; and of a pruned model which tokens
            reached the end, bool ``(B, h, w)``.
        """
        features, kept = extract(self.model, self.prepare(images))
        scores = torch.softmax(self.model.head(features), dim=1)
        outputs = (scores, scores.argmax(1))
        return outputs if kept is None else (*outputs, kept)
