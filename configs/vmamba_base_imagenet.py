"""The recipe of vmamba_imagenet.py with VMamba-B; the paper reports 83.9 %."""

_base_ = "./vmamba_imagenet.py"

model = dict(backbone=dict(arch="B", drop_path_rate=0.6), head=dict(in_channels=1024))
