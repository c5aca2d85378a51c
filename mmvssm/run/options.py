"""Options of tools/train.py that ``--cfg-options`` cannot set in one go; each sets parts of mmengine's or ours."""

import argparse
from importlib.util import find_spec
from typing import Any, Optional

import torch
from mmengine.config import Config, ConfigDict
from mmengine.dist import get_world_size
from mmengine.hooks import EarlyStoppingHook

from ..errors import UserError
from .image_size import set_image_size
from .pretrained import start_from_scratch
from .setup import print_once

LOGGERS = {
    "tensorboard": ("TensorboardVisBackend", "torch.utils.tensorboard", "tensorboard"),
    "wandb": ("WandbVisBackend", "wandb", "wandb"),
    "mlflow": ("MLflowVisBackend", "mlflow", "mlflow"),
}
"""For each of ``--logger``: mmengine's backend, the module that it imports, and the package to install."""
_METRICS = {
    "CocoMetric": "coco/bbox_mAP",
    "VOCMetric": "pascal_voc/mAP",
    "IoUMetric": "mIoU",
    "Accuracy": "accuracy/top1",
}
"""The metric of each type of evaluator that ``--early-stop`` follows."""


def apply_options(cfg: Config, args: argparse.Namespace) -> None:
    """Apply the options to a config, in place, and print what they change beyond the setting of their name.

    Raises:
        UserError: If the config lacks what an option changes, or a package is not installed.
    """
    if args.amp or args.amp_dtype:
        use_amp(cfg, args.amp_dtype)
    for logger in dict.fromkeys([*args.logger, *["tensorboard"] * args.tensorboard]):
        use_logger(cfg, logger)
    if args.from_scratch:
        print_once(start_from_scratch(cfg))
    if args.image_size is not None:
        print_once(set_image_size(cfg, args.image_size))
    if args.batch_size is not None:
        cfg.train_dataloader.batch_size = args.batch_size
    if args.lr is not None:
        _optimizer_of(cfg, "--lr").lr = args.lr
    if args.layer_decay is not None:
        use_layer_decay(cfg, args.layer_decay)
    if args.early_stop is not None:
        stop_early(cfg, args.early_stop)
    if args.auto_scale_lr or args.batch_size is not None:
        _scale_rates(cfg, args)


def use_amp(cfg: Config, dtype: Optional[str] = None) -> None:
    """Turn on mixed precision.

    On a GPU it is bfloat16 where the GPU has it, as scans overflow in float16; otherwise float16, whose losses are
    scaled. Without a GPU, the backbone and the neck run in bfloat16.

    Args:
        cfg: Changed in place. Settings of loss scaling are dropped where nothing is scaled.
        dtype: On a GPU, ``"bfloat16"`` or ``"float16"``; by default the config's, or else what the GPU has.
    """
    wrapper = cfg.optim_wrapper
    if not torch.cuda.is_available():
        wrapper.type = "mmvssm.BFloat16OptimWrapper"
        for name in ("loss_scale", "dtype", "use_fsdp"):  # of AmpOptimWrapper alone
            wrapper.pop(name, None)
        return
    wrapper.type = "AmpOptimWrapper"
    if dtype is None:
        found = "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float16"
        dtype = wrapper.get("dtype") or found
    wrapper.dtype = dtype
    if dtype == "bfloat16":
        wrapper.loss_scale = 1.0
    else:
        wrapper.setdefault("loss_scale", "dynamic")


def use_logger(cfg: Config, name: str) -> None:
    """Also log to one of :data:`LOGGERS`.

    Raises:
        UserError: If its package is not installed.
    """
    backend, module, package = LOGGERS[name]
    try:
        found = find_spec(package) is not None and find_spec(module) is not None
    except ImportError:
        found = False
    if not found:
        raise UserError(
            f"--logger {name} needs a package that is not installed; pip install {package}"
        )
    visualizer = cfg.setdefault("visualizer", ConfigDict(type="mmengine.Visualizer"))
    backends = list(visualizer.get("vis_backends") or [ConfigDict(type="LocalVisBackend")])
    if not any(str(part.get("type")).endswith(backend) for part in backends):
        visualizer.vis_backends = [*backends, ConfigDict(type=backend)]


def use_layer_decay(cfg: Config, rate: float) -> None:
    """Lower the learning rate from the backbone's last layer to its first, each time by ``rate``."""
    _optimizer_of(cfg, "--layer-decay")
    wrapper = cfg.optim_wrapper
    constructor = "mmvssm.LayerDecayOptimWrapperConstructor"
    if wrapper.get("constructor") not in (None, constructor):
        print_once(f"--layer-decay: {constructor} takes the place of {wrapper.constructor}")
    wrapper.constructor = constructor
    wrapper.setdefault("paramwise_cfg", ConfigDict()).layer_decay_rate = rate


def stop_early(cfg: Config, patience: int) -> None:
    """End the training when ``patience`` validations in a row have not improved the metric.

    It is the metric of ``default_hooks.checkpoint.save_best``, or else that of the evaluator; ``rule`` beside it says
    whether greater or less is better, where mmengine cannot infer that.

    Raises:
        UserError: If the config has no validation, or the metric or its direction is not known.
    """
    checkpoint = (cfg.get("default_hooks") or {}).get("checkpoint") or {}
    best = checkpoint.get("save_best")
    evaluators = cfg.get("val_evaluator") or []
    evaluators = evaluators if isinstance(evaluators, (list, tuple)) else [evaluators]
    types = [str(e.get("type")).rpartition(".")[2] for e in evaluators]
    if not types:
        raise UserError("--early-stop needs a validation: val_dataloader, val_cfg, val_evaluator")
    known = [_METRICS[kind] for kind in types if kind in _METRICS]
    metrics = [best] if isinstance(best, str) and best != "auto" else known
    if not metrics:
        raise UserError(
            f"--early-stop does not know the metric of {', '.join(types)}; name it by --cfg-options "
            "default_hooks.checkpoint.save_best=METRIC, as the log of a validation calls it"
        )
    settings = dict(
        monitor=metrics[0],
        rule=checkpoint.get("rule"),
        min_delta=0.0,
        strict=True,
        patience=patience,
    )
    try:
        EarlyStoppingHook(**settings)
    except ValueError as error:
        raise UserError(
            f"--early-stop does not know whether a greater {metrics[0]} is better; set "
            "default_hooks.checkpoint.rule to greater or less"
        ) from error
    hook = ConfigDict(type="EarlyStoppingHook", **settings)
    cfg.custom_hooks = [*(cfg.get("custom_hooks") or []), hook]
    print_once(
        f"--early-stop: ends after {patience} validations in a row without a better {metrics[0]}"
    )


def _scale_rates(cfg: Config, args: argparse.Namespace) -> None:
    base = (cfg.get("auto_scale_lr") or {}).get("base_batch_size")
    images = cfg.train_dataloader.batch_size * get_world_size()
    if args.auto_scale_lr:
        if base is None:
            raise UserError("--auto-scale-lr needs auto_scale_lr.base_batch_size in the config")
        cfg.auto_scale_lr.enable = True
        print_once(
            f"Learning rates times {images / base:g}: {images} images a step, and the config's rates are for {base}"
        )
    elif base not in (None, images) and args.lr is None:
        print_once(
            f"The learning rates are for {base} images a step, and there are {images}: --auto-scale-lr scales them"
        )


def _optimizer_of(cfg: Config, option: str) -> Any:
    optimizer = cfg.optim_wrapper.get("optimizer")
    if not isinstance(optimizer, dict):
        raise UserError(f"{option} needs optim_wrapper.optimizer in the config")
    return optimizer
