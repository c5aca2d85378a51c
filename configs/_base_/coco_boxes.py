"""Boxes on COCO: AdamW, 12 epochs ("1x"), AP by class and the best checkpoint; a config adds its model."""

_base_ = [
    "mmdet::_base_/datasets/coco_detection.py",
    "./adamw_detection.py",
    "mmdet::_base_/default_runtime.py",
]
custom_imports = dict(imports=["mmvssm"], allow_failed_imports=False)

val_evaluator = dict(classwise=True)
test_evaluator = val_evaluator
default_hooks = dict(checkpoint=dict(save_best="coco/bbox_mAP"))
