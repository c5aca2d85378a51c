"""The GroupMamba demo on the generated data set, with a small PlainMamba-Adapter."""

_base_ = "./groupmamba_maskrcnn_shapes.py"

embed_dims = 48
model = dict(
    backbone=dict(
        _delete_=True,
        type="mmvssm.PlainMambaAdapter",
        arch=dict(
            embed_dims=embed_dims,
            num_layers=6,
            patch_size=16,
            num_convs_patch_embed=1,
            layers_with_dwconv=[0],
            d_state=8,
        ),
        img_size=160,
        conv_inplane=16,
        interaction_indexes=((0, 1), (2, 3), (4, 5)),
    ),
    neck=dict(in_channels=[embed_dims] * 4),
)
optim_wrapper = dict(
    paramwise_cfg=dict(
        _delete_=True,
        custom_keys={
            "level_embed": dict(decay_mult=0.0),
            "pos_embed": dict(decay_mult=0.0),
            "norm": dict(decay_mult=0.0),
            "bias": dict(decay_mult=0.0),
            "A_log": dict(decay_mult=0.0),
            "mixer.D": dict(decay_mult=0.0),
            "direction_Bs": dict(decay_mult=0.0),
        },
    ),
)
