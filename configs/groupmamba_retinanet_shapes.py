"""RetinaNet on the generated data set, with a small GroupMamba and a narrow head."""

_base_ = [
    "mmdet::_base_/models/retinanet_r50_fpn.py",
    "./_base_/shapes_boxes.py",
    "./_base_/small_backbones.py",
]

channels = 64
model = dict(
    backbone=dict(_delete_=True, **{**_base_.groupmamba, "out_indices": (1, 2, 3)}),
    neck=dict(
        in_channels=[64, 96, 128],
        out_channels=channels,
        start_level=0,
        add_extra_convs="on_output",
        norm_cfg=dict(type="BN"),
    ),
    bbox_head=dict(
        num_classes=_base_.num_classes,
        in_channels=channels,
        feat_channels=channels,
        stacked_convs=2,
        anchor_generator=dict(octave_base_scale=2),
    ),
)
