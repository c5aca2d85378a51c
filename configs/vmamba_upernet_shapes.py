"""The GroupMamba demo on the generated data set, with a small VMamba."""

_base_ = "./groupmamba_upernet_shapes.py"

model = dict(
    backbone=dict(
        _delete_=True,
        type="mmvssm.VMamba",
        arch=dict(embed_dims=[32, 64, 96, 128], depths=[1, 1, 2, 1], ssm_ratio=1, mlp_ratio=4),
    ),
)
optim_wrapper = dict(paramwise_cfg=dict(_delete_=True, norm_decay_mult=0.0))
