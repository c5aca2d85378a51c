"""Change the length of a training together with its whole schedule.

Points of the schedule (milestones, begins, ends, intervals, switches of hooks) keep their share of the run: a milestone
at two thirds stays at two thirds. Only a warm-up in iterations keeps its length, because it depends on the optimizer
and not on the run.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator
from copy import deepcopy
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Optional, Union

from mmengine.config import Config
from mmengine.optim.scheduler.param_scheduler import INF
from mmengine.runner import Runner

from ..errors import UserError
from .settings import find_type

_WORDS = {"epochs": "epochs", "iters": "iterations"}
# mmengine's default validation interval.
_VAL_INTERVAL = {"epochs": 1, "iters": 1000}
# With fewer steps, mmengine's warm-ups never reach the full rate, which only their last step has.
_SHORTEST_WARM_UP = 2
_LONGEST_WARM_UP = Fraction(1, 2)  # of the run

# The schedulers of our configs and of mmdet's, mmseg's and mmpretrain's, by the base class that rates and momenta
# share: their setting, besides begin and end, that is a time. It counts from the scheduler's begin.
_TIMES = {
    "LinearParamScheduler": None,
    "ConstantParamScheduler": None,
    "PolyParamScheduler": None,
    "QuadraticWarmupParamScheduler": None,
    "CosineAnnealingParamScheduler": "T_max",
    "MultiStepParamScheduler": "milestones",
    "StepParamScheduler": "step_size",
}
_WARM_UPS = ("LinearParamScheduler", "ConstantParamScheduler", "QuadraticWarmupParamScheduler")
# Settings of the libraries' hooks that are times. Our own hooks declare theirs as ``schedule_settings``.
_HOOKS = {
    "PipelineSwitchHook": ("switch_epoch",),
    "YOLOXModeSwitchHook": ("num_last_epochs",),
    "EMAHook": ("begin_iter", "begin_epoch"),
}

Number = Union[int, float]


def change_length(cfg: Config, option: str, length: int, given: Collection[str] = ()) -> str:
    """Change the number of epochs or iterations of a training.

    Args:
        cfg: Changed in place: ``train_cfg``, ``param_scheduler``, the interval of checkpoints, and times in hooks.
        option: ``"epochs"`` or ``"iters"``.
        length: The new number.
        given: Dotted keys of settings to keep, such as those of ``--cfg-options``.

    Returns:
        A line that lists the changes.

    Raises:
        UserError: If the config counts in the other unit, or has a scheduler that we cannot change or that does not
            fit the new run.
    """
    loop, limit = cfg.get("train_cfg") or {}, f"max_{option}"
    _check_unit(loop, option, length)
    if f"train_cfg.{limit}" in given:
        raise UserError(
            f"--{option} {length} and --cfg-options train_cfg.{limit} both set the length; give "
            f"one of them (--{option} changes the schedule as well)"
        )
    _check_kinds(cfg, option)
    old, loop[limit] = loop[limit], length
    ratio, changes = Fraction(length, old), _Changes(given)
    changes.notes.append(f"{length} {_WORDS[option]} instead of {old}")
    if old == length:
        return f"--{option} {length}: that is the config's own schedule"
    _follow_loop(cfg, option, ratio, changes)
    for path, schedulers in _scheduler_lists(cfg):
        # Only the data loader tells how many iterations an epoch has (see shorten_warm_ups).
        total = length if option == "iters" else None
        warm_up = _fitting_warm_up(schedulers, total, ratio, changes, path)
        follower = _Follower(ratio, option, old, warm_up, changes)
        for index, scheduler in enumerate(schedulers):
            follower.follow(scheduler, f"{path}.{index}")
    _follow_hooks(cfg, ratio, changes)
    return "Schedule: " + "; ".join(changes.notes)


def shorten_warm_ups(runner: Runner, old_epochs: int, given: Collection[str] = ()) -> Optional[str]:
    """Shorten warm-ups in iterations that would take most of an epoch-based run.

    Only the data loader tells how many iterations an epoch has. We shorten the warm-ups of learning rates and of hooks
    such as ``KeepRatioWarmup``, after which a pruned model needs more training. We remove a warm-up in epochs that
    steps at every iteration if it would have fewer than two steps.

    Args:
        runner: Runner before training, with its training loop built.
        old_epochs: Length of the config's own run.
        given: As for :func:`change_length`.

    Returns:
        A line that lists the changes, or None if there are none.
    """
    total, ratio = runner.max_iters, Fraction(runner.max_epochs, old_epochs)
    changes = _Changes(given)
    for path, schedulers in _scheduler_lists(runner.cfg):
        if changes.allows(path):
            _remove_shortest(schedulers, len(runner.train_dataloader), changes)
        warm_up = _fitting_warm_up(schedulers, total, ratio, changes, path)
        if warm_up is not None and warm_up[0] != warm_up[1]:
            follower = _Follower(Fraction(1), "iters", total, warm_up, changes)
            for index, scheduler in enumerate(schedulers):
                if not scheduler.get("by_epoch", True):
                    follower.follow(scheduler, f"{path}.{index}")
    _shorten_hooks(runner, total, changes)
    if not changes.notes:
        return None
    runner.param_schedulers = deepcopy(runner.cfg.get("param_scheduler"))
    runner.dump_config()
    return f"Schedule of {total} iterations: " + "; ".join(changes.notes)


def _remove_shortest(schedulers: list, epoch_length: int, changes: _Changes) -> None:
    """Remove warm-ups in parts of epochs that have too few iterations for mmengine's steps."""
    ends = {
        scheduler.end
        for scheduler in schedulers
        if scheduler.get("convert_to_iter_based")
        and _is_warm_up(scheduler)
        and int(scheduler.end * epoch_length) < _SHORTEST_WARM_UP
    }
    for end in ends:
        schedulers[:] = [s for s in schedulers if not (_is_warm_up(s) and s.end == end)]
        for scheduler in schedulers:
            if scheduler.get("begin") == end:
                scheduler.begin = 0
        changes.notes.append(f"the warm-up of {_shown(float(end))} epochs is removed")


