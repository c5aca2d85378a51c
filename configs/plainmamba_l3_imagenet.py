"""The recipe of plainmamba_l2_imagenet.py with PlainMamba-L3, as published."""

_base_ = "./plainmamba_l2_imagenet.py"

model = dict(
    backbone=dict(arch="L3", drop_path_rate=0.4),
    head=dict(in_channels=448),
)
