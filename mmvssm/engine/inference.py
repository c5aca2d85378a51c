"""The test pipeline of a config, for images that nothing is annotated of."""

from __future__ import annotations

from mmengine.config import Config, ConfigDict

from .user_error import UserError


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
