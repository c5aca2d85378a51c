"""What tools/plot_log.py does."""

import argparse
from pathlib import Path

from ..analysis.training_log import default_keys, draw_runs, read_run
from .errors import UserError, user_mistakes
from .picture_file import picture_file


def plot_log(args: argparse.Namespace) -> None:
    """What tools/plot_log.py does.

    Args:
        args: Parsed by :func:`~mmvssm.cli.arguments.plot_log_parser`.

    Raises:
        UserError: If there is nothing to draw, or nowhere to put it.
    """
    out = picture_file(args.out)
    names = _names(args.runs)
    runs = [read_run(path, name) for path, name in zip(args.runs, names)]
    for path, run in zip(args.runs, runs):
        steps = max((curve.steps[-1] for curve in run.training.values() if curve.steps), default=0)
        damaged = f"; {run.unreadable} damaged lines were left out" * bool(run.unreadable)
        parts = f" in {run.parts} parts" * (run.parts > 1)
        print(f"{path}: {steps} iterations{parts}{damaged}")
    keys = args.keys or default_keys(runs)
    if not keys:
        raise UserError(f"nothing to draw by default; give --keys of {', '.join(runs[0].keys)}")
    figure = draw_runs(runs, keys)
    with user_mistakes(f"cannot write {out}"):
        figure.savefig(out)
    print(f"Picture: {out}")


def _names(paths: list[str]) -> list[str]:
    """The folders' own names if they differ, else the paths."""
    names = [Path(path).resolve().name for path in paths]
    return names if len(set(names)) == len(names) else list(paths)
