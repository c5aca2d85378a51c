"""Faster R-CNN with a GroupMamba-T backbone on COCO, for boxes alone: 12 epochs ("1x"), 1333x800, 16 images a step.

The recipe of groupmamba_maskrcnn_coco.py without masks; we know of no published result.
"""

_base_ = ["mmdet::_base_/models/faster-rcnn_r50_fpn.py", "./_base_/coco_boxes.py"]

model = dict(
    backbone=dict(
        _delete_=True,
        type="mmvssm.GroupMamba",
        arch="tiny",
        out_indices=(0, 1, 2, 3),
        drop_path_rate=0.2,
        init_cfg=dict(type="Pretrained", checkpoint="mmvssm://groupmamba_tiny", prefix="backbone."),
    ),
    neck=dict(in_channels=[64, 128, 348, 448]),
)
