"""The recipe of spatialmamba_upernet_ade20k.py with Spatial-Mamba-S; the paper reports 50.6 mIoU."""

_base_ = "./spatialmamba_upernet_ade20k.py"

model = dict(
    backbone=dict(
        arch="S", drop_path_rate=0.3, init_cfg=dict(checkpoint="mmvssm://spatialmamba_small")
    )
)
