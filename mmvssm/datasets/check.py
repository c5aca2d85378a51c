"""Check a config's data before a run writes anything: every file exists, is readable and consistent."""

from __future__ import annotations

import inspect
import os
from collections.abc import Iterator, Sequence
from typing import Any, Optional

import mmcv.transforms
from mmengine.config import Config, ConfigDict
from mmengine.dataset import BaseDataset
from mmengine.registry import DATASETS, TRANSFORMS, Registry
from mmengine.utils import is_list_of

from ..errors import UserError, brief, shown, user_mistakes
from .annotations import Use, category_names, check_annotations, read_coco
from .images import check_images
from .label_maps import check_label_maps
from .layouts import ADE20K, COCO, COCO_MAPS
from .memory import Memory
from .pictures import Loading
from .root import IMAGENET_LAYOUT, class_folders
from .walk import leaf_datasets

_ANNOTATIONS_PER_IMAGE = 16  # we check so many in the time of reading one image's header
_OWN_DATA = "point --data-root at a data set of your own in"


def check_data(cfg: Config, loaders: Sequence[str]) -> list[str]:
    """Check that every file the given data loaders need exists, can be read and is consistent.

    We read annotation files, headers of all images and all label maps, and save the findings beside the work dir if
    that took some time. We do not open images and maps if the config has ``check_data=False``, or if its pipeline
    does not load them by mmcv's ``LoadImageFromFile`` and mmseg's ``LoadAnnotations``. We skip remote files, and do not
    check the content of files in a format that we do not know.

    Args:
        cfg: A detection, segmentation or classification config.
        loaders: Names of data loaders in it, such as ``"train_dataloader"``.

    Returns:
        Warnings, one line each: the fault, and how the libraries treat it.

    Raises:
        UserError: If the run would fail on the data or misread it; the message has the first place and a remedy.
    """
    memory = Memory.beside(cfg.get("work_dir"))
    warnings: list[str] = []
    try:
        for loader in loaders:
            if cfg.get(loader):
                for leaf in leaf_datasets(cfg[loader].dataset):
                    if all(map(_is_local, [leaf, *(leaf.get("pipeline") or [])])):
                        warnings += _check_leaf(cfg, leaf, loader, memory)
    finally:
        # Free the parsed annotations: COCO's take gigabytes.
        read_coco.cache_clear()
        is_saved = memory.save()
    if not is_saved:
        warnings.append(
            f"we cannot save the findings about the data in {memory.path}, which is read-only"
        )
    if not _opens_files(cfg):
        warnings.append(
            "images and label maps are not checked (--no-data-check, or check_data=False in the "
            "config); broken ones may stop the run later, or be trained on"
        )
    for name, evaluator in _evaluators(cfg, loaders):
        ann_file = evaluator.get("ann_file")
        if ann_file and _is_local(evaluator) and not os.path.isfile(ann_file):
            raise UserError(f"{name} needs {ann_file}, which does not exist")
    return list(dict.fromkeys(warnings))


def _evaluators(cfg: Config, loaders: Sequence[str]) -> Iterator[tuple[str, ConfigDict]]:
    """Yield the evaluators of the given loaders' data, each with its name."""
    for loader in loaders:
        name = loader.replace("dataloader", "evaluator")
        for evaluator in _as_list(cfg.get(name)):
            yield name, evaluator


def _is_local(part: ConfigDict) -> bool:
    """Whether a data set, transform or evaluator reads its files from a disk of this machine."""
    places = [str(part.get(key)) for key in ("data_root", "ann_file", "data_prefix")]
    backend = (part.get("backend_args") or {}).get("backend", "local")
    return backend == "local" and not any("://" in place for place in places)


def _opens_files(cfg: Config) -> bool:
    return cfg.get("check_data", True)


def _check_leaf(cfg: Config, leaf: ConfigDict, loader: str, memory: Memory) -> list[str]:
    if cfg.default_scope == "mmdet":
        return _check_instances(cfg, leaf, loader, memory)
    if cfg.default_scope == "mmpretrain":
        return _check_class_folders(cfg, leaf, memory)
    return _check_label_maps(cfg, leaf, loader, memory)


def _as_list(value: Any) -> list:
    return list(value) if isinstance(value, (list, tuple)) else [value] if value else []


def _under(leaf: ConfigDict, path: Optional[str]) -> str:
    """Return ``path`` below the data set's folders."""
    return os.path.join(leaf.get("data_root") or "", path or "") or os.curdir


def _require(exists: bool, path: str, leaf: ConfigDict, layout: str) -> None:
    if exists:
        return
    root = leaf.get("data_root")
    missing = f"the folder {root}" if root and not os.path.isdir(root) else path
    raise UserError(f"the data set needs {missing}, which does not exist; {_remedy(leaf, layout)}")


def _remedy(leaf: ConfigDict, layout: str) -> str:
    """Tell how to get the data set that a config names."""
    kind = getattr(leaf.get("type"), "__name__", str(leaf.get("type"))).rsplit(".", 1)[-1]
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


