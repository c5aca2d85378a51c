"""Set up a run: its config, data, model and runner, for every tool that takes a config."""

import argparse
import logging
import os
import re
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from importlib import import_module
from importlib.util import find_spec
from itertools import chain
from pathlib import Path
from typing import Any, Optional

import torch
from mmengine.config import Config, ConfigDict
from mmengine.dist import is_main_process
from mmengine.logging import MMLogger
from mmengine.registry import MODELS, RUNNERS, init_default_scope
from mmengine.runner import Runner
from torch import nn

from ..datasets.check import check_data
from ..datasets.root import SPLIT_OF_LOADER, apply_data_root
from ..errors import UserError, one_line, printable, user_mistakes
from ..processes import on_each_machine
from ..registry import TASK_UTILS
from ..safe_checkpoint import force_weights_only
from .allocator import keep_freed_memory
from .checkpoints import Checkpoint, read_config
from .distributed import adapt_to_machine, collect_over_network, init_processes
from .settings import (
    check_options,
    check_types,
    check_values,
    drop_refused,
    find_type,
    spread_dicts,
    suggest_similar_name,
)

_DENSE = ("mmdet", "mmseg")
# How mmengine begins what it logs before a run: a line for each setting of each weight, and texts of many lines.
_OF_EACH_WEIGHT = "paramwise_options -- "
_LONG = ("\n---", "Config:\n", "Hooks will be executed")
LIBRARIES = (*_DENSE, "mmpretrain")
# mmengine's words for a missing config, and Python's for a missing module.
_NO_MMPRETRAIN = re.compile(r"\bmmpretrain is not installed|No module named '?mmpretrain\b")
_SETUP_PRETRAIN = "`make setup-pretrain` sets up compatible versions and prints how to use them"


def open_config(
    args: argparse.Namespace, needs: Sequence[str] = (), libraries: Sequence[str] = _DENSE
) -> Config:
    """Read the config file, apply the command line to it, check both, and join the processes.

    Args:
        args: Parsed command line.
        needs: Parts that the config must have.
        libraries: Values of ``default_scope`` that the tool supports.

    Raises:
        UserError: If the config cannot be read, lacks a part or has a setting that cannot work.
    """
    if args.launcher in ("none", "pytorch"):  # other launchers set their own variables
        os.environ.setdefault("LOCAL_RANK", str(args.local_rank))
    force_weights_only()
    if not torch.cuda.is_available():
        keep_freed_memory()
    with explain_missing_mmpretrain():
        cfg = read_config(args.config)
    args.cfg_options = options = spread_dicts(cfg, args.cfg_options or {})
    unchecked = check_options(
        cfg, options, getattr(args, "amp", False) or getattr(args, "amp_dtype", None)
    )
    dropped = list(drop_refused(cfg, options))
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
    with user_mistakes("cannot import what the config names"), explain_missing_mmpretrain():
        init_default_scope(cfg.default_scope)
        check_types(cfg)
    check_values(cfg)
    _check_runner(cfg)
    init_processes(cfg)
    adapt_to_machine(cfg)
    for line in dropped:
        print_once(line)
    if unchecked:
        print_once(f"Not in the config, passed on unchecked: {', '.join(unchecked)}")
    return cfg


def _check_runner(cfg: Config) -> None:
    kind = cfg.get("runner_type", "Runner")
    found = find_type(kind)
    if isinstance(found, type) and not issubclass(found, Runner):
        raise UserError(
            f"runner_type={kind} is not supported: our resuming and saving need mmengine's Runner; remove runner_type "
            "and strategy"
        )


@contextmanager
def explain_missing_mmpretrain() -> Iterator[None]:
    """Explain errors from importing mmpretrain, which only classifiers need, while reading a config.

    Raises:
        UserError: If the config needs mmpretrain, and it is not installed or does not load, mostly due to torchvision.
    """
    try:
        yield
    except Exception as error:
        # With the causes of the error, and the files that they passed through.
        text = "".join(traceback.format_exception(error))
        if _NO_MMPRETRAIN.search(text) and find_spec("mmpretrain") is None:
            raise UserError(
                f"this config needs mmpretrain, which is not installed; {_SETUP_PRETRAIN}"
            ) from error
        for name in ("torchvision", "mmpretrain") if f"{os.sep}mmpretrain{os.sep}" in text else ():
            try:
                import_module(name)
            except Exception as reason:
                raise UserError(
                    f"this config needs mmpretrain, but {name} does not load ({one_line(reason):.200}); "
                    f"{_SETUP_PRETRAIN}"
                ) from error
        raise


