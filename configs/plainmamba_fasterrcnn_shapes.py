"""Faster R-CNN on the generated data set, with a small PlainMamba."""

_base_ = "./groupmamba_fasterrcnn_shapes.py"

model = dict(
    backbone=dict(_delete_=True, **_base_.plainmamba),
    neck=[
        dict(type="mmvssm.TokenRestoration"),
        dict(
            type="mmvssm.FeaturePyramid",
            in_channels=64,
            rescales=[2, 1, 0.5, 0.25],
            norm_cfg=dict(type="BN", requires_grad=True),
        ),
        dict(_base_.model.neck, in_channels=[64] * 4),
    ],
)
