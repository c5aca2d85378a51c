"""VMamba-T on ImageNet-1k: 300 epochs, 1024 images a step.

The paper reports 82.6 %. The recipe of groupmamba_imagenet.py, which is Swin's like the published one, with the published
drop path rate.
"""

_base_ = "./groupmamba_imagenet.py"

model = dict(
    backbone=dict(
        _delete_=True, type="mmvssm.VMamba", arch="T", out_indices=(3,), drop_path_rate=0.2
    ),
    neck=dict(_delete_=True, type="mmpretrain.GlobalAveragePooling"),
    head=dict(in_channels=768),
)
# The inherited schedule spares norms and biases, as the published recipe does.
optim_wrapper = dict(
    paramwise_cfg=dict(
        custom_keys={"A_log": dict(decay_mult=1.0)},
    ),
)
