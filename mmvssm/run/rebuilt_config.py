"""Make the config of a checkpoint's model from its blueprint."""

from collections.abc import Mapping
from importlib import import_module
from typing import Any

from mmengine.config import Config

from ..models.blueprint import SCOPES, check_blueprint, register_library

# Of each library: the evaluator, and what draws. apply_data_root sets the class of the data set.
_TESTING = {
    "mmdet": (dict(type="CocoMetric"), "DetVisualizationHook", "DetLocalVisualizer"),
    "mmseg": (
        dict(type="IoUMetric", iou_metrics=["mIoU"]),
        "SegVisualizationHook",
        "SegLocalVisualizer",
    ),
    "mmpretrain": (dict(type="Accuracy"), "VisualizationHook", "UniversalVisualizer"),
}


def rebuild_config(blueprint: Mapping[str, Any], weights: Mapping[str, Any]) -> Config:
    """Make a config for predicting, exporting, and testing with ``--data-root``.

    Args:
        blueprint: From :func:`~mmvssm.models.blueprint.read_blueprint`.
        weights: The weights that come with it.

    Raises:
        UserError: If the blueprint is refused, or its library is not installed.
    """
    scope = blueprint.get("default_scope")
    if scope in SCOPES:  # else the check says so
        register_library(scope)
    if scope == "mmpretrain":
        import_module("mmvssm.pretraining")  # whose classes a distilled classifier is of
    check_blueprint(blueprint, weights)
    metric, hook, visualizer = _TESTING[scope]
    if scope == "mmdet":
        metric = dict(
            metric, metric=["bbox", "segm"] if predicts_masks(blueprint["model"]) else ["bbox"]
        )
    dataset = dict(pipeline=blueprint["pipeline"])
    if scope == "mmdet":
        dataset["test_mode"] = True
    return Config(
        dict(
            default_scope=scope,
            model=blueprint["model"],
            test_dataloader=dict(
                batch_size=1,
                num_workers=2,
                persistent_workers=True,
                sampler=dict(type="DefaultSampler", shuffle=False),
                dataset=dataset,
            ),
            test_cfg=dict(type="TestLoop"),
            test_evaluator=metric,
            default_hooks=dict(visualization=dict(type=hook)),
            visualizer=dict(type=visualizer, vis_backends=[dict(type="LocalVisBackend")]),
        )
    )


def predicts_masks(node: Any) -> bool:
    """Whether a model's config has a mask head."""
    if isinstance(node, dict):
        return bool(node.get("mask_head")) or any(map(predicts_masks, node.values()))
    return isinstance(node, (list, tuple)) and any(map(predicts_masks, node))
