"""UperNet with a small GroupMamba on CamVid's street scenes of 480x360 in 11 classes, from scratch, on CPU cores.

``data/camvid`` has ADE20K's layout, with ``test`` as a third split: 367 images to train, 101 to validate, 233 to test.
Label maps count the classes from 0; 255 is unlabelled.
"""

_base_ = "./groupmamba_upernet_shapes.py"

# Data.
prepare_data = None
data_root = "data/camvid/"
metainfo = dict(
    classes=(
        *("sky", "building", "pole", "road", "pavement", "tree", "sign", "fence", "car"),
        *("pedestrian", "bicyclist"),
    ),
    palette=[
        (128, 128, 128),
        (128, 0, 0),
        (192, 192, 128),
        (128, 64, 128),
        (60, 40, 222),
        (128, 128, 0),
        (192, 128, 128),
        (64, 64, 128),
        (64, 0, 128),
        (64, 64, 0),
        (0, 128, 192),
    ],
)
num_classes = 11

image_size = (480, 360)
crop_size = (256, 320)
train_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="LoadAnnotations"),
    dict(type="RandomResize", scale=image_size, ratio_range=(0.5, 2.0), keep_ratio=True),
    dict(type="RandomCrop", crop_size=crop_size, cat_max_ratio=0.75),
    dict(type="RandomFlip", prob=0.5),
    dict(type="PhotoMetricDistortion"),
    dict(type="PackSegInputs"),
]
test_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="Resize", scale=image_size, keep_ratio=True),
    dict(type="LoadAnnotations"),
    dict(type="PackSegInputs"),
]
img_ratios = [0.75, 1.0, 1.25]
tta_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(
        type="TestTimeAug",
        _scope_="mmseg",  # also in a config that inherits this one as mmvssm::...
        transforms=[
            [
                dict(type="Resize", scale=(int(480 * r), int(360 * r)), keep_ratio=True)
                for r in img_ratios
            ],
            [
                dict(type="RandomFlip", prob=0.0, direction="horizontal"),
                dict(type="RandomFlip", prob=1.0, direction="horizontal"),
            ],
            [dict(type="LoadAnnotations")],
            [dict(type="PackSegInputs")],
        ],
    ),
]
train_dataloader = dict(
    batch_size=4,
    dataset=dict(
        data_root=data_root,
        metainfo=metainfo,
        data_prefix=dict(img_path="images/training", seg_map_path="annotations/training"),
        img_suffix=".jpg",
        pipeline=train_pipeline,
    ),
)
val_dataloader = dict(
    dataset=dict(
        data_root=data_root,
        metainfo=metainfo,
        data_prefix=dict(img_path="images/validation", seg_map_path="annotations/validation"),
        img_suffix=".jpg",
        pipeline=test_pipeline,
    ),
)
test_dataloader = dict(
    dataset=dict(
        data_root=data_root,
        metainfo=metainfo,
        data_prefix=dict(img_path="images/test", seg_map_path="annotations/test"),
        img_suffix=".jpg",
        pipeline=test_pipeline,
    ),
)

# Model.
embed_dims = [48, 96, 160, 256]
model = dict(
    data_preprocessor=dict(size=crop_size),
    backbone=dict(arch=dict(embed_dims=embed_dims, depths=[1, 1, 3, 1])),
    decode_head=dict(
        in_channels=embed_dims,
        num_classes=num_classes,
        # Cross-entropy alone hardly learns poles, signs and fences, which have 1 to 2 % of the pixels.
        loss_decode=[
            dict(type="CrossEntropyLoss", loss_weight=1.0),
            dict(type="LovaszLoss", loss_weight=1.0, reduction="none"),
        ],
    ),
    auxiliary_head=dict(in_channels=embed_dims[2], num_classes=num_classes),
)

# Schedule.
max_iters = 1500
train_cfg = dict(max_iters=max_iters, val_interval=max_iters)
auto_scale_lr = dict(base_batch_size=4)
param_scheduler = [
    dict(type="LinearLR", start_factor=0.01, by_epoch=False, begin=0, end=75),
    dict(type="PolyLR", power=1.0, eta_min=0.0, by_epoch=False, begin=75, end=max_iters),
]
default_hooks = dict(checkpoint=dict(interval=max_iters // 4), visualization=dict(draw=False))
