"""Export a model to an ONNX file."""

import argparse
import importlib.util
import json
from pathlib import Path
from typing import Any

from mmengine.config import Config

from ..datasets.walk import inference_pipeline
from ..errors import UserError, user_mistakes
from ..files import write_whole
from ..version import __version__
from .checkpoints import Checkpoint
from .exported import TASKS
from .setup import LIBRARIES, build_model, open_config, print_once

_NEEDED = ("onnx", "onnxscript")


def export_onnx(args: argparse.Namespace) -> None:
    """Write a model to an ONNX file.

    Args:
        args: Parsed by :func:`~.arguments.export_onnx_parser`.

    Raises:
        UserError: If an argument cannot be used or the model cannot be exported; no file is written then.
    """
    out = Path(args.out)
    _check_first(out)
    cfg = open_config(args, libraries=LIBRARIES)
    checkpoint = Checkpoint.load(args.checkpoint)
    model = build_model(cfg)
    checkpoint.check_fits(model)
    # Not at the top: importing these takes seconds, and the packages may be missing.
    import onnx

    from ..export.onnx_export import build_onnx

    with user_mistakes("cannot export this model to ONNX"):
        graph = _graph_of(model, cfg)
        metadata = _metadata(cfg, checkpoint)
        if "kept" in graph.outputs:
            metadata["token_size"] = json.dumps(model.backbone.stride)
        onnx_model = build_onnx(graph.eval(), metadata, args.opset, _report)
    onnx_model.producer_name, onnx_model.producer_version = "mmvssm", __version__
    _report("check the exported model")
    content = onnx_model.SerializeToString()
    with user_mistakes("ONNX's checker refuses the exported model"):
        onnx.checker.check_model(content, full_check=True)
    with user_mistakes(f"cannot write {out}", (OSError,)):
        write_whole(out, content)
    inputs, outputs = (
        ", ".join(f"{x.name} {_shape_of(x)}" for x in values)
        for values in (onnx_model.graph.input, onnx_model.graph.output)
    )
    print_once(f"{out}: {len(content) / 1e6:.1f} MB, opset {args.opset}; {inputs} -> {outputs}")


def _report(step: str) -> None:
    print_once(f"Export: {step}")


def _check_first(out: Path) -> None:
    """Check the packages and the file's name before any slow work."""
    missing = [name for name in _NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(
            f"exporting needs {' and '.join(missing)}, not installed; run: pip install onnx onnxscript "
            "onnxruntime"
        )
    if out.suffix != ".onnx":
        raise UserError(f"{out}: the name of the file to write must end in .onnx")
    if not out.parent.is_dir():
        raise UserError(f"the folder {out.parent} for the exported model does not exist")
    if out.is_dir():
        raise UserError(f"{out} is a folder; name a file to write")


def _graph_of(model: Any, cfg: Config) -> Any:
    if cfg.default_scope == "mmseg":
        from ..export.segmenter import SegmenterGraph

        return SegmenterGraph(model, cfg.model)
    if cfg.default_scope == "mmpretrain":
        from ..export.classifier import ClassifierGraph

        return ClassifierGraph(model, {"data_preprocessor": {}, **cfg, **cfg.model})
    from ..export.detector import DetectorGraph

    return DetectorGraph(model, cfg.model)


def _metadata(cfg: Config, checkpoint: Checkpoint) -> dict[str, str]:
    """Return the file's metadata: texts, with lists as JSON."""
    metainfo = dict(cfg.test_dataloader.dataset.get("metainfo") or {})
    metainfo.update(checkpoint.dataset_meta)
    found = {
        "task": TASKS[cfg.default_scope],
        "license": "Apache-2.0 (the code; weights have their author's)",
        "mmvssm_version": __version__,
    }
    for name in ("classes", "palette"):
        if isinstance(metainfo.get(name), (list, tuple)):
            found[name] = json.dumps(metainfo[name])
    for step in inference_pipeline(cfg):
        scale, kind = step.get("scale"), step["type"].split(".")[-1]
        if kind == "ResizeEdge":
            found["resize"] = json.dumps({"edge": step.get("edge", "short"), "length": scale})
        elif kind == "CenterCrop":
            found["crop"] = json.dumps(step.crop_size)
        elif kind == "Resize" and isinstance(scale, (list, tuple)):
            keep_ratio = bool(step.get("keep_ratio", False))
            found["resize"] = json.dumps({"scale": list(scale), "keep_ratio": keep_ratio})
    return found


def _shape_of(value: Any) -> str:
    dims = (dim.dim_param or str(dim.dim_value or "?") for dim in value.type.tensor_type.shape.dim)
    return f"({', '.join(dims)})"
