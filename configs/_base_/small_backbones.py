"""Backbones of the configs on the generated data set, to be taken as `_base_.groupmamba` and `_base_.plainmamba`."""

groupmamba = dict(
    type="mmvssm.GroupMamba",
    arch=dict(
        stem_hidden_dim=16,
        embed_dims=[32, 64, 96, 128],
        depths=[1, 1, 2, 1],
        mlp_ratios=[4, 4, 4, 4],
    ),
    out_indices=(0, 1, 2, 3),
)
plainmamba = dict(
    type="mmvssm.PlainMamba",
    arch=dict(
        embed_dims=64,
        num_layers=6,
        patch_size=8,
        num_convs_patch_embed=1,
        layers_with_dwconv=[0],
        d_state=8,
    ),
    img_size=160,
    out_indices=(1, 3, 4, 5),
)
