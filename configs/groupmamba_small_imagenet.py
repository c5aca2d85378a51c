"""The recipe of groupmamba_imagenet.py with GroupMamba-S."""

_base_ = "./groupmamba_imagenet.py"

model = dict(
    backbone=dict(arch="small"),
    neck=dict(in_channels=512),
    head=dict(in_channels=512),
)
