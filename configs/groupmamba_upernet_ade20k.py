"""UperNet with a GroupMamba-T backbone on ADE20K: 160k iterations, 512x512 crops, 16 images a step.

The paper reports 48.6 mIoU (49.2 with test-time augmentation, tools/test.py --tta). As there, the backbone starts from
published ImageNet-1k weights, which are downloaded from their authors when training begins; with --from-scratch it starts at
random.

The batch of 16 is 8 GPUs with 2 images each; with another number of GPUs, pass --auto-scale-lr.
"""

_base_ = [
    "mmseg::_base_/models/upernet_r50.py",
    "mmseg::_base_/datasets/ade20k.py",
    "./_base_/adamw_segmentation.py",
    "mmseg::_base_/default_runtime.py",
]
custom_imports = dict(imports=["mmvssm"], allow_failed_imports=False)

model = dict(
    data_preprocessor=dict(size=(512, 512)),
    pretrained=None,
    backbone=dict(
        _delete_=True,
        type="mmvssm.GroupMamba",
        arch="tiny",
        out_indices=(0, 1, 2, 3),
        drop_path_rate=0.2,
        init_cfg=dict(type="Pretrained", checkpoint="mmvssm://groupmamba_tiny", prefix="backbone."),
    ),
    decode_head=dict(in_channels=[64, 128, 348, 448], num_classes=150),
    auxiliary_head=dict(in_channels=348, num_classes=150),
)

train_dataloader = dict(batch_size=2)

# Test-time augmentation scales the (2048, 512) of the single-scale test, as papers do; the inherited
# pipeline scales the pictures' own sizes, which in ADE20K vary a lot.
img_ratios = [0.5, 0.75, 1.0, 1.25, 1.5, 1.75]
tta_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(
        type="TestTimeAug",
        _scope_="mmseg",  # also in a config that inherits this one as mmvssm::...
        transforms=[
            [
                dict(type="Resize", scale=(int(2048 * r), int(512 * r)), keep_ratio=True)
                for r in img_ratios
            ],
            [
                dict(type="RandomFlip", prob=0.0, direction="horizontal"),
                dict(type="RandomFlip", prob=1.0, direction="horizontal"),
            ],
            [dict(type="LoadAnnotations", reduce_zero_label=True)],
            [dict(type="PackSegInputs")],
        ],
    ),
]
