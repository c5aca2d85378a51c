"""The GroupMamba demo on the generated data set, with a small Vim."""

_base_ = "./plainmamba_upernet_shapes.py"

model = dict(
    backbone=dict(
        _delete_=True,
        type="mmvssm.Vim",
        arch=dict(embed_dims=64, num_layers=6, patch_size=8, stride=8, d_state=8),
        img_size=160,
        out_indices=(1, 3, 4, 5),
    ),
)
optim_wrapper = dict(
    # As published: matrices are decayed, A_log among them.
    paramwise_cfg=dict(
        _delete_=True,
        norm_decay_mult=0.0,
        bias_decay_mult=0.0,
        flat_decay_mult=0.0,
        custom_keys={"pos_embed": dict(decay_mult=0.0)},
    ),
)
