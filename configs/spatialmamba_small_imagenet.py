"""The recipe of spatialmamba_imagenet.py, without MESA, with Spatial-Mamba-S; the paper reports 84.6 %."""

_base_ = "./spatialmamba_imagenet.py"

model = dict(backbone=dict(arch="S", drop_path_rate=0.3))
