"""The data sets and runs of dense.py."""

import argparse
import json
import math
import os
import subprocess
import sys
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass
from functools import cache, partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Callable

import numpy as np
from campaign import RESULT, Task, settle, with_requirements
from dense_arms import ARMS, BACKBONES, Backbone
from mmengine.config import Config, ConfigDict
from mmseg.evaluation import IoUMetric
from predictions import BOXES, MAPS, evaluate_boxes, score_boxes, score_maps, segment_areas

from mmvssm.datasets.formats import prepare_instances
from mmvssm.datasets.layouts import Layout, list_files, only_suffix
from mmvssm.errors import UserError, user_mistakes
from mmvssm.files import read_json, write_whole
from mmvssm.run.setup import print_once

REPO = Path(__file__).resolve().parents[2]

# ------------------------------------------------------------------------------------------- data


@dataclass(frozen=True)
class Data:
    """Where the images and labels are.

    Attributes:
        options: Settings of a config that name them, by dotted key.
        images: Folder of the images of the test split.
        labels: Of the test split: the folder of its label maps, or its annotation file.
        num_images: Number of images of each split.
    """

    options: dict[str, Any]
    images: Path
    labels: Path
    num_images: dict[str, int]


_LOADERS = dict(train_dataloader="train", val_dataloader="test", test_dataloader="test")


def find_camvid(root: Path, out: Path) -> Data:
    """Find CamVid's images and label maps in ADE20K's layout, with ``test`` as a third split.

    Raises:
        UserError: If a folder is missing.
    """
    folders = dict(train="training", test="test")
    for kind in ("images", "annotations"):
        for folder in folders.values():
            if not (root / kind / folder).is_dir():
                raise UserError(
                    f"there is no folder {root / kind / folder}; CamVid is expected in images/ and annotations/, each "
                    "with training/ and test/"
                )
    options = {}
    for loader, split in _LOADERS.items():
        images, maps = (f"{kind}/{folders[split]}" for kind in ("images", "annotations"))
        options.update(
            {
                f"{loader}.dataset.data_root": str(root),
                f"{loader}.dataset.data_prefix": dict(img_path=images, seg_map_path=maps),
                f"{loader}.dataset.img_suffix": only_suffix(str(root / images)),
            }
        )
    counts = {split: len(list_files(str(root / "images" / f))) for split, f in folders.items()}
    return Data(options, root / "images/test", root / "annotations/test", counts)


def find_bccd(root: Path, out: Path) -> Data:
    """Find BCCD's images and boxes in Pascal VOC's layout, and convert the boxes to files in ``out``.

    Raises:
        UserError: If a file is missing, or a box cannot be read.
    """
    lists = {"train": "ImageSets/Main/train.txt", "val": "ImageSets/Main/test.txt"}
    for part in ("Annotations", "JPEGImages", *lists.values()):
        if not (root / part).exists():
            raise UserError(
                f"there is no {root / part}; BCCD is expected as it is published, with Annotations/, JPEGImages/ and "
                "ImageSets/Main/{train,test}.txt"
            )
    layout = Layout("voc", "Pascal VOC", dict.fromkeys(lists, "JPEGImages"), lists)
    files = prepare_instances(str(root), layout, str(out)).labels
    options = {}
    for loader, split in _LOADERS.items():
        options.update(
            {
                f"{loader}.dataset.data_root": str(root),
                f"{loader}.dataset.data_prefix": dict(img=""),
                f"{loader}.dataset.ann_file": files["train" if split == "train" else "val"],
            }
        )
    for evaluator in ("val_evaluator", "test_evaluator"):
        options[f"{evaluator}.ann_file"] = files["val"]
    counts = {
        split: len(read_json(Path(files[key]), dict)["images"])
        for split, key in (("train", "train"), ("test", "val"))
    }
    return Data(options, root, Path(files["val"]), counts)


# ---------------------------------------------------------------------------------------- metrics


