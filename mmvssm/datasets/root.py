"""Point any config at the user's own data set (``--data-root``).

:mod:`.layouts` finds detection and segmentation data by names of folders and files, :mod:`.formats` and :mod:`.colours`
convert what mmdet and mmseg do not read. Classification takes ImageNet's layout, ``train/<class>/`` and
``val/<class>/``.
"""

import colorsys
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Optional

from mmengine.config import Config, ConfigDict

from ..errors import UserError, shown
from ..files import write_whole
from ..processes import on_first_process, on_own_machine
from .annotations import category_names, read_coco
from .colours import CONVERTED, prepare_maps
from .formats import draw_validation, made_from, prepare_instances
from .label_maps import labels_in
from .layouts import COCO, COCO_MAPS, Layout, find_instances, find_maps, list_files, only_suffix
from .memory import Memory
from .walk import leaf_datasets, parts_of

SPLIT_OF_LOADER = {"train_dataloader": "train", "val_dataloader": "val", "test_dataloader": "val"}
# Parts of a model whose number of classes is not that of the data set.
_NOT_CLASSIFYING = (
    *("backbone", "data_preprocessor", "rpn_head", "train_cfg", "test_cfg"),
    "teacher",  # keeps the classes that it was trained on
)


IMAGENET_LAYOUT = "ImageNet's layout (train/<class>/ and val/<class>/, with images in them)"


def apply_data_root(
    cfg: Config,
    root: str,
    loaders: Sequence[str],
    classes: Optional[Sequence[str]] = None,
    reduce_zero_label: Optional[bool] = None,
    data_format: Optional[str] = None,
) -> str:
    """Make a config use the data set under ``root``.

    We set paths, class names, palette, file suffixes, ``num_classes`` of every head and the annotation
    files of the evaluators. Data set wrappers are not changed. Of objects without masks, a detector's mask
    part is left out.

    Args:
        cfg: Changed in place.
        root: The data set's folder.
        loaders: The config's data loaders that the run uses; we need only their splits.
        classes: Class names. Default: from the annotation files. Classification takes the folders' names.
        reduce_zero_label: For segmentation: whether 0 in a label map means "unlabelled" and classes
            count from 1. Default: what all the maps show.
        data_format: Key of the layout, for a folder with several.

    Returns:
        A line that describes the data set.

    Raises:
        UserError: If something is missing or contradictory, or if the maps do not show the meaning of 0.
    """
    if not os.path.isdir(root):
        raise UserError(f"there is no folder {root} (--data-root)")
    cfg.pop("prepare_data", None)
    if cfg.default_scope == "mmdet":
        return _use_instances(cfg, root, loaders, classes, data_format)
    if cfg.default_scope == "mmpretrain":
        return _use_class_folders(cfg, root, loaders)
    return _use_label_maps(cfg, root, loaders, classes, reduce_zero_label, data_format)


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
    cfg: Config,
    root: str,
    loaders: Sequence[str],
    classes: Optional[Sequence[str]],
    data_format: Optional[str],
) -> str:
    # The parsed file takes gigabytes, so only one process of a machine reads it.
    found, layout, names, has_masks = on_own_machine(
        _read_instances, root, _splits(loaders), data_format, _work_dir(cfg)
    )
    classes = classes or names
    metainfo = {"classes": tuple(classes), "palette": make_palette(classes)}
    for loader, leaf in _leaves(cfg, loaders):
        split = SPLIT_OF_LOADER[loader]
        leaf.update(
            type="mmdet.CocoDataset",
            data_root=root,
            ann_file=layout.labels[split],
            data_prefix={"img": os.path.join(layout.images[split], "")},
            metainfo=metainfo,
        )
    for evaluator in ("val_evaluator", "test_evaluator"):
        if cfg.get(evaluator) and "val" in layout.labels:
            cfg[evaluator] = _coco_metrics(cfg[evaluator], os.path.join(root, layout.labels["val"]))
    note = layout.note
    if not has_masks and _leave_out_masks(cfg):
        note += "; it has boxes alone, so the model's mask part is left out"
    set_num_classes(cfg.model, len(classes))
    return f"{root}: {found}, {_listing(classes)}{note}"


