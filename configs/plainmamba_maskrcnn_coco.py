"""Mask R-CNN with a PlainMamba-L1 backbone on COCO: 12 epochs ("1x"), 1333x800, 16 images a step.

The maps of four layers, all at stride 16, become strides 4 to 32. The backbone starts from published ImageNet-1k weights,
which are downloaded from their authors when training begins; with --from-scratch it starts at random.

The batch of 16 is 8 GPUs with 2 images each; with another number of GPUs, pass --auto-scale-lr.
"""

_base_ = ["mmdet::_base_/models/mask-rcnn_r50_fpn.py", "./_base_/coco_instances.py"]

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
        dict(type="FPN", in_channels=[embed_dims] * 4, out_channels=256, num_outs=5),
    ],
)
