"""Read the scalars that mmengine logs, and draw them as curves."""

from __future__ import annotations

import json
import math
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Optional

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from mmengine.utils import is_list_of

from ..errors import UserError, brief
from ..files import open_regular

_SCALARS = "vis_data/scalars.json"
_NOT_METRICS = {"data_time", "time", "memory", "step", "epoch", "iter"}
# COCO's metrics of small, medium and large objects, and of single classes: not by default.
_IN_PARTS = ("_s", "_m", "_l", "_precision")
_COLUMNS = 3
_PANEL = (4.2, 2.8)  # inches
_DPI = 120
_MOST_PANELS = 150
_FEW = 40  # up to this many points get a marker each


@dataclass
class Curve:
    """Values of one scalar.

    Attributes:
        steps: Iterations or epochs, counted from 1, increasing.
        values: One for each.
    """

    steps: list[int] = field(default_factory=list)
    values: list[float] = field(default_factory=list)

    def cut(self, first: int) -> None:
        """Drop the values of step ``first`` and later ones."""
        kept = bisect_left(self.steps, first)
        del self.steps[kept:], self.values[kept:]

    def add(self, step: int, value: float) -> None:
        """Append a value; it replaces those of the same and of later steps."""
        self.cut(step)
        self.steps.append(step)
        self.values.append(value)


@dataclass
class Run:
    """The log of one run, its resumed parts joined.

    Attributes:
        name: Its name in pictures.
        training: Curves over iterations.
        metrics: Curves of evaluations, over epochs if ``by_epoch``, else over iterations.
        by_epoch: Whether the run counted epochs.
        parts: How many times the run was started.
        unreadable: Number of damaged lines, which are skipped.
    """

    name: str
    training: dict[str, Curve] = field(default_factory=dict)
    metrics: dict[str, Curve] = field(default_factory=dict)
    by_epoch: bool = False
    parts: int = 0
    unreadable: int = 0

    @property
    def keys(self) -> list[str]:
        """Names of all curves."""
        return [*self.training, *self.metrics]


def read_run(path: str, name: Optional[str] = None) -> Run:
    """Read the log of a run.

    Args:
        path: Its work dir, one of the folders with a time for a name in it, or a ``scalars.json`` file.
        name: Its name in pictures. Defaults to the path.

    Raises:
        UserError: If there is nothing to read.
    """
    files = _files(Path(path))
    run = Run(name or path)
    parts = [list(_records(run, file)) for file in files]
    # The folders' names give the order, unless the clock went back: then the earliest by name is a resumed part.
    first_steps = [_first_step(part) for part in parts]
    if first_steps[0] > min(first_steps):
        parts.sort(key=_first_step)
    for part in parts:
        _add_part(run, part)
    if not run.keys:
        raise UserError(
            f"the log of {path} holds no losses or metrics yet; a run writes them every "
            "default_hooks.logger.interval iterations"
        )
    return run


def _files(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise UserError(f"there is no work dir or log {path}")
    if (path / _SCALARS).is_file():
        return [path / _SCALARS]
    # mmengine names each folder by the time of the start, such as 20250131_235959.
    found = sorted(path.glob(f"*/{_SCALARS}"), key=lambda file: file.parts[-3])
    if not found:
        raise UserError(
            f"{path} has no log of a training (a folder with {_SCALARS} in it); give a run's work dir"
        )
    return found


def _first_step(records: list[dict[str, Any]]) -> float:
    return next((record["step"] for record in records if _is_training(record)), math.inf)


def _is_training(record: dict[str, Any]) -> bool:
    return "lr" in record or "iter" in record


def _add_part(run: Run, records: list[dict[str, Any]]) -> None:
    """Add one part of a run; it replaces what earlier parts logged after the step it resumed from."""
    begun = False
    for record in records:
        step, is_training = record["step"], _is_training(record)
        if is_training and not begun:
            begun = True
            run.parts += 1
            run.by_epoch = "epoch" in record
            for curve in run.training.values():
                curve.cut(step)
            for curve in run.metrics.values():
                curve.cut(record["epoch"] if run.by_epoch else step)
        curves = run.training if is_training else run.metrics
        skipped = {"step", "epoch", "iter"} if is_training else _NOT_METRICS
        for key, value in record.items():
            if _is_number(value) and key not in skipped:
                curves.setdefault(key, Curve()).add(step, value)


def _records(run: Run, file: Path) -> Iterator[dict[str, Any]]:
    """Yield the records of a log, and count its damaged lines in ``run.unreadable``."""
    try:
        with open_regular(file) as opened:
            lines = opened.readlines()
    except OSError as error:
        raise UserError(f"cannot read {file}: {error.strerror}") from error
    for line in filter(bytes.strip, lines):
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            record = None
        if isinstance(record, dict) and is_list_of(
            [record.get("step"), record.get("epoch", 1)], int
        ):
            yield record
        else:
            run.unreadable += 1


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def default_keys(runs: Sequence[Run]) -> list[str]:
    """Names of the curves drawn by default: losses, learning rate, share of kept tokens, metrics."""
    training = list(dict.fromkeys(key for run in runs for key in run.training))
    losses = [key for key in training if "loss" in key.rpartition(".")[2]]
    losses.sort(key=lambda key: key != "loss")
    others = [key for key in ("lr", "keep_ratio") if key in training]
    metrics = dict.fromkeys(key for run in runs for key in run.metrics)
    return losses + others + [key for key in metrics if not key.endswith(_IN_PARTS)]


def draw_runs(runs: Sequence[Run], keys: Sequence[str]) -> Figure:
    """Draw one panel for each curve, with one line for each run that logged it.

    Raises:
        UserError: If no run logged one of the curves.
    """
    logged = list(dict.fromkeys(key for run in runs for key in run.keys))
    for key in keys:
        if key not in logged:
            raise UserError(f"no run logged {key!r}; there are {', '.join(logged)}")
    if len(keys) > _MOST_PANELS:
        raise UserError(
            f"there are {len(keys)} curves, of which one picture holds {_MOST_PANELS}; choose some with --keys, of "
            f"{', '.join(map(brief, keys[:_FEW]))}, ..."
        )
    columns = min(_COLUMNS, len(keys))
    rows = math.ceil(len(keys) / columns)
    figure = Figure((columns * _PANEL[0], rows * _PANEL[1] + 0.3), dpi=_DPI, layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for panel, key in zip(axes, keys):
        _draw_panel(panel, runs, key)
    for panel in axes[len(keys) :]:
        panel.set_axis_off()
    if len(runs) > 1:
        handles = [
            axes[0].plot([], [], color=f"C{i}", label=run.name)[0] for i, run in enumerate(runs)
        ]
        figure.legend(handles=handles, loc="outside lower center", ncols=min(3, len(runs)))
    else:
        figure.suptitle(runs[0].name)
    return figure


def _draw_panel(panel: Axes, runs: Sequence[Run], key: str) -> None:
    units = set()
    for index, run in enumerate(runs):
        curve = run.metrics.get(key)
        in_epochs = curve is not None and run.by_epoch
        curve = curve or run.training.get(key)
        if curve is None:
            continue
        units.add("epoch" if in_epochs else "iteration")
        marker = "." if len(curve.steps) <= _FEW else None
        panel.plot(curve.steps, curve.values, color=f"C{index}", marker=marker, linewidth=1)
    panel.set_title(key)
    panel.set_xlabel(" or ".join(sorted(units)))
    panel.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
    panel.grid(alpha=0.3)
