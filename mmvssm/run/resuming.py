"""Choose what training starts from, and check that a checkpoint matches the run that resumes from it."""

import inspect
import os
from collections.abc import Iterator
from typing import Any, Callable, Optional

from mmengine.config import Config, ConfigDict
from mmengine.dataset import BaseDataset
from mmengine.registry import DATASETS
from torch import nn

from ..datasets.walk import leaf_datasets
from ..errors import UserError, shown, user_mistakes
from ..processes import on_first_process, share_file
from .checkpoints import Checkpoint, as_names, find_last
from .settings import find_type
from .setup import print_once
from .work_dir import check_unused


def choose_start(cfg: Config, model: nn.Module, resume: Optional[str], new_schedule: bool) -> None:
    """Start from random or given weights or resume, as the options ask, and check that the checkpoint fits.

    Args:
        cfg: We set its ``resume``, ``load_from`` and seed.
        model: Built for this check; its weights are overwritten.
        resume: Checkpoint to resume from, ``"auto"`` for the last one in the work dir; None to follow the config.
        new_schedule: Whether learning rates follow the config instead of the checkpoint's schedule.

    Raises:
        UserError: If the checkpoint does not fit, or the run would overwrite another.
    """
    weights, checkpoint = cfg.get("load_from"), None
    if resume:
        cfg.resume, cfg.load_from = True, None if resume == "auto" else resume
    if cfg.get("resume") and not cfg.get("load_from"):
        checkpoint = load_on_all(_find_last, cfg.work_dir, cfg.work_dir)
        cfg.resume, cfg.load_from = (True, checkpoint.path) if checkpoint else (False, weights)
        if not checkpoint:
            start = weights or "the beginning"
            print_once(f"There is no checkpoint in {cfg.work_dir}; training starts from {start}")
    path = cfg.get("load_from")
    on_first_process(check_unused, cfg.work_dir, path if cfg.get("resume") else None)
    if not path:
        return
    checkpoint = checkpoint or load_on_all(Checkpoint.load, path, cfg.work_dir)
    cfg.load_from = checkpoint.path
    if not cfg.get("resume"):
        print_once(checkpoint.count_shared(model))
        return
    checkpoint.check_resumable()
    checkpoint.check_fits(model)
    check_same_classes(cfg, "train_dataloader", checkpoint)
    for line in _compare_progress(cfg, checkpoint, new_schedule):
        print_once(line)
    # mmengine restores a seed that it chose itself only after it has fixed the order of the data.
    randomness = cfg.setdefault("randomness", ConfigDict())
    if randomness.get("seed") is None:
        randomness.seed = checkpoint.meta.get("seed")
    print_once(f"Resuming from {path}")


def _find_last(work_dir: str) -> Optional[Checkpoint]:
    checkpoint, skipped = find_last(work_dir)
    for path in skipped:
        print_once(f"{path} is damaged or incomplete and was skipped")
    return checkpoint


def load_on_all(
    load: Callable[[str], Optional[Checkpoint]], source: str, work_dir: str
) -> Optional[Checkpoint]:
    """Call ``load(source)`` on rank 0 and load its choice on all ranks.

    Args:
        load: Such as :meth:`Checkpoint.load`.
        source: Its argument.
        work_dir: Where machines whose disk lacks the checkpoint keep what rank 0 sends, until the run ends.

    Returns:
        The checkpoint; its ``path`` is that of the file on this machine.

    Raises:
        UserError: If rank 0 cannot load it, or a machine cannot keep it.
    """
    found: list[Optional[Checkpoint]] = []

    def load_first() -> Optional[str]:
        found.append(load(source))
        return found[0] and found[0].path

    path = on_first_process(load_first)
    if path and "://" not in path:
        path = share_file(path, os.path.join(work_dir, "received.pth"))
    return found[0] if found else path and Checkpoint.load(path)


def check_same_classes(cfg: Config, loader: str, checkpoint: Checkpoint) -> None:
    """Check that the categories of a data set are those that a checkpoint was trained on, in the same order.

    Args:
        cfg: Config with the data set.
        loader: The data loader of the data set, such as ``"train_dataloader"``.
        checkpoint: Compared if it has its classes.

    Raises:
        UserError: If the classes or their order differ.
    """
    path, trained = checkpoint.path, checkpoint.classes
    here = as_names(metainfo_of_data(cfg, loader).get("classes"))
    if not trained or not here or trained == here:
        return
    if sorted(trained) == sorted(here):
        old, new = next(pair for pair in zip(trained, here) if pair[0] != pair[1])
        raise UserError(
            f"{path} was trained on these classes in another order (it has {shown([old])} where this "
            f"data set has {shown([new])}); give them in its order, with --data-root and --classes or "
            "in the config's metainfo"
        )
    raise UserError(
        f"{path} was trained on other classes: {len(trained)} ({shown(trained)}); this data set has "
        f"{len(here)} ({shown(here)}); use the data set it was trained on, or start a new run from its "
        f"weights with --cfg-options load_from={path}"
    )


def metainfo_of_data(cfg: Config, loader: str) -> dict[str, Any]:
    """Return the metainfo of a loader's data set, such as its classes, without reading annotations.

    Args:
        cfg: Config with the data set.
        loader: Name of the data loader; if the config lacks it, the metainfo is empty.
    """
    if not cfg.get(loader):
        return {}
    leaf = next(leaf_datasets(cfg[loader].dataset))
    kind = find_type(leaf.get("type"))
    if not inspect.isclass(kind) or not issubclass(kind, BaseDataset):
        return leaf.get("metainfo") or {}
    with user_mistakes(f"cannot set up the data set of {loader}"):
        return DATASETS.build(ConfigDict(leaf, lazy_init=True)).metainfo


def _compare_progress(cfg: Config, checkpoint: Checkpoint, new_schedule: bool) -> Iterator[str]:
    """Yield lines on how the length and batch size of a run differ from those of its checkpoint.

    Raises:
        UserError: If it has already trained for longer than the config asks for.
    """
    unit = "iter" if "max_iters" in cfg.train_cfg else "epoch"
    limit, option = f"max_{unit}s", f"--{unit}s"
    done, wanted = checkpoint.meta[unit], cfg.train_cfg.get(limit)
    if isinstance(wanted, int):
        progress = (
            f"{checkpoint.path} has done {done} {dict(iter='iterations', epoch='epochs')[unit]}"
        )
        if done > wanted:
            raise UserError(
                f"{progress}, more than train_cfg.{limit}={wanted}; raise that, or resume an earlier checkpoint"
            )
        if done == wanted:
            yield f"{progress}, all that train_cfg.{limit} asks for: nothing is left to train"
        planned = checkpoint.planned(limit)
        if planned is not None and planned != wanted and not new_schedule:
            yield (
                f"The run was planned for train_cfg.{limit}={planned} and now ends at {wanted}, with the learning "
                f"rates planned for {planned}; {option} {planned} resumes as planned, {option} {wanted} changes the "
                "schedule too"
            )
    before = checkpoint.planned("batch_size")
    now = cfg.train_dataloader.get("batch_size")
    if before is not None and before != now:
        yield (
            f"The run had a batch size of {before} and resumes with {now}: it will differ from an uninterrupted run, "
            "and the learning rate stays as configured"
        )
