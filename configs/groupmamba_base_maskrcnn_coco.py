"""Mask R-CNN with a GroupMamba-B backbone on COCO; all else as for GroupMamba-T."""

_base_ = "./groupmamba_maskrcnn_coco.py"

model = dict(
    backbone=dict(
        arch="base",
        drop_path_rate=0.5,
        init_cfg=dict(checkpoint="mmvssm://groupmamba_base"),
    ),
    neck=dict(in_channels=[96, 192, 424, 512]),
)
