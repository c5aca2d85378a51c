"""Is the data that a config names there? Asked before anything is written."""

import os
from collections.abc import Sequence
from typing import Any, Optional

from mmengine.config import Config, ConfigDict
from mmengine.registry import DATASETS

from .data_root import (
    ADE20K,
    COCO,
    COCO_MAPS,
    IGNORED_LABEL,
    category_names,
    label_maps,
    labels_in,
    leaf_datasets,
    list_files,
    read_coco,
)
from .errors import UserError

_NAMES_SHOWN = 3
_OWN_DATA = "point --data-root at a data set of your own in"


def check_data(cfg: Config, loaders: Sequence[str]) -> None:
    """Check that every file the given data loaders need exists and is consistent.

    Files that are not on a local disk are not looked for.

    Args:
        cfg: A detection or segmentation config.
        loaders: Names of data loaders in it, such as ``"train_dataloader"``.

    Raises:
        UserError: On the first thing missing: what was looked for, where, and how to get it.
    """
    check = _check_instances if cfg.default_scope == "mmdet" else _check_label_maps
    for loader in loaders:
        if cfg.get(loader):
            for leaf in leaf_datasets(cfg[loader].dataset):
                if leaf.get("backend_args") is None and "://" not in str(leaf.get("data_root")):
                    check(cfg, leaf)
    if "test_dataloader" in loaders or "val_dataloader" in loaders:
        for name in ("val_evaluator", "test_evaluator"):
            for evaluator in _as_list(cfg.get(name)):
                ann_file = evaluator.get("ann_file")
                if ann_file and "://" not in ann_file and not os.path.isfile(ann_file):
                    raise UserError(f"{name} needs {ann_file}, which does not exist")


def _as_list(value: Any) -> list:
    return list(value) if isinstance(value, (list, tuple)) else [value] if value else []


def _under(leaf: ConfigDict, path: Optional[str]) -> str:
    """``path`` as the data set will find it."""
    return os.path.join(leaf.get("data_root") or "", path or "")


def _require(exists: bool, path: str, leaf: ConfigDict, layout: str) -> None:
    if exists:
        return
    root = leaf.get("data_root")
    missing = f"the folder {root}" if root and not os.path.isdir(root) else path
    raise UserError(f"the data set needs {missing}, which does not exist; {_remedy(leaf, layout)}")


def _remedy(leaf: ConfigDict, layout: str) -> str:
    """How to get the data set that a config names."""
    kind = str(leaf.get("type")).rsplit(".", 1)[-1]
    root = leaf.get("data_root")
    if kind == "ADE20KDataset":
        return (
            "download ADEChallengeData2016.zip from the ADE20K scene parsing benchmark and unpack "
            f"it so that {root} has {ADE20K}, or {_OWN_DATA} {layout}"
        )
    if kind == "CocoDataset" and "metainfo" not in leaf:
        return (
            "download train2017.zip, val2017.zip and annotations_trainval2017.zip from "
            f"https://cocodataset.org and unpack them so that {root} has {COCO}, or {_OWN_DATA} "
            "that layout"
        )
    return f"restore it, or {_OWN_DATA} {layout}"


def _check_instances(cfg: Config, leaf: ConfigDict) -> None:
    layout = str(COCO)
    ann_file = _under(leaf, leaf.get("ann_file"))
    prefix = leaf.get("data_prefix") or {}
    images = _under(leaf, prefix.get("img", ""))
    _require(os.path.isfile(ann_file), ann_file, leaf, layout)
    _require(os.path.isdir(images), images, leaf, layout)
    if not str(leaf.get("type")).endswith("CocoDataset"):
        return
    content = read_coco(ann_file)
    _check_named_images(ann_file, content, images)
    _check_categories(ann_file, _classes_of(leaf))
    if not leaf.get("test_mode") and not content["annotations"]:
        raise UserError(f"{ann_file} has no annotations to train on")
    if not leaf.get("test_mode") and _predicts_masks(cfg.model):
        without = sum(not annotation.get("segmentation") for annotation in content["annotations"])
        if without:
            raise UserError(
                f"{without} of {len(content['annotations'])} annotations in {ann_file} have no "
                "segmentation, which this config's mask head needs; train a box detector on them"
            )


