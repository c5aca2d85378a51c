"""Ablate token pruning: fine-tune one small dense model in several variants, with several seeds.

For each seed we train a dense model on the generated data set, 96x96 pixels (configs/plainmamba_upernet_shapes.py).
Every variant starts from it, has the same budget, differs from configs/plainmamba_pruned_upernet_shapes.py in one
choice, and is evaluated on the same images. The same command resumes an interrupted ablation. With --jobs 2 it takes
about 40 minutes on two cores.

Example:
    python tools/experiments/ablate_pruning.py --jobs 2
"""

import argparse
import json
import statistics
import sys
from pathlib import Path

from campaign import Task, last_metric, run_tasks
from mmengine.config import Config
from prettytable import PrettyTable, TableStyle

from mmvssm.errors import UserError, add_traceback_option, run_tool

REPO = Path(__file__).resolve().parents[2]
PRUNED = REPO / "configs/plainmamba_pruned_upernet_shapes.py"
DENSE = REPO / "configs/plainmamba_upernet_shapes.py"

VARIANTS = {
    "dense": (DENSE, []),
    "decay, clip, last": (PRUNED, []),
    "alignment hold": (PRUNED, ["model.backbone.pruning.alignment=hold"]),
    "alignment none": (PRUNED, ["model.backbone.pruning.alignment=none"]),
    "metric l1": (PRUNED, ["model.backbone.pruning.metric=l1"]),
    "metric l2": (PRUNED, ["model.backbone.pruning.metric=l2"]),
    "metric value": (PRUNED, ["model.backbone.pruning.metric=value"]),
    "random choice": (PRUNED, ["model.backbone.pruning.metric=random"]),
    "merging": (PRUNED, ["model.backbone.pruning.reduction=merge"]),
    "fill zero": (PRUNED, ["model.neck.0.fill=zero"]),
}
"""Config and options of each variant."""

START = "start"
SIZE = 96
START_ITERATIONS = 1500
START_CHECKPOINT = f"iter_{START_ITERATIONS}.pth"
ITERATIONS = 250
COMMON = [
    f"train_dataloader.dataset.pipeline.2.scale=({SIZE},{SIZE})",
    f"train_dataloader.dataset.pipeline.3.crop_size=({SIZE},{SIZE})",
    f"val_dataloader.dataset.pipeline.1.scale=({SIZE},{SIZE})",
    f"model.data_preprocessor.size=({SIZE},{SIZE})",
    f"model.backbone.img_size={SIZE}",
    "default_hooks.visualization.draw=False",
]
# alignment='none' packs only certain numbers of tokens and cannot warm up, so no variant does.
NO_WARM_UP = ["custom_hooks.0.num_iters=0"]


def schedule(iterations: int) -> list[str]:
    """Return options for a run of so many iterations."""
    return [
        f"train_cfg.max_iters={iterations}",
        f"train_cfg.val_interval={iterations}",
        f"param_scheduler.1.end={iterations}",
        f"default_hooks.checkpoint.interval={iterations // 2}",
    ]


def parse_args() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work-dir", default="work_dirs/ablate_pruning", help="where results go")
    parser.add_argument("--seeds", type=int, default=3, help="how many runs each variant has")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, one thread each")
    parser.add_argument(
        "--variants", nargs="+", default=list(VARIANTS), metavar="NAME", help="which; default all"
    )
    parser.add_argument(
        "--cfg-options", nargs="+", default=[], help="more settings, for all variants"
    )
    add_traceback_option(parser)
    args = parser.parse_args()
    unknown = sorted(set(args.variants) - set(VARIANTS))
    if unknown:
        raise UserError(
            f"unknown variants {', '.join(map(repr, unknown))}; known are {', '.join(map(repr, VARIANTS))}"
        )
    return args


def tasks(args: argparse.Namespace) -> dict[tuple[str, int], Task]:
    """Return all runs by variant and seed; each seed's variants start from the dense model of ``START``."""
    folder = Path(args.work_dir)

    def task(name: str, config: Path, options: list[str], seed: int, *after: Task) -> Task:
        options = [*COMMON, *options, *args.cfg_options]
        command = [sys.executable, str(REPO / "tools/train.py"), str(config)]
        command += ["--cfg-options", f"randomness.seed={seed}", *options]
        command += [f"load_from={other.folder.resolve()}/{START_CHECKPOINT}" for other in after]
        return Task(
            f"{name}, seed {seed}",
            folder / name.replace(", ", "_").replace(" ", "_") / f"seed{seed}",
            tuple(command),
            lambda folder: dict(mIoU=last_metric(folder, "mIoU")),
            after=tuple(other.name for other in after),
            settings=dict(config=Config.fromfile(config).to_dict(), options=options),
        )

    found = {}
    for seed in range(args.seeds):
        start = task(START, DENSE, schedule(START_ITERATIONS), seed)
        found[START, seed] = start
        for variant in args.variants:
            config, options = VARIANTS[variant]
            options = [*schedule(ITERATIONS), *(NO_WARM_UP if config == PRUNED else []), *options]
            options.append("optim_wrapper.optimizer.lr=1e-3")
            found[variant, seed] = task(variant, config, options, seed, start)
    return found


def report(results: dict[str, list[float]], folder: Path) -> None:
    """Print a table; write it as JSON and as a picture."""
    table = PrettyTable(["variant", "mIoU, mean", "spread (standard deviation)", "runs"])
    table.set_style(TableStyle.MARKDOWN)
    table.align["variant"] = "l"
    for variant, mious in results.items():
        spread = statistics.stdev(mious) if len(mious) > 1 else 0.0
        runs = ", ".join(f"{miou:.1f}" for miou in mious)
        table.add_row([variant, f"{statistics.mean(mious):.1f}", f"{spread:.1f}", runs])
    print(table)
    (folder / "results.json").write_text(json.dumps(results, indent=2))

    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 0.45 * len(results) + 1), constrained_layout=True)
    for row, mious in enumerate(results.values()):
        axes.plot(mious, [row] * len(mious), "o", color="tab:blue", alpha=0.6)
        axes.plot(statistics.mean(mious), row, "|", color="black", markersize=18)
    axes.set_yticks(range(len(results)), list(results))
    axes.invert_yaxis()
    axes.set_xlabel("mIoU (each run a dot, their mean a line)")
    axes.grid(axis="x", alpha=0.3)
    figure.savefig(folder / "results.png", dpi=120)
    print(f"{folder / 'results.json'} and {folder / 'results.png'} hold the same")


def main() -> None:
    """Run the tool."""
    args = parse_args()
    runs = tasks(args)
    run_tasks(list(runs.values()), args.jobs)
    results: dict[str, list[float]] = {variant: [] for variant in args.variants}
    for (variant, _), task in runs.items():
        if variant != START:
            results[variant].append(task.result["mIoU"])
    report(results, Path(args.work_dir))


if __name__ == "__main__":
    run_tool(main)
