"""Measure the effect of distillation, alignment and the choice of tokens with small classifiers, over seeds.

We train every arm below with every seed, each with one thread, and write a table, results.json and a picture: accuracy
against time, and the losses with and without a teacher. The same command skips finished runs and resumes interrupted
ones; if all are finished, it only measures time and reports.

On CIFAR-10 as folders of images, train/<class>/ and val/<class>/, it took 16 hours on one core of an AMD EPYC, 6.6 of
them for the teacher; with --jobs 2 about half as many.

Examples:
    python tools/experiments/accuracy.py --data-root path/to/cifar10 --jobs 2
    python tools/experiments/accuracy.py --data-root path/to/cifar10 --arms GroupMamba "GroupMamba, distilled" --seeds 0
"""

import argparse
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any, Optional

import torch
from campaign import Task, damaged, last_metric, run_tasks, settle, with_requirements
from matplotlib.figure import Figure
from mmengine.config import Config
from mmengine.registry import init_default_scope
from results import NOT_TUNED, in_words, plot_against_time
from torch import Tensor, nn

from mmvssm.analysis.flops import count
from mmvssm.analysis.training_log import Curve, read_run
from mmvssm.errors import UserError, add_traceback_option, run_tool, user_mistakes
from mmvssm.files import read_json
from mmvssm.registry import MODELS

REPO = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPO / "tools/benchmark"))

from timing import about, markdown_table, time_side_by_side, write_json  # noqa: E402


@dataclass(frozen=True)
class Arm:
    """A model and how it is trained.

    Attributes:
        config: Its file in ``configs``.
        options: Settings changed in the config.
        start: Arm whose weights, of the same seed, it starts from.
        teacher: Arm that is its teacher.
        average: Arms of the same config whose weights it averages instead of training (as in Izmailov et al. 2018,
            Wortsman et al. 2022).
        tuned: Whether it trains; otherwise it is ``start`` evaluated with these options.
        flags: More arguments of tools/train.py.
        seeds: Default seeds.
    """

    config: str
    options: tuple[str, ...] = ()
    start: Optional[str] = None
    teacher: Optional[str] = None
    tuned: bool = True
    flags: tuple[str, ...] = ()
    seeds: tuple[int, ...] = (0, 1)
    average: tuple[str, ...] = ()

    @property
    def trains(self) -> bool:
        """Whether it trains its own weights."""
        return self.tuned and not self.average


def pruned(*options: str, tuned: bool = True, model: str = "PlainMamba") -> Arm:
    """Return a pruned model with other pruning options, fine-tuned from the dense one or not.

    None of them warms up, since PlainMamba's alignment='none' packs only certain numbers of tokens.
    """
    settings = [f"model.backbone.pruning.{option}" for option in options]
    config = f"{model.lower()}_pruned_cifar10.py"
    return Arm(config, ("custom_hooks.0.num_iters=0", *settings), start=model, tuned=tuned)


PRUNINGS = {
    "decay": (),
    "hold": ("alignment=hold",),
    "none": ("alignment=none",),
    "random choice": ("metric=random",),
    "merging": ("reduction=merge",),
}
"""Settings that differ from the method's: importance by clip, alignment by decay."""
VIM_PRUNINGS = {
    "decay": (),
    "hold": ("alignment=hold",),
    "none": ("alignment=none",),
    "as released": ("metric=mirrored_gate", "alignment=recentred"),
    "random choice": ("metric=random",),
    "merging": ("reduction=merge", "alignment=none"),
}