def hint_at_options(cfg: Config, given: Collection[str]) -> Optional[str]:
    """Return a hint at ``--epochs`` or ``--iters`` if ``--cfg-options`` changes a run's length but not its schedule."""
    for option in _WORDS:
        key = f"train_cfg.max_{option}"
        if key in given and not any(name.startswith("param_scheduler") for name in given):
            return (
                f"{key} alone does not change learning rates and intervals; --{option} "
                f"{cfg.train_cfg[f'max_{option}']} makes the whole schedule follow"
            )
    return None


def _check_kinds(cfg: Config, option: str) -> None:
    for path, schedulers in _scheduler_lists(cfg):
        for index, scheduler in enumerate(schedulers):
            if _base(scheduler) is None:
                raise UserError(
                    f"--{option} cannot change {path}.{index} (type={scheduler.get('type')!r}); drop "
                    f"--{option}, and change that scheduler and train_cfg.max_{option} in the config"
                )


def _check_unit(loop: dict, option: str, length: int) -> None:
    limit, other = f"max_{option}", {"epochs": "iters", "iters": "epochs"}[option]
    if length < 1:
        raise UserError(f"--{option} {length}: must be at least 1")
    if limit in loop:
        return
    if f"max_{other}" in loop:
        raise UserError(
            f"--{option} {length}: this config counts {_WORDS[other]} "
            f"(train_cfg.max_{other}={loop[f'max_{other}']}); give --{other}"
        )
    raise UserError(f"--{option} {length}: train_cfg has no {limit} to change")


class _Changes:
    """Changes settings, except those that the user gave, and notes the changes."""

    def __init__(self, given: Collection[str]) -> None:
        self.given = given
        self.notes: list[str] = []

    def allows(self, path: str) -> bool:
        return not any(path == key or path.startswith(f"{key}.") for key in self.given)

    def set(self, node: dict, path: str, values: dict[str, Any], name: str) -> None:
        """Set the values that differ in ``node``, which is at ``path`` in the config; None removes a key."""
        notes = []
        for key, value in values.items():
            old = node.get(key)
            if value == old or not self.allows(f"{path}.{key}"):
                continue
            if value is None:
                del node[key]
                continue
            node[key] = value
            before = "" if old is None else f"{_shown(old)} -> "
            notes.append(f"{key} {before}{_shown(value)}")
        if notes:
            self.notes.append(f"{name} {', '.join(notes)}")


def _shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return str(list(value)) if isinstance(value, (list, tuple)) else str(value)


def _rounded(value: Fraction, least: int = 1) -> int:
    return max(least, int(value + Fraction(1, 2)))


# ----------------------------------------------------------------------------------- loop and hooks


