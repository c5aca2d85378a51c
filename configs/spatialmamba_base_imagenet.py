"""The recipe of spatialmamba_imagenet.py, without MESA, with Spatial-Mamba-B; the paper reports 85.3 %."""

_base_ = "./spatialmamba_imagenet.py"

model = dict(backbone=dict(arch="B", drop_path_rate=0.5), head=dict(in_channels=768))
