"""Make a config that tests and predicts, for a model that comes without one."""

from typing import Any

from mmengine.config import Config

# Of each library: the metric, and what draws. apply_data_root sets the data set.
_TESTING = {
    "mmdet": (dict(type="CocoMetric"), "DetVisualizationHook", "DetLocalVisualizer"),
    "mmseg": (
        dict(type="IoUMetric", iou_metrics=["mIoU"]),
        "SegVisualizationHook",
        "SegLocalVisualizer",
    ),
    "mmpretrain": (dict(type="Accuracy"), "VisualizationHook", "UniversalVisualizer"),
}


def testing_config(scope: str, model: dict[str, Any], pipeline: list[dict[str, Any]]) -> Config:
    """Make a config for predicting, exporting, and testing with ``--data-root``.

    Args:
        scope: ``default_scope``: mmdet, mmseg or mmpretrain.
        model: The model.
        pipeline: The test pipeline.
    """
    metric, hook, visualizer = _TESTING[scope]
    dataset: dict[str, Any] = dict(pipeline=pipeline)
    if scope == "mmdet":
        metric = dict(metric, metric=["bbox"] + ["segm"] * predicts_masks(model))
        dataset["test_mode"] = True
    return Config(
        dict(
            default_scope=scope,
            model=model,
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
