"""The recipe of vmamba_imagenet.py with VMamba-S; the paper reports 83.6 %."""

_base_ = "./vmamba_imagenet.py"

model = dict(backbone=dict(arch="S", drop_path_rate=0.3))
