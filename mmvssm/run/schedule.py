"""Training for longer or shorter than a config says, with its whole schedule following.

Points of the schedule (milestones, begins and ends, intervals, switches of hooks) keep their place relative to the
run: what happened after two thirds of the old one happens after two thirds of the new one. Only a warm-up that is
counted in iterations keeps its length, as it depends on the optimizer and not on the run.
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
from ..models import KeepRatioWarmup
from .settings import find_type

_WORDS = {"epochs": "epochs", "iters": "iterations"}
# mmengine's loops validate this often where the config does not say.
_VAL_INTERVAL = {"epochs": 1, "iters": 1000}
# Below, mmengine's warm-ups never end: the last of their steps is the one with the full rate.
_SHORTEST_WARM_UP = 2
_LONGEST_WARM_UP = Fraction(1, 2)  # of the run

# By the class that a scheduler derives from, for rates and momentum alike: the settings, besides begin and end, that
# have to do with time. They count from the scheduler's begin.
_LENGTHS = {
    "LinearParamScheduler": (),
    "ConstantParamScheduler": (),
    "PolyParamScheduler": (),
    "QuadraticWarmupParamScheduler": (),
    "ReduceOnPlateauParamScheduler": (),
    "CosineAnnealingParamScheduler": ("T_max",),
    "OneCycleParamScheduler": ("total_steps",),
    "MultiStepParamScheduler": ("milestones",),
    "StepParamScheduler": ("step_size",),
    "CosineRestartParamScheduler": ("periods",),
    "ExponentialParamScheduler": ("gamma",),
}
_WARM_UPS = ("LinearParamScheduler", "ConstantParamScheduler", "QuadraticWarmupParamScheduler")
# Settings of hooks that are points of a schedule or lengths of time.
_HOOKS = {
    "KeepRatioWarmup": ("num_iters", "begin"),
    "PipelineSwitchHook": ("switch_epoch",),
    "YOLOXModeSwitchHook": ("num_last_epochs",),
    "EMAHook": ("begin_iter", "begin_epoch"),
}

Number = Union[int, float]


def change_length(cfg: Config, option: str, length: int, given: Collection[str] = ()) -> str:
    """Make a training last for another number of epochs or iterations.

    Args:
        cfg: Changed in place: ``train_cfg``, ``param_scheduler``, the interval of checkpoints and what hooks have of a
            schedule.
        option: ``"epochs"`` or ``"iters"``.
        length: How many.
        given: Dotted keys of settings that stay as they are, such as those of ``--cfg-options``.

    Returns:
        A line that says what has changed.

    Raises:
        UserError: If the config counts the other way, or has a scheduler that nothing is known of, or one that does
            not go into so short a run.
    """
    loop, limit = cfg.get("train_cfg") or {}, f"max_{option}"
    _check_unit(loop, option, length)
    if f"train_cfg.{limit}" in given:
        raise UserError(
            f"--{option} {length} and --cfg-options train_cfg.{limit} both say how long to train; give "
            f"one of them (--{option} changes the schedule as well)"
        )
    old, loop[limit] = loop[limit], length
    ratio, changes = Fraction(length, old), _Changes(given)
    changes.notes.append(f"{length} {_WORDS[option]} in place of {old}")
    if old == length:
        return f"--{option} {length}: that is the config's own schedule"
    _follow_loop(cfg, option, ratio, changes)
    for path, schedulers in _scheduler_lists(cfg):
        # Of epochs it is not known yet how many iterations they are.
        total = length if option == "iters" else None
        warm_up = _fitting_warm_up(schedulers, total, ratio, changes, path)
        follower = _Follower(ratio, option, old, warm_up, changes)
        for index, scheduler in enumerate(schedulers):
            follower.follow(scheduler, f"{path}.{index}")
    _follow_hooks(cfg, ratio, changes)
    return "Schedule: " + "; ".join(changes.notes)


def shorten_warm_ups(runner: Runner, old_epochs: int, given: Collection[str] = ()) -> Optional[str]:
    """Shorten warm-ups in iterations that take most of a run by epochs, as only its data loader tells.

    That of the learning rate, and that of the keep ratio, after which a pruned model has to be trained some more. A
    warm-up in epochs that steps with every iteration is left out where it has too few of them to be any.

    Args:
        runner: Before training, with its training loop built.
        old_epochs: How long the config's own run is.
        given: As for :func:`change_length`.

    Returns:
        A line that says what has changed, or None if it fits.
    """
    total, ratio = runner.max_iters, Fraction(runner.max_epochs, old_epochs)
    changes = _Changes(given)
    for path, schedulers in _scheduler_lists(runner.cfg):
        if changes.allows(path):
            _leave_out_shortest(schedulers, len(runner.train_dataloader), changes)
        warm_up = _fitting_warm_up(schedulers, total, ratio, changes, path)
        if warm_up is not None and warm_up[0] != warm_up[1]:
            follower = _Follower(Fraction(1), "iters", total, warm_up, changes)
            for index, scheduler in enumerate(schedulers):
                if not scheduler.get("by_epoch", True):
                    follower.follow(scheduler, f"{path}.{index}")
    for index, config in enumerate(runner.cfg.get("custom_hooks") or []):
        _shorten_keep_ratio_warm_up(config, total, changes, f"custom_hooks.{index}")
    if not changes.notes:
        return None
    runner.param_schedulers = deepcopy(runner.cfg.get("param_scheduler"))
    ratios = [
        c for c in runner.cfg.get("custom_hooks") or [] if _name(c) == KeepRatioWarmup.__name__
    ]
    for hook, config in zip((h for h in runner.hooks if isinstance(h, KeepRatioWarmup)), ratios):
        hook.num_iters, hook.begin = config.num_iters, config.get("begin", 0)
    runner.dump_config()
    return f"Schedule of {total} iterations: " + "; ".join(changes.notes)


def _leave_out_shortest(schedulers: list, epoch_length: int, changes: _Changes) -> None:
    """Take out of ``schedulers`` warm-ups in parts of epochs that mmengine could not step through."""
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
        changes.notes.append(f"the warm-up of {_shown(float(end))} epochs is left out")


def hint_at_options(cfg: Config, given: Collection[str]) -> Optional[str]:
    """What to say where ``--cfg-options`` changes a run's length and nothing else of its schedule."""
    for option in _WORDS:
        key = f"train_cfg.max_{option}"
        if key in given and not any(name.startswith("param_scheduler") for name in given):
            return (
                f"{key} alone leaves learning rate and intervals as they are; --{option} "
                f"{cfg.train_cfg[f'max_{option}']} makes the whole schedule follow"
            )
    return None


