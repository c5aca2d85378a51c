"""The recipe of spatialmamba_upernet_ade20k.py with Spatial-Mamba-B; the paper reports 51.8 mIoU."""

_base_ = "./spatialmamba_upernet_ade20k.py"

model = dict(
    backbone=dict(
        arch="B", drop_path_rate=0.5, init_cfg=dict(checkpoint="mmvssm://spatialmamba_base")
    ),
    decode_head=dict(in_channels=[96, 192, 384, 768]),
    auxiliary_head=dict(in_channels=384),
)
