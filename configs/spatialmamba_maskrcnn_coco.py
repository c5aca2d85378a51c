"""Mask R-CNN with a Spatial-Mamba-T backbone on COCO: 12 epochs ("1x"), 1333x800, 16 images a step.

The paper reports 47.6 box AP and 42.9 mask AP. The recipe of vmamba_maskrcnn_coco.py, which is the published one. The
backbone's BatchNorm is trained on the 2 images of each GPU, as published.
"""

_base_ = "./vmamba_maskrcnn_coco.py"

model = dict(
    backbone=dict(
        type="mmvssm.SpatialMamba", init_cfg=dict(checkpoint="mmvssm://spatialmamba_tiny")
    ),
    neck=dict(in_channels=[64, 128, 256, 512]),
)
