"""A small GroupMamba on CIFAR-10, in folders as ImageNet has them: a size that two cores train in minutes.

    data/cifar10/train/<class>/*.jpg  data/cifar10/val/<class>/*.jpg

Another place, or any data set of that layout, by --data-root. The shorter side of its images becomes 32 pixels.
"""

_base_ = "./groupmamba_imagenet.py"

data_preprocessor = dict(
    num_classes=10, mean=[125.307, 122.961, 113.8575], std=[51.5865, 50.847, 51.255], to_rgb=True
)
model = dict(
    backbone=dict(
        arch=dict(
            _delete_=True,
            stem_hidden_dim=16,
            embed_dims=(32, 48, 64, 96),
            depths=(1, 1, 2, 1),
            mlp_ratios=(4, 4, 4, 4),
        ),
    ),
    neck=dict(in_channels=96),
    head=dict(num_classes=10, in_channels=96),
    # In so few epochs Mixup and CutMix would cost more than they bring.
    train_cfg=dict(_delete_=True),
)

classes = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
train_pipeline = [
    dict(type="mmpretrain.LoadImageFromFile"),
    dict(type="mmpretrain.ResizeEdge", scale=32, edge="short"),  # leaves 32x32 as they are
    dict(type="mmpretrain.RandomCrop", crop_size=32, padding=4),
    dict(type="mmpretrain.RandomFlip", prob=0.5, direction="horizontal"),
    dict(type="mmpretrain.PackInputs"),
]
test_pipeline = [
    dict(type="mmpretrain.LoadImageFromFile"),
    dict(type="mmpretrain.ResizeEdge", scale=32, edge="short"),  # leaves 32x32 as they are
    dict(type="mmpretrain.CenterCrop", crop_size=32),
    dict(type="mmpretrain.PackInputs"),
]
train_dataloader = dict(
    batch_size=128,
    num_workers=1,
    dataset=dict(
        _delete_=True,
        type="mmpretrain.CustomDataset",
        data_root="data/cifar10",
        data_prefix="train",
        metainfo=dict(classes=classes),
        pipeline=train_pipeline,
    ),
)
val_dataloader = dict(
    batch_size=250,
    num_workers=1,
    dataset=dict(
        _delete_=True,
        type="mmpretrain.CustomDataset",
        data_root="data/cifar10",
        data_prefix="val",
        metainfo=dict(classes=classes),
        pipeline=test_pipeline,
    ),
)
test_dataloader = val_dataloader
val_evaluator = dict(topk=(1,))
test_evaluator = val_evaluator

train_cfg = dict(max_epochs=10)
param_scheduler = [
    dict(type="LinearLR", start_factor=1e-3, by_epoch=True, end=1, convert_to_iter_based=True),
    dict(
        type="CosineAnnealingLR",
        eta_min=1e-5,
        by_epoch=True,
        begin=1,
        end=10,
        convert_to_iter_based=True,
    ),
]
auto_scale_lr = dict(base_batch_size=128)
custom_hooks = []  # in so few epochs averaged weights lag behind those that are there at the end
default_hooks = dict(logger=dict(interval=50))
