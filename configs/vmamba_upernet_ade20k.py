"""UperNet with a VMamba-T backbone on ADE20K: 160k iterations, 512x512 crops, 16 images a step.

The paper reports 47.9 mIoU (48.8 with test-time augmentation). The recipe of groupmamba_upernet_ade20k.py, which is the
published one; only norms are spared from weight decay.
"""

_base_ = "./groupmamba_upernet_ade20k.py"

model = dict(
    backbone=dict(
        _delete_=True,
        type="mmvssm.VMamba",
        arch="T",
        drop_path_rate=0.2,
        init_cfg=dict(type="Pretrained", checkpoint="mmvssm://vmamba_tiny", prefix="backbone."),
    ),
    decode_head=dict(in_channels=[96, 192, 384, 768]),
    auxiliary_head=dict(in_channels=384),
)
optim_wrapper = dict(paramwise_cfg=dict(_delete_=True, norm_decay_mult=0.0))
