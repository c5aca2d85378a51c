"""The recipe of vim_upernet_ade20k.py with Vim-S, whose maps are the tokens after a layer; the paper reports 44.9 mIoU."""

_base_ = "./vim_upernet_ade20k.py"

embed_dims = 384
model = dict(
    backbone=dict(arch="S", out_type="residual", init_cfg=dict(checkpoint="mmvssm://vim_small")),
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
optim_wrapper = dict(optimizer=dict(lr=1e-4, weight_decay=0.05))
