"""Evaluate the model of a config, as tools/test.py does."""

import argparse
import json
import math
import os
from collections.abc import Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any, Optional

import numpy as np
import torch
from mmengine.config import Config, ConfigDict
from mmengine.dist import is_main_process

from ..datasets.testing import predicts_masks
from ..datasets.walk import leaf_datasets
from ..errors import UserError, shown
from ..private_names import forget_train_loop
from .checkpoints import Checkpoint, is_checkpoint
from .exported import check_arguments, is_exported, load_exported, use_exported
from .failures import run_failures
from .hooks.checkpoint_hook import INTERRUPTED
from .resuming import check_same_classes, load_on_all
from .setup import (
    LIBRARIES,
    build_model,
    build_runner,
    open_config,
    prepare_data,
    print_once,
    use_worker_init,
)
from .work_dir import LOCK

_LOADERS = ("test_dataloader",)
_PICKLES = (".pkl", ".pickle")
_NEEDS = ("test_dataloader", "test_cfg", "test_evaluator")
_OF_TRAINING = (LOCK, "last_checkpoint", INTERRUPTED, "epoch_*.pth", "iter_*.pth", "best_*.pth")


def test(args: argparse.Namespace) -> dict[str, Any]:
    """Evaluate a checkpoint or an exported file on the config's test data.

    mmengine's runner tests. Before it, we check settings, data and checkpoint as :func:`~.train.train` does.

    Args:
        args: Parsed by :func:`test_parser`.

    Returns:
        The metrics. We also write them to ``test_results.json`` in the work dir, or in its sub-folder ``test`` if a
        training wrote there.

    Raises:
        UserError: If the config, the data or the checkpoint cannot be used, before anything is written.
    """
    check_arguments(args)
    if is_checkpoint(args.config) and not args.data_root:
        raise UserError(
            f"{args.config} names no data to test on; add --data-root DIR, or put its config first"
        )
    exported = is_exported(args.checkpoint)
    cfg = open_config(args, _NEEDS, LIBRARIES)
    checkpoint = (
        load_exported(args.checkpoint, cfg)
        if exported
        else load_on_all(Checkpoint.load, args.checkpoint, cfg.work_dir)
    )
    prepare_data(cfg, args, _LOADERS, checkpoint)
    if exported:
        use_exported(cfg, args.checkpoint, args.native)
    else:
        checkpoint.check_fits(build_model(cfg))
    check_same_classes(cfg, "test_dataloader", checkpoint)
    cfg.load_from, cfg.resume = None if exported else checkpoint.path, False
    cfg.work_dir = _work_dir_of_test(cfg.work_dir, args.config)
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
    forget_train_loop(runner)
    with run_failures():
        metrics = runner.test()
    if is_main_process():
        path = Path(runner.work_dir) / "test_results.json"
        content = {"config": args.config, "checkpoint": args.checkpoint, "metrics": _plain(metrics)}
        path.write_text(json.dumps(content, indent=2, allow_nan=False) + "\n")
        print_once(f"Results: {path}")
    if args.show_dir and cfg.default_scope == "mmpretrain":
        print_once(_warning_of_equal_names(runner.test_dataloader.dataset))
    for what, where in (("Pictures", args.show_dir), ("Predictions", args.out)):
        if where:
            print_once(f"{what}: {where}")
    return metrics


def _work_dir_of_test(work_dir: str, config: str) -> str:
    """Return the work dir, or ``test`` inside it if a training wrote there: mmengine overwrites a work dir's config."""
    folder = Path(work_dir)
    has_config = Path(config).resolve().parent == folder.resolve()
    if has_config or any(file for pattern in _OF_TRAINING for file in folder.glob(pattern)):
        return str(folder / "test")
    return work_dir


def _check_writable(option: str, where: Optional[str]) -> None:
    """Check before the evaluation that we can write its pictures or predictions."""
    if not where:
        return
    path = Path(where).absolute()
    as_file, is_folder = path.suffix in _PICKLES, path.is_dir()
    if path.exists() and as_file == is_folder:
        found, needed = ("folder", "file") if is_folder else ("file", "folder")
        raise UserError(f"{option} {where}: this is a {found}, not a {needed}")
    there = next(folder for folder in (path, *path.parents) if folder.exists())
    if there != path and not there.is_dir():
        raise UserError(f"{option} {where}: {there} is a file, not a folder")
    if not os.access(there, os.W_OK | (os.X_OK if there.is_dir() else 0)):
        raise UserError(f"{option} {where}: {there} cannot be written to; name another place")