def _class_of(cfg: Config, part: ConfigDict, registry: Registry = DATASETS) -> Any:
    """Return the class that a part's ``type`` stands for; None if it is not registered."""
    kind = part.get("type")
    with registry.switch_scope_and_registry(cfg.default_scope) as scoped:
        return scoped.get(kind) if isinstance(kind, str) else kind


def _is_a(kind: Any, base: type) -> bool:
    return inspect.isclass(kind) and issubclass(kind, base)


def _build(cfg: Config, leaf: ConfigDict) -> Any:
    """Build the data set without its samples."""
    with (
        user_mistakes("cannot set up the data set"),
        DATASETS.switch_scope_and_registry(cfg.default_scope) as registry,
    ):
        return registry.build(dict(leaf, pipeline=[], lazy_init=True))


def _transform(cfg: Config, leaf: ConfigDict, kind: type) -> Optional[ConfigDict]:
    """Return the config of a data set's transform of exactly this class; None if it has none."""
    for transform in leaf.get("pipeline") or []:
        if _class_of(cfg, transform, TRANSFORMS) is kind:
            return transform
    return None


def _loading(cfg: Config, leaf: ConfigDict) -> Optional[Loading]:
    """Return how the pipeline decodes a data set's images; None if unknown or if we may not open them."""
    transform = _transform(cfg, leaf, mmcv.transforms.LoadImageFromFile)
    return Loading.of(transform) if transform is not None and _opens_files(cfg) else None


def _check_unknown_format(leaf: ConfigDict, kind: Any, layout: str) -> None:
    """Check that the files of a data set in an unknown format exist."""
    if not _is_a(kind, BaseDataset):
        return  # Its settings may mean anything.
    if leaf.get("data_root"):
        _require(os.path.isdir(leaf.data_root), leaf.data_root, leaf, layout)
    if leaf.get("ann_file"):
        ann_file = _under(leaf, leaf.ann_file)
        _require(os.path.exists(ann_file), ann_file, leaf, layout)


# ------------------------------------------------------------------------------------ detection


def _check_instances(cfg: Config, leaf: ConfigDict, loader: str, memory: Memory) -> list[str]:
    from mmdet.datasets import CocoDataset  # Here, as segmentation needs no mmdet.

    layout = str(COCO)
    kind = _class_of(cfg, leaf)
    is_coco = _is_a(kind, CocoDataset) and kind.load_data_list is CocoDataset.load_data_list
    # Classes that mmdet derives from it have other names, and may lack categories in their files.
    if not is_coco or not kind.__name__.endswith("CocoDataset"):
        _check_unknown_format(leaf, kind, layout)
        return []
    ann_file = _under(leaf, leaf.get("ann_file"))
    prefix = leaf.get("data_prefix") or {}
    images = _under(leaf, prefix.get("img", ""))
    _require(os.path.isfile(ann_file), ann_file, leaf, layout)
    _require(os.path.isdir(images), images, leaf, layout)
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
    loading = _loading(cfg, leaf)
    if loading is None:
        return found
    paths = [os.path.join(images, name) for name in names]
    return found + check_images(loading, paths, sizes, memory)[1]


