"""Mask R-CNN with a PlainMamba-Adapter-L1 backbone on COCO: 12 epochs ("1x"), 1333x800, 16 images a step.

The published detector: 44.1 box AP and 39.1 mask AP. On GPUs every BatchNorm is a SyncBN, as published, in the backbone by
sync_bn. Images without objects are kept. The batch of 16 is 8 GPUs with 2 images each; with another number of GPUs, pass
--auto-scale-lr.
"""

_base_ = [
    "mmdet::_base_/models/mask-rcnn_r50_fpn.py",
    "mmdet::_base_/datasets/coco_instance.py",
    "./_base_/adamw_adapter.py",
    "mmdet::_base_/default_runtime.py",
]
custom_imports = dict(imports=["mmvssm"], allow_failed_imports=False)

norm_cfg = dict(type="SyncBN", requires_grad=True)
sync_bn = "torch"
model = dict(
    backbone=dict(
        _delete_=True,
        type="mmvssm.PlainMambaAdapter",
        arch="L1",
        drop_path_rate=0.1,
        init_cfg=dict(type="Pretrained", checkpoint="mmvssm://plainmamba_l1", prefix="backbone."),
    ),
    neck=dict(in_channels=[192] * 4, norm_cfg=norm_cfg),
    roi_head=dict(
        bbox_head=dict(
            type="Shared4Conv1FCBBoxHead",
            conv_out_channels=256,
            norm_cfg=norm_cfg,
            loss_bbox=dict(type="L1Loss", loss_weight=1.0),
        )
    ),
)
train_dataloader = dict(dataset=dict(filter_cfg=dict(filter_empty_gt=False)))

val_evaluator = dict(classwise=True)
test_evaluator = val_evaluator
default_hooks = dict(checkpoint=dict(save_best="coco/bbox_mAP"))
