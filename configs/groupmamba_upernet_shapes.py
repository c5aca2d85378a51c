"""The ADE20K recipe at a size that two CPU cores train in minutes, on the generated data set.

The same model, from scratch: a small GroupMamba, narrow heads, 160x160 images.
"""

_base_ = ["./groupmamba_upernet_ade20k.py"]

randomness = dict(seed=0)

# Data. The tools write the data set when it is not there.
image_size = 160
data_root = "data/shapes/"
prepare_data = dict(
    type="mmvssm.ShapesGenerator",
    root=data_root,
    num_train=800,
    num_val=100,
    image_size=image_size,
    seed=0,
)
metainfo = dict(
    classes=("background", "disk", "square", "triangle", "star", "ring"),
    palette=[
        (0, 0, 0),
        (230, 60, 60),
        (60, 180, 75),
        (60, 110, 230),
        (240, 200, 40),
        (170, 80, 220),
    ],
)
num_classes = 6

train_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="LoadAnnotations"),
    dict(
        type="RandomResize",
        scale=(image_size, image_size),
        ratio_range=(0.8, 1.25),
        keep_ratio=True,
    ),
    dict(type="RandomCrop", crop_size=(image_size, image_size)),
    dict(type="RandomFlip", prob=0.5),
    dict(type="PackSegInputs"),
]
test_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="Resize", scale=(image_size, image_size), keep_ratio=True),
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
                dict(type="Resize", scale=(int(image_size * r),) * 2, keep_ratio=True)
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
    batch_size=8,
    num_workers=1,
    persistent_workers=False,
    dataset=dict(
        type="BaseSegDataset",
        data_root=data_root,
        metainfo=metainfo,
        data_prefix=dict(img_path="train2017", seg_map_path="semantic_train2017"),
        img_suffix=".png",
        pipeline=train_pipeline,
    ),
)
val_dataloader = dict(
    batch_size=4,
    num_workers=1,
    persistent_workers=False,
    dataset=dict(
        type="BaseSegDataset",
        data_root=data_root,
        metainfo=metainfo,
        data_prefix=dict(img_path="val2017", seg_map_path="semantic_val2017"),
        img_suffix=".png",
        pipeline=test_pipeline,
    ),
)
test_dataloader = val_dataloader

# Model. SyncBN needs a GPU when training is distributed; BN does not.
norm_cfg = dict(type="BN", requires_grad=True)
model = dict(
    data_preprocessor=dict(size=(image_size, image_size)),
    backbone=dict(
        init_cfg=dict(_delete_=True),
        arch=dict(
            _delete_=True,
            stem_hidden_dim=16,
            embed_dims=[32, 64, 96, 128],
            depths=[1, 1, 2, 1],
            mlp_ratios=[4, 4, 4, 4],
        ),
        drop_path_rate=0.0,
    ),
    decode_head=dict(
        in_channels=[32, 64, 96, 128],
        channels=48,
        num_classes=num_classes,
        norm_cfg=norm_cfg,
    ),
    auxiliary_head=dict(in_channels=96, channels=32, num_classes=num_classes, norm_cfg=norm_cfg),
)

# Schedule.
max_iters = 1800
train_cfg = dict(max_iters=max_iters, val_interval=600)
auto_scale_lr = dict(base_batch_size=8)
optim_wrapper = dict(optimizer=dict(lr=3e-3), clip_grad=dict(_delete_=True, max_norm=10.0))
param_scheduler = [
    dict(type="LinearLR", start_factor=0.01, by_epoch=False, begin=0, end=50),
    dict(type="PolyLR", power=1.0, eta_min=0.0, by_epoch=False, begin=50, end=max_iters),
]

default_hooks = dict(
    logger=dict(interval=20),
    checkpoint=dict(interval=600, max_keep_ckpts=2),
    visualization=dict(draw=True, interval=10),
)
