"""Walk from the wrappers of a data set's config to the data sets inside."""

from __future__ import annotations

from collections.abc import Iterator

from mmengine.config import Config, ConfigDict

from ..errors import UserError


def inference_pipeline(cfg: Config) -> list[ConfigDict]:
    """The steps by which testing prepares an image, less those that load annotations.

    Args:
        cfg: A detection or segmentation config; it stays as it is.

    Raises:
        UserError: If it has no ``test_dataloader``.
    """
    if not cfg.get("test_dataloader"):
        raise UserError("the config has no test_dataloader, whose pipeline would prepare the image")
    dataset = cfg.test_dataloader.dataset
    while "pipeline" not in dataset:  # RepeatDataset, ConcatDataset and the like
        dataset = dataset.dataset if "dataset" in dataset else dataset.datasets[0]
    return [
        ConfigDict(step) for step in dataset.pipeline if not step["type"].endswith("Annotations")
    ]


def leaf_datasets(dataset: ConfigDict) -> Iterator[ConfigDict]:
    """The data sets proper inside any nesting of wrappers (RepeatDataset, ConcatDataset ...)."""
    if isinstance(dataset.get("dataset"), dict):
        yield from leaf_datasets(dataset.dataset)
    elif "datasets" in dataset:
        for part in dataset.datasets:
            yield from leaf_datasets(part)
    else:
        yield dataset
