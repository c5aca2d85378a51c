"""The recipe of vmamba_upernet_ade20k.py with VMamba-S; the paper reports 50.6 mIoU."""

_base_ = "./vmamba_upernet_ade20k.py"

model = dict(
    backbone=dict(arch="S", drop_path_rate=0.3, init_cfg=dict(checkpoint="mmvssm://vmamba_small"))
)
