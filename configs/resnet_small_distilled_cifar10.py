"""The network of resnet_small_cifar10.py as the student of the teacher of groupmamba_distilled_cifar10.py."""

_base_ = "./groupmamba_distilled_cifar10.py"

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
