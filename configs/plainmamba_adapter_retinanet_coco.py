"""RetinaNet with a PlainMamba-Adapter-L1 backbone on COCO: 12 epochs ("1x"), 1333x800, 16 images a step.

The published detector: 41.7 box AP. The FPN starts at stride 8, so parts of the backbone get no gradient. The batch of 16
is 8 GPUs with 2 images each; with another number of GPUs, pass --auto-scale-lr.
"""

_base_ = [
    "mmdet::_base_/models/retinanet_r50_fpn.py",
    "mmdet::_base_/datasets/coco_detection.py",
    "./_base_/adamw_adapter.py",
    "mmdet::_base_/default_runtime.py",
]
custom_imports = dict(imports=["mmvssm"], allow_failed_imports=False)

sync_bn = "torch"
find_unused_parameters = True
model = dict(
    backbone=dict(
        _delete_=True,
        type="mmvssm.PlainMambaAdapter",
        arch="L1",
        drop_path_rate=0.1,
        init_cfg=dict(type="Pretrained", checkpoint="mmvssm://plainmamba_l1", prefix="backbone."),
    ),
    neck=dict(
        in_channels=[192] * 4,
        add_extra_convs="on_output",
        norm_cfg=dict(type="SyncBN", requires_grad=True),
    ),
)
optim_wrapper = dict(clip_grad=dict(max_norm=35, norm_type=2))

val_evaluator = dict(classwise=True)
test_evaluator = val_evaluator
default_hooks = dict(checkpoint=dict(save_best="coco/bbox_mAP"))
