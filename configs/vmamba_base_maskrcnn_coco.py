"""The recipe of vmamba_maskrcnn_coco.py with VMamba-B; the paper reports 49.2 box AP and 44.1 mask AP."""

_base_ = "./vmamba_maskrcnn_coco.py"

model = dict(
    backbone=dict(arch="B", drop_path_rate=0.6, init_cfg=dict(checkpoint="mmvssm://vmamba_base")),
    neck=dict(in_channels=[128, 256, 512, 1024]),
)
