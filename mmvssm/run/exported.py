"""Evaluate an exported .onnx file in place of a checkpoint."""

from __future__ import annotations

import argparse
import importlib.util
from pathlib import Path

from mmengine.config import Config, ConfigDict

from ..datasets.root import num_classes_of
from ..errors import UserError, user_mistakes
from .checkpoints import Checkpoint

_NEEDED = ("onnx", "onnxruntime")
TASKS = {"mmdet": "detection", "mmseg": "semantic segmentation", "mmpretrain": "classification"}
# A file is for the first task whose outputs it has.
_OUTPUTS = {
    "mmdet": {"boxes", "scores", "labels"},
    "mmseg": {"logits", "labels"},
    "mmpretrain": {"scores", "labels"},
}


def is_exported(path: str) -> bool:
    """Whether the name of a file is that of an exported model."""
    return path.endswith(".onnx")


def check_arguments(args: argparse.Namespace) -> None:
    """Check that the options fit a checkpoint or an exported file, whichever is tested.

    Args:
        args: Parsed by :func:`~.arguments.test_parser`.

    Raises:
        UserError: If an option does not fit, or a package is missing.
    """
    path = args.checkpoint
    if not is_exported(path):
        if args.native:
            raise UserError(f"--native is for exported models, and {path} is not an .onnx file")
        return
    if args.tta:
        raise UserError("--tta needs a checkpoint: an exported model has no test-time augmentation")
    if args.launcher != "none":
        raise UserError(
            f"an exported model is tested by one process: leave out --launcher {args.launcher}"
        )
    without_effect = [key for key in args.cfg_options or () if key.split(".")[0] == "model"]
    if without_effect:
        raise UserError(
            f"--cfg-options {without_effect[0]} has no effect on {path}, in which the model's settings are fixed; give "
            "it to tools/export_onnx.py"
        )
    missing = [name for name in _NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(
            f"testing {path} needs {' and '.join(missing)}, which this environment lacks: pip install onnx onnxruntime"
        )


def load_exported(path: str, cfg: Config) -> Checkpoint:
    """Read the classes and palette in an exported file; its weights are not read.

    Args:
        path: The file.
        cfg: The config that it is tested with.

    Raises:
        UserError: If tools/export_onnx.py did not write it, or it is for another task.
    """
    import onnx  # not at the top: optional, and not needed to test checkpoints

    from ..export.onnx_model import metadata_of

    if not Path(path).is_file():
        raise UserError(f"there is no file {path}")
    with user_mistakes(f"{path} cannot be read as an ONNX model"):
        model = onnx.load(path)
        metadata = metadata_of(model)
    scope = cfg.default_scope
    outputs = {output.name for output in model.graph.output}
    task = next((name for name, needed in _OUTPUTS.items() if needed <= outputs), None)
    if "mmvssm_version" not in metadata or not task:
        raise UserError(f"{path} was not written by tools/export_onnx.py")
    if scope != task:
        raise UserError(
            f"{path} is a model for {TASKS[task]}, and this config is for {TASKS[scope]}"
        )
    return Checkpoint(path, dict(meta=dict(dataset_meta=metadata)))


def use_exported(cfg: Config, path: str, native: bool) -> None:
    """Replace a config's model with an exported file.

    Args:
        cfg: Changed in place. Its custom hooks are dropped, since they read PyTorch models.
        path: The file.
        native: Whether mmvssm's compiled operator runs the scans.

    Raises:
        UserError: If onnxruntime cannot load it.
    """
    from ..export.onnx_model import OnnxModel

    settings = dict(path=path, native=native, num_classes=num_classes_of(cfg.model))
    if cfg.default_scope == "mmseg":
        head = cfg.model.decode_head
        settings["align_corners"] = head.get("align_corners", False)
        if head.get("threshold") is not None:
            settings["threshold"] = head.threshold
    elif cfg.default_scope == "mmdet" and "mask_thr_binary" in cfg.model.test_cfg.rcnn:
        settings["mask_threshold"] = cfg.model.test_cfg.rcnn.mask_thr_binary
    with user_mistakes(f"onnxruntime cannot load {path}"):
        OnnxModel(**settings)
    cfg.model = ConfigDict(type="mmvssm.OnnxModel", **settings)
    cfg.custom_hooks = []
    cfg.pop("data_preprocessor", None)  # the file has its own
