"""UperNet with a Spatial-Mamba-T backbone on ADE20K: 160k iterations, 512x512 crops, 16 images a step.

The paper reports 48.6 mIoU (49.4 with test-time augmentation). The recipe of vmamba_upernet_ade20k.py, which is the
published one.
"""

_base_ = "./vmamba_upernet_ade20k.py"

model = dict(
    backbone=dict(
        type="mmvssm.SpatialMamba", init_cfg=dict(checkpoint="mmvssm://spatialmamba_tiny")
    ),
    decode_head=dict(in_channels=[64, 128, 256, 512]),
    auxiliary_head=dict(in_channels=256),
)
