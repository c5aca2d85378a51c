"""The recipe of vmamba_upernet_ade20k.py with VMamba-B; the paper reports 51.0 mIoU."""

_base_ = "./vmamba_upernet_ade20k.py"

model = dict(
    backbone=dict(arch="B", drop_path_rate=0.6, init_cfg=dict(checkpoint="mmvssm://vmamba_base")),
    decode_head=dict(in_channels=[128, 256, 512, 1024]),
    auxiliary_head=dict(in_channels=512),
)
