"""UperNet with a PlainMamba-L1 backbone on ADE20K: 160k iterations, 512x512 crops, 16 images a step.

The maps of four layers, all at stride 16, become strides 4 to 32. No weights are hosted in this
layout, so the backbone starts at random unless a converted ImageNet checkpoint is named:

    python tools/convert_checkpoint.py plainmamba SRC plainmamba_l1.pth
    python tools/train.py configs/plainmamba_upernet_ade20k.py --cfg-options \
        model.backbone.init_cfg.type=Pretrained model.backbone.init_cfg.prefix=backbone. \
        model.backbone.init_cfg.checkpoint=plainmamba_l1.pth

The batch of 16 is 8 GPUs with 2 images each; with another number of GPUs, pass --auto-scale-lr.
"""

_base_ = ["./groupmamba_upernet_ade20k.py"]

embed_dims = 192
model = dict(
    backbone=dict(
        _delete_=True,
        type="mmvssm.PlainMamba",
        arch="L1",
        out_indices=(5, 11, 17, 23),
        drop_path_rate=0.1,
    ),
    neck=[
        dict(type="mmvssm.TokenRestoration"),
        dict(
            type="mmseg.Feature2Pyramid",
            embed_dim=embed_dims,
            rescales=[4, 2, 1, 0.5],
            norm_cfg=dict(type="SyncBN", requires_grad=True),
        ),
    ],
    decode_head=dict(in_channels=[embed_dims] * 4),
    auxiliary_head=dict(in_channels=embed_dims),
)