def prepare_data(
    cfg: Config,
    args: argparse.Namespace,
    loaders: Sequence[str],
    checkpoint: Optional[Checkpoint],
) -> None:
    """Apply ``--data-root``, generate the data set if the config has a generator, and check the data.

    Args:
        cfg: Changed in place, to use ``--data-root``.
        args: Parsed command line.
        loaders: Data loaders that the run will use.
        checkpoint: Gives the classes of ``--data-root`` if ``--classes`` is not given.

    Raises:
        UserError: If the data cannot be trained on or tested with.
    """
    if args.no_data_check:
        cfg.check_data = False
    if args.data_root:
        for key in args.cfg_options or ():
            if key.split(".")[0] == "prepare_data":
                raise UserError(
                    f"--cfg-options {key} has no effect with --data-root, whose images exist already; "
                    "--image-size changes their size in a training"
                )
        if (args.classes or args.data_format) and cfg.default_scope == "mmpretrain":
            raise UserError(
                "--classes and --data-format: a classifier's classes are the folders in --data-root"
            )
        classes = args.classes or (checkpoint.classes if checkpoint else None)
        # Change all loaders of those splits, so that the config saved in the work dir names one data set.
        here = {SPLIT_OF_LOADER[loader] for loader in loaders}
        following = [name for name, split in SPLIT_OF_LOADER.items() if split in here]
        how = (args.reduce_zero_label, args.data_format)
        print_once(apply_data_root(cfg, args.data_root, following, classes, *how))
    elif args.classes or args.reduce_zero_label is not None or args.data_format:
        raise UserError(
            "--classes, --reduce-zero-label and --data-format describe a --data-root; give that too"
        )
    if cfg.get("prepare_data"):
        on_each_machine(generate_data, cfg.prepare_data)
    for warning in dict.fromkeys(chain(*on_each_machine(check_data, cfg, loaders))):
        print_once(f"warning: {warning}")


def generate_data(generator: ConfigDict) -> None:
    """Generate the data set that a config's ``prepare_data`` describes, unless it exists.

    Raises:
        UserError: If the data cannot be generated.
    """
    with user_mistakes("cannot prepare the data set"):
        TASK_UTILS.build(generator).ensure()


def build_model(cfg: Config) -> nn.Module:
    """Build the model, which checks its config before a work dir exists.

    Raises:
        UserError: If the model cannot be built.
    """
    model = deepcopy(cfg.model)
    if cfg.get("data_preprocessor"):  # as the runner does
        model.setdefault("data_preprocessor", deepcopy(cfg.data_preprocessor))
    with user_mistakes("cannot build the model"), suggest_similar_name():
        return MODELS.build(model)


class _Runner(Runner):
    """A runner whose console shows the run; environment, config and hooks are in its log file."""

    def build_logger(self, *args: Any, **kwargs: Any) -> MMLogger:
        """See the base class."""
        logger = super().build_logger(*args, **kwargs)
        logger.addFilter(lambda record: not record.getMessage().startswith(_OF_EACH_WEIGHT))
        for handler in logger.handlers:
            if type(handler) is logging.StreamHandler:
                handler.addFilter(lambda record: not record.getMessage().startswith(_LONG))
        return logger


def build_runner(cfg: Config) -> Runner:
    """Build the config's runner, which creates the work dir.

    Raises:
        UserError: If the runner cannot be built.
    """
    with user_mistakes("cannot set up the run"), suggest_similar_name():
        runner = RUNNERS.build(cfg) if "runner_type" in cfg else _Runner.from_cfg(cfg)
    collect_over_network(runner)
    return runner


def print_once(text: Optional[str]) -> None:
    """Print ``text``, if any, on rank 0, without its control characters."""
    if text and is_main_process():
        print(printable(text, keep="\n"), flush=True)


def use_worker_init(cfg: Config) -> None:
    """Make every data loader of a config start its workers with :func:`~.hooks.workers.init_worker`.

    Args:
        cfg: Changed in place. A loader's own ``worker_init_fn`` stays. Without workers, ``persistent_workers`` is
            turned off, which PyTorch refuses otherwise.
    """
    for name in ("train_dataloader", "val_dataloader", "test_dataloader"):
        loader = cfg.get(name)
        if loader:
            loader.setdefault("worker_init_fn", ConfigDict(type="mmvssm.init_worker"))
            if not loader.get("num_workers"):
                loader.persistent_workers = False
