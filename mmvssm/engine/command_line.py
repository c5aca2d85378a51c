"""What tools/train.py and tools/test.py have in common: arguments, config, checks, results."""

import argparse
import json
import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Optional

import numpy as np
import torch
from mmengine.config import Config, ConfigDict, DictAction
from mmengine.dist import is_main_process
from mmengine.registry import MODELS, RUNNERS, init_default_scope
from mmengine.runner import Runner
from torch import nn

from mmvssm.models.pruning import PruningError
from mmvssm.registry import TASK_UTILS

from .allocator import keep_freed_memory
from .checkpoints import (
    check_fits,
    check_resumable,
    check_shares_weights,
    classes_of,
    find_resumable,
    is_url,
    load_local,
)
from .data_check import check_data
from .data_root import SPLIT_OF_LOADER, apply_data_root
from .distributed import adapt_to_machine, init_processes, wait_for_all
from .errors import TRACEBACK_VARIABLE, UserError, user_mistakes
from .reproducible import make_reproducible
from .safe_checkpoint import force_weights_only
from .workers import use_worker_init

_SCOPES = ("mmdet", "mmseg")
TRAIN_LOADERS = ("train_dataloader", "val_dataloader")
TEST_LOADERS = ("test_dataloader",)


# ------------------------------------------------------------------------------------ arguments


def train_parser() -> argparse.ArgumentParser:
    """The arguments of tools/train.py."""
    parser = argparse.ArgumentParser(
        description="Train a detector (mmdet) or a segmenter (mmseg); the config says which."
    )
    parser.add_argument("config", help="config file")
    _add_common(parser)
    parser.add_argument(
        "--amp",
        action="store_true",
        help="mixed-precision training: float16 on a GPU, bfloat16 backbone and neck on a CPU",
    )
    parser.add_argument(
        "--auto-scale-lr",
        action="store_true",
        help="scale the learning rate from the config's base_batch_size to the actual batch size",
    )
    parser.add_argument(
        "--resume",
        nargs="?",
        const="auto",
        metavar="CHECKPOINT",
        help="continue an interrupted training from this checkpoint, or, with no file named, from "
        "the last one in the work dir",
    )
    return parser


def test_parser() -> argparse.ArgumentParser:
    """The arguments of tools/test.py."""
    parser = argparse.ArgumentParser(
        description="Evaluate a detector (mmdet) or a segmenter (mmseg); the config says which."
    )
    parser.add_argument("config", help="config file")
    parser.add_argument("checkpoint", help="checkpoint file")
    _add_common(parser)
    parser.add_argument("--show", action="store_true", help="show predictions in a window")
    parser.add_argument(
        "--show-dir",
        metavar="DIR",
        help="write pictures of predictions here (of several processes, the first draws its share)",
    )
    parser.add_argument(
        "--wait-time", type=float, default=2, help="seconds that --show shows a picture for"
    )
    parser.add_argument(
        "--out",
        metavar="PATH",
        help="write predictions: to a .pkl file, or, for segmentation, as label maps to a folder",
    )
    parser.add_argument(
        "--tta", action="store_true", help="test-time augmentation (several scales, flips)"
    )
    return parser


