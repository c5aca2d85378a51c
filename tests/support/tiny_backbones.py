"""Settings of backbones that run in a moment."""

GROUP = dict(
    stem_hidden_dim=8, embed_dims=(16, 16, 32, 32), depths=(1, 2, 1, 2), mlp_ratios=(2, 2, 2, 2)
)
PLAIN = dict(
    embed_dims=16,
    num_layers=4,
    patch_size=16,
    num_convs_patch_embed=1,
    layers_with_dwconv=(0,),
    d_state=4,
)
SPATIAL = dict(embed_dims=(16, 24, 32, 40), depths=(1, 2, 1, 1), mlp_ratio=2)
VIM = dict(embed_dims=16, num_layers=4, patch_size=8, stride=8, d_state=4)
V = dict(embed_dims=(16, 24, 32, 40), depths=(1, 2, 1, 1), ssm_ratio=2, mlp_ratio=2)
ADAPTER = dict(arch=PLAIN, conv_inplane=8, deform_num_heads=2, interaction_indexes=((0, 1), (2, 3)))
