"""Draw samples of a data set before and after the pipeline, and print tables about its annotations.

python tools/browse_dataset.py configs/groupmamba_maskrcnn_shapes.py
python tools/browse_dataset.py configs/groupmamba_upernet_ade20k.py --data-root my_data --split val --num 20
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterable, Iterator, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any, Optional

import mmcv
import numpy as np
import torch
from mmengine.config import Config, ConfigDict
from mmengine.registry import DATASETS
from rich.progress import track

from mmvssm.analysis.dataset_view import (
    Anchors,
    PixelCounts,
    SampleDrawer,
    count_objects,
    side_by_side,
    table_of_anchors,
    table_of_objects,
    table_of_pixels,
    table_of_sizes,
)
from mmvssm.datasets.walk import leaf_datasets, parts_of
from mmvssm.errors import UserError, add_traceback_option, run_tool, user_mistakes
from mmvssm.files import write_whole
from mmvssm.run.arguments import add_data_options
from mmvssm.run.hooks.reproducible import derive_seed, seed_all
from mmvssm.run.setup import open_config, prepare_data, print_once

_MANY = 200  # from so many images on we show progress


def browse_parser() -> argparse.ArgumentParser:
    """Return the argument parser."""
    parser = argparse.ArgumentParser(
        description="Draw samples of a detector's or segmenter's data set with their annotations, before and after "
        "the pipeline, and print tables about the annotations."
    )
    parser.add_argument("config", help="config file")
    add_data_options(parser)
    parser.add_argument(
        "--split", choices=["train", "val"], default="train", help="which part (default: train)"
    )
    parser.add_argument(
        "--num", type=int, default=10, metavar="N", help="how many samples to draw (default: 10)"
    )
    parser.add_argument(
        "--seed",
        type=int,
        default=0,
        help="seed for choosing and augmenting samples (default: 0)",
    )
    parser.add_argument(
        "--max-images",
        type=int,
        default=500,
        metavar="N",
        help="open at most N images for the tables of sizes and pixels; 0: all (default: 500)",
    )
    parser.add_argument(
        "--out-dir",
        metavar="DIR",
        help="folder for the pictures (default: work_dirs/<config name>/browse_<split>)",
    )
    add_traceback_option(parser)
    parser.set_defaults(work_dir=None, launcher="none", local_rank=0)
    return parser


def browse(args: argparse.Namespace) -> None:
    """Write pictures and tables of the data set of a config.

    Args:
        args: Parsed by :func:`browse_parser`.

    Raises:
        UserError: If an argument, the config or the data cannot be used, or nothing can be written.
    """
    for name in ("num", "max_images", "seed"):
        if getattr(args, name) < 0:
            raise UserError(f"--{name.replace('_', '-')} must not be negative")
    cfg = open_config(args)
    loader = f"{args.split}_dataloader"
    if not cfg.get(loader):
        raise UserError(f"--split {args.split}: the config has no {loader}")
    prepare_data(cfg, args, [loader], None)
    out_dir = Path(args.out_dir or os.path.join(cfg.work_dir, f"browse_{args.split}"))
    if out_dir.exists() and not out_dir.is_dir():
        raise UserError(f"--out-dir {out_dir} is a file, not a folder")
    samples = Samples(cfg, loader, args.seed)
    text = "\n".join(_statistics(cfg, samples, args.max_images))
    print_once(text)
    with user_mistakes(f"cannot write to --out-dir {out_dir}", (OSError,)):
        for name, picture in _pictures(cfg, samples, args.num):
            mmcv.imwrite(picture[..., ::-1], str(out_dir / name))
        write_whole(out_dir / "statistics.txt", f"{text}\n")
    print_once(f"Pictures and statistics: {out_dir}")


class Samples:
    """The samples of a data loader's data set, before and after its pipeline.

    Args:
        cfg: The config.
        loader: Name of the data loader in it.
        seed: Seed for choosing and augmenting samples.

    Attributes:
        dataset: The data set, built from the loader's config without filters and packing.
        leaves: The data sets inside its wrappers.

    Raises:
        UserError: If the data set cannot be set up, or its pipeline loads no annotations.
    """

    def __init__(self, cfg: Config, loader: str, seed: int) -> None:
        self.loader, self.seed = loader, seed
        config = deepcopy(cfg[loader].dataset)
        self._filters = [_without_filter(leaf) for leaf in leaf_datasets(config)]
        _unpack(config)
        with user_mistakes(f"cannot set up the data set of {loader}"):
            self.dataset = DATASETS.build(config)
            self.leaves = list(leaf_datasets(self.dataset))
        for leaf in self.leaves:
            names = [type(step).__name__ for step in leaf.pipeline.transforms]
            if not any(name.startswith("Load") and "Annotation" in name for name in names):
                raise UserError(f"the pipeline of {loader} loads no annotations to draw or count")
        # Wrappers of data sets only tell the image of a sample, not the leaf that it comes from.
        self._leaf_of = {r["img_path"]: leaf for leaf in self.leaves for r in leaf.data_list}
        self._kept = {record["img_path"] for records in self._filtered() for record in records}

    @property
    def classes(self) -> Sequence[str]:
        """Names of the data set's classes."""
        return self.dataset.metainfo["classes"]

    @property
    def records(self) -> list[dict[str, Any]]:
        """The records of all images, including those that training filters out."""
        return [record for leaf in self.leaves for record in leaf.data_list]

    def num_filtered_out(self) -> int:
        """Return how many images the data set's own filter drops."""
        return len(self.records) - sum(map(len, self._filtered()))

    def path(self, index: int) -> str:
        """Return the image file of a sample."""
        return self.dataset.get_data_info(index)["img_path"]

    def choose(self, most: int) -> list[int]:
        """Return random indices of at most so many different images that training does not filter out."""
        chosen, seen = [], set()
        for index in np.random.default_rng(self.seed).permutation(len(self.dataset)):
            if len(chosen) == most:
                break
            path = self.path(int(index))
            if path in self._kept and path not in seen:
                seen.add(path)
                chosen.append(int(index))
        return chosen

    def before(self, index: int) -> dict[str, Any]:
        """Return a sample as loaded from its files."""
        with self._mistakes(index):
            results = self.dataset.get_data_info(index)
            for step in self._leaf_of[results["img_path"]].pipeline.transforms:
                if type(step).__name__.startswith("Load"):
                    results = step(results)
        return results

    def after(self, index: int) -> dict[str, Any]:
        """Return a sample after the pipeline, except for its last step, which packs it for the model."""
        seed_all(derive_seed(self.seed, index))
        with self._mistakes(index):
            results = self.dataset[index]
        if "img" not in results:
            raise UserError(
                f"the pipeline of {self.loader} must end in PackDetInputs or PackSegInputs, so that we can "
                "draw its samples"
            )
        return results

    def _mistakes(self, index: int) -> Any:
        return user_mistakes(f"the pipeline of {self.loader} fails on {self.path(index)}")

    def _filtered(self) -> Iterator[Sequence[dict]]:
        for leaf, filter_cfg in zip(self.leaves, self._filters):
            leaf.filter_cfg = filter_cfg
            yield leaf.filter_data()


