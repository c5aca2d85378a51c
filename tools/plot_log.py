"""Draw the losses and metrics of one or more runs.

python tools/plot_log.py work_dirs/groupmamba_maskrcnn_shapes --out curves.png
python tools/plot_log.py work_dirs/dense work_dirs/pruned --keys loss mIoU --out comparison.png
"""

import argparse
from pathlib import Path

from mmvssm.analysis import picture_file
from mmvssm.analysis.training_log import default_keys, draw_runs, read_run
from mmvssm.errors import UserError, add_traceback_option, run_tool, user_mistakes


def plot_log_parser() -> argparse.ArgumentParser:
    """Return the argument parser."""
    parser = argparse.ArgumentParser(
        description="Draw the losses and metrics of one or more runs, resumed parts joined."
    )
    parser.add_argument(
        "runs",
        nargs="+",
        metavar="WORK_DIR",
        help="a run's work dir, a folder of one of its starts, or a scalars.json file",
    )
    parser.add_argument("--out", required=True, metavar="FILE.png", help="the picture to write")
    parser.add_argument(
        "--keys",
        nargs="+",
        metavar="NAME",
        help="what to draw, such as loss, lr or coco/bbox_mAP; default: losses, the learning rate "
        "and metrics",
    )
    add_traceback_option(parser)
    return parser


def plot_log(args: argparse.Namespace) -> None:
    """Draw the curves of some runs into one picture, and print how far each run came.

    Args:
        args: Parsed by :func:`plot_log_parser`.

    Raises:
        UserError: If a log cannot be read, there is nothing to draw, or the picture cannot be written.
    """
    out = picture_file(args.out)
    names = _names(args.runs)
    runs = [read_run(path, name) for path, name in zip(args.runs, names)]
    for path, run in zip(args.runs, runs):
        steps = max((curve.steps[-1] for curve in run.training.values() if curve.steps), default=0)
        damaged = f"; {run.unreadable} damaged lines were skipped" * bool(run.unreadable)
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
    """Return the folders' names if they all differ, else the paths."""
    names = [Path(path).resolve().name for path in paths]
    return names if len(set(names)) == len(names) else list(paths)


if __name__ == "__main__":
    run_tool(lambda: plot_log(plot_log_parser().parse_args()))
