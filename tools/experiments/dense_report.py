"""Measure what the models of dense.py cost, and report it with their results."""

from __future__ import annotations

import random
import statistics
import sys
from collections.abc import Sequence
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any, Callable, Optional

import candidates  # noqa: F401  (registers what arms name)
import numpy as np
import torch
from dense_arms import ARMS, DENSE
from dense_campaign import Campaign
from matplotlib.figure import Figure
from mmengine.config import Config
from mmengine.dataset import pseudo_collate
from mmengine.optim import build_optim_wrapper
from mmengine.registry import DATASETS, MODELS, init_default_scope
from predictions import BOXES, MAPS, draw_predictions
from results import NOT_TUNED, in_words, plot_against_time
from torch import nn

import mmvssm  # noqa: F401  (registers the models)
from mmvssm.analysis.flops import Cost, count
from mmvssm.errors import UserError
from mmvssm.run.setup import print_once

REPO = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(REPO / "tools" / part) for part in ("benchmark", "analysis_tools")]

from get_flops import run_once  # noqa: E402
from timing import about, markdown_table, peak_memory, time_side_by_side, write_json  # noqa: E402

STEPS = ("image", "step")
"""What is measured: the test of one image, and a training step."""

SHOWN = ("GroupMamba", DENSE, "pruned, decay", "pruned, pyramid")
"""Arms whose predictions are drawn; the last of those that are there chooses the images."""

_EACH = 2  # of the best and of the worst images
_SECONDS = 3.0  # of each arm
_WARM_UP = (128, 160)  # height and width, at which all arms can prune


def build(cfg: Config) -> nn.Module:
    """Build a config's model, to evaluate."""
    init_default_scope(cfg.default_scope)
    return MODELS.build(cfg.model).eval()


def cost_of(cfg: Config, shape: tuple[int, int]) -> dict[str, Cost]:
    """Count parameters and FLOPs of a config's model and of its parts, for an image of ``shape``."""
    model = build(cfg)
    return count(model, partial(run_once, model, torch.rand(1, 3, *shape)))


def prepare(config: str, weights: Optional[str], step: str) -> Callable[[], object]:
    """Prepare the test of one image or a training step, with one thread; also in a process of its own.

    Args:
        config: File with the paths of the data.
        weights: Checkpoint; None for random weights.
        step: One of :data:`STEPS`.
    """
    about("cpu")
    torch.set_num_threads(1)
    cfg = Config.fromfile(config)
    model = build(cfg)
    if weights:
        state = torch.load(weights, map_location="cpu", weights_only=True)["state_dict"]
        model.load_state_dict(state)
    run_once(model, torch.rand(1, 3, *_WARM_UP))
    trains = step == "step"
    loader = cfg.train_dataloader if trains else cfg.test_dataloader
    dataset = DATASETS.build(loader.dataset)
    random.seed(0)  # the same crops for all arms
    np.random.seed(0)
    batch = pseudo_collate([dataset[i] for i in range(loader.batch_size if trains else 1)])
    model.train(trains)
    optimizer = build_optim_wrapper(model, cfg.optim_wrapper)

    def run() -> None:
        if trains:
            model.train_step(deepcopy(batch), optimizer)
        else:
            with torch.no_grad():
                model.test_step(deepcopy(batch))

    return run


def measure(campaign: Campaign, arms: Sequence[str]) -> dict[str, dict[str, float]]:
    """Measure milliseconds and peak megabytes of both :data:`STEPS` of arms, which run in turn."""
    found: dict[str, dict[str, float]] = {arm: {} for arm in arms}
    files = {arm: _files(campaign, arm) for arm in arms}
    for step in STEPS:
        runs = {arm: prepare(*files[arm], step) for arm in arms}
        for arm, seconds in time_side_by_side(runs, "cpu", _SECONDS).items():
            found[arm][f"milliseconds a {step}"] = statistics.median(seconds) * 1e3
        del runs
        for arm in arms:
            peak = peak_memory(prepare, *files[arm], step)
            if peak is not None:
                found[arm][f"megabytes a {step}"] = peak / 1e6
    return found


def _files(campaign: Campaign, arm: str) -> tuple[str, Optional[str]]:
    seed = campaign.seeds_of(arm)[0]
    config, weights = campaign.write_config(arm, seed), campaign.weights(arm, seed)
    if weights.exists():
        return str(config), str(weights)
    print_once(f"{arm}: its weights are not here, so we time random ones")
    return str(config), None