def _follow_loop(cfg: Config, option: str, ratio: Fraction, changes: _Changes) -> None:
    """Validate and save as often as before; round intervals up, so that none ends just before the run."""
    loop, values = cfg.train_cfg, {}
    if cfg.get("val_dataloader"):
        interval = loop.get("val_interval", _VAL_INTERVAL[option])
        values["val_interval"] = math.ceil(interval * ratio)
        if "val_begin" in loop:
            values["val_begin"] = _rounded(loop.val_begin * ratio)
        if loop.get("dynamic_intervals"):
            values["dynamic_intervals"] = [
                (_rounded(begin * ratio, 0), math.ceil(interval * ratio))
                for begin, interval in loop.dynamic_intervals
            ]
    changes.set(loop, "train_cfg", values, "train_cfg")
    checkpoint = (cfg.get("default_hooks") or {}).get("checkpoint")
    if checkpoint:
        lengths = {key: checkpoint.get(key, 0) for key in ("interval", "save_begin")}
        values = {key: math.ceil(value * ratio) for key, value in lengths.items() if value > 0}
        changes.set(checkpoint, "default_hooks.checkpoint", values, "checkpoint")


def _hooks(cfg: Config) -> Iterator[tuple[str, dict, Any, tuple[str, ...]]]:
    """Yield custom hooks of a config that have times: path, settings, class, and names of the times."""
    for index, hook in enumerate(cfg.get("custom_hooks") or []):
        kind = find_type(hook.get("type")) if isinstance(hook, dict) else None
        times = getattr(kind, "schedule_settings", _HOOKS.get(getattr(kind, "__name__", "")))
        if times:
            yield f"custom_hooks.{index}", hook, kind, times


def _follow_hooks(cfg: Config, ratio: Fraction, changes: _Changes) -> None:
    for path, hook, kind, times in _hooks(cfg):
        values = {
            key: _rounded(hook[key] * ratio)
            for key in times
            if isinstance(hook.get(key), int) and hook[key] > 0
        }
        changes.set(hook, path, values, kind.__name__)


def _shorten_hooks(runner: Runner, total: int, changes: _Changes) -> None:
    """Make warm-ups by our hooks end in the first half of ``total`` iterations."""
    built = list(runner.hooks)
    for path, hook, kind, times in _hooks(runner.cfg):
        if not hasattr(kind, "schedule_settings"):
            continue
        lengths = {key: hook[key] for key in times if key in hook}
        share = total * _LONGEST_WARM_UP / max(1, sum(lengths.values()))
        if share < 1:
            values = {key: int(length * share) for key, length in lengths.items()}
            changes.set(hook, path, values, kind.__name__)
        mine = next(one for one in built if type(one) is kind)
        built.remove(mine)
        for key in lengths:
            setattr(mine, key, hook[key])


# --------------------------------------------------------------------------------------- schedulers


def _scheduler_lists(cfg: Config) -> Iterator[tuple[str, list]]:
    """Yield the lists of schedulers of a config, one per optimizer; a single scheduler becomes a list."""
    schedulers = cfg.get("param_scheduler")
    if isinstance(schedulers, dict) and "type" not in schedulers:
        parent, path = schedulers, "param_scheduler."
    else:
        parent, path = cfg, ""
    for key in list(parent) if path else ["param_scheduler"] * bool(schedulers):
        if isinstance(parent[key], dict):
            parent[key] = [parent[key]]
        elif isinstance(parent[key], tuple):
            parent[key] = list(parent[key])
        yield f"{path}{key}", parent[key]


def _base(scheduler: dict) -> Optional[str]:
    """Return the base class of a scheduler, or None if we cannot change its kind."""
    bases = getattr(find_type(scheduler.get("type")), "__mro__", ())
    return next((base.__name__ for base in bases if base.__name__ in _TIMES), None)


def _is_warm_up_in_iterations(scheduler: dict) -> bool:
    return not scheduler.get("by_epoch", True) and _is_warm_up(scheduler)


def _is_warm_up(scheduler: dict) -> bool:
    kind = _base(scheduler)
    if kind not in _WARM_UPS or scheduler.get("begin", 0) != 0:
        return False
    if scheduler.get("end", INF) >= INF:
        return False
    if kind == "ConstantParamScheduler":
        return scheduler.get("factor", 1 / 3) < 1
    if kind == "LinearParamScheduler":
        return scheduler.get("start_factor", 1 / 3) < scheduler.get("end_factor", 1.0)
    return True


def _fitting_warm_up(
    schedulers: list, total: Optional[int], ratio: Fraction, changes: _Changes, path: str
) -> Optional[tuple[int, int]]:
    """Return the old and the new length of the warm-up in iterations; remove it from ``schedulers`` if too short.

    It keeps its length unless that is more than half of the run. Then it keeps its share of the run, up to half. It
    also keeps its length if ``total``, the iterations of the run, is None.
    """
    ends = [scheduler.end for scheduler in schedulers if _is_warm_up_in_iterations(scheduler)]
    if not ends:
        return None
    old = new = max(ends)
    if total is not None and old > total * _LONGEST_WARM_UP:
        new = int(total * min(_LONGEST_WARM_UP, old * ratio / total))
    if new < _SHORTEST_WARM_UP and changes.allows(path):
        schedulers[:] = [s for s in schedulers if not _is_warm_up_in_iterations(s)]
        changes.notes.append(f"the warm-up of {old} iterations is removed")
        return old, 0
    return old, new