def segmentation_metrics(folder: Path, labels: Path) -> dict[str, float]:
    """Return mIoU, accuracies and the IoU of each class in percent, by mmseg's functions."""
    classes = _camvid_classes()
    maps = sorted((folder / MAPS).glob("*.png"))
    areas = [segment_areas(path, labels / path.name, len(classes)) for path in maps]
    found = IoUMetric.total_area_to_metrics(*map(sum, zip(*areas)))
    means = dict(mIoU=found["IoU"], mAcc=found["Acc"], aAcc=found["aAcc"])
    metrics = {key: np.nanmean(values) * 100 for key, values in means.items()}
    metrics.update({f"IoU of {c}": value * 100 for c, value in zip(classes, found["IoU"])})
    return _finite(metrics)


def detection_metrics(folder: Path, labels: Path) -> dict[str, float]:
    """Return AP, AP50, AP75 and the AP of each class in percent, by COCO's definition."""
    evaluation = evaluate_boxes(folder / BOXES, labels)
    # Thresholds of IoU, recalls, classes; of all areas, and as many detections as the detector makes.
    precision = evaluation.eval["precision"][:, :, :, 0, -1]
    classes = evaluation.cocoGt.loadCats(evaluation.params.catIds)
    parts = dict(AP=precision, AP50=precision[0], AP75=precision[5])
    parts.update({f"AP of {c['name']}": precision[:, :, i] for i, c in enumerate(classes)})
    return _finite({key: part[part > -1].mean() * 100 for key, part in parts.items()})


def _camvid_classes() -> Sequence[str]:
    return _base_config(DATA_SETS["camvid"].config).metainfo.classes


def _finite(metrics: dict[str, float]) -> dict[str, float]:
    """Leave out classes that the labels lack."""
    return {key: float(value) for key, value in metrics.items() if np.isfinite(value)}


@dataclass(frozen=True)
class DataSet:
    """What is trained and measured on a data set.

    Attributes:
        config: The config of GroupMamba, in ``configs``; arms differ in their backbones.
        find: Finds the data below ``--data-root``; its second argument is the folder for converted files.
        metrics: Called with a run's folder and :attr:`Data.labels`.
        scores: Called with the same; returns a score of each test image, by file name.
        metric: The main one of the metrics.
        unit: What its schedule counts, an option of tools/train.py.
        shape: Height and width of what the network sees in a test.
    """

    config: str
    find: Callable[[Path, Path], Data]
    metrics: Callable[[Path, Path], dict[str, float]]
    scores: Callable[[Path, Path], dict[str, float]]
    metric: str
    unit: str
    shape: tuple[int, int]

    @property
    def length(self) -> int:
        """Length of a training, that of the config."""
        return _base_config(self.config).train_cfg[f"max_{self.unit}"]


DATA_SETS = {
    "camvid": DataSet(
        *("groupmamba_upernet_camvid.py", find_camvid, segmentation_metrics),
        lambda folder, labels: score_maps(folder, labels, len(_camvid_classes())),
        *("mIoU", "iters", (360, 480)),
    ),
    "bccd": DataSet(
        *("groupmamba_fasterrcnn_bccd.py", find_bccd, detection_metrics, score_boxes),
        *("AP", "epochs", (256, 320)),
    ),
}

# --------------------------------------------------------------------------------------- campaign


