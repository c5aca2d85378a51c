"""Point any config at the user's own data set (``--data-root``).

We recognise four layouts by their folders. COCO instances, for detection::

    annotations/instances_train2017.json  annotations/instances_val2017.json
    train2017/                            val2017/

COCO with semantic maps, for segmentation, where 0 is the background and k the k-th category::

    semantic_train2017/*.png              semantic_val2017/*.png
    train2017/                            val2017/

ADE20K's, for segmentation::

    images/training/                      images/validation/
    annotations/training/*.png            annotations/validation/*.png

and ImageNet's, for classification::

    train/<class>/                        val/<class>/
"""

import colorsys
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Optional

from mmengine.config import Config, ConfigDict

from ..errors import UserError, shown
from ..processes import on_first_process
from .annotations import category_names
from .label_maps import labels_in
from .memory import Memory
from .pictures import IMAGE_SUFFIXES
from .walk import leaf_datasets, parts_of

SPLIT_OF_LOADER = {"train_dataloader": "train", "val_dataloader": "val", "test_dataloader": "val"}
# Parts of a model whose number of classes is not that of the data set.
_NOT_CLASSIFYING = (
    *("backbone", "data_preprocessor", "rpn_head", "train_cfg", "test_cfg"),
    "teacher",  # keeps the classes that it was trained on
)


@dataclass(frozen=True, eq=False)
class Layout:
    """Paths of a data set's images and labels, relative to its root.

    Attributes:
        name: Its name in messages.
        images: Folder of images of each split.
        labels: Annotation file, or folder of label maps, of each split.
    """

    name: str
    images: dict[str, str]
    labels: dict[str, str]

    def missing_in(self, root: str, splits: Sequence[str]) -> list[str]:
        """Return the folders and files of some splits that ``root`` lacks."""
        parts = [part for s in splits for part in (self.labels[s], self.images[s])]
        return [part for part in parts if not _exists(root, part)]

    def __str__(self) -> str:
        parts = [f"{self.images[s]}/ with {self.labels[s]}" for s in ("train", "val")]
        return f"{self.name} ({'; '.join(parts)})"


COCO = Layout(
    "the COCO layout",
    images={"train": "train2017", "val": "val2017"},
    labels={
        "train": "annotations/instances_train2017.json",
        "val": "annotations/instances_val2017.json",
    },
)
COCO_MAPS = Layout(
    "the COCO layout with semantic maps",
    images=COCO.images,
    labels={"train": "semantic_train2017", "val": "semantic_val2017"},
)
ADE20K = Layout(
    "the ADE20K layout",
    images={"train": "images/training", "val": "images/validation"},
    labels={"train": "annotations/training", "val": "annotations/validation"},
)
IMAGENET_LAYOUT = "ImageNet's layout (train/<class>/ and val/<class>/, with images in them)"


def apply_data_root(
    cfg: Config,
    root: str,
    loaders: Sequence[str],
    classes: Optional[Sequence[str]] = None,
    reduce_zero_label: Optional[bool] = None,
) -> str:
    """Make a config use the data set under ``root``.

    We set paths, class names, palette, file suffixes, ``num_classes`` of every head and the annotation
    files of the evaluators. Data set wrappers and pipelines are not changed.

    Args:
        cfg: Changed in place.
        root: The data set's folder.
        loaders: The config's data loaders that the run uses; we need only their splits.
        classes: Class names. Default: from the annotation files. Classification takes the folders' names.
        reduce_zero_label: For segmentation in the ADE20K layout: whether 0 in a label map means
            "unlabelled" and classes count from 1. Default: what all the maps show.

    Returns:
        A line that describes the data set.

    Raises:
        UserError: If something is missing or contradictory, or if the maps do not show the meaning of 0.
    """
    if not os.path.isdir(root):
        raise UserError(f"there is no folder {root} (--data-root)")
    cfg.pop("prepare_data", None)
    if cfg.default_scope == "mmdet":
        return _use_instances(cfg, root, loaders, classes)
    if cfg.default_scope == "mmpretrain":
        return _use_class_folders(cfg, root, loaders)
    return _use_label_maps(cfg, root, loaders, classes, reduce_zero_label)


def make_palette(classes: Sequence[str]) -> list[tuple[int, int, int]]:
    """Return an RGB colour (0 to 255) for each class, easy to tell apart; grey for "background"."""
    golden = 0.6180339887
    palette = []
    for index, name in enumerate(classes):
        if name == "background":
            palette.append((110, 110, 110))
        else:
            value = colorsys.hsv_to_rgb((0.98 + index * golden) % 1, 0.8, 0.95)
            palette.append(tuple(round(channel * 255) for channel in value))
    return palette