def _read_instances(
    root: str, splits: Sequence[str], data_format: Optional[str], work_dir: str
) -> tuple[Layout, Layout, list[str], bool]:
    """Return the layout as found and as used, the names of the categories, and whether objects have masks."""
    found = find_instances(root, splits, data_format)
    layout = prepare_instances(root, found, work_dir)
    ann_file = os.path.join(root, layout.labels.get("train") or layout.labels["val"])
    names = category_names(ann_file)
    annotations = read_coco(ann_file)["annotations"]
    return found, layout, names, not annotations or any(a.get("segmentation") for a in annotations)


def _leave_out_masks(cfg: Config) -> bool:
    """Make a detector of boxes and masks one of boxes; return whether it was one."""
    roi_head = cfg.model.get("roi_head") or {}
    if not roi_head.pop("mask_head", None):
        return False
    roi_head.pop("mask_roi_extractor", None)
    for part in _dicts_in(cfg._cfg_dict):
        for key in ("with_mask", "by_mask"):
            if part.get(key):
                part[key] = False
        for key in ("save_best", "monitor"):
            if isinstance(part.get(key), str):
                part[key] = part[key].replace("segm_", "bbox_")
        if str(part.get("type")).endswith("CocoMetric"):
            part["metric"] = "bbox"
    return True


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
    data_format: Optional[str],
) -> str:
    splits, opens = _splits(loaders), cfg.get("check_data", True)
    found, layout, classes = on_own_machine(
        _read_maps, root, splits, data_format, classes, _work_dir(cfg), opens
    )
    if not classes:
        kept = next((leaf for _, leaf in _leaves(cfg, loaders)), {}).get("type")
        if layout.key != "ade20k" or kept not in ("ADE20KDataset", "mmseg.ADE20KDataset"):
            raise UserError(
                f"the class names of {root} are not known; give them with --classes, in the order "
                "of their numbers in the label maps"
            )
    elif layout.key == CONVERTED and reduce_zero_label:
        raise UserError(
            f"--reduce-zero-label: we number the classes of the label maps of {root} ourselves, from 0"
        )
    elif reduce_zero_label is None and layout.key not in ("coco", CONVERTED):
        folders = [os.path.join(root, layout.labels[s]) for s in splits]
        reduce_zero_label = _counts_from_one(cfg, root, folders, list(classes))
    for loader, leaf in _leaves(cfg, loaders):
        split = SPLIT_OF_LOADER[loader]
        images, maps = (os.path.join(root, part[split]) for part in (layout.images, layout.labels))
        leaf.update(
            data_root=root,
            data_prefix={"img_path": layout.images[split], "seg_map_path": layout.labels[split]},
            img_suffix=only_suffix(images),
            seg_map_suffix=layout.tail + only_suffix(maps),
            ann_file=layout.lists.get(split, ""),
        )
        if classes:
            leaf.update(
                type="mmseg.BaseSegDataset",
                metainfo={"classes": tuple(classes), "palette": make_palette(classes)},
                reduce_zero_label=bool(reduce_zero_label),
            )
            _let_dataset_number_labels(leaf.get("pipeline"))
    if not classes:
        return f"{root}: {found}, with ADE20K's own classes{layout.note}"
    _let_dataset_number_labels(cfg.get("tta_pipeline"))
    set_num_classes(cfg.model, len(classes))
    zero = "0 is unlabelled" if reduce_zero_label else f"0 is {classes[0]!r}"
    return f"{root}: {found}, {_listing(classes)}, {zero} in the label maps{layout.note}"


def _read_maps(
    root: str,
    splits: Sequence[str],
    data_format: Optional[str],
    classes: Optional[Sequence[str]],
    work_dir: str,
    opens: bool,
) -> tuple[Layout, Layout, Sequence[str]]:
    """Return the layout as found and as used, and the class names, if they are known."""
    found = find_maps(root, splits, data_format)
    layout = prepare_maps(root, found, classes, work_dir, opens)
    # Categories do not tell the colours of several classes.
    is_numbered = layout.key == COCO_MAPS.key or layout.classes[1:] == ["foreground"]
    for part in COCO.labels.values() if found.key == COCO_MAPS.key and is_numbered else ():
        if not classes and os.path.exists(os.path.join(root, part)):
            classes = ["background", *category_names(os.path.join(root, part))]
    return found, layout, classes or layout.classes


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
    for step in _dicts_in(pipeline):
        if str(step.get("type")).endswith("LoadAnnotations"):
            step.pop("reduce_zero_label", None)


