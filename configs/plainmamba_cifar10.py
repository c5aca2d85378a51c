"""A small PlainMamba on CIFAR-10: 256 tokens for 32x32 pixels, whose training takes about an hour of one core."""

_base_ = "./groupmamba_cifar10.py"

embed_dims = 32
model = dict(
    backbone=dict(
        _delete_=True,
        type="mmvssm.PlainMamba",
        arch=dict(
            embed_dims=embed_dims,
            num_layers=6,
            patch_size=2,
            num_convs_patch_embed=0,
            layers_with_dwconv=(0,),
            d_state=8,
        ),
        img_size=32,
    ),
    neck=dict(_delete_=True, type="mmvssm.TokenPooling"),
    head=dict(in_channels=embed_dims),
)