def set_num_classes(model: ConfigDict, num_classes: int) -> None:
    """Set ``num_classes`` in every classifying head of a model config, in place.

    Per-class loss weights are resized if they are all equal (an extra one for "no object" stays).

    Raises:
        UserError: If per-class loss weights differ.
    """
    _set_num_classes(model, num_classes, None)


def _set_num_classes(node: Any, new: int, old: Optional[int]) -> None:
    if isinstance(node, (list, tuple)):
        for item in node:
            _set_num_classes(item, new, old)
    if not isinstance(node, dict):
        return
    # mmdet's panoptic heads count the classes that have instances separately.
    for key in ("num_classes", "num_things_classes"):
        if isinstance(node.get(key), int):
            old = node[key]
            node[key] = new
    if old is not None and node.get("out_channels") == old and "in_channels" in node:
        node["out_channels"] = new
    weights = node.get("class_weight")
    if isinstance(weights, (list, tuple)) and old is not None and len(weights) in (old, old + 1):
        if len(set(weights[:old])) != 1:
            raise UserError(
                f"the config's loss has a weight for each of its {old} classes; set class_weight "
                f"for the {new} classes of --data-root with --cfg-options"
            )
        node["class_weight"] = [weights[0]] * new + list(weights[old:])
    for key, value in node.items():
        if key not in _NOT_CLASSIFYING:
            _set_num_classes(value, new, old)


def num_classes_of(model: ConfigDict) -> Optional[int]:
    """Return the number of classes of a model config's classifying heads; None if they differ or it has none."""
    found = set(_num_classes(model))
    return found.pop() if len(found) == 1 else None


def _num_classes(node: Any) -> Iterator[int]:
    if isinstance(node, (list, tuple)):
        for item in node:
            yield from _num_classes(item)
    elif isinstance(node, dict):
        if isinstance(node.get("num_classes"), int):
            yield node["num_classes"]
        for key, value in node.items():
            if key not in _NOT_CLASSIFYING:
                yield from _num_classes(value)


# ------------------------------------------------------------------------------- COCO instances


def _use_instances(
    cfg: Config, root: str, loaders: Sequence[str], classes: Optional[Sequence[str]]
) -> str:
    splits = sorted({SPLIT_OF_LOADER[loader] for loader in loaders})
    missing = COCO.missing_in(root, splits)
    if missing:
        raise UserError(f"{root} lacks {' and '.join(missing)}; detection expects {COCO}")
    if not classes:
        first = "train" if _exists(root, COCO.labels["train"]) else "val"
        # The parsed file takes gigabytes, so only one process reads it.
        classes = on_first_process(category_names, os.path.join(root, COCO.labels[first]))
    metainfo = {"classes": tuple(classes), "palette": make_palette(classes)}
    for loader, leaf in _leaves(cfg, loaders):
        split = SPLIT_OF_LOADER[loader]
        leaf.update(
            type="mmdet.CocoDataset",
            data_root=root,
            ann_file=COCO.labels[split],
            data_prefix={"img": COCO.images[split] + "/"},
            metainfo=metainfo,
        )
    for evaluator in ("val_evaluator", "test_evaluator"):
        if cfg.get(evaluator):
            cfg[evaluator] = _coco_metrics(cfg[evaluator], os.path.join(root, COCO.labels["val"]))
    set_num_classes(cfg.model, len(classes))
    return f"{root}: {COCO.name}, {_listing(classes)}"


def _coco_metrics(evaluator: Any, ann_file: str) -> Any:
    """Return the evaluator with ``ann_file``; a metric of another data set becomes COCO's."""
    if isinstance(evaluator, (list, tuple)):
        return [_coco_metrics(part, ann_file) for part in evaluator]
    if evaluator.get("type") not in ("CocoMetric", "mmdet.CocoMetric"):
        metric = evaluator.get("metric", "bbox")
        known = [m for m in ([metric] if isinstance(metric, str) else metric) if m in _COCO_METRICS]
        evaluator = ConfigDict(type="mmdet.CocoMetric", metric=known or ["bbox"])
    evaluator["ann_file"] = ann_file
    return evaluator


_COCO_METRICS = ("bbox", "segm")


# ------------------------------------------------------------------------------------ label maps


