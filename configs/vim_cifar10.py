"""A small Vim on CIFAR-10: 64 tokens for 32x32 pixels, and a class token in the middle of the line."""

_base_ = "./groupmamba_cifar10.py"

embed_dims = 64
model = dict(
    backbone=dict(
        _delete_=True,
        type="mmvssm.Vim",
        arch=dict(embed_dims=embed_dims, num_layers=6, patch_size=4, stride=4, d_state=8),
        img_size=32,
        out_type="cls_token",
    ),
    neck=None,
    head=dict(in_channels=embed_dims),
)
