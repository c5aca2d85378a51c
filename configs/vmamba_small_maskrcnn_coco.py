"""The recipe of vmamba_maskrcnn_coco.py with VMamba-S; the paper reports 48.7 box AP and 43.7 mask AP."""

_base_ = "./vmamba_maskrcnn_coco.py"

model = dict(
    backbone=dict(arch="S", drop_path_rate=0.3, init_cfg=dict(checkpoint="mmvssm://vmamba_small")),
)