@dataclass(frozen=True)
class _Follower:
    """Changes the times of schedulers.

    Attributes:
        ratio: The new run's length over the old one's.
        option: The run's unit, ``"epochs"`` or ``"iters"``.
        old: The old run's length.
        warm_up: Length of the warm-up in iterations, old and new.
        changes: Where to note the changes.
    """

    ratio: Fraction
    option: str
    old: int
    warm_up: Optional[tuple[int, int]]
    changes: _Changes

    def follow(self, scheduler: dict, path: str) -> None:
        """Change a scheduler, which is at ``path`` in the config."""
        name = str(scheduler.type)
        begin, end = scheduler.get("begin", 0), self._end(scheduler)
        new_begin = self._move(scheduler, begin)
        new_end = None if end is None else self._move(scheduler, end)
        if new_end is not None and new_end <= new_begin:
            raise UserError(
                f"--{self.option}: {path} ({name}), from {begin} to {end}, does not fit so short a run; "
                "train for longer, or change it with --cfg-options"
            )
        values = {}
        if "begin" in scheduler:
            values["begin"] = new_begin
        if scheduler.get("end", INF) < INF:
            values["end"] = new_end
        time = _TIMES[_base(scheduler)]
        if time == "T_max" and scheduler.get(time) is not None:
            length = self._move(scheduler, begin + scheduler[time]) - new_begin
            values[time] = max(1, length)
        elif time == "milestones":
            values[time] = self._new_milestones(scheduler[time], scheduler, begin, new_begin, end)
        elif time == "step_size" and self.changes.allows(f"{path}.{time}"):
            values.update(self._new_steps(scheduler, path, begin, new_begin, end))
        self.changes.set(scheduler, path, values, name)

    def _end(self, scheduler: dict) -> Optional[int]:
        """Return the scheduler's end or else the run's; None if the run counts in the other unit."""
        end = scheduler.get("end", INF)
        if end < INF:
            return end
        return self.old if scheduler.get("by_epoch", True) == (self.option == "epochs") else None

    def _move(self, scheduler: dict, point: Number, whole: bool = False) -> Number:
        """Return the new position of a point of a scheduler."""
        by_epoch = scheduler.get("by_epoch", True)
        if not by_epoch and self.warm_up is not None:
            old, new = self.warm_up
            if point <= old:
                return _rounded(Fraction(new, old) * Fraction(point), 0)
            return max(new, _rounded(self.ratio * Fraction(point), 0))
        exact = self.ratio * Fraction(point)
        if by_epoch and scheduler.get("convert_to_iter_based") and not whole:
            return int(exact) if exact.denominator == 1 else float(exact)
        if by_epoch and _base(scheduler) in _WARM_UPS and point >= _SHORTEST_WARM_UP:
            return _rounded(exact, _SHORTEST_WARM_UP)
        return _rounded(exact, 0)

    def _new_milestones(
        self,
        milestones: list,
        scheduler: dict,
        begin: Number,
        new_begin: Number,
        end: Optional[Number],
    ) -> list[int]:
        # A milestone at the new end would never be reached; one at the begin would apply from the first step.
        last = None if end is None else self._move(scheduler, end, whole=True) - new_begin - 1
        found = []
        for old in milestones:
            new = self._move(scheduler, begin + old, whole=True) - new_begin
            if old > 0 and (end is None or begin + old < end):
                new = max(1, new if last is None else min(new, last))
            if last is None or new <= last or (end is not None and begin + old >= end):
                found.append(int(new))
        return found

    def _new_steps(
        self, scheduler: dict, path: str, begin: Number, new_begin: Number, end: Optional[Number]
    ) -> dict[str, Any]:
        """Return the new ``step_size``, or milestones if the new steps are not all of the same length."""
        old = scheduler["step_size"]
        exact = old * self.ratio
        unequal = str(scheduler["type"]).replace("Step", "MultiStep")
        may_change = self.changes.allows(f"{path}.type") and find_type(unequal) is not None
        if exact.denominator == 1 or end is None or not may_change:
            return {"step_size": _rounded(exact)}
        steps = list(range(old, int(end - begin), old))
        milestones = self._new_milestones(steps, scheduler, begin, new_begin, end)
        return {"type": unequal, "step_size": None, "milestones": milestones}