def _use_label_maps(
    cfg: Config,
    root: str,
    loaders: Sequence[str],
    classes: Optional[Sequence[str]],
    reduce_zero_label: Optional[bool],
) -> str:
    splits = sorted({SPLIT_OF_LOADER[loader] for loader in loaders})
    layout = _layout_of_maps(root, splits)
    if not classes and layout is COCO_MAPS:
        ann_file = next((f for f in COCO.labels.values() if _exists(root, f)), None)
        if ann_file:
            names = on_first_process(category_names, os.path.join(root, ann_file))
            classes = ["background", *names]
    if not classes:
        kept = next((leaf for _, leaf in _leaves(cfg, loaders)), {}).get("type")
        if layout is not ADE20K or kept not in ("ADE20KDataset", "mmseg.ADE20KDataset"):
            raise UserError(
                f"the class names of {root} are not known; give them with --classes, in the order "
                "of their numbers in the label maps"
            )
    elif reduce_zero_label is None and layout is ADE20K:
        folders = [os.path.join(root, layout.labels[s]) for s in splits]
        reduce_zero_label = _counts_from_one(cfg, root, folders, list(classes))
    for loader, leaf in _leaves(cfg, loaders):
        split = SPLIT_OF_LOADER[loader]
        images, maps = (os.path.join(root, part[split]) for part in (layout.images, layout.labels))
        leaf.update(
            data_root=root,
            data_prefix={"img_path": layout.images[split], "seg_map_path": layout.labels[split]},
            img_suffix=only_suffix(images),
            seg_map_suffix=only_suffix(maps),
        )
        leaf.pop("ann_file", None)
        if classes:
            leaf.update(
                type="mmseg.BaseSegDataset",
                metainfo={"classes": tuple(classes), "palette": make_palette(classes)},
                reduce_zero_label=bool(reduce_zero_label),
            )
            _let_dataset_number_labels(leaf.get("pipeline"))
    if not classes:
        return f"{root}: {layout.name}, with ADE20K's own classes"
    _let_dataset_number_labels(cfg.get("tta_pipeline"))
    set_num_classes(cfg.model, len(classes))
    zero = "0 is unlabelled" if reduce_zero_label else f"0 is {classes[0]!r}"
    return f"{root}: {layout.name}, {_listing(classes)}, {zero} in the label maps"


def _layout_of_maps(root: str, splits: Sequence[str]) -> Layout:
    missing = {layout: layout.missing_in(root, splits) for layout in (COCO_MAPS, ADE20K)}
    for layout, lacking in missing.items():
        if not lacking:
            return layout
    layout, lacking = min(missing.items(), key=lambda item: len(item[1]))
    raise UserError(
        f"{root} lacks {' and '.join(lacking)} of {layout}; segmentation expects "
        f"{COCO_MAPS.name} or {ADE20K}"
    )


def _counts_from_one(
    cfg: Config, root: str, folders: Sequence[str], classes: Sequence[str]
) -> bool:
    """Whether the labels of all maps in some folders count from 1.

    Raises:
        UserError: If the maps do not show it, or have labels beyond the classes.
    """
    flags = "--reduce-zero-label if 0 means unlabelled, or --no-reduce-zero-label"
    if not cfg.get("check_data", True):
        raise UserError(
            f"we do not open the label maps of {root} (--no-data-check), so tell us what 0 means in "
            f"them: {flags} if it is {classes[0]!r}"
        )
    labels = on_first_process(_labels_of_all, cfg, folders)
    largest, count = max(labels, default=0), len(classes)
    if largest > count:
        raise UserError(
            f"the label maps of {root} go up to {largest}, which {count} classes "
            f"({_listing(classes)}) cannot name; give --classes a name for every label"
        )
    if largest == count and count > 1:
        return True  # it can be the last class only
    if {0, count - 1} <= labels and count > 1:
        return False  # the first and the last class occur
    held = f"{min(labels)} to {largest}" if labels else "nothing but 255"
    raise UserError(
        f"the label maps of {root} hold {held}, which does not show whether the {count} classes "
        f"({_listing(classes)}) count from 0 or from 1; give {flags} if it is {classes[0]!r}"
    )


def _labels_of_all(cfg: Config, folders: Sequence[str]) -> set[int]:
    memory = Memory.beside(cfg.get("work_dir"))
    try:
        return labels_in([os.path.join(f, name) for f in folders for name in list_files(f)], memory)
    finally:
        memory.save()