def _check_named_images(ann_file: str, content: dict, folder: str) -> None:
    names = [image.get("file_name", "") for image in content["images"]]
    if not names:
        raise UserError(f"{ann_file} names no images")
    present = set(os.listdir(folder))
    absent = [
        name
        for name in names
        if name not in present
        and (os.sep not in name or not os.path.isfile(os.path.join(folder, name)))
    ]
    if absent:
        shown = ", ".join(absent[:_NAMES_SHOWN]) + ", ..." * (len(absent) > _NAMES_SHOWN)
        raise UserError(
            f"{ann_file} names {len(absent)} images (of {len(names)}) that are not in {folder} "
            f"({shown}); put them there or take them out of the annotation file"
        )


def _classes_of(leaf: ConfigDict) -> Sequence[str]:
    """Class names that a data set config stands for."""
    classes = (leaf.get("metainfo") or {}).get("classes")
    if classes:
        return (classes,) if isinstance(classes, str) else tuple(classes)
    with DATASETS.switch_scope_and_registry(None) as registry:
        dataset = registry.get(leaf.type)
    return tuple(getattr(dataset, "METAINFO", {}).get("classes", ()))


def _check_categories(ann_file: str, classes: Sequence[str]) -> None:
    """Compare with the annotation file, by whose order mmdet numbers classes."""
    names = category_names(ann_file)
    absent = [name for name in classes if name not in names]
    if absent:
        raise UserError(
            f"{ann_file} has no category {absent[0]!r}, which is one of the {len(classes)} classes "
            f"expected; it has {', '.join(names[:8])}{', ...' * (len(names) > 8)}, and --data-root "
            "takes the classes from the annotation files of your own data"
        )
    order = [name for name in names if name in set(classes)]
    if order != list(classes):
        raise UserError(
            f"{ann_file} lists its categories in another order than the classes expected "
            f"({', '.join(order[:5])} against {', '.join(list(classes)[:5])}), and mmdet would "
            "confuse them; write the same list of categories into every annotation file"
        )


def _predicts_masks(node: Any) -> bool:
    if isinstance(node, dict):
        return bool(node.get("mask_head")) or any(_predicts_masks(v) for v in node.values())
    return isinstance(node, (list, tuple)) and any(_predicts_masks(v) for v in node)


def _check_label_maps(cfg: Config, leaf: ConfigDict) -> None:
    layout = f"{COCO_MAPS} or {ADE20K}"
    prefix = leaf.get("data_prefix") or {}
    images, maps = (_under(leaf, prefix.get(key)) for key in ("img_path", "seg_map_path"))
    _require(os.path.isdir(images), images, leaf, layout)
    _require(os.path.isdir(maps), maps, leaf, layout)
    kind = str(leaf.get("type")).rsplit(".", 1)[-1]
    if leaf.get("ann_file") or kind not in ("BaseSegDataset", "ADE20KDataset"):
        return  # a list of names, or a data set with rules of its own for finding its files
    img_suffix, map_suffix = leaf.get("img_suffix", ".jpg"), leaf.get("seg_map_suffix", ".png")
    named = [n for n in list_files(images) if n.endswith(img_suffix)]
    if not named:
        raise UserError(f"there are no {img_suffix} pictures in {images}")
    present = set(list_files(maps))
    absent = [n for n in named if n[: -len(img_suffix)] + map_suffix not in present]
    if absent:
        shown = ", ".join(n[: -len(img_suffix)] + map_suffix for n in absent[:_NAMES_SHOWN])
        raise UserError(
            f"{len(absent)} of {len(named)} images in {images} have no label map in {maps} "
            f"({shown}{', ...' * (len(absent) > _NAMES_SHOWN)}); add them or remove the images"
        )
    _check_labels(leaf, maps)


def _check_labels(leaf: ConfigDict, maps: str) -> None:
    classes = _classes_of(leaf)
    reduce_zero_label = leaf.get("reduce_zero_label", str(leaf.type).endswith("ADE20KDataset"))
    largest = len(classes) if reduce_zero_label else len(classes) - 1
    for path in label_maps(maps):
        unknown = sorted(x for x in labels_in(path) if largest < x != IGNORED_LABEL)
        if classes and unknown:
            raise UserError(
                f"{path} holds label {unknown[0]}, but {len(classes)} classes end at {largest}; "
                "name every label with --classes, or mark pixels to ignore with 255"
            )
