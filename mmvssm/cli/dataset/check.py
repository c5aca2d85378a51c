"""Is the data that a config names there, and is it what the libraries take it for? Asked before anything is written."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any, Optional

from mmengine.config import Config, ConfigDict
from mmengine.registry import DATASETS
from mmengine.utils import is_list_of

from ..errors import UserError, user_mistakes
from .annotations import Use, category_names, check_annotations, read_coco
from .images import check_images
from .label_maps import check_label_maps
from .memory import Memory
from .root import ADE20K, COCO, COCO_MAPS, leaf_datasets

_NAMES_SHOWN = 3
_ANNOTATIONS_PER_IMAGE = 16  # that are checked while one image's header is read
_OWN_DATA = "point --data-root at a data set of your own in"
_EVALUATORS = ("val_evaluator", "test_evaluator")


def check_data(cfg: Config, loaders: Sequence[str]) -> list[str]:
    """Check that every file the given data loaders need exists, can be read and is consistent.

    Annotation files, headers of all images and all label maps are read, and what was found is
    remembered beside the work dir if that took some time. Images and maps stay closed if the config
    says ``check_data=False``. Files that are not on a local disk are not looked for.

    Args:
        cfg: A detection or segmentation config.
        loaders: Names of data loaders in it, such as ``"train_dataloader"``.

    Returns:
        Warnings, one sentence each: what is odd, and what the library makes of it.

    Raises:
        UserError: On the first thing that training would fail on or take wrongly: where it is,
            and what to do.
    """
    memory = Memory.beside(cfg.get("work_dir"))
    warnings: list[str] = []
    try:
        for loader in loaders:
            if cfg.get(loader):
                for leaf in leaf_datasets(cfg[loader].dataset):
                    if _is_local(leaf):
                        warnings += _check_leaf(cfg, leaf, loader, memory)
    finally:
        # COCO's takes gigabytes, which a run should not carry along.
        read_coco.cache_clear()
        is_saved = memory.save()
    if not is_saved:
        warnings.append(f"what was read cannot be remembered in {memory.path}, which is read-only")
    if not _opens_files(cfg):
        warnings.append(
            "images and label maps are not opened beforehand (--no-data-check, or check_data=False "
            "in the config); broken ones will stop the run, or be trained on, when their turn comes"
        )
    if "test_dataloader" in loaders or "val_dataloader" in loaders:
        for name in _EVALUATORS:
            for evaluator in _as_list(cfg.get(name)):
                ann_file = evaluator.get("ann_file")
                if ann_file and "://" not in ann_file and not os.path.isfile(ann_file):
                    raise UserError(f"{name} needs {ann_file}, which does not exist")
    return list(dict.fromkeys(warnings))


def _is_local(leaf: ConfigDict) -> bool:
    return leaf.get("backend_args") is None and "://" not in str(leaf.get("data_root"))


def _opens_files(cfg: Config) -> bool:
    return cfg.get("check_data", True)


def _check_leaf(cfg: Config, leaf: ConfigDict, loader: str, memory: Memory) -> list[str]:
    if cfg.default_scope == "mmdet":
        return _check_instances(cfg, leaf, loader, memory)
    return _check_label_maps(cfg, leaf, memory)


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


def _dataset_class(cfg: Config, leaf: ConfigDict) -> Optional[type]:
    with DATASETS.switch_scope_and_registry(cfg.default_scope) as registry:
        return registry.get(leaf.type) if isinstance(leaf.type, str) else leaf.type


# ------------------------------------------------------------------------------------ detection


def _check_instances(cfg: Config, leaf: ConfigDict, loader: str, memory: Memory) -> list[str]:
    layout = str(COCO)
    ann_file = _under(leaf, leaf.get("ann_file"))
    prefix = leaf.get("data_prefix") or {}
    images = _under(leaf, prefix.get("img", ""))
    _require(os.path.isfile(ann_file), ann_file, leaf, layout)
    _require(os.path.isdir(images), images, leaf, layout)
    if not str(leaf.get("type")).endswith("CocoDataset"):
        return []  # of a format of its own
    use = _use(cfg, leaf, loader)
    noted = _remembered(memory.recall("annotations", ann_file), use)
    if noted is None:
        _check_categories(ann_file, use.classes)
        found = check_annotations(ann_file, use)
        content = read_coco(ann_file)
        records = [(i["file_name"], i["width"], i["height"]) for i in content["images"]]
        effort = len(content["annotations"]) / _ANNOTATIONS_PER_IMAGE
        memory.note("annotations", ann_file, [repr(use), found, records], effort)
    else:
        found, records = noted
    names, sizes = [name for name, _, _ in records], [(w, h) for _, w, h in records]
    _check_named_images(ann_file, names, images)
    if not _opens_files(cfg):
        return found
    paths = [os.path.join(images, name) for name in names]
    return found + check_images(leaf, paths, sizes, memory)[1]


def _remembered(facts: Optional[list], use: Use) -> Optional[tuple[list[str], list]]:
    """Warnings and images of a file that was checked for the same use, if a memory says so."""
    if facts is None or len(facts) != 3 or facts[0] != repr(use):
        return None
    _, found, records = facts
    if not is_list_of(found, str) or not is_list_of(records, list):
        return None
    sound = all(
        len(r) == 3 and isinstance(r[0], str) and is_list_of(r[1:], (int, float)) for r in records
    )
    return (list(found), records) if sound else None


def _use(cfg: Config, leaf: ConfigDict, loader: str) -> Use:
    """What the run does with a data set's annotations."""
    pipeline = [dict(transform) for transform in leaf.get("pipeline") or []]
    evaluator = cfg.get(loader.replace("dataloader", "evaluator"))
    metrics = [
        metric for part in _as_list(evaluator) for metric in _as_list(part.get("metric", "bbox"))
    ]
    trains = loader == "train_dataloader"
    return Use(
        classes=tuple(_classes_of(cfg, leaf)),
        trains=trains,
        evaluates=not trains,
        with_masks=any(transform.get("with_mask") for transform in pipeline)
        or (trains and _predicts_masks(cfg.model))
        or (not trains and "segm" in metrics),
        compares_masks=not trains and "segm" in metrics,
        filter_cfg=dict(leaf.get("filter_cfg") or {}) if not leaf.get("test_mode") else {},
    )


