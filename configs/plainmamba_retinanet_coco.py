"""RetinaNet with a PlainMamba-L1 backbone on COCO: 12 epochs ("1x"), 1333x800, 16 images a step.

The maps of three layers, all at stride 16, become strides 8 to 32. The recipe of plainmamba_maskrcnn_coco.py for boxes alone;
we know of no published result. With PlainMamba-Adapter, RetinaNet is as published: plainmamba_adapter_retinanet_coco.py.
"""

_base_ = "./groupmamba_retinanet_coco.py"

embed_dims = 192
model = dict(
    backbone=dict(
        _delete_=True,
        type="mmvssm.PlainMamba",
        arch="L1",
        out_indices=(11, 17, 23),
        drop_path_rate=0.1,
        init_cfg=dict(type="Pretrained", checkpoint="mmvssm://plainmamba_l1", prefix="backbone."),
    ),
    neck=[
        dict(type="mmvssm.TokenRestoration"),
        dict(
            type="mmvssm.FeaturePyramid",
            in_channels=embed_dims,
            rescales=[2, 1, 0.5],
            norm_cfg=dict(type="SyncBN", requires_grad=True),
        ),
        dict(_base_.model.neck, in_channels=[embed_dims] * 3),
    ],
)