TEACHER_BF16 = ("model.teacher_bf16=True",)
SOFT = ("model.head.distillation=soft", "model.head.temperature=3.0")
THREE = (0, 1, 2)  # seeds of models that train in minutes, and whose runs differ most
ARMS = {
    "teacher, plain": Arm("resnet18_cifar10.py", flags=("--amp",)),
    "teacher, CutMix": Arm("resnet18_cutmix_cifar10.py", start="teacher, plain", flags=("--amp",)),
    "teacher, CutMix again": Arm(  # with other random numbers
        "resnet18_cutmix_cifar10.py", ("randomness.seed=1",), "teacher, CutMix", flags=("--amp",)
    ),
    "teacher": Arm(
        "resnet18_cutmix_cifar10.py", average=("teacher, CutMix", "teacher, CutMix again")
    ),
    "PlainMamba": Arm("plainmamba_cifar10.py"),
    "PlainMamba, trained on": pruned("keep_ratio=1"),  # as long as the pruned ones are tuned
    **{f"pruned, {name}": pruned(*options) for name, options in PRUNINGS.items()},
    **{
        f"pruned, {name}{NOT_TUNED}": pruned(*options, tuned=False)
        for name, options in PRUNINGS.items()
    },
    "Vim": Arm("vim_cifar10.py"),
    "Vim, trained on": pruned("keep_ratio=1", model="Vim"),
    **{
        f"Vim pruned, {name}{NOT_TUNED * (not tuned)}": pruned(*options, tuned=tuned, model="Vim")
        for tuned in (True, False)
        for name, options in VIM_PRUNINGS.items()
    },
    "GroupMamba": Arm("groupmamba_cifar10.py", seeds=THREE),
    "GroupMamba, distilled": Arm(
        "groupmamba_distilled_cifar10.py", TEACHER_BF16, teacher="teacher", seeds=THREE
    ),
    "GroupMamba, distilled softly": Arm(
        "groupmamba_distilled_cifar10.py", (*TEACHER_BF16, *SOFT), teacher="teacher"
    ),
    "ResNet": Arm("resnet_small_cifar10.py", seeds=THREE),
    "ResNet, distilled": Arm(
        "resnet_small_distilled_cifar10.py", TEACHER_BF16, teacher="teacher", seeds=THREE
    ),
}
TEACHERS = ("teacher, plain", "teacher, CutMix", "teacher, CutMix again", "teacher")
TEACHER_SEED = 0  # one teacher for all students, whatever their seeds
METRIC = "accuracy/top1"
ONLY_THE_LAST = 1000  # epochs between evaluations; the last epoch is evaluated anyway
BATCH, IMAGE = 64, 32  # of the images whose time is measured


def parse_args() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--data-root", required=True, metavar="DIR", help="train/ and val/ with a folder per class"
    )
    parser.add_argument(
        "--out",
        default="work_dirs/benchmark/accuracy",
        metavar="DIR",
        help="where runs and results go",
    )
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, one thread each")
    parser.add_argument(
        "--seeds",
        type=int,
        nargs="+",
        metavar="N",
        help="of all arms but teachers; default 0, 1 and, of small models, 2",
    )
    parser.add_argument(
        "--arms",
        nargs="+",
        default=list(ARMS),
        metavar="NAME",
        help="which, and what they start from; default all",
    )
    parser.add_argument(
        "--epochs", type=int, metavar="N", help="so many in every run, to try it out"
    )
    parser.add_argument("--no-time", action="store_true", help="do not measure time")
    add_traceback_option(parser)
    args = parser.parse_args()
    unknown = [name for name in args.arms if name not in ARMS]
    if unknown:
        raise UserError(
            f"unknown arms {', '.join(map(repr, unknown))}; known are {', '.join(map(repr, ARMS))}"
        )
    for option in ("jobs", "epochs"):
        value = getattr(args, option)
        if value is not None and value < 1:
            raise UserError(f"--{option} must be at least 1; got {value}")
    if args.seeds and len(set(args.seeds)) < len(args.seeds):
        given = " ".join(map(str, args.seeds))
        raise UserError(f"--seeds {given}: each seed once, or the spread would be that of one run")
    if not Path(args.data_root, "train").is_dir():
        raise UserError(
            f"there is no folder {args.data_root}/train; accuracy is measured on images as train/<class>/ and "
            "val/<class>/, such as CIFAR-10's"
        )
    return args


