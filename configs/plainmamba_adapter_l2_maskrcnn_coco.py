"""The recipe of plainmamba_adapter_maskrcnn_coco.py with PlainMamba-Adapter-L2; published: 46.0 box AP and 40.6 mask AP."""

_base_ = "./plainmamba_adapter_maskrcnn_coco.py"

model = dict(
    backbone=dict(
        arch="L2", drop_path_rate=0.2, init_cfg=dict(checkpoint="mmvssm://plainmamba_l2")
    ),
    neck=dict(in_channels=[384] * 4),
)
