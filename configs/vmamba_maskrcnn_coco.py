"""Mask R-CNN with a VMamba-T backbone on COCO: 12 epochs ("1x"), 1333x800, 16 images a step.

The paper reports 47.3 box AP and 42.7 mask AP. The recipe of groupmamba_maskrcnn_coco.py, which is the published one;
only norms are spared from weight decay.
"""

_base_ = "./groupmamba_maskrcnn_coco.py"

model = dict(
    backbone=dict(
        _delete_=True,
        type="mmvssm.VMamba",
        arch="T",
        drop_path_rate=0.2,
        init_cfg=dict(type="Pretrained", checkpoint="mmvssm://vmamba_tiny", prefix="backbone."),
    ),
    neck=dict(in_channels=[96, 192, 384, 768]),
)
optim_wrapper = dict(paramwise_cfg=dict(_delete_=True, norm_decay_mult=0.0))