def _add_common(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--work-dir",
        help="folder for logs, checkpoints and results (default: work_dirs/<config name>)",
    )
    parser.add_argument(
        "--data-root",
        metavar="DIR",
        help="use the data set in this folder, in COCO's or (segmentation) ADE20K's layout; "
        "classes, heads and evaluators follow",
    )
    parser.add_argument(
        "--classes",
        nargs="+",
        metavar="NAME",
        help="class names of --data-root; default: those in its annotation files (test: those the "
        "checkpoint was trained on)",
    )
    parser.add_argument(
        "--reduce-zero-label",
        action=argparse.BooleanOptionalAction,
        help="whether 0 in the label maps of --data-root means unlabelled and classes count from "
        "1, as in ADE20K; default: as the maps suggest",
    )
    parser.add_argument(
        "--cfg-options",
        nargs="+",
        action=DictAction,
        metavar="KEY=VALUE",
        help="change settings of the config, such as optim_wrapper.optimizer.lr=0.001; lists are "
        'key="[a,b]" or key=a,b, without spaces',
    )
    parser.add_argument(
        "--launcher",
        choices=["none", "pytorch", "slurm", "mpi"],
        default="none",
        help="what started the processes of a distributed run",
    )
    parser.add_argument("--local_rank", "--local-rank", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument(
        "--traceback", action="store_true", help="show where in the code a mistake surfaced"
    )


# --------------------------------------------------------------------------------------- tools


def train(args: argparse.Namespace) -> None:
    """What tools/train.py does.

    Args:
        args: Parsed by :func:`train_parser`.

    Raises:
        UserError: If the config, the data or a checkpoint will not do; nothing was written then. Or if, when it
            runs, a pruned backbone meets a neck or a grid that does not go with it.
    """
    cfg = _open_config(args)
    if args.amp:
        _use_amp(cfg)
    if args.auto_scale_lr:
        if "base_batch_size" not in (cfg.get("auto_scale_lr") or {}):
            raise UserError("--auto-scale-lr needs auto_scale_lr.base_batch_size in the config")
        cfg.auto_scale_lr.enable = True
    _prepare_data(cfg, args, TRAIN_LOADERS, None)
    model = _build_model(cfg)
    _choose_start(cfg, args, model)
    del model
    _use_atomic_checkpoints(cfg)
    make_reproducible(cfg)
    use_worker_init(cfg)
    runner = _build_runner(cfg)
    with _pruning_mistakes():
        runner.train()
    _say(f"Training is finished: checkpoints, logs and the config are in {runner.work_dir}")
    _say(f"Losses and metrics of this run: {runner.log_dir}/vis_data/scalars.json")


def test(args: argparse.Namespace) -> dict[str, Any]:
    """What tools/test.py does.

    Args:
        args: Parsed by :func:`test_parser`.

    Returns:
        The metrics.

    Raises:
        UserError: If the config, the data or the checkpoint will not do; nothing was written then.
    """
    cfg = _open_config(args)
    checkpoint = None if is_url(args.checkpoint) else load_local(args.checkpoint)
    _prepare_data(cfg, args, TEST_LOADERS, checkpoint)
    if checkpoint is not None:
        check_fits(_build_model(cfg), checkpoint, args.checkpoint)
    cfg.load_from = args.checkpoint
    cfg.resume = False
    if args.show or args.show_dir:
        _draw_predictions(cfg, args)
    if args.tta:
        _use_tta(cfg)
    if args.out:
        _write_predictions(cfg, args.out)
    use_worker_init(cfg)
    runner = _build_runner(cfg)
    # mmseg's visualization hook asks for the training iteration, and the runner would build the
    # training data set, which need not be here, to answer.
    runner._train_loop = None
    with _pruning_mistakes():
        metrics = runner.test()
    if is_main_process():
        path = Path(runner.work_dir) / "test_results.json"
        content = {"config": args.config, "checkpoint": args.checkpoint, "metrics": _plain(metrics)}
        path.write_text(json.dumps(content, indent=2) + "\n")
        _say(f"Results: {path}")
    for what, where in (("Pictures", args.show_dir), ("Predictions", args.out)):
        if where:
            _say(f"{what}: {where}")
    return metrics


# --------------------------------------------------------------------------------------- steps


def _open_config(args: argparse.Namespace) -> Config:
    """Read the config file and what the command line changes in it."""
    if args.traceback:
        os.environ[TRACEBACK_VARIABLE] = "1"
    os.environ.setdefault("LOCAL_RANK", str(args.local_rank))
    force_weights_only()
    if not torch.cuda.is_available():
        keep_freed_memory()
    if not os.path.isfile(args.config):
        raise UserError(f"there is no config file {args.config}")
    with user_mistakes(f"cannot read the config {args.config}"):
        cfg = Config.fromfile(args.config)
    with user_mistakes("cannot apply --cfg-options"):
        cfg.merge_from_dict(args.cfg_options or {})
    cfg.launcher = args.launcher
    if cfg.get("default_scope") not in _SCOPES or "model" not in cfg:
        raise UserError(
            f"{args.config} is not a config for mmdet or mmseg: it needs a model and "
            "default_scope='mmdet' or 'mmseg'"
        )
    if args.work_dir:
        cfg.work_dir = args.work_dir
    elif not cfg.get("work_dir"):
        cfg.work_dir = os.path.join("work_dirs", Path(args.config).stem)
    with user_mistakes("cannot import what the config names"):
        init_default_scope(cfg.default_scope)
    init_processes(cfg)
    adapt_to_machine(cfg)
    return cfg


def _prepare_data(
    cfg: Config,
    args: argparse.Namespace,
    loaders: Sequence[str],
    checkpoint: Optional[dict[str, Any]],
) -> None:
    """Choose the data set, generate it if the config says how, and check that it is there."""
    if args.data_root:
        classes = args.classes or (classes_of(checkpoint) if checkpoint else None)
        # Loaders of a split that is there anyway follow too, so that the config saved in the work dir
        # is one of the data set throughout.
        here = {SPLIT_OF_LOADER[loader] for loader in loaders}
        following = [name for name, split in SPLIT_OF_LOADER.items() if split in here]
        _say(apply_data_root(cfg, args.data_root, following, classes, args.reduce_zero_label))
    elif args.classes or args.reduce_zero_label is not None:
        raise UserError("--classes and --reduce-zero-label describe a --data-root; give that too")
    generator = cfg.get("prepare_data")
    if generator and is_main_process():
        with user_mistakes("cannot prepare the data set"):
            TASK_UTILS.build(generator).ensure()
    wait_for_all()
    # One process looks; when it stops, the launcher stops the others.
    if is_main_process():
        check_data(cfg, loaders)
    wait_for_all()


def _build_model(cfg: Config) -> nn.Module:
    """Build the model to see that its config is right, before a work dir exists."""
    for path in _pretrained_files(cfg.model):
        load_local(path)
    with user_mistakes("cannot build the model"):
        return MODELS.build(cfg.model.copy())


def _pretrained_files(node: Any) -> list[str]:
    """Local checkpoint files that ``init_cfg``s in a model config name."""
    if isinstance(node, (list, tuple)):
        return [path for item in node for path in _pretrained_files(item)]
    if not isinstance(node, dict):
        return []
    if node.get("type") == "Pretrained" and isinstance(node.get("checkpoint"), str):
        return [] if is_url(node["checkpoint"]) else [node["checkpoint"]]
    return [path for value in node.values() for path in _pretrained_files(value)]


def _choose_start(cfg: Config, args: argparse.Namespace, model: nn.Module) -> None:
    """Settle what training starts from, and check that it fits."""
    if args.resume:
        cfg.resume, cfg.load_from = True, None if args.resume == "auto" else args.resume
    if cfg.get("resume") and not cfg.get("load_from"):
        cfg.load_from = find_resumable(cfg.work_dir)
        if cfg.load_from is None:
            _say(f"There is no checkpoint in {cfg.work_dir}; training starts from the beginning")
            cfg.resume = False
    path = cfg.get("load_from")
    if not path or is_url(path):
        return
    checkpoint = load_local(path)
    if not cfg.get("resume"):
        check_shares_weights(model, checkpoint, path)
        return
    check_resumable(checkpoint, path)
    check_fits(model, checkpoint, path)
    # mmengine restores a seed it had chosen itself only after the data order is settled.
    randomness = cfg.setdefault("randomness", ConfigDict())
    if randomness.get("seed") is None:
        randomness.seed = checkpoint["meta"].get("seed")
    _say(f"Resuming from {path}")


def _use_amp(cfg: Config) -> None:
    if not torch.cuda.is_available():
        cfg.optim_wrapper.type = "mmvssm.BFloat16OptimWrapper"
        return
    cfg.optim_wrapper.type = "AmpOptimWrapper"
    cfg.optim_wrapper.setdefault("loss_scale", "dynamic")


def _use_atomic_checkpoints(cfg: Config) -> None:
    hook = cfg.get("default_hooks", {}).get("checkpoint")
    if hook and hook.get("type") == "CheckpointHook":
        hook.type = "mmvssm.AtomicCheckpointHook"


def _draw_predictions(cfg: Config, args: argparse.Namespace) -> None:
    """Turn on the library's visualization hook, with pictures going to ``--show-dir`` itself."""
    hook = cfg.get("default_hooks", {}).get("visualization")
    if not hook:
        raise UserError("--show and --show-dir need default_hooks.visualization in the config")
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
    if out.endswith((".pkl", ".pickle")):
        kind = "mmdet.DumpDetResults" if cfg.default_scope == "mmdet" else "DumpResults"
        evaluators.append(ConfigDict(type=kind, out_file_path=out))
    elif cfg.default_scope == "mmdet":
        raise UserError(f"--out {out}: predictions of a detector go to a .pkl file")
    else:
        evaluators[0].output_dir = out
    cfg.test_evaluator = evaluators


def _build_runner(cfg: Config) -> Runner:
    with user_mistakes("cannot set up the run"):
        return RUNNERS.build(cfg) if "runner_type" in cfg else Runner.from_cfg(cfg)


@contextmanager
def _pruning_mistakes() -> Iterator[None]:
    """What a pruned model finds wrong with its config shows only when it runs."""
    try:
        yield
    except PruningError as error:
        raise UserError(str(error)) from error


def _say(text: str) -> None:
    if is_main_process():
        print(text, flush=True)


def _plain(value: Any) -> Any:
    """``value`` with NumPy's and PyTorch's numbers as Python's, and NaN as None, for JSON."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, (np.generic, torch.Tensor)):
        value = value.item() if getattr(value, "ndim", 0) == 0 else value.tolist()
    return None if isinstance(value, float) and math.isnan(value) else value