class Campaign:
    """All runs of the command line.

    Args:
        args: Parsed command line.
    """

    def __init__(self, args: argparse.Namespace) -> None:
        self.out = Path(args.out)
        self.data_root = args.data_root
        self.epochs = args.epochs
        needed = with_requirements(args.arms, _requirements)
        self.arms = [name for name in ARMS if name in needed]
        self.seeds = args.seeds
        self.num_classes = sum(path.is_dir() for path in Path(args.data_root, "train").iterdir())
        runs = [(arm, TEACHER_SEED) for arm in self.arms if arm in TEACHERS]
        students = [arm for arm in self.arms if arm not in TEACHERS]
        seeds = dict.fromkeys(seed for arm in students for seed in self.seeds_of(arm))
        runs += [(arm, seed) for seed in seeds for arm in students if seed in self.seeds_of(arm)]
        self.tasks = {run: self._task(*run) for run in runs}

    def seeds_of(self, arm: str) -> Sequence[int]:
        """Return the seeds of an arm."""
        return (TEACHER_SEED,) if arm in TEACHERS else self.seeds or ARMS[arm].seeds

    def config(self, arm: str) -> Config:
        """Read the config that an arm's first run used."""
        return Config.fromfile(self._folder(arm, self.seeds_of(arm)[0]) / ARMS[arm].config)

    def checkpoint(self, arm: str, seed: int) -> Path:
        """Return the file of an arm's final weights."""
        if ARMS[arm].average:
            return self._folder(arm, seed) / "average.pth"
        if not ARMS[arm].tuned:
            arm = ARMS[arm].start
        cfg = _config(ARMS[arm].config)
        return self._folder(arm, seed) / f"epoch_{self.epochs or cfg.train_cfg.max_epochs}.pth"

    def results(self, arm: str, key: str = "top1") -> list[float]:
        """Return a metric of an arm's finished runs, by seed."""
        tasks = [self.tasks[arm, seed] for seed in self.seeds_of(arm)]
        with user_mistakes(f"a result of {arm} lacks {key}", (KeyError,)):
            return [task.result[key] for task in tasks if task.result is not None]

    def curves(self, arm: str) -> list[Curve]:
        """Return curves of the loss on labels of an arm's runs, by seed."""
        runs = [read_run(str(self._folder(arm, seed))) for seed in self.seeds_of(arm)]
        share = 1 - self.config(arm).model.head.get("distillation_weight", 0)
        curves = [run.training["loss_label" if share < 1 else "loss"] for run in runs]
        return [Curve(curve.steps, [value / share for value in curve.values]) for curve in curves]

    def _folder(self, arm: str, seed: int) -> Path:
        return self.out / arm.replace(", ", "_").replace(" ", "_") / f"seed{seed}"

    def _task(self, arm: str, seed: int) -> Task:
        settings = ARMS[arm]
        name, needs, options = f"{arm}, seed {seed}", [], list(settings.options)
        if settings.start:
            needs.append(f"{settings.start}, seed {seed}")
        if settings.trains:
            options.append(f"train_cfg.val_interval={ONLY_THE_LAST}")
        if settings.start and settings.trains:
            options.append(f"load_from={self.checkpoint(settings.start, seed)}")
        if settings.teacher:
            needs.append(f"{settings.teacher}, seed {TEACHER_SEED}")
            weights = self.checkpoint(settings.teacher, TEACHER_SEED)
            options.append(f"model.teacher_checkpoint={weights}")
            options.append(f"model.teacher.head.num_classes={self.num_classes}")
        needs += [f"{other}, seed {seed}" for other in settings.average]
        tool = [str(REPO / "tools" / ("train.py" if settings.trains else "test.py"))]
        tool += [str(REPO / "configs" / settings.config), *settings.flags]
        if not settings.trains:
            tool.append(str(self.checkpoint(arm, seed)))
        elif self.epochs:
            tool += ["--epochs", str(self.epochs)]
        tool += [
            "--data-root",
            self.data_root,
            "--cfg-options",
            f"randomness.seed={seed}",
            *options,
        ]
        return Task(
            name,
            self._folder(arm, seed),
            (sys.executable, *tool),
            _of_training if settings.trains else _of_test,
            after=tuple(needs),
            settings=dict(
                config=_config(settings.config).to_dict(),
                options=settings.options,
                flags=settings.flags,
            ),
            prepare=partial(self._average, arm, seed) if settings.average else None,
        )

    def _average(self, arm: str, seed: int) -> None:
        paths = [self.checkpoint(other, seed) for other in ARMS[arm].average]
        weights = mean([torch.load(path, weights_only=True)["state_dict"] for path in paths])
        torch.save(dict(state_dict=weights), self.checkpoint(arm, seed))


