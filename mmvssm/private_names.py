"""All private names of other packages that we use: check these first when such a package changes.

Each docstring names the package, the versions that we checked, and why the public interface does not suffice.
"""

from __future__ import annotations

import functools
import multiprocessing.queues
from typing import Any, Callable, Optional

from mmengine.config import Config
from mmengine.config import config as _config
from mmengine.config import utils as _config_utils
from mmengine.hub import hub as _hub
from mmengine.infer import BaseInferencer
from mmengine.optim import OptimWrapper
from mmengine.optim.scheduler.param_scheduler import _ParamScheduler
from mmengine.runner import Runner
from mmengine.runner.checkpoint import CheckpointLoader


def config_lookup() -> Callable[[str], tuple[str, str]]:
    """Mmengine 0.10.x: splits ``package::path``. It knows only OpenMMLab's packages, and none can be registered."""
    return _config._get_package_and_cfg_path


def replace_config_lookup(function: Callable[[str], tuple[str, str]]) -> None:
    """Let mmengine call ``function`` in place of :func:`config_lookup`, for ``_base_`` and in ``mmengine.hub``."""
    _config._get_package_and_cfg_path = _hub._get_package_and_cfg_path = function


def replace_index_lookup(
    function: Callable[[Callable[[str, str], dict], str, str], dict],
) -> None:
    """Mmengine 0.10.x: let ``mmengine.hub`` call ``function(mmengine's own, folder, config)`` for an entry of an index.

    ``get_model`` loads the address that stands there and asks nobody.
    """
    _hub._get_cfg_metainfo = functools.partial(function, _config_utils._get_cfg_metainfo)


def metafile_lookup() -> Callable[[BaseInferencer, str], tuple[Config, Optional[str]]]:
    """Mmengine 0.10.x: an inferencer's config and weights by a model's name. It knows names without a package alone."""
    return BaseInferencer._load_model_from_metafile


def replace_metafile_lookup(
    function: Callable[[BaseInferencer, str], tuple[Config, Optional[str]]],
) -> None:
    """Let inferencers call ``function`` in place of :func:`metafile_lookup`."""
    BaseInferencer._load_model_from_metafile = function


def checkpoint_loaders() -> dict[str, Callable]:
    """Mmengine 0.10.x: checkpoint loaders by address prefix. Public functions add loaders but do not list them."""
    return CheckpointLoader._schemes


def forget_train_loop(runner: Runner) -> None:
    """Mmengine 0.10.x: make ``runner.train_loop`` None in a test.

    mmseg's visualization hook reads the iteration from it, for which the runner would build the training data set.
    """
    runner._train_loop = None


def build_schedulers(runner: Runner, configs: Any, wrapper: OptimWrapper) -> list[_ParamScheduler]:
    """Mmengine 0.10.x: build schedulers of one optimizer; the public method takes all optimizers of a runner."""
    schedulers = runner._build_param_scheduler(configs, wrapper)
    # Suppress the warning about schedulers that step before the optimizer: ours do so on purpose.
    wrapper._global_step = 0
    return schedulers


def set_scheduler_values(scheduler: _ParamScheduler, values: list[float]) -> None:
    """Mmengine 0.10.x: set what ``scheduler.get_last_value()`` returns; publicly only a step sets it."""
    scheduler._last_value = values


def on_queue_feeder_error(function: Callable[[Any, Exception, Any], None]) -> None:
    """Python 3.10 to 3.13: call ``function(queue, error, item)`` if a process cannot send an item.

    Python itself prints a traceback and drops the item, and the receiver hangs.
    """
    multiprocessing.queues.Queue._on_queue_feeder_error = function


def place_class_names(visualizer: Any, function: Callable) -> None:
    """Mmseg 1.x: place class names on a map by ``function(mask)``.

    mmseg's own function sorts all pixels of a class in Python, which takes longer than the prediction.
    """
    if hasattr(visualizer, "_get_center_loc"):
        visualizer._get_center_loc = function