def check_can_follow(cfg: Config, option: str) -> None:
    """Check that it is known what the rates of a schedule would be in the middle of a run.

    Raises:
        UserError: If they depend on what was measured on the way.
    """
    for _, schedulers in _scheduler_lists(cfg):
        for scheduler in schedulers:
            if _base(scheduler) == "ReduceOnPlateauParamScheduler":
                raise UserError(
                    f"--{option} with --resume: the rate of {scheduler.type} depends on the metrics of the "
                    f"whole run, so nothing says what it would be in another one; leave out --{option}"
                )


def _check_unit(loop: dict, option: str, length: int) -> None:
    limit, other = f"max_{option}", {"epochs": "iters", "iters": "epochs"}[option]
    if length < 1:
        raise UserError(f"--{option} {length}: a training has at least 1 of them")
    if limit in loop:
        return
    if f"max_{other}" in loop:
        raise UserError(
            f"--{option} {length}: this config counts {_WORDS[other]} "
            f"(train_cfg.max_{other}={loop[f'max_{other}']}); give --{other}"
        )
    raise UserError(f"--{option} {length}: train_cfg has no {limit} that could be changed")


class _Changes:
    """Changes settings, apart from those that were given, and notes what was changed."""

    def __init__(self, given: Collection[str]) -> None:
        self.given = given
        self.notes: list[str] = []

    def allows(self, path: str) -> bool:
        return not any(path == key or path.startswith(f"{key}.") for key in self.given)

    def set(self, node: dict, path: str, values: dict[str, Any], name: str) -> None:
        """Set what differs from before in ``node``, which is at ``path`` in the config; None takes a key out."""
        told = []
        for key, value in values.items():
            old = node.get(key)
            if value == old or not self.allows(f"{path}.{key}"):
                continue
            if value is None:
                del node[key]
            else:
                node[key] = value
                before = "" if old is None else f"{_shown(old)} -> "
                told.append(f"{key} {before}{_shown(value)}")
        if told:
            self.notes.append(f"{name} {', '.join(told)}")