def report(campaign: Campaign, time: bool) -> None:
    """Write results.json, table.md and pictures of the finished runs, and print the table.

    Args:
        campaign: The runs.
        time: Whether to measure time and memory.

    Raises:
        UserError: If no run is finished, or a result lacks the metric.
    """
    results = {arm: result for arm in campaign.arms if (result := campaign.results(arm))["runs"]}
    if not results:
        raise UserError(f"no run in {campaign.out} is finished; run without --report first")
    tuned = [arm for arm in results if not arm.endswith(NOT_TUNED)]
    for arm in tuned:
        costs = cost_of(campaign.config(arm), campaign.data_set.shape)
        results[arm].update(
            parameters=costs["total"].parameters / 1e6,
            flops=costs["total"].flops / 1e9,
            backbone_flops=costs["backbone"].flops / 1e9,
        )
    machine = about("cpu")
    if time:
        for arm, costs in measure(campaign, tuned).items():
            results[arm].update(costs)
    metric = campaign.data_set.metric
    table = table_of(results, metric)
    hours = sum(run["seconds"] for result in results.values() for run in result["runs"]) / 3600
    print(table)
    print(f"\nThese runs together took {hours:.1f} hours of one core.", flush=True)
    (campaign.out / "table.md").write_text(table + "\n")
    write_json(str(campaign.out / "results.json"), dict(machine, arms=results))
    if time:
        draw(results, metric).savefig(campaign.out / "time.png")
        print(f"{campaign.out / 'time.png'} shows {metric} against time")
    draw_best_and_worst(campaign, list(results))


def table_of(results: dict[str, dict[str, Any]], metric: str) -> str:
    """Make a Markdown table; arms without tuning are beside the tuned ones."""
    costs = {
        "parameters": ("parameters (M)", 2),
        "flops": ("FLOPs (G)", 2),
        "backbone_flops": ("of the backbone (G)", 2),
        **{
            f"{quantity} a {step}": (f"{unit} a {step}", 0)
            for step in STEPS
            for quantity, unit in (("milliseconds", "ms"), ("megabytes", "MB"))
        },
    }
    costs = {k: v for k, v in costs.items() if any(k in result for result in results.values())}
    table = markdown_table(
        ["arm", *(title for title, _ in costs.values()), metric, "runs", "not tuned"]
    )
    table.align["arm"] = "l"
    for arm, result in results.items():
        if arm.removesuffix(NOT_TUNED) in results.keys() - {arm}:
            continue
        of_costs = [f"{result[k]:.{n}f}" if k in result else "" for k, (_, n) in costs.items()]
        values, untuned = (
            [run[metric] for run in results.get(name, {}).get("runs", [])]
            for name in (arm, arm + NOT_TUNED)
        )
        runs = ", ".join(f"{value:.2f}" for value in values)
        table.add_row([arm, *of_costs, in_words(values), runs, in_words(untuned)])
    return table.get_string()


def draw(results: dict[str, dict[str, Any]], metric: str) -> Figure:
    """Draw the metric against time: backbones, and PlainMamba pruned."""
    figure = Figure((13, 5), dpi=110, layout="constrained")
    timed = {
        arm: {
            "milliseconds": result["milliseconds a image"],
            metric: [run[metric] for run in result["runs"]],
        }
        for arm, result in results.items()
        if "milliseconds a image" in result
    }
    pruning = [a for a in timed if a == DENSE or ARMS[a].start or ARMS[a].saving]
    backbones = [arm for arm in timed if arm not in pruning]
    parts = ((backbones, "backbones"), (pruning, "PlainMamba, dense and pruned"))
    for axes, (arms, title) in zip(figure.subplots(1, 2), parts):
        plot_against_time(axes, {arm: timed[arm] for arm in arms}, metric)
        axes.set(xlabel="ms an image", ylabel=f"{metric} (%), each run a dot, their mean a line")
        axes.set_title(title)
    return figure


def draw_best_and_worst(campaign: Campaign, arms: Sequence[str]) -> None:
    """Draw predictions of :data:`SHOWN` of the test images that the last of them does best and worst."""
    folders = {}
    for arm in SHOWN:
        folder = campaign.folder(arm, campaign.seeds_of(arm)[0])
        if arm in arms and any((folder / name).exists() for name in (MAPS, BOXES)):
            folders[arm] = folder
    if not folders:
        return
    data = campaign.data
    scores = campaign.data_set.scores(list(folders.values())[-1], data.labels)
    ranked = sorted(scores, key=scores.get, reverse=True)
    names = list(dict.fromkeys([*ranked[:_EACH], *ranked[-_EACH:]]))
    metainfo = campaign.config(next(iter(folders))).metainfo
    path = campaign.out / "predictions.jpg"
    draw_predictions(folders, names, data.images, data.labels, metainfo).savefig(path)
    print(f"{path} shows the {_EACH} test images that {list(folders)[-1]} does best and worst")