def _draw_predictions(cfg: Config, args: argparse.Namespace) -> None:
    """Turn on the library's visualization hook, and let it write to ``--show-dir`` itself."""
    hook = cfg.get("default_hooks", {}).get("visualization")
    if not hook:
        raise UserError("--show and --show-dir need default_hooks.visualization in the config")
    folder = os.path.abspath(args.show_dir) if args.show_dir else None
    if args.show:
        hook.update(show=True, wait_time=args.wait_time)
    if cfg.default_scope == "mmpretrain":
        hook.update(enable=True, interval=1, out_dir=folder)
        return
    hook.draw = True
    if folder and cfg.default_scope == "mmdet":
        hook.test_out_dir = folder
    elif folder:
        hook.interval = 1
        visualizer = cfg.setdefault("visualizer", ConfigDict(type="SegLocalVisualizer"))
        visualizer.vis_backends = [{"type": "LocalVisBackend", "img_save_dir": folder}]
        # mmseg's own default covers the picture almost completely.
        visualizer.setdefault("alpha", 0.5)


def _warning_of_equal_names(dataset: Any) -> Optional[str]:
    """Warn if images share a file name, since mmpretrain names its pictures by file name alone."""
    paths = [dataset.get_data_info(i).get("img_path") for i in range(len(dataset))]
    names = {os.path.basename(path) for path in paths if path}
    if len(names) == len(paths):
        return None
    return (
        f"warning: the {len(paths)} images have only {len(names)} different file names, by which mmpretrain names its "
        "pictures; of images of one name, only the last picture was kept"
    )


def _use_tta(cfg: Config) -> None:
    """Test with the config's test-time augmentation."""
    if cfg.default_scope == "mmdet" and predicts_masks(cfg.model):
        raise UserError(
            "--tta: mmdet cannot merge the masks of several views, only boxes, and this model "
            "predicts masks; test it without --tta"
        )
    if not cfg.get("tta_model") or not cfg.get("tta_pipeline"):
        raise UserError("--tta needs tta_model and tta_pipeline in the config")
    cfg.model = ConfigDict(**cfg.tta_model, module=cfg.model)
    for dataset in leaf_datasets(cfg.test_dataloader.dataset):
        tested = [step.scale for step in dataset.get("pipeline") or [] if _resizes(step)]
        dataset.pipeline = deepcopy(cfg.tta_pipeline)
        if len(tested) == 1:
            _follow_test_scale(dataset.pipeline, tested[0], cfg.get("img_ratios") or ())


def _resizes(step: Any) -> bool:
    """Whether a step of a pipeline resizes to a fixed scale."""
    is_step = isinstance(step, dict) and str(step.get("type")).rpartition(".")[2] == "Resize"
    return is_step and bool(step.get("scale"))


def _follow_test_scale(pipeline: Sequence[Any], tested: Any, ratios: Sequence[float]) -> None:
    """Resize the views to ``ratios`` of the scale that the test pipeline has, which a config may have changed alone.

    Raises:
        UserError: If no view has that scale, and the views do not have ``ratios`` of another one.
    """
    views = [
        step for part in pipeline if isinstance(part, dict) for step in part.get("transforms") or []
    ]
    resizes = [step for view in views for step in view if _resizes(step)]
    tested, *scales = (
        (s, s) if isinstance(s, int) else tuple(s) for s in (tested, *(r.scale for r in resizes))
    )
    if not scales or tested in scales:
        return
    # Whole pixels hide up to one pixel of the scale that the views were made from.
    was = [scale[1] / ratio for scale, ratio in zip(scales, ratios)]
    if len(ratios) != len(scales) or max(was) - min(was) > 1 / min(ratios):
        raise UserError(
            f"--tta: the test pipeline resizes to {tested}, and tta_pipeline to {shown(scales)}, none of them the "
            "same; give tta_pipeline the scales for that test"
        )
    for resize, ratio in zip(resizes, ratios):
        resize.scale = tuple(int(side * ratio) for side in tested)
    print_once(f"--tta: views are resized to {list(ratios)} times the test pipeline's {tested}")


def _write_predictions(cfg: Config, out: str) -> None:
    """Add a metric that writes predictions."""
    evaluators = cfg.test_evaluator
    evaluators = list(evaluators) if isinstance(evaluators, (list, tuple)) else [evaluators]
    if out.endswith(_PICKLES):
        kind = "mmdet.DumpDetResults" if cfg.default_scope == "mmdet" else "DumpResults"
        evaluators.append(ConfigDict(type=kind, out_file_path=out))
    elif cfg.default_scope != "mmseg":
        raise UserError(f"--out {out}: only a segmenter writes to a folder; name a .pkl file")
    else:
        evaluators[0].output_dir = out
    cfg.test_evaluator = evaluators


def _plain(value: Any) -> Any:
    """Convert ``value`` for JSON: numbers of NumPy and PyTorch to Python's, NaN and infinity to None."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, (np.generic, torch.Tensor)):
        value = value.item() if getattr(value, "ndim", 0) == 0 else value.tolist()
    return None if isinstance(value, float) and not math.isfinite(value) else value
