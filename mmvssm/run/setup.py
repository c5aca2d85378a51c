"""What training and testing have in common: config, data, model, runner."""

import argparse
import os
from collections.abc import Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any, Optional

import torch
from mmengine.config import Config, ConfigDict
from mmengine.dist import is_main_process
from mmengine.registry import MODELS, RUNNERS, init_default_scope
from mmengine.runner import Runner
from torch import nn

from ..datasets.check import check_data
from ..datasets.root import SPLIT_OF_LOADER, apply_data_root
from ..errors import UserError, before_processes_meet, user_mistakes
from ..processes import on_first_process
from ..registry import TASK_UTILS
from ..safe_checkpoint import force_weights_only
from .allocator import keep_freed_memory
from .checkpoints import classes_of
from .distributed import adapt_to_machine, init_processes
from .mmpretrain_missing import telling_of_mmpretrain
from .settings import (
    check_config_file,
    check_options,
    check_types,
    check_values,
    find_type,
    naming_the_nearest,
)

_DENSE = ("mmdet", "mmseg")
LIBRARIES = (*_DENSE, "mmpretrain")


def open_config(
    args: argparse.Namespace, needs: Sequence[str] = (), libraries: Sequence[str] = _DENSE
) -> Config:
    """Read the config file and what the command line changes in it, and join the processes.

    Args:
        args: Of the command line.
        needs: Parts that the config has to have.
        libraries: Those whose configs the tool can do with, as ``default_scope`` names them.

    Raises:
        UserError: If it cannot be read or lacks one of them, or if a setting will not do.
    """
    with before_processes_meet(args.launcher):
        return _open_config(args, needs, libraries)


def _open_config(
    args: argparse.Namespace, needs: Sequence[str], libraries: Sequence[str]
) -> Config:
    if args.launcher in ("none", "pytorch"):  # the others tell it in variables of their own
        os.environ.setdefault("LOCAL_RANK", str(args.local_rank))
    force_weights_only()
    if not torch.cuda.is_available():
        keep_freed_memory()
    check_config_file(args.config)
    with user_mistakes(f"cannot read the config {args.config}"), telling_of_mmpretrain():
        cfg = Config.fromfile(args.config)
    options = args.cfg_options or {}
    unsure = check_options(cfg, options, getattr(args, "amp", False))
    with user_mistakes("cannot apply --cfg-options"):
        cfg.merge_from_dict(options)
    cfg.launcher = args.launcher
    if cfg.get("default_scope") not in libraries or "model" not in cfg:
        raise UserError(
            f"{args.config} is not a config for {' or '.join(libraries)}: it needs a model and "
            f"default_scope={' or '.join(map(repr, libraries))}"
        )
    missing = [name for name in needs if not isinstance(cfg.get(name), (dict, list, tuple))]
    if missing:
        raise UserError(f"{args.config} lacks {' and '.join(missing)}, which this tool needs")
    if args.work_dir:
        cfg.work_dir = args.work_dir
    elif not cfg.get("work_dir"):
        cfg.work_dir = os.path.join("work_dirs", Path(args.config).stem)
    with user_mistakes("cannot import what the config names"), telling_of_mmpretrain():
        init_default_scope(cfg.default_scope)
        check_types(cfg)
    check_values(cfg)
    _check_runner(cfg)
    init_processes(cfg)
    adapt_to_machine(cfg)
    if unsure:
        say(f"New in this config, read if its model or data set knows it: {', '.join(unsure)}")
    return cfg


def _check_runner(cfg: Config) -> None:
    kind = cfg.get("runner_type", "Runner")
    found = find_type(kind)
    if isinstance(found, type) and not issubclass(found, Runner):
        raise UserError(
            f"runner_type={kind}: that is another kind than mmengine's Runner, on which resuming and saving here rely; "
            "remove runner_type and strategy"
        )


def prepare_data(
    cfg: Config,
    args: argparse.Namespace,
    loaders: Sequence[str],
    checkpoint: Optional[dict[str, Any]],
) -> None:
    """Choose the data set, generate it if the config says how, and check that it is there."""
    if args.no_data_check:
        cfg.check_data = False
    if args.data_root:
        if args.classes and cfg.default_scope == "mmpretrain":
            raise UserError(
                "--classes: a classifier's classes are called as their folders in --data-root are"
            )
        classes = args.classes or (classes_of(checkpoint) if checkpoint else None)
        # Loaders of a split that is there anyway follow too, so that the config saved in the work dir
        # is one of the data set throughout.
        here = {SPLIT_OF_LOADER[loader] for loader in loaders}
        following = [name for name, split in SPLIT_OF_LOADER.items() if split in here]
        say(apply_data_root(cfg, args.data_root, following, classes, args.reduce_zero_label))
    elif args.classes or args.reduce_zero_label is not None:
        raise UserError("--classes and --reduce-zero-label describe a --data-root; give that too")
    if cfg.get("prepare_data"):
        on_first_process(_generate_data, cfg.prepare_data)
    for warning in on_first_process(check_data, cfg, loaders):
        say(f"warning: {warning}")


def _generate_data(generator: ConfigDict) -> None:
    with user_mistakes("cannot prepare the data set"):
        TASK_UTILS.build(generator).ensure()


def build_model(cfg: Config) -> nn.Module:
    """Build the model to see that its config is right, before a work dir exists."""
    model = deepcopy(cfg.model)
    if cfg.get("data_preprocessor"):  # which the runner gives it, too
        model.setdefault("data_preprocessor", deepcopy(cfg.data_preprocessor))
    with user_mistakes("cannot build the model"), naming_the_nearest():
        return MODELS.build(model)


def build_runner(cfg: Config) -> Runner:
    """Build the runner that the config asks for, which makes the work dir."""
    with user_mistakes("cannot set up the run"), naming_the_nearest():
        return RUNNERS.build(cfg) if "runner_type" in cfg else Runner.from_cfg(cfg)


def say(text: Optional[str]) -> None:
    """Print a line at once, if there is one, from one process of several."""
    if text and is_main_process():
        print(text, flush=True)


def use_worker_init(cfg: Config) -> None:
    """Make every data loader of a config start its workers with :func:`init_worker`.

    Args:
        cfg: Changed in place. A ``worker_init_fn`` of its own is left.
    """
    for name in ("train_dataloader", "val_dataloader", "test_dataloader"):
        if cfg.get(name):
            cfg[name].setdefault("worker_init_fn", ConfigDict(type="mmvssm.init_worker"))