def _without_filter(leaf: ConfigDict) -> Optional[dict]:
    """Make a data set keep all its records, readable; return the filter that it had."""
    leaf.serialize_data = False
    return leaf.pop("filter_cfg", None)


def _unpack(config: ConfigDict) -> None:
    """Drop packing from all pipelines of a data set's config, and load annotations before any resizing.

    Evaluation compares in the original image, so its pipelines load annotations after resizing.
    """
    if config.get("pipeline"):
        steps = [step for step in config.pipeline if not _kind(step).startswith("Pack")]
        config.pipeline = sorted(steps, key=lambda step: not _kind(step).startswith("Load"))
    for part in parts_of(config):
        _unpack(part)


def _kind(step: dict) -> str:
    return str(step.get("type")).rpartition(".")[2]


# --------------------------------------------------------------------------------------- statistics


def _statistics(cfg: Config, samples: Samples, most: int) -> list[str]:
    if cfg.default_scope == "mmdet":
        return _statistics_of_objects(cfg, samples, most)
    return _statistics_of_pixels(samples, most)


def _chosen(samples: Samples, most: int) -> tuple[list[int], str]:
    """Return the indices of the images to open, and a phrase for them."""
    total = len(samples.records)
    indices = samples.choose(most or total)
    some = f"{len(indices):,} of {total:,}" if len(indices) < total else f"all {total:,}"
    return indices, f"{some} images"


