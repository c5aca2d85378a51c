"""The GroupMamba demo on the generated data set, with a small Spatial-Mamba."""

_base_ = "./vmamba_upernet_shapes.py"

model = dict(
    backbone=dict(
        type="mmvssm.SpatialMamba",
        arch=dict(_delete_=True, embed_dims=[32, 64, 96, 128], depths=[1, 1, 2, 1], mlp_ratio=4),
    ),
)
