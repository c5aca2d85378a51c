"""GroupMamba-T on ImageNet-1k without a teacher: 300 epochs, 1024 images a step.

The published recipe (its train.py, config.py) less its teacher: with that it is groupmamba_distilled_imagenet.py. The
batch of 1024 is 8 GPUs with 128 images each; with another number of GPUs, pass --auto-scale-lr.
"""

_base_ = [
    "mmpretrain::_base_/datasets/imagenet_bs64_swin_224.py",
    "./_base_/adamw_imagenet.py",
    "mmpretrain::_base_/default_runtime.py",
]
custom_imports = dict(imports=["mmvssm", "mmvssm.pretraining"], allow_failed_imports=False)

model = dict(
    type="mmpretrain.ImageClassifier",
    _scope_="mmpretrain",  # also in a config that inherits this one as mmvssm::...
    backbone=dict(
        type="mmvssm.GroupMamba",
        arch="tiny",
        out_indices=(3,),
        out_type="unnormed",
        drop_path_rate=0.05,
    ),
    neck=dict(type="mmvssm.ClassBlock", in_channels=448, mlp_ratio=4),
    head=dict(
        type="mmpretrain.LinearClsHead",
        num_classes=1000,
        in_channels=448,
        init_cfg=dict(type="TruncNormal", layer="Linear", std=0.02),
        loss=dict(type="mmpretrain.LabelSmoothLoss", label_smooth_val=0.1, mode="original"),
    ),
    train_cfg=dict(
        augments=[
            dict(type="mmpretrain.Mixup", alpha=0.8),
            dict(type="mmpretrain.CutMix", alpha=1.0),
        ]
    ),
)

train_dataloader = dict(batch_size=128)

custom_hooks = [
    dict(
        type="mmpretrain.EMAHook",
        momentum=1e-4,
        update_buffers=True,  # BatchNorm's statistics too, or they would be those of other weights
        priority="ABOVE_NORMAL",
    )
]
default_hooks = dict(checkpoint=dict(max_keep_ckpts=3, save_best="auto"))