def _check_named_images(ann_file: str, names: Sequence[str], folder: str) -> None:
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


def _classes_of(cfg: Config, leaf: ConfigDict) -> Sequence[str]:
    """Class names that a data set config stands for."""
    classes = (leaf.get("metainfo") or {}).get("classes")
    if classes:
        return (classes,) if isinstance(classes, str) else tuple(classes)
    return tuple(getattr(_dataset_class(cfg, leaf), "METAINFO", {}).get("classes", ()))


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


# --------------------------------------------------------------------------------- segmentation


def _check_label_maps(cfg: Config, leaf: ConfigDict, memory: Memory) -> list[str]:
    from mmseg.datasets import BaseSegDataset  # here, as detection needs no mmseg

    layout = f"{COCO_MAPS} or {ADE20K}"
    prefix = leaf.get("data_prefix") or {}
    images, maps = (_under(leaf, prefix.get(key)) for key in ("img_path", "seg_map_path"))
    _require(os.path.isdir(images), images, leaf, layout)
    _require(os.path.isdir(maps), maps, leaf, layout)
    if not issubclass(_dataset_class(cfg, leaf) or object, BaseSegDataset):
        return []  # with rules of its own for finding its files
    with user_mistakes(f"cannot list the images in {images}"):
        with DATASETS.switch_scope_and_registry(cfg.default_scope) as registry:
            dataset = registry.build(dict(leaf, pipeline=[], lazy_init=True))
        records = dataset.load_data_list()
    if not records:
        raise UserError(f"there are no {dataset.img_suffix} pictures in {images}")
    has_maps = "seg_map_path" in records[0]  # or images alone, to be predicted
    if has_maps:
        _check_maps_are_there(records, images, maps)
    if not _opens_files(cfg):
        return []
    sizes, warnings = check_images(leaf, [r["img_path"] for r in records], None, memory)
    if not has_maps:
        return warnings
    return warnings + check_label_maps(leaf, dataset, records, sizes, memory)


def _check_maps_are_there(records: Sequence[dict], images: str, maps: str) -> None:
    absent = [r["seg_map_path"] for r in records if not os.path.isfile(r["seg_map_path"])]
    if absent:
        shown = ", ".join(os.path.relpath(path, maps) for path in absent[:_NAMES_SHOWN])
        raise UserError(
            f"{len(absent)} of {len(records)} images in {images} have no label map in {maps} "
            f"({shown}{', ...' * (len(absent) > _NAMES_SHOWN)}); add them or remove the images"
        )
