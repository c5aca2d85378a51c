"""Faster R-CNN with a small GroupMamba on BCCD's photographs of blood cells, from scratch, on CPU cores.

The cells of 640x480 images are found at 320x240. ``--data-root`` reads the data set as it is published, in Pascal VOC's
layout; without it, ``data/bccd`` has to be in COCO's.
"""

_base_ = "./groupmamba_fasterrcnn_shapes.py"

# Data.
prepare_data = None
data_root = "data/bccd/"
metainfo = dict(
    classes=("Platelets", "RBC", "WBC"),
    palette=[(240, 200, 40), (230, 60, 60), (60, 110, 230)],
)
num_classes = 3

image_size = (320, 240)
train_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="LoadAnnotations", with_bbox=True),
    dict(type="Resize", scale=image_size, keep_ratio=True),
    dict(type="RandomFlip", prob=[0.3, 0.3], direction=["horizontal", "vertical"]),
    dict(type="PhotoMetricDistortion"),
    dict(type="PackDetInputs"),
]
test_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="Resize", scale=image_size, keep_ratio=True),
    dict(type="LoadAnnotations", with_bbox=True),
    dict(
        type="PackDetInputs",
        meta_keys=("img_id", "img_path", "ori_shape", "img_shape", "scale_factor"),
    ),
]
train_dataloader = dict(
    dataset=dict(data_root=data_root, metainfo=metainfo, pipeline=train_pipeline),
)
val_dataloader = dict(
    dataset=dict(data_root=data_root, metainfo=metainfo, pipeline=test_pipeline),
)
test_dataloader = val_dataloader
val_evaluator = dict(ann_file=data_root + "annotations/instances_val2017.json", metric="bbox")
test_evaluator = val_evaluator

# Model.
embed_dims = [48, 96, 160, 256]
model = dict(
    backbone=dict(arch=dict(embed_dims=embed_dims, depths=[1, 1, 3, 1])),
    neck=dict(in_channels=embed_dims),
    roi_head=dict(bbox_head=dict(num_classes=num_classes)),
)

# Schedule.
max_epochs = 16
train_cfg = dict(max_epochs=max_epochs, val_interval=max_epochs)
param_scheduler = [
    dict(type="LinearLR", start_factor=0.01, by_epoch=False, begin=0, end=100),
    dict(
        type="CosineAnnealingLR",
        eta_min_ratio=0.01,
        begin=0,
        end=max_epochs,
        T_max=max_epochs,
        by_epoch=True,
        convert_to_iter_based=True,
    ),
]
default_hooks = dict(checkpoint=dict(interval=4), visualization=dict(draw=False))