# --------------------------------------------------------------------------------- class folders


def class_folders(folder: str) -> list[str]:
    """Return the names of the folders in ``folder``, sorted: the classes as mmpretrain numbers them."""
    with os.scandir(folder) as entries:
        return sorted(e.name for e in entries if e.is_dir() and not e.name.startswith("."))


def _use_class_folders(cfg: Config, root: str, loaders: Sequence[str]) -> str:
    here = [split for split in ("train", "val") if os.path.isdir(os.path.join(root, split))]
    if "train" not in here and ("train" in _splits(loaders) or not here):
        raise UserError(f"{root} lacks train/; classification expects {IMAGENET_LAYOUT}")
    # The training set names the classes, also for a test if it exists.
    classes = class_folders(os.path.join(root, here[0]))
    if not classes:
        raise UserError(
            f"there are no folders in {os.path.join(root, here[0])}; classification expects {IMAGENET_LAYOUT}"
        )
    lists, note = {}, ""
    if "val" not in here:
        lists, note = on_own_machine(_draw_from_folders, root, classes, _work_dir(cfg))
    for loader, leaf in _leaves(cfg, loaders):
        split = SPLIT_OF_LOADER[loader]
        leaf.pop("split", None)
        leaf.update(
            type="mmpretrain.CustomDataset",
            data_root=root,
            data_prefix="train" if lists else split,
            ann_file=lists.get(split, ""),
            metainfo={"classes": tuple(classes)},
        )
    set_num_classes(cfg.model, len(classes))
    for preprocessor in (cfg.get("data_preprocessor"), cfg.model.get("data_preprocessor")):
        if preprocessor and "num_classes" in preprocessor:
            preprocessor.num_classes = len(classes)
    for name in ("val_evaluator", "test_evaluator"):
        _limit_topk(cfg.get(name), len(classes))
    return f"{root}: ImageNet's layout, {_listing(classes)}{note}"


def _draw_from_folders(
    root: str, classes: Sequence[str], work_dir: str
) -> tuple[dict[str, str], str]:
    """Write lists of the images of both splits, each with its class's number; return them and a note."""
    folder = os.path.join(root, "train")
    names = list_files(folder)

    def make(target: Path) -> dict[str, Any]:
        drawn, note = draw_validation(names)
        for split in ("train", "val"):
            chosen = [name for name in names if (name in drawn) is (split == "val")]
            numbered = [f"{name} {classes.index(name.split(os.sep)[0])}" for name in chosen]
            write_whole(target / f"{split}.txt", "\n".join(numbered))
        return {"note": note}

    target, about = made_from(root, work_dir, [os.path.join(folder, n) for n in names], make)
    lists = {split: str(target / f"{split}.txt") for split in ("train", "val")}
    return lists, f"{about['note']}; files in {target}"


def _limit_topk(evaluator: Any, num_classes: int) -> None:
    """Drop from the accuracy's ``topk`` the numbers that exceed the number of classes."""
    for metric in evaluator if isinstance(evaluator, (list, tuple)) else [evaluator or {}]:
        topk = metric.get("topk")
        if isinstance(topk, (list, tuple)):
            metric["topk"] = tuple(k for k in topk if k <= num_classes) or (1,)


# ----------------------------------------------------------------------------------------- config


def _splits(loaders: Sequence[str]) -> list[str]:
    return sorted({SPLIT_OF_LOADER[loader] for loader in loaders})


def _work_dir(cfg: Config) -> str:
    return cfg.get("work_dir") or "work_dirs"


def _dicts_in(node: Any) -> Iterator[dict]:
    """Yield every dict in nested dicts and lists."""
    if isinstance(node, dict):
        yield node
        node = list(node.values())
    for item in node if isinstance(node, (list, tuple)) else ():
        yield from _dicts_in(item)


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
