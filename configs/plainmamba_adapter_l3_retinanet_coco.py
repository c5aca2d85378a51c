"""The recipe of plainmamba_adapter_retinanet_coco.py with PlainMamba-Adapter-L3; published: 44.8 box AP."""

_base_ = "./plainmamba_adapter_retinanet_coco.py"

model = dict(
    backbone=dict(
        arch="L3", drop_path_rate=0.3, init_cfg=dict(checkpoint="mmvssm://plainmamba_l3")
    ),
    neck=dict(in_channels=[448] * 4),
)