def _shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return str(list(value)) if isinstance(value, (list, tuple)) else str(value)


def _rounded(value: Fraction, least: int = 1) -> int:
    return max(least, int(value + Fraction(1, 2)))


# ----------------------------------------------------------------------------------- loop and hooks


def _follow_loop(cfg: Config, option: str, ratio: Fraction, changes: _Changes) -> None:
    """Validate and save as often in the run as before, and not just before its end: intervals are rounded up."""
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


def _shorten_keep_ratio_warm_up(hook: dict, total: int, changes: _Changes, path: str) -> None:
    """Let the warm-up of the keep ratio end in the first half of ``total`` iterations."""
    if _name(hook) != KeepRatioWarmup.__name__:
        return
    end = hook["num_iters"] + hook.get("begin", 0)
    if end > total * _LONGEST_WARM_UP:
        share = total * _LONGEST_WARM_UP / end
        values = {key: int(hook[key] * share) for key in ("num_iters", "begin") if key in hook}
        changes.set(hook, path, values, _name(hook))


def _name(config: dict) -> str:
    """The ``type`` of a config without its scope."""
    return str(config.get("type")).rpartition(".")[2]


def _follow_hooks(cfg: Config, ratio: Fraction, changes: _Changes) -> None:
    for index, hook in enumerate(cfg.get("custom_hooks") or []):
        values = {
            key: _rounded(hook[key] * ratio)
            for key in _HOOKS.get(_name(hook), ())
            if isinstance(hook.get(key), int) and hook[key] > 0
        }
        changes.set(hook, f"custom_hooks.{index}", values, _name(hook))


# --------------------------------------------------------------------------------------- schedulers


def _scheduler_lists(cfg: Config) -> Iterator[tuple[str, list]]:
    """The lists of schedulers of a config, one for each optimizer; a single scheduler becomes a list."""
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
    """The class that a scheduler derives from, if it is one that is known."""
    bases = getattr(find_type(scheduler.get("type")), "__mro__", ())
    return next((base.__name__ for base in bases if base.__name__ in _LENGTHS), None)


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
    """How long the warm-up was and is to be; one too short to be any is taken out of ``schedulers``.

    It stays as it is unless it would take more than half of the run. Then it keeps its share of the run, but not more
    than half of that. It stays as well where ``total``, the run's iterations, is not known.
    """
    ends = [scheduler.end for scheduler in schedulers if _is_warm_up_in_iterations(scheduler)]
    if not ends:
        return None
    old = new = max(ends)
    if total is not None and old > total * _LONGEST_WARM_UP:
        new = int(total * min(_LONGEST_WARM_UP, old * ratio / total))
    if new < _SHORTEST_WARM_UP and changes.allows(path):
        schedulers[:] = [s for s in schedulers if not _is_warm_up_in_iterations(s)]
        changes.notes.append(f"the warm-up of {old} iterations is left out")
        return old, 0
    return old, new


