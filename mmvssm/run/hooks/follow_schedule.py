"""Resume a run with a schedule that differs from its checkpoint's."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from typing import Any

from mmengine.hooks import Hook
from mmengine.optim import OptimWrapper, OptimWrapperDict, _ParamScheduler
from mmengine.runner import Runner

from ...private_names import build_schedulers, set_scheduler_values
from ...registry import HOOKS

_INITIAL = "initial_"


@HOOKS.register_module()
class FollowSchedule(Hook):
    """Give a resumed run the learning rates of its own config.

    mmengine loads schedulers from the checkpoint and ignores changes of ``param_scheduler``. With this hook, learning
    rates and momenta are those of a run that had this config from its first iteration. With an unchanged config they
    equal the checkpoint's.

    The hook cannot repeat schedulers that depend on metrics, such as ``ReduceOnPlateauLR``.
    """

    # Run before hooks that log or change rates.
    priority = "VERY_HIGH"

    def before_train(self, runner: Runner) -> None:
        """Repeat the schedule up to the iteration at which the run resumes."""
        if runner.iter == 0 or not runner.param_schedulers:
            return
        before = _rates(runner.optim_wrapper)
        for name, wrapper in _wrappers(runner.optim_wrapper):
            configs = deepcopy(runner.cfg.param_scheduler)
            if isinstance(configs, dict) and "type" not in configs:
                configs = configs[name]
            schedulers = _repeat(runner, wrapper, configs)
            if name is None:
                runner.param_schedulers = schedulers
            else:
                runner.param_schedulers[name] = schedulers
        after = _rates(runner.optim_wrapper)
        if before != after:
            runner.logger.info(
                f"The schedule differs from the checkpoint's: the learning rate is now {after:.4g}; it was {before:.4g}"
            )


def _wrappers(optim_wrapper: Any) -> Iterator[tuple[Any, OptimWrapper]]:
    if isinstance(optim_wrapper, OptimWrapperDict):
        yield from optim_wrapper.items()
    else:
        yield None, optim_wrapper


def _rates(optim_wrapper: Any) -> float:
    """Return the learning rate of the first optimizer, as the log shows it."""
    _, wrapper = next(_wrappers(optim_wrapper))
    rates = wrapper.get_lr()
    return rates.get("base_lr", rates["lr"])[0]


def _repeat(runner: Runner, wrapper: OptimWrapper, configs: Any) -> list[_ParamScheduler]:
    """Step new schedulers through all past iterations and epochs; this updates the optimizer's values."""
    for group in wrapper.param_groups:
        for key in [key for key in group if key.startswith(_INITIAL)]:
            group[key.removeprefix(_INITIAL)] = group[key]
        if "initial_momentum" in group and "betas" in group:  # Adam's momentum
            group["betas"] = (group["initial_momentum"], group["betas"][1])
    iters, epochs, epoch_length = runner.iter, runner.epoch, len(runner.train_dataloader)
    with _one_group_of_each_kind(wrapper):
        schedulers = build_schedulers(runner, configs, wrapper)
        by_iter = [s for s in schedulers if not s.by_epoch]
        by_epoch = [s for s in schedulers if s.by_epoch]
        epochs_done = 0
        for done in range(1, iters + 1):
            for scheduler in by_iter:
                scheduler.step()
            if done % epoch_length == 0 and epochs_done < epochs:
                epochs_done += 1
                for scheduler in by_epoch:
                    scheduler.step()
        for _ in range(epochs - epochs_done):  # if epochs used to have fewer iterations
            for scheduler in by_epoch:
                scheduler.step()
    for scheduler in schedulers:
        name = scheduler.param_name
        scheduler.base_values = [group[f"{_INITIAL}{name}"] for group in wrapper.param_groups]
        set_scheduler_values(scheduler, [group[name] for group in wrapper.param_groups])
    return schedulers


@contextmanager
def _one_group_of_each_kind(wrapper: OptimWrapper) -> Iterator[None]:
    """Reduce an optimizer to one parameter group for each distinct setting.

    Otherwise hundreds of groups would each take a hundred thousand scheduler steps.
    """
    groups = wrapper.optimizer.param_groups
    kinds = [repr({k: v for k, v in group.items() if k != "params"}) for group in groups]
    chosen = dict(zip(reversed(kinds), reversed(groups)))
    wrapper.optimizer.param_groups = list(chosen.values())
    try:
        yield
    finally:
        wrapper.optimizer.param_groups = groups
        for kind, group in zip(kinds, groups):
            group.update({k: v for k, v in chosen[kind].items() if k != "params"})
