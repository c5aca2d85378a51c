"""A convolutional network of as many FLOPs as the GroupMamba of groupmamba_cifar10.py, with its recipe.

mmpretrain's ResNet-18 for CIFAR-10, less the last of its stages and very narrow.
"""

_base_ = "./groupmamba_cifar10.py"

model = dict(
    backbone=dict(
        _delete_=True,
        type="mmpretrain.ResNet_CIFAR",
        depth=18,
        base_channels=6,
        stem_channels=9,
        num_stages=3,
        strides=(1, 2, 2),
        dilations=(1, 1, 1),
        out_indices=(2,),
    ),
    neck=dict(_delete_=True, type="mmpretrain.GlobalAveragePooling"),
    head=dict(in_channels=24),
)