@dataclass(frozen=True)
class _Follower:
    """Moves the points of schedulers.

    Attributes:
        ratio: The new run's length over the old one's.
        option: What the run counts, ``"epochs"`` or ``"iters"``.
        old: The old run's length.
        warm_up: Its length in iterations, old and new.
        changes: Where to note what was changed.
    """

    ratio: Fraction
    option: str
    old: int
    warm_up: Optional[tuple[int, int]]
    changes: _Changes

    def follow(self, scheduler: dict, path: str) -> None:
        """Change a scheduler, which is at ``path`` in the config."""
        kind = _base(scheduler)
        if kind is None:
            raise UserError(
                f"--{self.option}: nothing is known of how {path} (type={scheduler.get('type')!r}) follows the "
                f"length of a run; set its values and train_cfg.max_{self.option} with --cfg-options"
            )
        name = str(scheduler.type)
        begin, end = scheduler.get("begin", 0), self._end(scheduler)
        new_begin = self._move(scheduler, begin)
        new_end = None if end is None else self._move(scheduler, end)
        if new_end is not None and new_end <= new_begin:
            raise UserError(
                f"--{self.option}: {path} ({name}), from {begin} to {end}, does not go into so short a run; "
                "train for longer, or change it with --cfg-options"
            )
        values = {}
        if "begin" in scheduler:
            values["begin"] = new_begin
        if scheduler.get("end", INF) < INF:
            values["end"] = new_end
        for key in _LENGTHS[kind]:
            if scheduler.get(key) is not None:
                values.update(getattr(self, f"_new_{key}")(scheduler, begin, new_begin, end))
        self.changes.set(scheduler, path, values, name)

    def _end(self, scheduler: dict) -> Optional[int]:
        """The end, which is the run's where none is given; None if that is counted in the other unit."""
        end = scheduler.get("end", INF)
        if end < INF:
            return end
        return self.old if scheduler.get("by_epoch", True) == (self.option == "epochs") else None

    def _move(self, scheduler: dict, point: Number, whole: bool = False) -> Number:
        """Where a point of a scheduler comes to lie."""
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

    def _new_length(self, scheduler: dict, length: Number, begin: Number, new_begin: Number) -> Any:
        return self._move(scheduler, begin + length) - new_begin

    def _new_T_max(self, scheduler: dict, begin: Number, new_begin: Number, end: Any) -> dict:
        length = self._new_length(scheduler, scheduler["T_max"], begin, new_begin)
        return {"T_max": max(1, length)}

    def _new_total_steps(self, scheduler: dict, begin: Number, new_begin: Number, end: Any) -> dict:
        length = self._new_length(scheduler, scheduler["total_steps"], begin, new_begin)
        return {"total_steps": max(1, _rounded(Fraction(length)))}

    def _new_milestones(self, scheduler: dict, begin: Number, new_begin: Number, end: Any) -> dict:
        # At the new end a milestone would never be reached, and at the begin it would be there from the beginning on.
        last = None if end is None else self._move(scheduler, end, whole=True) - new_begin - 1
        milestones = []
        for old in scheduler["milestones"]:
            new = self._move(scheduler, begin + old, whole=True) - new_begin
            if old > 0 and (end is None or begin + old < end):
                new = max(1, new if last is None else min(new, last))
            if last is None or new <= last or (end is not None and begin + old >= end):
                milestones.append(int(new))
        return {"milestones": milestones}

    def _new_step_size(self, scheduler: dict, begin: Number, new_begin: Number, end: Any) -> dict:
        exact = scheduler["step_size"] * self.ratio
        unequal = str(scheduler["type"]).replace("Step", "MultiStep")
        if exact.denominator == 1 or end is None or find_type(unequal) is None:
            return {"step_size": _rounded(exact)}
        # Steps of unequal length, each where it belongs.
        steps = list(range(scheduler["step_size"], int(end - begin), scheduler["step_size"]))
        as_milestones = dict(scheduler, milestones=steps)
        milestones = self._new_milestones(as_milestones, begin, new_begin, end)
        return {"type": unequal, "step_size": None, **milestones}

    def _new_periods(self, scheduler: dict, begin: Number, new_begin: Number, end: Any) -> dict:
        bounds, total = [new_begin], 0
        for period in scheduler["periods"]:
            total += period
            bounds.append(self._move(scheduler, begin + total, whole=True))
        periods = [int(after - before) for before, after in zip(bounds, bounds[1:])]
        if min(periods) < 1:
            raise UserError(
                f"--{self.option}: the periods {list(scheduler['periods'])} of {scheduler['type']} do not go into "
                "so short a run; train for longer, or change them with --cfg-options"
            )
        return {"periods": periods}

    def _new_gamma(self, scheduler: dict, begin: Number, new_begin: Number, end: Any) -> dict:
        # A factor for each step: as many more steps come to the same end.
        return {"gamma": float(scheduler["gamma"]) ** float(1 / self.ratio)}
