"""An exported file where a checkpoint could be."""

from __future__ import annotations

import argparse
import importlib.util
from pathlib import Path
from typing import Any

from mmengine.config import Config, ConfigDict

from ..errors import UserError, user_mistakes

_NEEDED = ("onnx", "onnxruntime")
_TASKS = {"mmdet": "detection", "mmseg": "semantic segmentation"}
_OUTPUTS = {"mmdet": {"boxes", "scores", "labels"}, "mmseg": {"logits", "labels"}}


def is_exported(path: str) -> bool:
    """Whether a file is one of tools/export_onnx.py, by its name."""
    return path.endswith(".onnx")


def check_arguments(args: argparse.Namespace) -> None:
    """Check that what is asked for can be done with what is given in the place of a checkpoint.

    Args:
        args: Parsed by :func:`~.arguments.test_parser`.

    Raises:
        UserError: If not.
    """
    if not is_exported(args.checkpoint):
        if args.native:
            raise UserError(
                f"--native is for exported models, and {args.checkpoint} is not an .onnx file"
            )
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
            f"--cfg-options {without_effect[0]} has no effect on {args.checkpoint}, in which the model's settings are "
            "fixed; give it to tools/export_onnx.py"
        )
    missing = [name for name in _NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(
            f"testing {args.checkpoint} needs {' and '.join(missing)}, which this environment lacks: pip install onnx "
            "onnxruntime"
        )


def load_exported(path: str, cfg: Config) -> dict[str, Any]:
    """What an exported file says of the data that its model was trained on, as a checkpoint says it.

    Args:
        path: The file.
        cfg: The config that it is to be tested with.

    Raises:
        UserError: If it is none of our files, or one for another task.
    """
    import onnx  # not at the top: it may be missing, and most tests do without

    from ..export.onnx_model import metadata_of

    if not Path(path).is_file():
        raise UserError(f"there is no file {path}")
    with user_mistakes(f"{path} cannot be read as an ONNX model"):
        model = onnx.load(path)
        said = metadata_of(model)
    scope = cfg.default_scope
    if scope not in _TASKS:
        raise UserError(
            f"{path} cannot be tested with a config of {scope}'s: detectors and segmenters are what is exported"
        )
    outputs = {output.name for output in model.graph.output}
    if "mmvssm_version" not in said or not _OUTPUTS[scope] <= outputs:
        other = next((task for name, task in _TASKS.items() if _OUTPUTS[name] <= outputs), None)
        if "mmvssm_version" in said and other:
            raise UserError(
                f"{path} is a model for {other}, and this config is for {_TASKS[scope]}"
            )
        raise UserError(f"{path} was not written by tools/export_onnx.py")
    return dict(meta=dict(dataset_meta=said))


def use_exported(cfg: Config, path: str, native: bool) -> None:
    """Put an exported file in the place of a config's model.

    Args:
        cfg: Changed in place. Its custom hooks go: they are of PyTorch's models, and look into them.
        path: The file.
        native: Whether mmvssm's compiled operator runs the scans.

    Raises:
        UserError: If onnxruntime cannot load it.
    """
    from ..export.onnx_model import OnnxModel

    model = ConfigDict(type="mmvssm.OnnxModel", path=path, native=native)
    if cfg.default_scope == "mmseg":
        head = cfg.model.decode_head
        model.align_corners = head.get("align_corners", False)
        if head.get("threshold") is not None:
            model.threshold = head.threshold
    elif "mask_thr_binary" in cfg.model.test_cfg.rcnn:
        model.mask_threshold = cfg.model.test_cfg.rcnn.mask_thr_binary
    with user_mistakes(f"onnxruntime cannot load {path}"):
        OnnxModel(**{name: value for name, value in model.items() if name != "type"})
    cfg.model = model
    cfg.custom_hooks = []
    cfg.pop("data_preprocessor", None)  # the file has its own
