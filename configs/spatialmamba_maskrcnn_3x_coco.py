"""Mask R-CNN with a Spatial-Mamba-T backbone on COCO: 36 epochs ("3x"), several scales and crops, 16 images a step.

The paper reports 49.3 box AP and 43.6 mask AP. The recipe of vmamba_maskrcnn_3x_coco.py, which is the published one.
"""

_base_ = "./vmamba_maskrcnn_3x_coco.py"

model = dict(
    backbone=dict(
        type="mmvssm.SpatialMamba", init_cfg=dict(checkpoint="mmvssm://spatialmamba_tiny")
    ),
    neck=dict(in_channels=[64, 128, 256, 512]),
)
