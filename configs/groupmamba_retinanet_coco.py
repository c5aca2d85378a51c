"""RetinaNet with a GroupMamba-T backbone on COCO: 12 epochs ("1x"), 1333x800, 16 images a step.

The recipe of groupmamba_maskrcnn_coco.py for boxes alone; we know of no published result.
"""

_base_ = ["mmdet::_base_/models/retinanet_r50_fpn.py", "./_base_/coco_boxes.py"]

model = dict(
    backbone=dict(
        _delete_=True,
        type="mmvssm.GroupMamba",
        arch="tiny",
        out_indices=(1, 2, 3),
        drop_path_rate=0.2,
        init_cfg=dict(type="Pretrained", checkpoint="mmvssm://groupmamba_tiny", prefix="backbone."),
    ),
    neck=dict(in_channels=[128, 348, 448], start_level=0, add_extra_convs="on_output"),
)
