"""Compare backbones, and ways to prune one, on real street scenes (CamVid) or blood cells (BCCD), over seeds.

We train every arm of dense_arms.py with every seed from scratch, each with one thread, on the training split, and
evaluate its last weights on the test split: backbones at about equal FLOPs of the whole model, with the same head,
schedule and augmentation; and PlainMamba pruned in different ways. Results are a table, results.json and pictures.

The same command skips finished runs and resumes interrupted ones. Finished runs count wherever they ran: copy their
folders to --out, or name the results.json of another machine with --take. Of a run whose weights are gone we keep the
result, and train again only if other arms start from it.

Examples:
    python tools/experiments/dense.py --data-root path/to/camvid --task camvid --jobs 2
    python tools/experiments/dense.py --data-root path/to/bccd --task bccd --arms GroupMamba ResNet-18 --seeds 0
"""

import argparse
from pathlib import Path

from campaign import run_tasks
from dense_arms import ARMS
from dense_campaign import DATA_SETS, Campaign
from dense_report import report

from mmvssm.errors import UserError, add_traceback_option, run_tool


def parse_args() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--data-root", required=True, metavar="DIR", help="the data set, as docs/dense.md describes"
    )
    parser.add_argument("--task", required=True, choices=list(DATA_SETS), help="the data set")
    parser.add_argument(
        "--out", metavar="DIR", help="where runs and results go (default: work_dirs/dense/<task>)"
    )
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, one thread each")
    parser.add_argument(
        "--seeds",
        type=int,
        nargs="+",
        metavar="N",
        help="of all arms; default one to three, by arm",
    )
    parser.add_argument(
        "--arms",
        nargs="+",
        default=list(ARMS),
        metavar="NAME",
        help="which, and what they start from; default all",
    )
    parser.add_argument(
        "--length",
        type=int,
        metavar="N",
        help="so many iterations (camvid) or epochs (bccd) in every run, to try it out",
    )
    parser.add_argument("--no-time", action="store_true", help="do not measure time and memory")
    parser.add_argument(
        "--take", metavar="FILE", help="results.json whose runs count where --out has none"
    )
    parser.add_argument(
        "--report", action="store_true", help="run nothing, report what is finished"
    )
    add_traceback_option(parser)
    args = parser.parse_args()
    unknown = [name for name in args.arms if name not in ARMS]
    if unknown:
        raise UserError(
            f"unknown arms {', '.join(map(repr, unknown))}; known are {', '.join(map(repr, ARMS))}"
        )
    for option in ("jobs", "length"):
        value = getattr(args, option)
        if value is not None and value < 1:
            raise UserError(f"--{option} must be at least 1; got {value}")
    if args.seeds and len(set(args.seeds)) < len(args.seeds):
        given = " ".join(map(str, args.seeds))
        raise UserError(f"--seeds {given}: each seed once, or the spread would be that of one run")
    return args


def main() -> None:
    """Run the tool."""
    args = parse_args()
    campaign = Campaign(args)
    if args.take:
        campaign.take(Path(args.take))
    if not args.report:
        run_tasks(list(campaign.tasks.values()), args.jobs)
    report(campaign, time=not args.no_time)


if __name__ == "__main__":
    run_tool(main)
