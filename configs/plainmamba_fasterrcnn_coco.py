"""Faster R-CNN with a PlainMamba-L1 backbone on COCO, for boxes alone: 12 epochs ("1x"), 1333x800, 16 images a step.

The recipe of plainmamba_maskrcnn_coco.py without masks; we know of no published result.
"""

_base_ = "./groupmamba_fasterrcnn_coco.py"

embed_dims = 192
model = dict(
    backbone=dict(
        _delete_=True,
        type="mmvssm.PlainMamba",
        arch="L1",
        out_indices=(5, 11, 17, 23),
        drop_path_rate=0.1,
        init_cfg=dict(type="Pretrained", checkpoint="mmvssm://plainmamba_l1", prefix="backbone."),
    ),
    neck=[
        dict(type="mmvssm.TokenRestoration"),
        dict(
            type="mmvssm.FeaturePyramid",
            in_channels=embed_dims,
            rescales=[4, 2, 1, 0.5],
            norm_cfg=dict(type="SyncBN", requires_grad=True),
        ),
        dict(_base_.model.neck, in_channels=[embed_dims] * 4),
    ],
)
