"""Evaluate an exported file with the libraries' own tools."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from typing import Any, Optional

import onnx
import onnxruntime
import torch
import torch.nn.functional as F
from mmengine.model import BaseModel
from mmengine.structures import InstanceData, PixelData
from torch import Tensor

from ..errors import shown, user_mistakes
from ..ops import onnxruntime_library
from ..registry import MODELS
from .detection_ops import paste_masks
from .functions import PASTE_MASKS
from .scan_function import DOMAIN

_MASK_PROBABILITIES = "mask_probabilities"
_MOST_NODES = (
    1_000_000  # onnxruntime puts functions' nodes in place of each call; ours make a few thousand
)


def open_session(
    model: onnx.ModelProto, native: bool = False, threads: Optional[int] = None
) -> onnxruntime.InferenceSession:
    """Load a model into onnxruntime, on the CPU.

    Args:
        model: The model.
        native: Whether mmvssm's compiled operator runs the scans instead of their portable functions.
        threads: Number of threads; defaults to torch's.

    Raises:
        RuntimeError: If ``native`` is set and the operator was not built.
        ValueError: If its functions stand for more nodes than memory holds.
    """
    functions = {(f.domain, f.name, f.overload): f for f in model.functions}
    if _count_nodes(model.graph.node, functions, {}) > _MOST_NODES:
        raise ValueError(f"its functions stand for more than {_MOST_NODES} nodes")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads or torch.get_num_threads()
    if native:
        options.register_custom_ops_library(onnxruntime_library())
    return onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )


def _count_nodes(nodes: Iterable[onnx.NodeProto], functions: dict, counted: dict) -> float:
    """Count nodes, with those of the functions that they call, or infinity if one calls itself."""
    total = 0.0
    for node in nodes:
        key = (node.domain, node.op_type, node.overload)
        if key in functions and key not in counted:
            counted[key] = math.inf
            counted[key] = _count_nodes(functions[key].node, functions, counted)
        total += counted.get(key, 1)
        graphs = [graph for part in node.attribute for graph in (part.g, *part.graphs)]
        total += sum(_count_nodes(graph.node, functions, counted) for graph in graphs)
    return total


def metadata_of(model: onnx.ModelProto) -> dict[str, Any]:
    """Return an exported model's metadata, with lists decoded."""
    said = {entry.key: entry.value for entry in model.metadata_props}
    return said | {name: json.loads(said[name]) for name in ("classes", "palette") if name in said}


@MODELS.register_module()
class OnnxModel(BaseModel):
    """An exported detector, segmenter or classifier whose predictions the libraries can evaluate.

    It maps predictions back to the image's size before the test pipeline, as the libraries do: it divides boxes by the
    scale factor, pastes masks again at that size from their probabilities, and interpolates logits.

    Args:
        path: The file.
        native: Whether mmvssm's compiled operator runs the scans instead of their portable functions.
        num_classes: Labels must be below it; None if it is unknown.
        mask_threshold: Least probability of an object's pixels.
        threshold: For segmenters with one logit: pixels above this probability are foreground.
        align_corners: Setting of the interpolation of logits.

    Raises:
        UserError: When it predicts, if the file fails or gives what are no predictions.
    """

    def __init__(
        self,
        path: str,
        native: bool = False,
        num_classes: Optional[int] = None,
        mask_threshold: float = 0.5,
        threshold: float = 0.3,
        align_corners: bool = False,
    ) -> None:
        super().__init__()
        self.path = path
        self.num_classes = math.inf if num_classes is None else num_classes
        self.mask_threshold = mask_threshold
        self.threshold = threshold
        self.align_corners = align_corners
        model = onnx.load(path)
        _give_out_mask_probabilities(model)
        self._session = open_session(model, native)
        if (inputs := [x.name for x in self._session.get_inputs()]) != ["images"]:
            raise ValueError(f"its inputs are {shown(inputs)}, not images alone")
        self._names = [output.name for output in self._session.get_outputs()]

    def forward(
        self, inputs: Sequence[Tensor], data_samples: Sequence[Any], mode: str = "predict"
    ) -> Sequence[Any]:
        """Predict, image by image.

        Args:
            inputs: Images from the test pipeline, BGR ``(3, H, W)``.
            data_samples: Data samples of the libraries, to which we add the predictions.
            mode: Must be ``"predict"``.

        Returns:
            ``data_samples``.
        """
        if mode != "predict":
            raise ValueError(f"OnnxModel: mode={mode!r}; an exported model can only predict.")
        for image, sample in zip(inputs, data_samples):
            rgb, size = image.flip(0)[None].float().numpy(), tuple(image.shape[1:])
            with user_mistakes(f"{self.path} cannot predict on an image of {size[1]}x{size[0]}"):
                outputs = self._session.run(None, {"images": rgb})
                found = dict(zip(self._names, map(torch.from_numpy, outputs)))
                for name, x in found.items():
                    if x.is_floating_point() and not x.isfinite().all():
                        raise ValueError(f"its {name} are not finite")
                if "logits" in found:
                    self._add_map(sample, found, size)
                elif "boxes" in found:
                    self._add_instances(sample, found, size)
                else:
                    sample.set_pred_score(found["scores"][0]).set_pred_label(found["labels"])
                self._check(sample)
        return data_samples

    def _check(self, sample: Any) -> None:
        """Check that predictions fit the image and the classes, which evaluators trust."""
        size = tuple(sample.get("ori_shape", ())[:2])
        if "pred_sem_seg" in sample:
            found, shapes = {"labels": sample.pred_sem_seg.data}, {"labels": (1, *size)}
        elif "pred_label" in sample:
            found = {"scores": sample.pred_score, "labels": sample.pred_label}
            known = self.num_classes < math.inf
            shapes = {"scores": (self.num_classes if known else len(sample.pred_score),)}
            shapes["labels"] = (1,)
        else:
            found, count = dict(sample.pred_instances.items()), len(sample.pred_instances)
            shapes = dict(bboxes=(count, 4), scores=(count,), labels=(count,), masks=(count, *size))
        for name, x in found.items():
            if tuple(x.shape) != shapes[name]:
                raise ValueError(f"its {name} have the shape {tuple(x.shape)}, not {shapes[name]}")
        labels = found["labels"]
        low, high = (int(labels.min()), int(labels.max())) if labels.numel() else (0, -1)
        if labels.is_floating_point() or low < 0 or high >= self.num_classes:
            raise ValueError(f"its labels are no whole numbers below {self.num_classes}")

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
        from mmdet.models.utils.misc import samplelist_boxtype2tensor  # segmenters need no mmdet

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
        for i in range(len(masks)):  # all at once, the float32 masks would take much memory
            pasted[i] = paste_masks(
                masks[i : i + 1], boxes[i : i + 1], *size[:2], self.mask_threshold
            )[0]
        return pasted


def _give_out_mask_probabilities(model: onnx.ModelProto) -> None:
    """Add a detector's mask probabilities before pasting to the model's outputs."""
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
