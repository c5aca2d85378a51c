"""Mask R-CNN with a GroupMamba-T backbone on COCO: 12 epochs ("1x"), 1333x800, 16 images a step.

The paper reports 47.6 box AP and 42.9 mask AP. As there, the backbone starts from published ImageNet-1k weights, which are
downloaded from their authors when training begins; with --from-scratch it starts at random.

The batch of 16 is 8 GPUs with 2 images each; with another number of GPUs, pass --auto-scale-lr.
"""

_base_ = ["mmdet::_base_/models/mask-rcnn_r50_fpn.py", "./_base_/coco_instances.py"]

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
