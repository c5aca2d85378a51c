"""Cascade Mask R-CNN with a GroupMamba-T backbone on COCO: 12 epochs ("1x"), 1333x800, 16 images a step.

The recipe of groupmamba_maskrcnn_coco.py with three box heads in a row; we know of no published result.
"""

_base_ = ["mmdet::_base_/models/cascade-mask-rcnn_r50_fpn.py", "./_base_/coco_instances.py"]

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
