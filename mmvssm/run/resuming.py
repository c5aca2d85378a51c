"""Does a run that continues fit the one that it continues?"""

import inspect
from collections.abc import Sequence
from typing import Any, Optional

from mmengine.config import Config, ConfigDict
from mmengine.dataset import BaseDataset
from mmengine.registry import DATASETS

from ..datasets.walk import leaf_datasets
from ..errors import UserError, shown, user_mistakes
from .checkpoints import classes_of, text_settings
from .settings import find_type


def check_same_classes(cfg: Config, loader: str, checkpoint: dict[str, Any], path: str) -> None:
    """Check that the categories of a data set are those that a checkpoint was trained on, in order.

    Args:
        cfg: Config with the data set.
        loader: The data loader whose data set is meant, such as ``"train_dataloader"``.
        checkpoint: Compared if it tells its classes.
        path: Its file, for the message.

    Raises:
        UserError: If the weights would mean other classes.
    """
    trained, here = classes_of(checkpoint), _classes_of_data(cfg, loader)
    if not trained or not here or trained == here:
        return
    if sorted(trained) == sorted(here):
        old, new = next(pair for pair in zip(trained, here) if pair[0] != pair[1])
        raise UserError(
            f"{path} was trained on these classes in another order (where it has {shown([old])}, there "
            f"is {shown([new])} here), so its weights would mean other classes; give them in its order, "
            "with --data-root and --classes or in the config's metainfo"
        )
    raise UserError(
        f"{path} was trained on other classes: {len(trained)} ({shown(trained)}), and here are "
        f"{len(here)} ({shown(here)}); use the data set it was trained on, or train anew from its "
        f"weights with --cfg-options load_from={path}"
    )


def _classes_of_data(cfg: Config, loader: str) -> Optional[list[str]]:
    """The class names of a loader's data set."""
    classes = metainfo_of_data(cfg, loader).get("classes")
    return [str(name) for name in classes] if isinstance(classes, (list, tuple)) else None


def metainfo_of_data(cfg: Config, loader: str) -> dict[str, Any]:
    """What a loader's data set says of itself, such as its classes, without reading annotations.

    Args:
        cfg: Config with the data set.
        loader: The data loader; nothing is said of one that is not there.
    """
    if not cfg.get(loader):
        return {}
    leaf = next(leaf_datasets(cfg[loader].dataset))
    kind = find_type(leaf.get("type"))
    if not inspect.isclass(kind) or not issubclass(kind, BaseDataset):
        return leaf.get("metainfo") or {}
    with user_mistakes(f"cannot set up the data set of {loader}"):
        return DATASETS.build(ConfigDict(leaf, lazy_init=True)).metainfo


def check_progress(
    cfg: Config, checkpoint: dict[str, Any], path: str, new_schedule: bool = False
) -> Sequence[str]:
    """Compare how far a run came, and with which batch size, with what it is to do now.

    Args:
        cfg: What it is to do now.
        checkpoint: Of the run.
        path: Its file, for messages.
        new_schedule: Whether rates follow the config from here on, and not what the checkpoint has of a schedule.

    Returns:
        Lines on what is different.

    Raises:
        UserError: If it came further than it is to go.
    """
    lines = []
    loop = cfg.train_cfg
    unit, limit = ("iter", "max_iters") if "max_iters" in loop else ("epoch", "max_epochs")
    done, wanted = checkpoint["meta"][unit], loop.get(limit)
    if isinstance(wanted, int):
        said = f"{path} has done {done} {'iterations' if unit == 'iter' else 'epochs'}"
        if done > wanted:
            raise UserError(
                f"{said}, more than train_cfg.{limit}={wanted}; set that to more, or resume an "
                "earlier checkpoint"
            )
        if done == wanted:
            lines.append(
                f"{said}, all that train_cfg.{limit} asks for: there is nothing left to train"
            )
        planned = text_settings(checkpoint, "train_cfg").get(limit)
        if isinstance(planned, int) and planned != wanted and not new_schedule:
            option = f"--{limit.removeprefix('max_')}"
            lines.append(
                f"The run was planned for train_cfg.{limit}={planned} and now goes to {wanted}, at rates that stay "
                f"those planned for {planned}; {option} {planned} goes on as planned, {option} {wanted} changes "
                "the schedule too"
            )
    before = text_settings(checkpoint, "train_dataloader").get("batch_size")
    now = cfg.train_dataloader.get("batch_size")
    if isinstance(before, int) and before != now:
        lines.append(
            f"The run had a batch size of {before} so far and goes on with {now}: it will not repeat "
            "what it would have done uninterrupted, and the learning rate stays as configured"
        )
    return lines
