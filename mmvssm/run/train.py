"""What tools/train.py does."""

import argparse
from typing import Any, Optional

import torch
from mmengine.config import Config, ConfigDict
from mmengine.hooks import CheckpointHook
from mmengine.runner import Runner
from torch import nn

from ..errors import UserError, one_sentence, user_mistakes
from ..processes import on_first_process
from .checkpoints import Resumable, check_fits, check_resumable, find_resumable, load_any
from .failures import run_failures
from .hooks.reproducible import make_reproducible
from .pretrained import check_pretrained, count_shared
from .resuming import check_progress, check_same_classes
from .schedule import change_length, check_can_follow, hint_at_options, shorten_warm_ups
from .settings import find_type, naming_the_nearest
from .setup import (
    LIBRARIES,
    build_model,
    build_runner,
    open_config,
    prepare_data,
    say,
    use_worker_init,
)
from .work_dir import check_not_locked, check_unused, lock_work_dir

_LOADERS = ("train_dataloader", "val_dataloader")
_NEEDS = ("train_dataloader", "train_cfg", "optim_wrapper")


def train(args: argparse.Namespace) -> None:
    """What tools/train.py does.

    Args:
        args: Parsed by :func:`train_parser`.

    Raises:
        UserError: If the config, the data or a checkpoint will not do; nothing was written then. Or if, when it
            runs, a pruned backbone meets a neck or a grid that does not go with it.
    """
    cfg = open_config(args, _NEEDS, LIBRARIES)
    given, old_epochs = list(args.cfg_options or {}), (cfg.get("train_cfg") or {}).get("max_epochs")
    option = _option_of_length(args)
    if option:
        say(change_length(cfg, option, getattr(args, option), given))
    else:
        say(hint_at_options(cfg, given))
    if args.amp:
        use_amp(cfg)
    if args.tensorboard:
        use_tensorboard(cfg)
    if args.auto_scale_lr:
        if "base_batch_size" not in (cfg.get("auto_scale_lr") or {}):
            raise UserError("--auto-scale-lr needs auto_scale_lr.base_batch_size in the config")
        cfg.auto_scale_lr.enable = True
    on_first_process(check_not_locked, cfg.work_dir)
    if not (args.resume or cfg.get("resume")):
        check_unused(cfg.work_dir, None)
    prepare_data(cfg, args, _LOADERS, None)
    model = build_model(cfg)
    _choose_start(cfg, args, model)
    if option and cfg.get("resume"):
        check_can_follow(cfg, option)
        _add_hooks(cfg, "mmvssm.FollowSchedule")
    for line in check_pretrained(model):
        say(line)
    if hasattr(model, "load_teacher"):
        with user_mistakes("cannot set up the teacher"), naming_the_nearest():
            model.load_teacher()
    del model
    prepare_training(cfg)
    with lock_work_dir(cfg.work_dir):
        runner = build_runner(cfg)
        # Not what the machine may lack when workers start, such as memory.
        with user_mistakes("cannot set up the training", (KeyError, TypeError, ValueError)):
            _ = runner.train_loop
            runner.optim_wrapper = runner.build_optim_wrapper(runner.optim_wrapper)
        _tell_of_bad_schedules(runner)
        if option == "epochs":
            say(shorten_warm_ups(runner, old_epochs, given))
        with run_failures(runner.work_dir):
            runner.train()
    say(f"Training is finished: checkpoints, logs and the config are in {runner.work_dir}")
    say(f"Losses and metrics of this run: {runner.log_dir}/vis_data/scalars.json")
    if args.tensorboard:
        say(f"To look at them: tensorboard --logdir {runner.work_dir}")


def prepare_training(cfg: Config) -> None:
    """Add to a training config what every run has: resuming exactly, saving safely, ending properly.

    Args:
        cfg: Changed in place. What it has of these already is left as it is.
    """
    _use_atomic_checkpoints(cfg)
    make_reproducible(cfg)
    _add_hooks(
        cfg,
        "mmvssm.NonFiniteGuardHook",
        "mmvssm.InterruptionHook",
        "mmvssm.UnfinishedValidationHook",
    )
    use_worker_init(cfg)


def _tell_of_bad_schedules(runner: Runner) -> None:
    """Make a mistake in ``param_scheduler`` one sentence; the runner reads that only once it trains."""
    build = runner.build_param_scheduler

    def build_or_tell(schedulers: Any) -> Any:
        with user_mistakes("cannot set up the schedule (param_scheduler)"):
            return build(schedulers)

    runner.build_param_scheduler = build_or_tell


