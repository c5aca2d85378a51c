"""The recipe of groupmamba_imagenet.py with GroupMamba-B."""

_base_ = "./groupmamba_imagenet.py"

model = dict(
    backbone=dict(arch="base"),
    neck=dict(in_channels=512),
    head=dict(in_channels=512),
)
