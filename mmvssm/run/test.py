"""What tools/test.py does."""

import argparse
import json
import math
import os
from pathlib import Path
from typing import Any, Optional

import numpy as np
import torch
from mmengine.config import Config, ConfigDict
from mmengine.dist import is_main_process

from ..errors import UserError
from .checkpoints import check_fits, load_any
from .exported import check_arguments, is_exported, load_exported, use_exported
from .failures import run_failures
from .resuming import check_same_classes
from .setup import (
    LIBRARIES,
    build_model,
    build_runner,
    open_config,
    prepare_data,
    say,
    use_worker_init,
)

_LOADERS = ("test_dataloader",)
_PICKLES = (".pkl", ".pickle")
_NEEDS = ("test_dataloader", "test_cfg", "test_evaluator")


def test(args: argparse.Namespace) -> dict[str, Any]:
    """What tools/test.py does.

    Args:
        args: Parsed by :func:`test_parser`.

    Returns:
        The metrics.

    Raises:
        UserError: If the config, the data or the checkpoint will not do; nothing was written then.
    """
    check_arguments(args)
    exported = is_exported(args.checkpoint)
    cfg = open_config(args, _NEEDS, LIBRARIES)
    checkpoint = load_exported(args.checkpoint, cfg) if exported else load_any(args.checkpoint)
    prepare_data(cfg, args, _LOADERS, checkpoint)
    if exported:
        use_exported(cfg, args.checkpoint, args.native)
    else:
        check_fits(build_model(cfg), checkpoint, args.checkpoint)
    check_same_classes(cfg, "test_dataloader", checkpoint, args.checkpoint)
    cfg.load_from = None if exported else args.checkpoint
    cfg.resume = False
    for option, where in (("--show-dir", args.show_dir), ("--out", args.out)):
        _check_writable(option, where)
    if args.show or args.show_dir:
        _draw_predictions(cfg, args)
    if args.tta:
        _use_tta(cfg)
    if args.out:
        _write_predictions(cfg, args.out)
    use_worker_init(cfg)
    runner = build_runner(cfg)
    # mmseg's visualization hook asks for the training iteration, and the runner would build the
    # training data set, which need not be here, to answer.
    runner._train_loop = None
    with run_failures():
        metrics = runner.test()
    if is_main_process():
        path = Path(runner.work_dir) / "test_results.json"
        content = {"config": args.config, "checkpoint": args.checkpoint, "metrics": _plain(metrics)}
        path.write_text(json.dumps(content, indent=2, allow_nan=False) + "\n")
        say(f"Results: {path}")
    if args.show_dir and cfg.default_scope == "mmpretrain":
        say(_warning_of_equal_names(runner.test_dataloader.dataset))
    for what, where in (("Pictures", args.show_dir), ("Predictions", args.out)):
        if where:
            say(f"{what}: {where}")
    return metrics


def _check_writable(option: str, where: Optional[str]) -> None:
    """Check before the evaluation that what comes out of it will have a place."""
    if not where:
        return
    path = Path(where).absolute()
    if path.suffix in _PICKLES and path.is_dir():
        raise UserError(f"{option} {where}: this is a folder, not a file")
    if path.exists() and path.suffix not in _PICKLES and not path.is_dir():
        raise UserError(f"{option} {where}: this is a file, not a folder")
    there = next(folder for folder in (path, *path.parents) if folder.exists())
    if there != path and not there.is_dir():
        raise UserError(f"{option} {where}: {there} is a file, not a folder")
    if not os.access(there, os.W_OK | (os.X_OK if there.is_dir() else 0)):
        raise UserError(f"{option} {where}: {there} cannot be written to; name another place")


def _draw_predictions(cfg: Config, args: argparse.Namespace) -> None:
    """Turn on the library's visualization hook, with pictures going to ``--show-dir`` itself."""
    hook = cfg.get("default_hooks", {}).get("visualization")
    if not hook:
        raise UserError("--show and --show-dir need default_hooks.visualization in the config")
    if cfg.default_scope == "mmpretrain":
        out_dir = os.path.abspath(args.show_dir) if args.show_dir else None
        hook.update(enable=True, interval=1, out_dir=out_dir)
        if args.show:
            hook.update(show=True, wait_time=args.wait_time)
        return
    hook.update(draw=True)
    if args.show:
        hook.update(show=True, wait_time=args.wait_time)
    if not args.show_dir:
        return
    folder = os.path.abspath(args.show_dir)
    if cfg.default_scope == "mmdet":
        hook.test_out_dir = folder
        return
    hook.interval = 1
    visualizer = cfg.setdefault("visualizer", ConfigDict(type="SegLocalVisualizer"))
    visualizer.vis_backends = [{"type": "LocalVisBackend", "img_save_dir": folder}]
    # mmseg's own default covers the picture almost completely.
    visualizer.setdefault("alpha", 0.5)


def _warning_of_equal_names(dataset: Any) -> Optional[str]:
    """What to say where mmpretrain, which names pictures by the image's file alone, wrote over some."""
    paths = [dataset.get_data_info(i).get("img_path") for i in range(len(dataset))]
    names = {os.path.basename(path) for path in paths if path}
    if len(names) == len(paths):
        return None
    return (
        f"warning: the {len(paths)} images have {len(names)} file names between them (mmpretrain's pictures are called "
        "by these), and of each name the last one's picture is there"
    )


def _use_tta(cfg: Config) -> None:
    """Test with the config's test-time augmentation."""
    if cfg.default_scope == "mmdet" and "mask_head" in repr(cfg.model):
        raise UserError(
            "--tta: mmdet cannot merge the masks of several views, only boxes, and this model "
            "predicts masks; test it without --tta"
        )
    if not cfg.get("tta_model") or not cfg.get("tta_pipeline"):
        raise UserError("--tta needs tta_model and tta_pipeline in the config")
    cfg.model = ConfigDict(**cfg.tta_model, module=cfg.model)
    dataset = cfg.test_dataloader.dataset
    while "dataset" in dataset:
        dataset = dataset.dataset
    dataset.pipeline = cfg.tta_pipeline


def _write_predictions(cfg: Config, out: str) -> None:
    """Add a metric that writes predictions."""
    evaluators = cfg.test_evaluator
    evaluators = list(evaluators) if isinstance(evaluators, (list, tuple)) else [evaluators]
    if out.endswith(_PICKLES):
        kind = "mmdet.DumpDetResults" if cfg.default_scope == "mmdet" else "DumpResults"
        evaluators.append(ConfigDict(type=kind, out_file_path=out))
    elif cfg.default_scope != "mmseg":
        raise UserError(f"--out {out}: only a segmenter's go to a folder; name a .pkl file")
    else:
        evaluators[0].output_dir = out
    cfg.test_evaluator = evaluators


def _plain(value: Any) -> Any:
    """``value`` with NumPy's and PyTorch's numbers as Python's, and None for what JSON has no number for."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, (np.generic, torch.Tensor)):
        value = value.item() if getattr(value, "ndim", 0) == 0 else value.tolist()
    return None if isinstance(value, float) and not math.isfinite(value) else value