class Campaign:
    """All runs of the command line.

    Args:
        args: Parsed command line.

    Attributes:
        data_set: What is trained on.
        data: Where it is.
        arms: Names of the arms, with what they start from.
        tasks: Their runs, by arm and seed.
    """

    def __init__(self, args: argparse.Namespace) -> None:
        self.data_set = DATA_SETS[args.task]
        self.out = Path(args.out or f"work_dirs/dense/{args.task}").absolute()
        self.length = args.length
        # Runs import candidates.py.
        paths = [str(REPO / "tools/experiments"), os.environ.get("PYTHONPATH")]
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
        self.seeds = args.seeds
        self.data = self.data_set.find(Path(args.data_root).absolute(), self.out)
        settle(self.out, dict(task=args.task, length=args.length, images=self.data.num_images))
        needed = with_requirements(args.arms, lambda arm: filter(None, [ARMS[arm].start]))
        self.arms = [arm for arm in ARMS if arm in needed and _is_installed(arm)]
        seeds = dict.fromkeys(seed for arm in self.arms for seed in self.seeds_of(arm))
        runs = [(arm, seed) for seed in seeds for arm in self.arms if seed in self.seeds_of(arm)]
        self.tasks = {run: self._task(*run) for run in runs}

    def seeds_of(self, arm: str) -> Sequence[int]:
        """Return the seeds of an arm."""
        return self.seeds or ARMS[arm].seeds

    def folder(self, arm: str, seed: int) -> Path:
        """Return the folder of a run."""
        return self.out / arm.replace(", ", "_").replace(" ", "_") / f"seed{seed}"

    def length_of(self, arm: str) -> int:
        """Return the length of an arm's training, in its config's unit."""
        if not ARMS[arm].tuned:
            return 0
        return self.length or round(self.data_set.length * ARMS[arm].length)

    def weights(self, arm: str, seed: int) -> Path:
        """Return the file of an arm's final weights."""
        if not ARMS[arm].tuned:
            arm = ARMS[arm].start
        unit = self.data_set.unit.removesuffix("s")
        return self.folder(arm, seed) / f"{unit}_{self.length_of(arm)}.pth"

    def config(self, arm: str) -> Config:
        """Return the config of an arm, without paths."""
        return config_of(self.data_set, arm)

    def results(self, arm: str) -> dict[str, Any]:
        """Return an arm's settings and the results of its finished runs."""
        runs = []
        for seed in self.seeds_of(arm):
            result = self.tasks[arm, seed].result
            if result is None:
                continue
            if self.data_set.metric not in result:
                raise UserError(
                    f"the result of {arm} lacks {self.data_set.metric}; move {self.folder(arm, seed)} away"
                )
            runs.append(dict(seed=seed, **result))
        return dict(runs=runs, iterations=self._iterations(arm), options=ARMS[arm].options)

    def take(self, path: Path) -> None:
        """Count the runs in another campaign's results.json, where we have none of the same arm and seed.

        Raises:
            UserError: If the file is damaged, or an arm has other settings there.
        """
        with user_mistakes(f"{path} is not a results.json that this tool wrote"):
            arms = dict(read_json(path, dict)["arms"])
            # As JSON, in which tuples are lists.
            found = {arm: (r["iterations"], r["options"]) for arm, r in arms.items()}
            runs = {(arm, run["seed"]): run for arm, r in arms.items() for run in r["runs"]}
        for (arm, seed), run in runs.items():
            task = self.tasks.get((arm, seed))
            if task is None or task.result is not None:
                continue
            ours = json.loads(json.dumps((self._iterations(arm), ARMS[arm].options)))
            if list(found[arm]) != ours:
                raise UserError(
                    f"{path} has {arm} with {found[arm][0]} iterations and {found[arm][1]}, not {ours[0]} and {ours[1]}"
                )
            task.folder.mkdir(parents=True, exist_ok=True)
            result = {key: value for key, value in run.items() if key != "seed"}
            write_whole(task.folder / RESULT, json.dumps(result) + "\n")

    def _iterations(self, arm: str) -> int:
        batches = 1
        if self.data_set.unit == "epochs":
            batch = self.config(arm).train_dataloader.batch_size
            batches = math.ceil(self.data.num_images["train"] / batch)
        return self.length_of(arm) * batches

    def write_config(self, arm: str, seed: int) -> Path:
        """Write the config of a run, with the paths of the data, and return its path."""
        cfg = config_of(self.data_set, arm)
        cfg.merge_from_dict(self.data.options)
        folder = self.folder(arm, seed)
        outputs = dict(output_dir=MAPS, outfile_prefix=BOXES.partition(".")[0])
        key = "output_dir" if cfg.default_scope == "mmseg" else "outfile_prefix"
        for evaluator in (cfg.val_evaluator, cfg.test_evaluator):
            evaluator[key] = str(folder / outputs[key])
        if ARMS[arm].start and ARMS[arm].tuned:
            cfg.load_from = str(self.weights(ARMS[arm].start, seed))
        if ARMS[arm].taught:
            cfg.model.teacher = cfg.load_from
        cfg.randomness = dict(seed=seed)
        # Beside the folder, since a test writes elsewhere if its config is in its work dir.
        path = folder.with_name(f"{folder.name}.py")
        path.parent.mkdir(parents=True, exist_ok=True)
        cfg.dump(path)
        return path

    def _task(self, arm: str, seed: int) -> Task:
        settings, folder = ARMS[arm], self.folder(arm, seed)
        tool = REPO / "tools" / ("train.py" if settings.tuned else "test.py")
        command = [sys.executable, str(tool), str(folder.with_name(f"{folder.name}.py"))]
        if settings.tuned:
            command += [f"--{self.data_set.unit}", str(self.length_of(arm))]
        else:
            command.append(str(self.weights(arm, seed)))
        return Task(
            f"{arm}, seed {seed}",
            folder,
            tuple(command),
            partial(self._finish, arm, seed),
            after=(f"{settings.start}, seed {seed}",) if settings.start else (),
            settings=dict(config=self.config(arm).to_dict(), length=self.length_of(arm)),
            prepare=partial(self.write_config, arm, seed),
            weights=self.weights(arm, seed),
        )

    def _finish(self, arm: str, seed: int, folder: Path) -> dict[str, float]:
        """Return a run's metrics; evaluate its last weights if the run ended between saving and evaluating them."""
        count = len(list(folder.glob(f"{MAPS}/*.png")))
        if not (folder / BOXES).exists() and count < self.data.num_images["test"]:
            print_once(f"{arm}, seed {seed} ended within its evaluation; we repeat that")
            command = [
                sys.executable,
                str(REPO / "tools/test.py"),
                str(self.write_config(arm, seed)),
            ]
            command += [str(self.weights(arm, seed)), "--work-dir", str(folder / "evaluation")]
            with open(folder / "evaluation.txt", "w") as output:
                streams = dict(stdout=output, stderr=subprocess.STDOUT)
                env = {**os.environ, "OMP_NUM_THREADS": "1"}
                if subprocess.run(command, env=env, **streams).returncode:
                    raise UserError(
                        f"the evaluation failed; the end of {output.name} has the cause"
                    )
        return self.data_set.metrics(folder, self.data.labels)


