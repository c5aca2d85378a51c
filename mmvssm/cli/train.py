"""What tools/train.py does."""

import argparse

import torch
from mmengine.config import Config, ConfigDict
from torch import nn

from ..engine.reproducible import make_reproducible
from .checkpoints import (
    check_fits,
    check_resumable,
    check_shares_weights,
    find_resumable,
    is_url,
    load_local,
)
from .errors import UserError
from .run import (
    build_model,
    build_runner,
    open_config,
    prepare_data,
    pruning_mistakes,
    say,
    use_worker_init,
)

_LOADERS = ("train_dataloader", "val_dataloader")


def train(args: argparse.Namespace) -> None:
    """What tools/train.py does.

    Args:
        args: Parsed by :func:`train_parser`.

    Raises:
        UserError: If the config, the data or a checkpoint will not do; nothing was written then. Or if, when it
            runs, a pruned backbone meets a neck or a grid that does not go with it.
    """
    cfg = open_config(args)
    if args.amp:
        _use_amp(cfg)
    if args.auto_scale_lr:
        if "base_batch_size" not in (cfg.get("auto_scale_lr") or {}):
            raise UserError("--auto-scale-lr needs auto_scale_lr.base_batch_size in the config")
        cfg.auto_scale_lr.enable = True
    prepare_data(cfg, args, _LOADERS, None)
    model = build_model(cfg)
    _choose_start(cfg, args, model)
    del model
    _use_atomic_checkpoints(cfg)
    make_reproducible(cfg)
    use_worker_init(cfg)
    runner = build_runner(cfg)
    with pruning_mistakes():
        runner.train()
    say(f"Training is finished: checkpoints, logs and the config are in {runner.work_dir}")
    say(f"Losses and metrics of this run: {runner.log_dir}/vis_data/scalars.json")


def _choose_start(cfg: Config, args: argparse.Namespace, model: nn.Module) -> None:
    """Settle what training starts from, and check that it fits."""
    if args.resume:
        cfg.resume, cfg.load_from = True, None if args.resume == "auto" else args.resume
    if cfg.get("resume") and not cfg.get("load_from"):
        cfg.load_from = find_resumable(cfg.work_dir)
        if cfg.load_from is None:
            say(f"There is no checkpoint in {cfg.work_dir}; training starts from the beginning")
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
    say(f"Resuming from {path}")


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
