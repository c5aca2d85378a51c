"""Walk from the wrappers around a data set (RepeatDataset, ConcatDataset ...) to what is inside."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from mmengine.config import Config, ConfigDict

from ..errors import UserError


def parts_of(dataset: Any) -> list:
    """Return the data sets directly inside a wrapper, built or a config; none of a data set proper."""
    inner = getattr(dataset, "dataset", None)
    if inner is not None and not isinstance(inner, str):
        return [inner]
    return list(getattr(dataset, "datasets", ()))


def leaf_datasets(dataset: Any) -> Iterator[Any]:
    """Yield the data sets proper inside any nesting of wrappers, built or configs."""
    parts = parts_of(dataset)
    if not parts:
        yield dataset
    for part in parts:
        yield from leaf_datasets(part)


def inference_pipeline(cfg: Config) -> list[ConfigDict]:
    """Return the steps by which testing prepares an image, without those that load annotations.

    Args:
        cfg: A detection or segmentation config; it is not changed.

    Raises:
        UserError: If it has no ``test_dataloader``.
    """
    if not cfg.get("test_dataloader"):
        raise UserError("the config has no test_dataloader, whose pipeline would prepare the image")
    dataset = cfg.test_dataloader.dataset
    while "pipeline" not in dataset:
        dataset = parts_of(dataset)[0]
    return [
        ConfigDict(step) for step in dataset.pipeline if not step["type"].endswith("Annotations")
    ]
