"""Change the size of the images that a config trains and tests with (``--image-size``)."""

from collections.abc import Iterator
from typing import Any, Optional

from mmengine.config import Config

from ..datasets.walk import leaf_datasets
from ..errors import UserError

# What mmcv's, mmdet's, mmseg's and mmpretrain's transforms, data preprocessors and test_cfg call sizes in pixels.
_SIZES = ("scale", "scales", "img_scale", "crop_size", "size", "stride", "random_size_range")
_LOADERS = ("train_dataloader", "val_dataloader", "test_dataloader")


def set_image_size(cfg: Config, size: int) -> str:
    """Scale every size in pixels of a config alike, so that its images become ``size`` pixels.

    That is the longer side to which a detector's test resizes; of a segmenter or a classifier, the crop that it trains
    with. Pipelines, test-time augmentation, padding of batches, sliding windows and generated data follow. Anchors and
    the position embeddings' own size stay: backbones resize those.

    Args:
        cfg: Changed in place.
        size: Pixels.

    Returns:
        A line that says what changed.

    Raises:
        UserError: If the config's pipelines name no size.
    """
    reference = _reference(cfg)
    if reference is None:
        raise UserError("--image-size: no pipeline of the config resizes or crops its images")
    ratio, seen, changed = size / reference, set(), []
    for name, part in _parts(cfg):
        if _scale(part, ratio, seen):
            changed.append(name)
    generator = cfg.get("prepare_data")
    if generator and "image_size" in generator:
        generator.image_size = _times(generator.image_size, ratio)
        changed.append("prepare_data")
    return (
        f"--image-size {size}: sizes times {ratio:g} ({reference} before) in {', '.join(changed)}"
    )


def _reference(cfg: Config) -> Optional[int]:
    """Return the size in pixels that ``--image-size`` names."""
    resizes = [("test_dataloader", ("Resize", "RandomResize"), "scale")]
    crops = [
        ("train_dataloader", ("RandomCrop",), "crop_size"),
        ("train_dataloader", ("RandomResizedCrop",), "scale"),
    ]
    for loader, types, key in resizes if cfg.default_scope == "mmdet" else crops + resizes:
        for dataset in leaf_datasets((cfg.get(loader) or {}).get("dataset")):
            for step in (dataset or {}).get("pipeline") or []:
                value = step.get(key)
                if str(step.get("type")).rpartition(".")[2] in types and _is_size(value):
                    return value if isinstance(value, int) else max(value)
    return None


def _parts(cfg: Config) -> Iterator[tuple[str, Any]]:
    """Yield the parts of a config that hold sizes of images."""
    for loader in _LOADERS:
        yield loader, (cfg.get(loader) or {}).get("dataset")
    yield "tta_pipeline", cfg.get("tta_pipeline")
    for hook in cfg.get("custom_hooks") or ():  # mmdet's PipelineSwitchHook
        yield "custom_hooks", hook.get("switch_pipeline")
    yield "data_preprocessor", cfg.get("data_preprocessor")
    yield "model.data_preprocessor", cfg.model.get("data_preprocessor")
    yield "model.test_cfg", cfg.model.get("test_cfg")


def _scale(node: Any, ratio: float, seen: set[int]) -> bool:
    """Scale sizes anywhere in ``node``, in place; return whether there were any. No node is scaled twice."""
    if not isinstance(node, (dict, list, tuple)) or id(node) in seen:
        return False
    seen.add(id(node))
    found = False
    for key, value in list(node.items() if isinstance(node, dict) else enumerate(node)):
        if isinstance(node, dict) and key in _SIZES and _is_size(value):
            node[key] = _times(value, ratio)
            found = True
        else:
            found |= _scale(value, ratio, seen)
    return found


def _is_size(value: Any) -> bool:
    """Whether it is a number of pixels, or pairs or lists of such; shares of an image are floats."""
    if isinstance(value, (list, tuple)):
        return bool(value) and all(map(_is_size, value))
    return type(value) is int and value > 1


def _times(value: Any, ratio: float) -> Any:
    if isinstance(value, (list, tuple)):
        return type(value)(_times(item, ratio) for item in value)
    return max(round(value * ratio), 1)
