"""Train with mmengine alone, to find out whether a problem is ours or mmengine's."""

import argparse
import os
from pathlib import Path

from mmengine.config import Config
from mmengine.registry import RUNNERS
from mmengine.runner import Runner

from ..errors import UserError
from ..processes import on_each_machine
from .arguments import train_parser
from .pretrained import start_from_scratch
from .setup import generate_data, print_once

_DATA_OPTIONS = ("data_root", "data_format", "classes", "reduce_zero_label", "no_data_check")
_SHORT = (
    "amp_dtype",
    "batch_size",
    "image_size",
    "lr",
    "layer_decay",
    "early_stop",
    "logger",
    "tensorboard",
)
_NOT_PLAIN = ("epochs", "iters", *_SHORT, *_DATA_OPTIONS)


def train_plain(args: argparse.Namespace) -> None:
    """Train as mmdet's own tools/train.py does, without the additions that :func:`~.train.train` lists.

    Two additions remain. Checkpoints still load with ``weights_only=True`` and without their config text. And if the
    config has a generator (``prepare_data``), we generate missing data, because mmengine could not run the config
    otherwise. Mistakes end in mmengine's own tracebacks.

    Args:
        args: Parsed by :func:`~.arguments.train_parser`.

    Raises:
        UserError: If an option was given that mmengine does not have.
    """
    default = train_parser().get_default
    given = [name for name in _NOT_PLAIN if getattr(args, name) != default(name)]
    if given:
        options = ", ".join(f"--{name.replace('_', '-')}" for name in given)
        raise UserError(
            f"--plain runs the config with mmengine alone, which has no {options}; set it in the config, or drop "
            "--plain"
        )
    if args.launcher in ("none", "pytorch"):
        os.environ.setdefault("LOCAL_RANK", str(args.local_rank))
    cfg = Config.fromfile(args.config)
    cfg.merge_from_dict(args.cfg_options or {})
    cfg.launcher = args.launcher
    cfg.work_dir = (
        args.work_dir or cfg.get("work_dir") or os.path.join("work_dirs", Path(args.config).stem)
    )
    if args.from_scratch:
        print_once(start_from_scratch(cfg))
    if args.amp:
        cfg.optim_wrapper.update(type="AmpOptimWrapper", loss_scale="dynamic")
    if args.auto_scale_lr:
        cfg.auto_scale_lr.enable = True
    if args.resume:
        cfg.resume, cfg.load_from = True, None if args.resume == "auto" else args.resume
    runner = RUNNERS.build(cfg) if "runner_type" in cfg else Runner.from_cfg(cfg)
    if cfg.get("prepare_data"):
        on_each_machine(generate_data, cfg.prepare_data)
    runner.train()
