"""Mask R-CNN with a GroupMamba-S backbone on COCO; all else as for GroupMamba-T."""

_base_ = "./groupmamba_maskrcnn_coco.py"

model = dict(
    backbone=dict(
        arch="small",
        drop_path_rate=0.3,
        init_cfg=dict(checkpoint="mmvssm://groupmamba_small"),
    ),
    neck=dict(in_channels=[64, 128, 348, 512]),
)
