"""An exported file in the place of the model that it was made of, for the libraries' own evaluation."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, Optional

import onnx
import onnxruntime
import torch
import torch.nn.functional as F
from mmengine.model import BaseModel
from mmengine.structures import InstanceData, PixelData
from torch import Tensor

from ..ops import onnxruntime_library
from ..registry import MODELS
from .detection_ops import paste_masks
from .functions import PASTE_MASKS
from .scan_function import DOMAIN

_MASK_PROBABILITIES = "mask_probabilities"


def open_session(
    model: onnx.ModelProto, native: bool = False, threads: Optional[int] = None
) -> onnxruntime.InferenceSession:
    """Load a model into onnxruntime, on the CPU.

    Args:
        model: The model.
        native: Whether mmvssm's compiled operator runs the scans, or their portable functions do.
        threads: How many it uses; default: as many as torch.

    Raises:
        RuntimeError: If the operator is asked for and was not built.
    """
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads or torch.get_num_threads()
    if native:
        options.register_custom_ops_library(onnxruntime_library())
    return onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )


def metadata_of(model: onnx.ModelProto) -> dict[str, Any]:
    """What an exported model says of itself, lists as such."""
    said = {entry.key: entry.value for entry in model.metadata_props}
    return said | {name: json.loads(said[name]) for name in ("classes", "palette") if name in said}


@MODELS.register_module()
class OnnxModel(BaseModel):
    """An exported detector or segmenter, whose predictions are what mmdet and mmseg evaluate.

    What the libraries do after the network, back to the size that an image had before the test pipeline resized it,
    is done here likewise: boxes are divided by the scale factor, masks are pasted anew at that size from the
    probabilities that the file pastes at the size of its input, logits are interpolated.

    Args:
        path: The file.
        native: Whether mmvssm's compiled operator runs the scans, or their portable functions do.
        mask_threshold: From which probability on a pixel belongs to an object.
        threshold: Of segmenters with one logit, above which probability a pixel is foreground.
        align_corners: Of the interpolation of logits.
    """

    def __init__(
        self,
        path: str,
        native: bool = False,
        mask_threshold: float = 0.5,
        threshold: float = 0.3,
        align_corners: bool = False,
    ) -> None:
        super().__init__()
        self.mask_threshold = mask_threshold
        self.threshold = threshold
        self.align_corners = align_corners
        model = onnx.load(path)
        _give_out_mask_probabilities(model)
        self._session = open_session(model, native)
        self._names = [output.name for output in self._session.get_outputs()]

    def forward(
        self, inputs: Sequence[Tensor], data_samples: Sequence[Any], mode: str = "predict"
    ) -> Sequence[Any]:
        """Predict, image by image.

        Args:
            inputs: Images as the test pipeline leaves them, BGR ``(3, H, W)``.
            data_samples: mmdet's or mmseg's of each; predictions are added to them.
            mode: There is no other than ``"predict"``.

        Returns:
            ``data_samples``.
        """
        if mode != "predict":
            raise ValueError(f"OnnxModel: mode={mode!r}; an exported model can only predict.")
        for image, sample in zip(inputs, data_samples):
            rgb = image.flip(0)[None].float().numpy()
            found = dict(
                zip(self._names, map(torch.from_numpy, self._session.run(None, {"images": rgb})))
            )
            add = self._add_map if "logits" in found else self._add_instances
            add(sample, found, tuple(image.shape[1:]))
        return data_samples

    def _add_map(self, sample: Any, found: dict[str, Tensor], size: tuple[int, int]) -> None:
        logits, labels = found["logits"], found["labels"]
        if sample.ori_shape[:2] != size:
            logits = F.interpolate(
                logits, sample.ori_shape[:2], mode="bilinear", align_corners=self.align_corners
            )
            one_logit = logits.shape[1] == 1
            labels = logits[:, 0].sigmoid() > self.threshold if one_logit else logits.argmax(1)
        sample.seg_logits = PixelData(data=logits[0])
        sample.pred_sem_seg = PixelData(data=labels.to(torch.int64))

    def _add_instances(self, sample: Any, found: dict[str, Tensor], size: tuple[int, int]) -> None:
        from mmdet.models.utils.misc import samplelist_boxtype2tensor  # segmenters do without mmdet

        samplelist_boxtype2tensor([sample])  # of annotated boxes, as mmdet's data_preprocessor does
        boxes = found["boxes"] / found["boxes"].new_tensor(sample.scale_factor).repeat(2)
        instances = InstanceData(bboxes=boxes, scores=found["scores"], labels=found["labels"])
        if "masks" in found:
            instances.masks = found["masks"]
            if sample.ori_shape[:2] != size:
                instances.masks = self._paste(found[_MASK_PROBABILITIES], boxes, sample.ori_shape)
        sample.pred_instances = instances

    def _paste(self, masks: Tensor, boxes: Tensor, size: Sequence[int]) -> Tensor:
        pasted = torch.zeros(len(masks), *size[:2], dtype=torch.bool)
        for i in range(len(masks)):  # as floating-point numbers, all of them would be large
            pasted[i] = paste_masks(
                masks[i : i + 1], boxes[i : i + 1], *size[:2], self.mask_threshold
            )[0]
        return pasted


def _give_out_mask_probabilities(model: onnx.ModelProto) -> None:
    """Make an output of what the masks of a detector are pasted from."""
    for node in model.graph.node:
        if (node.domain, node.op_type) == (DOMAIN, PASTE_MASKS):
            model.graph.node.add(
                op_type="Identity", input=node.input[:1], output=[_MASK_PROBABILITIES]
            )
            model.graph.output.append(
                onnx.helper.make_tensor_value_info(
                    _MASK_PROBABILITIES, onnx.TensorProto.FLOAT, [None] * 3
                )
            )
            return
