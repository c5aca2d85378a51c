"""Distillation from a teacher's predictions (DeiT, arXiv 2012.12877; GroupMamba, section 3.4)."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any, Callable, Optional

import torch
import torch.nn.functional as F
from mmpretrain.models import ImageClassifier, LinearClsHead
from mmpretrain.structures import DataSample
from torch import Tensor, nn

from ..errors import UserError
from ..models.backbones.common import init_parameters
from ..models.published import unwrap
from ..registry import MODELS
from ..safe_checkpoint import UnsafeCheckpointError, load_checkpoint_safely

KINDS = ("hard", "soft")


@MODELS.register_module()
class DistillationHead(LinearClsHead):
    """Two linear layers, one trained on labels and one on a teacher; inference averages them (DeiT, GroupMamba).

    Args:
        num_classes: Number of classes.
        in_channels: Channels of the features ``(B, in_channels)``.
        distillation: ``'hard'`` trains on the teacher's most likely class, as published; ``'soft'`` on its
            probabilities at ``temperature`` (Hinton et al., arXiv 1503.02531).
        distillation_weight: The teacher's share of the loss, from 0 to 1; labels have the rest.
        temperature: For ``'soft'``. The loss is multiplied by its square, so that gradients keep their size.
        kwargs: Arguments of mmpretrain's ``LinearClsHead``, such as ``loss``, the loss on labels.

    Raises:
        ValueError: If ``distillation``, its weight or the temperature is out of range.
    """

    def __init__(
        self,
        num_classes: int,
        in_channels: int,
        distillation: str = "hard",
        distillation_weight: float = 0.5,
        temperature: float = 1.0,
        init_cfg: Optional[dict] = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(num_classes, in_channels, init_cfg=init_cfg, **kwargs)
        if distillation not in KINDS:
            raise ValueError(
                f"DistillationHead: unknown distillation {distillation!r}; known are {', '.join(map(repr, KINDS))}."
            )
        if not 0 <= distillation_weight <= 1 or not temperature > 0:
            raise ValueError(
                "DistillationHead: distillation_weight must be from 0 to 1 and temperature above 0; got "
                f"{distillation_weight} and {temperature}."
            )
        self.distillation = distillation
        self.distillation_weight = distillation_weight
        self.temperature = temperature
        self.distillation_fc = nn.Linear(in_channels, num_classes)
        self.apply(init_parameters)

    def forward(self, feats: tuple[Tensor, ...]) -> Tensor:
        """Average both layers' logits ``(B, num_classes)``."""
        feature = self.pre_logits(feats)
        return (self.fc(feature) + self.distillation_fc(feature)) / 2

    def loss(
        self, feats: tuple[Tensor, ...], data_samples: list[DataSample], teacher_logits: Tensor
    ) -> dict[str, Tensor]:
        """Compute the losses.

        Args:
            feats: Features; only the last ``(B, in_channels)`` is used.
            data_samples: Data samples with labels, or with scores after Mixup and CutMix.
            teacher_logits: The teacher's logits ``(B, num_classes)``.

        Returns:
            ``loss_label`` and ``loss_distillation``, both weighted; their sum is the loss.
        """
        feature = self.pre_logits(feats)
        of_labels = self._get_loss(self.fc(feature), data_samples)["loss"]
        of_teacher = self._distillation_loss(self.distillation_fc(feature), teacher_logits)
        return dict(
            loss_label=(1 - self.distillation_weight) * of_labels,
            loss_distillation=self.distillation_weight * of_teacher,
        )

    def _distillation_loss(self, logits: Tensor, teacher_logits: Tensor) -> Tensor:
        if self.distillation == "hard":
            return F.cross_entropy(logits, teacher_logits.argmax(1))
        student, teacher = (
            F.log_softmax(x.float() / self.temperature, dim=1) for x in (logits, teacher_logits)
        )
        divergence = F.kl_div(student, teacher, reduction="batchmean", log_target=True)
        return divergence * self.temperature**2


