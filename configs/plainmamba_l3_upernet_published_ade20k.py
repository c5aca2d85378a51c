"""The recipe of plainmamba_upernet_published_ade20k.py with PlainMamba-L3; published: 49.1 mIoU."""

_base_ = "./plainmamba_upernet_published_ade20k.py"

embed_dims = 448
model = dict(
    backbone=dict(
        arch="L3",
        out_indices=(8, 17, 26, 35),
        drop_path_rate=0.3,
        init_cfg=dict(checkpoint="mmvssm://plainmamba_l3"),
    ),
    decode_head=dict(in_channels=[embed_dims] * 4),
    auxiliary_head=dict(in_channels=embed_dims),
)