def _tracked(indices: list[int], what: str) -> Iterable[int]:
    return track(indices, what, disable=len(indices) < _MANY, transient=True)


def _statistics_of_objects(cfg: Config, samples: Samples, most: int) -> list[str]:
    counts = count_objects(samples.records, samples.classes)
    dropped = samples.num_filtered_out()
    note = f" (filter_cfg drops {dropped:,} images)" if dropped else ""
    lines = [
        f"{counts.images:,} images, {counts.empty:,} of them without an object{note}; "
        f"{counts.objects.sum():,} objects",
        str(table_of_objects(counts)),
        str(table_of_sizes(counts.sizes, "in the files, pixels")),
    ]
    indices, some = _chosen(samples, most)
    sizes, overlaps, anchors = [], [], _anchors(cfg)
    for index in _tracked(indices, "Applying the pipeline"):
        results = samples.after(index)
        boxes = _boxes(results)
        sizes += (boxes[:, 2:] - boxes[:, :2]).prod(1).sqrt().tolist()
        if anchors is not None:
            overlaps += anchors.best_overlaps(boxes, results["img"].shape[:2]).tolist()
    lines.append(f"After the pipeline ({some}):")
    lines.append(str(table_of_sizes(sizes, "as the model gets them, pixels")))
    if anchors is None:
        lines.append("The model has no anchors to compare objects with.")
    else:
        lines.append(str(table_of_anchors(np.array(sizes), np.array(overlaps), anchors)))
    return lines


def _boxes(results: dict[str, Any]) -> torch.Tensor:
    """Return the boxes ``(N, 4)`` of objects that are not ignored."""
    boxes = results["gt_bboxes"]
    boxes = torch.as_tensor(getattr(boxes, "tensor", boxes), dtype=torch.float32)
    ignored = results.get("gt_ignore_flags")
    return boxes if ignored is None else boxes[~torch.as_tensor(ignored, dtype=torch.bool)]


def _anchors(cfg: Config) -> Optional[Anchors]:
    """Return the anchors of a one-stage detector, or of the first stage of a two-stage one."""
    model = cfg.model
    training = model.get("train_cfg") or {}
    preprocessor = model.get("data_preprocessor") or {}
    for head, assigner in (
        (model.get("rpn_head"), (training.get("rpn") or {}).get("assigner")),
        (model.get("bbox_head"), training.get("assigner")),
    ):
        if isinstance(head, dict) and head.get("anchor_generator"):
            with user_mistakes("cannot set up the model's anchors"):
                return Anchors(head, assigner, preprocessor.get("pad_size_divisor", 1))
    return None


def _statistics_of_pixels(samples: Samples, most: int) -> list[str]:
    counts = PixelCounts.of(samples.classes)
    indices, some = _chosen(samples, most)
    for index in _tracked(indices, "Reading label maps"):
        counts.add(samples.before(index)["gt_seg_map"])
    return [
        f"{some}: {counts.empty:,} of {counts.images:,} without any labelled pixel, {counts.uniform:,} with one "
        "class only",
        str(table_of_pixels(counts)),
    ]


# ----------------------------------------------------------------------------------------- pictures


def _pictures(cfg: Config, samples: Samples, num: int) -> Iterator[tuple[str, np.ndarray]]:
    """Yield file names and pictures, RGB, uint8 ``(H, W, 3)``."""
    drawer = SampleDrawer(cfg.default_scope, samples.dataset.metainfo)
    for index in _tracked(samples.choose(num), "Drawing"):
        panels, labels = [], set()
        for when, results in (("file", samples.before(index)), ("pipeline", samples.after(index))):
            height, width = results["img"].shape[:2]
            name = Path(results.get("img_path", "")).name
            panels.append((f"{when}: {name} {width}x{height}", drawer.draw(results)))
            labels |= set(np.unique(results.get("gt_seg_map", []))) & set(
                range(len(samples.classes))
            )
        picture = side_by_side(panels)
        if labels:
            legend = drawer.legend(sorted(map(int, labels)), picture.shape[1])
            picture = np.vstack([picture, legend])
        yield f"{index:06d}_{Path(samples.path(index)).stem}.jpg", picture


if __name__ == "__main__":
    run_tool(lambda: browse(browse_parser().parse_args()))