class _Teacher:
    """Hides a teacher from PyTorch, so that it is not saved, trained, or copied for averaged weights."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def __deepcopy__(self, memo: dict) -> _Teacher:
        return self


@MODELS.register_module()
class DistilledClassifier(ImageClassifier):
    """mmpretrain's ``ImageClassifier``, also trained on a teacher's predictions.

    The teacher gets the student's images, after Mixup and CutMix, in evaluation mode and without gradients. It is not
    part of checkpoints, and we load it only for training.

    Args:
        teacher: Config of any registered classifier, such as
            ``dict(type='TimmClassifier', model_name='regnety_160.deit_in1k', pretrained=True)``. It gets the images
            from this model's ``data_preprocessor``.
        teacher_checkpoint: File with all of the teacher's weights; None if ``teacher`` names its weights.
        teacher_bf16: Whether the teacher computes in bfloat16.
        kwargs: Arguments of ``ImageClassifier``; the head must be a :class:`DistillationHead`.

    Raises:
        ValueError: If the head is of another class.
    """

    def __init__(
        self,
        *args: Any,
        teacher: dict,
        teacher_checkpoint: Optional[str] = None,
        teacher_bf16: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        if not isinstance(self.head, DistillationHead):
            raise ValueError(
                "DistilledClassifier: the head must be a mmvssm.DistillationHead, which has a layer for the teacher's "
                f"labels; got {type(self.head).__name__}."
            )
        self.teacher_cfg = teacher
        self.teacher_checkpoint = teacher_checkpoint
        self.teacher_bf16 = teacher_bf16
        self._teacher: Optional[_Teacher] = None

    @property
    def teacher(self) -> Optional[nn.Module]:
        """The teacher, or None before training."""
        return self._teacher and self._teacher.model

    def init_weights(self) -> None:
        """Initialise the weights and load the teacher; a runner calls this only before training."""
        super().init_weights()
        self.load_teacher()

    def load_teacher(self) -> None:
        """Build the teacher and load its weights.

        Raises:
            UserError: If the file is missing, if its weights belong to another model, if the teacher's number of
                classes differs from the student's, or if ``teacher`` has a ``checkpoint_path``.
        """
        if self.teacher_cfg.get("checkpoint_path"):  # some releases of timm unpickle it
            raise UserError(
                "timm itself would load model.teacher.checkpoint_path; name the file as model.teacher_checkpoint, from "
                "which we read only weights"
            )
        teacher = MODELS.build(self.teacher_cfg)
        if self.teacher_checkpoint is not None:
            _load_all(teacher, self.teacher_checkpoint)
        else:
            teacher.init_weights()
        self._check_classes(_num_classes(teacher))
        device = next(self.parameters()).device
        self._teacher = _Teacher(teacher.to(device).eval().requires_grad_(False))

    def loss(self, inputs: Tensor, data_samples: list[DataSample]) -> dict[str, Tensor]:
        """Compute the losses.

        Args:
            inputs: Images ``(B, 3, H, W)`` from the data preprocessor.
            data_samples: Data samples with labels.

        Returns:
            The losses of :meth:`DistillationHead.loss`.
        """
        feats = self.extract_feat(inputs)
        return self.head.loss(feats, data_samples, teacher_logits=self.ask_teacher(inputs))

    @torch.no_grad()
    def ask_teacher(self, inputs: Tensor) -> Tensor:
        """Compute the teacher's logits ``(B, num_classes)`` for images ``(B, 3, H, W)``."""
        if self._teacher is None:
            self.load_teacher()
        precision = (
            torch.autocast(inputs.device.type, torch.bfloat16)
            if self.teacher_bf16
            else nullcontext()
        )
        with precision:
            logits = self.teacher(inputs)
        self._check_classes(logits.shape[1])
        return logits

    def _check_classes(self, number: Optional[int]) -> None:
        if number not in (None, self.head.num_classes):
            raise UserError(
                f"the teacher has {number} classes and the student {self.head.num_classes}; name a teacher that was "
                "trained on this data set (model.teacher, model.teacher_checkpoint), or train without one"
            )

    def _apply(self, fn: Callable, recurse: bool = True) -> DistilledClassifier:
        # Move the teacher with the student.
        if self._teacher is not None:
            self.teacher._apply(fn)
        return super()._apply(fn, recurse)


def _load_all(teacher: nn.Module, path: str) -> None:
    """Load a teacher's weights; none may be missing or left over."""
    try:
        teacher.load_state_dict(unwrap(load_checkpoint_safely(path)))
    except UnsafeCheckpointError as error:
        raise UserError(f"the teacher's weights (model.teacher_checkpoint): {error}") from error
    except (RuntimeError, ValueError) as error:
        lines = " ".join(str(error).split())
        raise UserError(
            f"the teacher's weights (model.teacher_checkpoint): those in {path} are not model.teacher's: {lines:.300}"
        ) from error


def _num_classes(classifier: nn.Module) -> Optional[int]:
    """Return a classifier's number of classes: from mmpretrain's head, or from the model of timm and others."""
    for part in (getattr(classifier, "head", None), getattr(classifier, "model", None), classifier):
        number = getattr(part, "num_classes", None)
        if isinstance(number, int):
            return number
    return None