def _remembered(facts: Optional[list], use: Use) -> Optional[tuple[list[str], list]]:
    """Return warnings and images of a file that was checked for the same use; None if it was not."""
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
    """Describe how the run uses a data set's annotations."""
    pipeline = [dict(transform) for transform in leaf.get("pipeline") or []]
    evaluators = [evaluator for _, evaluator in _evaluators(cfg, [loader])]
    comparing = [evaluator for evaluator in evaluators if not evaluator.get("format_only")]
    metrics = [metric for part in comparing for metric in _as_list(part.get("metric", "bbox"))]
    trains = loader == "train_dataloader"
    return Use(
        classes=tuple(_classes_of(cfg, leaf)),
        trains=trains,
        evaluates=not trains and (bool(comparing) or not evaluators),
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
        raise UserError(
            f"{ann_file} names {len(absent)} images (of {len(names)}) that are not in {folder} "
            f"({shown(absent)}); add them or remove them from the annotation file"
        )


def _classes_of(cfg: Config, leaf: ConfigDict) -> Sequence[str]:
    """Return the class names of a data set's config."""
    classes = _build(cfg, leaf).metainfo.get("classes") or ()
    return (classes,) if isinstance(classes, str) else tuple(classes)


def _check_categories(ann_file: str, classes: Sequence[str]) -> None:
    """Compare the classes with the annotation file, by whose order mmdet numbers them."""
    names = category_names(ann_file)
    absent = [name for name in classes if name not in names]
    if absent:
        raise UserError(
            f"{ann_file} has no category {absent[0]!r}, which is one of the {len(classes)} classes "
            f"expected; it has {shown(names)}, and --data-root takes the classes from the "
            "annotation files of your own data"
        )
    order = [name for name in names if name in set(classes)]
    if order != list(classes):
        found, expected = next(pair for pair in zip(order, classes) if pair[0] != pair[1])
        raise UserError(
            f"{ann_file} lists its categories in another order than the classes expected (it has "
            f"{brief(found)} where we expect {brief(expected)}), and mmdet would confuse them; "
            "write the same list of categories into every annotation file"
        )


def _predicts_masks(node: Any) -> bool:
    if isinstance(node, dict):
        return bool(node.get("mask_head")) or any(_predicts_masks(v) for v in node.values())
    return isinstance(node, (list, tuple)) and any(_predicts_masks(v) for v in node)


# --------------------------------------------------------------------------------- segmentation


def _check_label_maps(cfg: Config, leaf: ConfigDict, loader: str, memory: Memory) -> list[str]:
    # Here, as detection needs no mmseg.
    from mmseg.datasets import BaseSegDataset
    from mmseg.datasets.transforms import LoadAnnotations

    layout = f"{COCO_MAPS} or {ADE20K}"
    kind = _class_of(cfg, leaf)
    if not _is_a(kind, BaseSegDataset):
        _check_unknown_format(leaf, kind, layout)
        return []
    load_map = _transform(cfg, leaf, LoadAnnotations)
    prefix = leaf.get("data_prefix") or {}
    images, maps = (_under(leaf, prefix.get(key)) for key in ("img_path", "seg_map_path"))
    _require(os.path.isdir(images), images, leaf, layout)
    if load_map is not None:
        _require(os.path.isdir(maps), maps, leaf, layout)
    dataset = _build(cfg, leaf)
    with user_mistakes(f"cannot list the images in {images}"):
        records = dataset.load_data_list()
    if not records:
        raise UserError(f"there are no {dataset.img_suffix} pictures in {images}")
    # Images to predict on need no maps.
    has_maps = load_map is not None and "seg_map_path" in records[0]
    if has_maps:
        _check_maps_are_there(records, images, maps)
    sizes, warnings = None, []
    loading = _loading(cfg, leaf)
    if loading is not None:
        sizes, warnings = check_images(loading, [r["img_path"] for r in records], None, memory)
    if has_maps and _opens_files(cfg):
        backend = load_map.get("imdecode_backend")
        trains = loader == "train_dataloader" and not dataset.test_mode
        warnings += check_label_maps(backend, dataset, records, sizes, trains, memory)
    return warnings


def _check_maps_are_there(records: Sequence[dict], images: str, maps: str) -> None:
    paths = [record["seg_map_path"] for record in records]
    absent = [os.path.relpath(path, maps) for path in paths if not os.path.isfile(path)]
    if absent:
        raise UserError(
            f"{len(absent)} of {len(records)} images in {images} have no label map in {maps} "
            f"({shown(absent)}); add them or remove the images"
        )


# ------------------------------------------------------------------------------- classification


def _check_class_folders(cfg: Config, leaf: ConfigDict, memory: Memory) -> list[str]:
    # Here, as the others need no mmpretrain.
    from mmpretrain.datasets import CustomDataset, ImageNet

    if _class_of(cfg, leaf) not in (CustomDataset, ImageNet) or leaf.get("split") == "test":
        _check_unknown_format(leaf, _class_of(cfg, leaf), IMAGENET_LAYOUT)
        return []
    dataset = _build(cfg, leaf)
    folder, classes = dataset.img_prefix, dataset.metainfo.get("classes")
    _require(os.path.isdir(folder), folder, leaf, IMAGENET_LAYOUT)
    if dataset.ann_file:
        _require(os.path.isfile(dataset.ann_file), dataset.ann_file, leaf, IMAGENET_LAYOUT)
    elif dataset.with_label:
        folders = class_folders(folder)
        # Folders of ImageNet itself are named by numbers, its classes by words.
        if type(dataset) is CustomDataset and classes is not None:
            _check_same_folders(folder, folders, list(classes))
        for name in folders:
            if not any(map(dataset.is_valid_file, _files_below(os.path.join(folder, name)))):
                raise UserError(
                    f"there are no images in {os.path.join(folder, name)}, the folder of one class; put some there, or "
                    f"remove that folder, in {os.path.dirname(folder)} both from train and from val"
                )
    with user_mistakes(f"cannot list the images in {folder}"):
        paths = [record["img_path"] for record in dataset.load_data_list()]
    loading = _loading(cfg, leaf)
    return check_images(loading, paths, None, memory)[1] if loading is not None else []


def _files_below(folder: str) -> Iterator[str]:
    return (name for _, _, names in os.walk(folder, followlinks=True) for name in names)


def _check_same_folders(folder: str, found: Sequence[str], classes: Sequence[str]) -> None:
    """Compare a split's folders with the classes expected, which mmpretrain would only count."""
    unknown = [name for name in found if name not in set(classes)]
    absent = [name for name in classes if name not in set(found)]
    if unknown or absent:
        what = f"has {shown(unknown)}" if unknown else f"lacks {shown(absent)}"
        raise UserError(
            f"{folder} {what}, other classes than the {len(classes)} expected ({shown(classes)}); train and val need "
            "a folder of the same name for every class"
        )
    if list(classes) != list(found):
        raise UserError(
            f"the classes of {folder} are expected in another order than that of their names, in which mmpretrain "
            "numbers them; sort metainfo.classes"
        )
