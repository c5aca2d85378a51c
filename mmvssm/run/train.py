"""Train the model of a config, as tools/train.py does."""

import argparse
from itertools import count
from types import MethodType
from typing import Any

from mmengine.config import Config, ConfigDict
from mmengine.hooks import CheckpointHook
from mmengine.runner import Runner

from ..errors import user_mistakes
from ..processes import on_first_process
from .failures import run_failures
from .hooks.reproducible import make_reproducible
from .options import apply_options
from .plain import train_plain
from .pretrained import check_pretrained
from .resuming import choose_start
from .schedule import change_length, hint_at_options, shorten_warm_ups
from .settings import find_type, suggest_similar_name
from .setup import (
    LIBRARIES,
    build_model,
    build_runner,
    open_config,
    prepare_data,
    print_once,
    use_worker_init,
)
from .work_dir import check_not_locked, check_unused, lock_work_dir

_LOADERS = ("train_dataloader", "val_dataloader")
_NEEDS = ("train_dataloader", "train_cfg", "optim_wrapper")


def train(args: argparse.Namespace) -> None:
    """Train the model of a config.

    mmengine's runner trains. With ``--plain``, nothing else happens (:func:`~.plain.train_plain`). Without it, we add:

    Before the run, when nothing has been written yet:

    1. Settings: refuse misspelt keys, unknown types and values that cannot work (:func:`~.setup.open_config`).
    2. Machine: gloo and plain batch norm without GPUs; ``SyncBuffersHook`` with several processes.
    3. Options: ``--epochs`` and ``--iters`` with the whole schedule, and those of :mod:`~.options`.
    4. Work dir: refuse one that holds, or is locked by, another run (:mod:`~.work_dir`).
    5. Data: ``--data-root`` with classes, heads and evaluators; generated data; checks of every file that the run will
       read (:func:`~.setup.prepare_data`).
    6. Start: the newest checkpoint that loads for ``--resume``; checks that a checkpoint, pretrained weights and a
       teacher fit the model, the classes and the schedule (:mod:`~.resuming`, :mod:`~.pretrained`).

    In the run:

    7. Exact resuming: samplers, loops and seeds that depend on the iteration alone (:mod:`~.hooks.reproducible`).
    8. Checkpoints that are written atomically (``AtomicCheckpointHook`` in place of ``CheckpointHook``).
    9. A stop at the first loss or weight that is not finite (``NonFiniteGuardHook``).
    10. A checkpoint when Ctrl-C or a signal ends the run (``InterruptionHook``).
    11. Data workers that end with the run and report why they fail (``init_worker``).
    12. The work dir's lock (:func:`~.work_dir.lock_work_dir`).
    13. One-line errors for memory, disk, network and mistakes in the config (:func:`~.failures.run_failures`).

    Importing :mod:`mmvssm.run` makes checkpoints load with ``weights_only=True``, also with ``--plain``.

    Args:
        args: Parsed by :func:`~.arguments.train_parser`.

    Raises:
        UserError: If the config, the data or a checkpoint cannot be used, before anything is written; or if a pruned
            backbone finds, in the run, that its neck or grid does not fit.
    """
    if args.plain:
        train_plain(args)
        return
    cfg = open_config(args, _NEEDS, LIBRARIES)
    given, old_epochs = list(args.cfg_options or {}), cfg.train_cfg.get("max_epochs")
    option = next((name for name in ("epochs", "iters") if getattr(args, name) is not None), None)
    if option:
        print_once(change_length(cfg, option, getattr(args, option), given))
    else:
        print_once(hint_at_options(cfg, given))
    apply_options(cfg, args)
    on_first_process(check_not_locked, cfg.work_dir)
    if not (args.resume or cfg.get("resume")):
        on_first_process(check_unused, cfg.work_dir, None)
    prepare_data(cfg, args, _LOADERS, None)
    model = build_model(cfg)
    choose_start(cfg, model, args.resume, new_schedule=option is not None)
    if option and cfg.get("resume"):
        _add_hooks(cfg, "mmvssm.FollowSchedule")
    for line in check_pretrained(model):
        print_once(line)
    if hasattr(model, "load_teacher"):
        with user_mistakes("cannot set up the teacher"), suggest_similar_name():
            model.load_teacher()
    del model
    prepare_training(cfg)
    with lock_work_dir(cfg.work_dir):
        runner = build_runner(cfg)
        # Only these errors are mistakes in the config: workers start here, and may lack memory.
        with user_mistakes("cannot set up the training", (KeyError, TypeError, ValueError)):
            _ = runner.train_loop
            runner.optim_wrapper = runner.build_optim_wrapper(runner.optim_wrapper)
        explain(runner, "build_param_scheduler", "cannot set up the schedule (param_scheduler)")
        if cfg.get("resume"):
            explain_resuming(runner, cfg.load_from)
        if option == "epochs":
            print_once(shorten_warm_ups(runner, old_epochs, given))
        with run_failures(runner.work_dir):
            runner.train()
    print_once(f"Training is finished: checkpoints, logs and the config are in {runner.work_dir}")
    print_once(f"Losses and metrics of this run: {runner.log_dir}/vis_data/scalars.json")
    if args.tensorboard or "tensorboard" in args.logger:
        print_once(f"To look at them: tensorboard --logdir {runner.work_dir}")


def prepare_training(cfg: Config) -> None:
    """Add exact resuming, atomic checkpoints and our hooks to a training config.

    Args:
        cfg: Changed in place. Parts of these types that it already has stay unchanged.
    """
    hook = cfg.get("default_hooks", {}).get("checkpoint")
    if hook and find_type(hook.get("type")) is CheckpointHook:
        hook.type = "mmvssm.AtomicCheckpointHook"
    make_reproducible(cfg)
    _add_hooks(cfg, "mmvssm.NonFiniteGuardHook", "mmvssm.InterruptionHook")
    use_worker_init(cfg)


def _add_hooks(cfg: Config, *types: str) -> None:
    """Add hooks to ``custom_hooks``; one that the config has already keeps its settings."""
    hooks = list(cfg.get("custom_hooks") or [])
    present = [find_type(hook.get("type")) for hook in hooks if isinstance(hook, dict)]
    missing = (name for name in types if find_type(name) not in present)
    cfg.custom_hooks = [*hooks, *(ConfigDict(type=name) for name in missing)]


def explain_resuming(runner: Runner, path: str) -> None:
    """Report an optimizer state that does not fit in one line, where it is loaded and at the first step."""
    words = f"{path} cannot be resumed from: its optimizer state does not fit"
    explain(runner, "load_or_resume", words)
    explain(runner.optim_wrapper, "step", words, once=True)


def explain(owner: Any, method: str, words: str, once: bool = False) -> None:
    """Report what ``owner.method``, or (``once``) its first call, raises in one line that begins with ``words``."""
    call, calls = getattr(owner, method), count()

    def call_or_explain(_: Any, *args: Any, **kwargs: Any) -> Any:
        with user_mistakes(words, () if once and next(calls) else (Exception,)):
            return call(*args, **kwargs)

    setattr(
        owner, method, MethodType(call_or_explain, owner)
    )  # schedulers wrap nothing but methods
