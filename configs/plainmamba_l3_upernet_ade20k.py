"""The recipe of plainmamba_upernet_ade20k.py with PlainMamba-L3."""

_base_ = ["./plainmamba_upernet_ade20k.py"]

embed_dims = 448
model = dict(
    backbone=dict(
        arch="L3",
        out_indices=(8, 17, 26, 35),
        drop_path_rate=0.3,
        init_cfg=dict(checkpoint="mmvssm://plainmamba_l3"),
    ),
    neck=[
        dict(type="mmvssm.TokenRestoration"),
        dict(
            type="mmvssm.FeaturePyramid",
            in_channels=embed_dims,
            rescales=[4, 2, 1, 0.5],
            norm_cfg=dict(type="SyncBN", requires_grad=True),
        ),
    ],
    decode_head=dict(in_channels=[embed_dims] * 4),
    auxiliary_head=dict(in_channels=embed_dims),
)