def _option_of_length(args: argparse.Namespace) -> Optional[str]:
    """``"epochs"`` or ``"iters"``, if the command line says how long to train."""
    return next((name for name in ("epochs", "iters") if getattr(args, name) is not None), None)


def _choose_start(cfg: Config, args: argparse.Namespace, model: nn.Module) -> None:
    """Settle what training starts from, and check that it fits."""
    weights = cfg.get("load_from")
    if args.resume:
        cfg.resume, cfg.load_from = True, None if args.resume == "auto" else args.resume
    checkpoint = None
    if cfg.get("resume") and not cfg.get("load_from"):
        found = _find_resumable(cfg.work_dir)
        if found is None:
            check_unused(cfg.work_dir, None)
            start = weights or "the beginning"
            say(f"There is no checkpoint in {cfg.work_dir}; training starts from {start}")
            cfg.resume, cfg.load_from = False, weights
        else:
            cfg.load_from, checkpoint = found.path, found.content
            for path in found.skipped:
                say(f"{path} is damaged or incomplete and was skipped")
    path = cfg.get("load_from")
    check_unused(cfg.work_dir, path if cfg.get("resume") else None)
    if not path:
        return
    checkpoint = checkpoint or load_any(path)
    if not cfg.get("resume"):
        say(count_shared(model, checkpoint, path))
        return
    check_resumable(checkpoint, path)
    check_fits(model, checkpoint, path)
    check_same_classes(cfg, "train_dataloader", checkpoint, path)
    for line in check_progress(cfg, checkpoint, path, _option_of_length(args) is not None):
        say(line)
    # mmengine restores a seed it had chosen itself only after the data order is settled.
    randomness = cfg.setdefault("randomness", ConfigDict())
    if randomness.get("seed") is None:
        randomness.seed = checkpoint["meta"].get("seed")
    say(f"Resuming from {path}")


def _find_resumable(work_dir: str) -> Optional[Resumable]:
    """:func:`find_resumable`, decided by the first process; only that one gets the content."""
    contents = []

    def look() -> Optional[Resumable]:
        found = find_resumable(work_dir)
        if found is None:
            return None
        contents.append(found.content)
        return found._replace(content=None)

    found = on_first_process(look)
    return found._replace(content=contents[0]) if contents else found


def use_amp(cfg: Config) -> None:
    """Turn on mixed precision as this machine has it.

    Args:
        cfg: Changed in place. Without a GPU, settings that only loss scaling has are dropped.
    """
    if not torch.cuda.is_available():
        cfg.optim_wrapper.type = "mmvssm.BFloat16OptimWrapper"
        for name in ("loss_scale", "dtype", "use_fsdp"):  # AmpOptimWrapper's own
            cfg.optim_wrapper.pop(name, None)
        return
    cfg.optim_wrapper.type = "AmpOptimWrapper"
    cfg.optim_wrapper.setdefault("loss_scale", "dynamic")


def use_tensorboard(cfg: Config) -> None:
    """Let a run write what it logs for TensorBoard as well.

    Args:
        cfg: Changed in place.

    Raises:
        UserError: If TensorBoard is not installed.
    """
    try:
        import torch.utils.tensorboard  # noqa: F401
    except ImportError as error:
        raise UserError(
            f"--tensorboard needs a package that is not installed ({one_sentence(error)}); pip install tensorboard"
        ) from error
    visualizer = cfg.setdefault("visualizer", ConfigDict(type="mmengine.Visualizer"))
    backends = list(visualizer.get("vis_backends") or [ConfigDict(type="LocalVisBackend")])
    if not any(str(part.get("type")).endswith("TensorboardVisBackend") for part in backends):
        visualizer.vis_backends = [*backends, ConfigDict(type="TensorboardVisBackend")]


def _use_atomic_checkpoints(cfg: Config) -> None:
    hook = cfg.get("default_hooks", {}).get("checkpoint")
    if hook and find_type(hook.get("type")) is CheckpointHook:
        hook.type = "mmvssm.AtomicCheckpointHook"


def _add_hooks(cfg: Config, *types: str) -> None:
    """Add hooks that every training has; one that the config has already keeps its settings."""
    hooks = list(cfg.get("custom_hooks") or [])
    there = [find_type(hook.get("type")) for hook in hooks if isinstance(hook, dict)]
    missing = (name for name in types if find_type(name) not in there)
    cfg.custom_hooks = [*hooks, *(ConfigDict(type=name) for name in missing)]