def _let_dataset_number_labels(pipeline: Any) -> None:
    """Drop a loading transform's own reduce_zero_label, so that it cannot contradict the data set."""
    if isinstance(pipeline, dict):
        if str(pipeline.get("type")).endswith("LoadAnnotations"):
            pipeline.pop("reduce_zero_label", None)
        pipeline = list(pipeline.values())
    if isinstance(pipeline, (list, tuple)):
        for item in pipeline:
            _let_dataset_number_labels(item)


# --------------------------------------------------------------------------------- class folders


def class_folders(folder: str) -> list[str]:
    """Return the names of the folders in ``folder``, sorted: the classes as mmpretrain numbers them."""
    with os.scandir(folder) as entries:
        return sorted(e.name for e in entries if e.is_dir() and not e.name.startswith("."))


def _use_class_folders(cfg: Config, root: str, loaders: Sequence[str]) -> str:
    splits = sorted({SPLIT_OF_LOADER[loader] for loader in loaders})
    missing = [f"{split}/" for split in splits if not os.path.isdir(os.path.join(root, split))]
    if missing:
        raise UserError(
            f"{root} lacks {' and '.join(missing)}; classification expects {IMAGENET_LAYOUT}"
        )
    # The training set names the classes, also for a test if it exists.
    named_by = next(s for s in ("train", "val") if os.path.isdir(os.path.join(root, s)))
    classes = class_folders(os.path.join(root, named_by))
    if not classes:
        raise UserError(
            f"there are no folders in {os.path.join(root, named_by)}; classification expects {IMAGENET_LAYOUT}"
        )
    for loader, leaf in _leaves(cfg, loaders):
        for key in ("split", "ann_file"):
            leaf.pop(key, None)
        leaf.update(
            type="mmpretrain.CustomDataset",
            data_root=root,
            data_prefix=SPLIT_OF_LOADER[loader],
            metainfo={"classes": tuple(classes)},
        )
    set_num_classes(cfg.model, len(classes))
    for preprocessor in (cfg.get("data_preprocessor"), cfg.model.get("data_preprocessor")):
        if preprocessor and "num_classes" in preprocessor:
            preprocessor.num_classes = len(classes)
    for name in ("val_evaluator", "test_evaluator"):
        _limit_topk(cfg.get(name), len(classes))
    return f"{root}: ImageNet's layout, {_listing(classes)}"


def _limit_topk(evaluator: Any, num_classes: int) -> None:
    """Drop from the accuracy's ``topk`` the numbers that exceed the number of classes."""
    for metric in evaluator if isinstance(evaluator, (list, tuple)) else [evaluator or {}]:
        topk = metric.get("topk")
        if isinstance(topk, (list, tuple)):
            metric["topk"] = tuple(k for k in topk if k <= num_classes) or (1,)


# ---------------------------------------------------------------------------------------- files


def list_files(folder: str) -> list[str]:
    """Return relative paths of all pictures under a folder, sorted."""
    found = []
    for directory, _, names in os.walk(folder, followlinks=True):
        found += [
            os.path.relpath(os.path.join(directory, name), folder)
            for name in names
            if name.lower().endswith(IMAGE_SUFFIXES) and not name.startswith(".")
        ]
    return sorted(found)


def only_suffix(folder: str) -> str:
    """Return the file name suffix that all pictures in ``folder`` share.

    Raises:
        UserError: If there are no pictures, or several suffixes (mmseg takes one).
    """
    suffixes = Counter(os.path.splitext(name)[1] for name in list_files(folder))
    if not suffixes:
        raise UserError(f"there are no pictures in {folder}")
    if len(suffixes) > 1:
        raise UserError(
            f"the pictures in {folder} end in {' and '.join(sorted(suffixes))}, but mmseg reads "
            "one kind; convert or rename them to one"
        )
    return next(iter(suffixes))


def _exists(root: str, part: str) -> bool:
    return os.path.exists(os.path.join(root, part))


def _leaves(cfg: Config, loaders: Sequence[str]) -> Iterator[tuple[str, ConfigDict]]:
    """Yield every data set of the given loaders; of concatenated ones keep only the first."""
    for loader in loaders:
        if cfg.get(loader):
            _keep_first(cfg[loader].dataset)
            for leaf in leaf_datasets(cfg[loader].dataset):
                yield loader, leaf


def _keep_first(dataset: ConfigDict) -> None:
    """Keep one of several concatenated data sets, since all would become the same."""
    while parts_of(dataset):
        if "datasets" in dataset:
            dataset.datasets = dataset.datasets[:1]
        dataset = parts_of(dataset)[0]


def _listing(classes: Sequence[str]) -> str:
    return f"{len(classes)} {'class' if len(classes) == 1 else 'classes'} ({shown(classes)})"
