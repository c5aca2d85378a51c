"""mmpretrain's ResNet-18 for CIFAR-10 at half its width: what resnet18_cutmix_cifar10.py starts from."""

_base_ = "./groupmamba_cifar10.py"

model = dict(
    backbone=dict(
        _delete_=True, type="mmpretrain.ResNet_CIFAR", depth=18, base_channels=32, stem_channels=32
    ),
    neck=dict(_delete_=True, type="mmpretrain.GlobalAveragePooling"),
    head=dict(in_channels=256),
)
optim_wrapper = dict(
    optimizer=dict(
        _delete_=True, type="SGD", lr=0.1, momentum=0.9, nesterov=True, weight_decay=5e-4
    ),
    paramwise_cfg=dict(_delete_=True, norm_decay_mult=0.0),
)
train_cfg = dict(max_epochs=40, val_interval=5)
param_scheduler = [
    dict(type="LinearLR", start_factor=1e-3, by_epoch=True, end=1, convert_to_iter_based=True),
    dict(
        type="CosineAnnealingLR",
        eta_min=0.0,
        by_epoch=True,
        begin=1,
        end=40,
        convert_to_iter_based=True,
    ),
]