def _is_installed(arm: str) -> bool:
    package = BACKBONES[ARMS[arm].backbone].package
    if package is None or find_spec(package):
        return True
    print_once(f"{arm} is left out: it needs {package}, which is not installed")
    return False


def config_of(data_set: DataSet, arm: str) -> Config:
    """Return the config of an arm, without paths."""
    cfg = deepcopy(_base_config(data_set.config))
    backbone = BACKBONES[ARMS[arm].backbone]
    use_backbone(cfg.model, backbone)
    if backbone.package:
        cfg.custom_imports.imports.append(f"{backbone.package}.models")
    for loader in _LOADERS:
        cfg[loader].num_workers = 0  # a run has one thread in all
    # The last weights count, whatever the test says of others.
    cfg.default_hooks.checkpoint.update(save_best=None, max_keep_ckpts=1)
    if ARMS[arm].start:
        cfg.optim_wrapper.optimizer.lr /= 3
    cfg.merge_from_dict(ARMS[arm].options)
    taught = ARMS[arm].taught
    if taught:
        cfg.model.update(type=f"mmvssm.Distilled{cfg.model.type}", teacher="", **taught)
    if taught or "Candidate" in cfg.model.backbone.type:
        cfg.custom_imports.imports.append("candidates")
    return cfg


def use_backbone(model: ConfigDict, backbone: Backbone) -> None:
    """Put a backbone into the config of a segmenter or a detector, in place."""
    model.backbone = ConfigDict(deepcopy(backbone.settings))
    is_plain = isinstance(backbone.channels, int)
    channels = [backbone.channels] * 4 if is_plain else backbone.channels
    if "decode_head" in model:
        model.decode_head.in_channels, model.auxiliary_head.in_channels = channels, channels[2]
    else:
        model.neck.in_channels = channels
    if is_plain:
        pyramid = dict(
            type="mmvssm.FeaturePyramid",
            in_channels=backbone.channels,
            rescales=[2, 1, 0.5, 0.25],
            norm_cfg=dict(type="BN", requires_grad=True),
        )
        necks = [dict(type="mmvssm.TokenRestoration"), pyramid]
        model.neck = [*necks, model.neck] if "neck" in model else necks


@cache  # arms share it, and reading one takes a while
def _base_config(name: str) -> Config:
    return Config.fromfile(REPO / "configs" / name)