def mean(states: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Average each weight and running statistic; take the first of counters."""
    return {
        key: torch.stack([state[key] for state in states]).mean(0)
        if value.is_floating_point()
        else value
        for key, value in states[0].items()
    }


@cache  # arms share configs, and reading one takes a while
def _config(name: str) -> Config:
    return Config.fromfile(REPO / "configs" / name)


def _requirements(arm: str) -> list[str]:
    settings = ARMS[arm]
    return [name for name in (settings.start, settings.teacher, *settings.average) if name]


def _of_training(folder: Path) -> dict[str, Any]:
    return dict(top1=last_metric(folder, METRIC))


def _of_test(folder: Path) -> dict[str, Any]:
    with damaged(folder / "test_results.json"):
        return dict(top1=float(read_json(folder / "test_results.json", dict)["metrics"][METRIC]))


# ------------------------------------------------------------------------------------------- time


def build(campaign: Campaign, arm: str) -> nn.Module:
    """Build an arm's model with the weights of its first run."""
    cfg = campaign.config(arm)
    init_default_scope(cfg.default_scope)
    model = MODELS.build(cfg.model)
    path = campaign.checkpoint(arm, campaign.seeds_of(arm)[0])
    model.load_state_dict(torch.load(path, map_location="cpu", weights_only=True)["state_dict"])
    return model.eval()


def measure(campaign: Campaign, arms: list[str]) -> dict[str, dict[str, float]]:
    """Measure milliseconds per image, millions of FLOPs and of parameters of arms, which run in turn."""
    x = torch.rand(BATCH, 3, IMAGE, IMAGE)
    models = {arm: build(campaign, arm) for arm in arms}

    def run(model: nn.Module, x: Tensor) -> None:
        with torch.no_grad():
            model(x)

    seconds = time_side_by_side({arm: partial(run, m, x) for arm, m in models.items()}, "cpu", 3.0)
    costs = {arm: count(m, partial(run, m, x[:1]))["total"] for arm, m in models.items()}
    return {
        arm: dict(
            milliseconds=statistics.median(seconds[arm]) * 1e3 / BATCH,
            flops=costs[arm].flops / 1e6,
            parameters=costs[arm].parameters / 1e6,
        )
        for arm in arms
    }


# ----------------------------------------------------------------------------------------- report


def table_of(results: dict[str, dict[str, Any]]) -> str:
    """Make a Markdown table; arms without tuning are beside the tuned ones."""
    fields = ["arm", "parameters (M)", "FLOPs (M)", "ms an image", "top-1", "runs", "not tuned"]
    table = markdown_table(fields)
    table.align["arm"] = "l"
    for arm, result in results.items():
        if arm.removesuffix(NOT_TUNED) in results.keys() - {arm}:
            continue
        costs = [
            *(f"{result[key]:.2f}" if key in result else "" for key in ("parameters", "flops")),
            f"{result['milliseconds']:.3f}" if "milliseconds" in result else "",
        ]
        untuned = results.get(arm + NOT_TUNED, {}).get("top1", [])
        runs = ", ".join(f"{value:.2f}" for value in result["top1"])
        table.add_row([arm, *costs, in_words(result["top1"]), runs, in_words(untuned)])
    return table.get_string()


def draw(campaign: Campaign, results: dict[str, dict[str, Any]]) -> Figure:
    """Draw accuracy against time, of arms with and without a teacher and of pruned ones, and the former's losses."""
    figure = Figure((20, 4.6), dpi=110, layout="constrained")
    taught, plain, vim, losses = figure.subplots(1, 4)
    shown = [arm for arm, result in results.items() if ARMS[arm].tuned and "milliseconds" in result]
    of_plain = [arm for arm in shown if arm.startswith(("PlainMamba", "pruned"))]
    of_vim = [arm for arm in shown if arm.startswith("Vim")]
    others = [arm for arm in shown if arm not in (*of_plain, *of_vim, *TEACHERS)]
    for axes, arms, title in (
        (taught, others, "with and without a teacher"),
        (plain, of_plain, "PlainMamba, dense and pruned"),
        (vim, of_vim, "Vim, dense and pruned"),
    ):
        plot_against_time(axes, {arm: results[arm] for arm in arms}, "top1")
        axes.set(
            xlabel="ms an image", ylabel="top-1 (%), each run a dot, their mean a line", title=title
        )
    for index, arm in enumerate(others):
        for curve in campaign.curves(arm):
            losses.plot(curve.steps, curve.values, color=f"C{index}", linewidth=0.8, alpha=0.8)
        losses.plot([], [], color=f"C{index}", label=arm)
    losses.set(
        xlabel="iteration",
        ylabel="training loss on the labels",
        title="losses, a line for each run",
    )
    losses.grid(alpha=0.3)
    if others:
        losses.legend(fontsize="small")
    return figure


def main() -> None:
    """Run the tool."""
    args = parse_args()
    data_root = str(Path(args.data_root).resolve())
    settle(Path(args.out), dict(data_root=data_root, epochs=args.epochs))
    campaign = Campaign(args)
    run_tasks(list(campaign.tasks.values()), args.jobs)
    machine = about("cpu")
    results: dict[str, dict[str, Any]] = {
        arm: dict(
            seeds=campaign.seeds_of(arm),
            top1=campaign.results(arm),
            seconds=campaign.results(arm, "seconds"),
            config=ARMS[arm].config,
            options=ARMS[arm].options,
        )
        for arm in campaign.arms
    }
    if not args.no_time:
        tuned = [arm for arm in campaign.arms if ARMS[arm].tuned]
        for arm, costs in measure(campaign, tuned).items():
            results[arm].update(costs)
    table = table_of(results)
    hours = sum(sum(result["seconds"]) for result in results.values()) / 3600
    print(table)
    print(f"\nAll runs together took {hours:.1f} hours of one core.", flush=True)
    (campaign.out / "table.md").write_text(table + "\n")
    write_json(str(campaign.out / "results.json"), dict(machine, arms=results))
    draw(campaign, results).savefig(campaign.out / "accuracy.png")
    print(f"{campaign.out / 'accuracy.png'} shows the same")


if __name__ == "__main__":
    run_tool(main)
