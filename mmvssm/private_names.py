"""Private names of other packages that we use, all of them: look here first when one of these packages moves.

Each function says whose name it is, in which versions we saw it, and why the public interface does not do.
"""

from __future__ import annotations

import multiprocessing.queues
from typing import Any, Callable

from mmengine.config import config as _config
from mmengine.optim import OptimWrapper
from mmengine.optim.scheduler.param_scheduler import _ParamScheduler
from mmengine.runner import Runner
from mmengine.runner.checkpoint import CheckpointLoader


def config_lookup() -> Callable[[str], tuple[str, str]]:
    """Mmengine 0.10.x: splits ``package::path``. It knows OpenMMLab's packages alone and has no registration."""
    return _config._get_package_and_cfg_path


def replace_config_lookup(function: Callable[[str], tuple[str, str]]) -> None:
    """Let mmengine call ``function`` in place of :func:`config_lookup`."""
    _config._get_package_and_cfg_path = function


def checkpoint_loaders() -> dict[str, Callable]:
    """Mmengine 0.10.x: its loaders by the beginning of an address. Public functions add loaders but list none."""
    return CheckpointLoader._schemes


def forget_train_loop(runner: Runner) -> None:
    """Mmengine 0.10.x: make ``runner.train_loop`` None in a test.

    mmseg's visualization hook asks it for the iteration, and the runner would build the training data set to answer.
    """
    runner._train_loop = None


def build_schedulers(runner: Runner, configs: Any, wrapper: OptimWrapper) -> list[_ParamScheduler]:
    """Mmengine 0.10.x: schedulers of one optimizer; the public method takes all optimizers of a runner at once."""
    schedulers = runner._build_param_scheduler(configs, wrapper)
    # It warns of schedulers that step before the optimizer does, which here they are meant to.
    wrapper._global_step = 0
    return schedulers


def set_scheduler_values(scheduler: _ParamScheduler, values: list[float]) -> None:
    """Mmengine 0.10.x: what ``scheduler.get_last_value()`` returns, which only a step sets."""
    scheduler._last_value = values


def on_queue_feeder_error(function: Callable[[Any, Exception, Any], None]) -> None:
    """Python 3.10 to 3.13: call ``function(queue, error, item)`` where a process cannot send an item.

    Python prints a traceback there and drops the item, for which the other end waits for ever.
    """
    multiprocessing.queues.Queue._on_queue_feeder_error = function


def place_class_names(visualizer: Any, function: Callable) -> None:
    """Mmseg 1.x: place a class's name on its map by ``function(mask)``; mmseg's own
    sorts all pixels of a class in Python, which takes longer than the prediction.
    """
    if hasattr(visualizer, "_get_center_loc"):
        visualizer._get_center_loc = function
