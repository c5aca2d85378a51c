"""Vim-T on ImageNet-1k: 300 epochs, 1024 images a step.

The paper reports 76.1 %. The recipe of groupmamba_imagenet.py with the published numbers; the published one is DeiT's, which
also shows each image three times in a row of epochs (repeated augmentation), and this one does not. The class token is in
the middle of the line. What the published code marks as undecayed, it decays all the same: A_log too.
"""

_base_ = "./groupmamba_imagenet.py"

embed_dims = 192
model = dict(
    backbone=dict(_delete_=True, type="mmvssm.Vim", arch="T", out_type="cls_token"),
    neck=None,
    head=dict(in_channels=embed_dims),
)

optim_wrapper = dict(
    optimizer=dict(weight_decay=0.1),
    paramwise_cfg=dict(
        custom_keys={
            "A_log": dict(decay_mult=1.0),
            "cls_token": dict(decay_mult=0.0),
            "cls_pos_embed": dict(decay_mult=0.0),
        },
    ),
)
param_scheduler = [
    dict(type="LinearLR", start_factor=1e-3, by_epoch=True, end=5, convert_to_iter_based=True),
    dict(type="CosineAnnealingLR", eta_min=1e-5, by_epoch=True, begin=5),
]
custom_hooks = [
    dict(type="mmpretrain.EMAHook", momentum=4e-5, update_buffers=True, priority="ABOVE_NORMAL")
]
