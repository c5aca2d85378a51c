"""Faster R-CNN on the generated data set, for boxes alone: groupmamba_maskrcnn_shapes.py without masks."""

_base_ = [
    "mmdet::_base_/models/faster-rcnn_r50_fpn.py",
    "./_base_/shapes_boxes.py",
    "./_base_/small_backbones.py",
]

channels = 64
model = dict(
    backbone=dict(_delete_=True, **_base_.groupmamba),
    neck=dict(in_channels=[32, 64, 96, 128], out_channels=channels, norm_cfg=dict(type="BN")),
    rpn_head=dict(
        in_channels=channels,
        feat_channels=channels,
        anchor_generator=dict(scales=[4]),
    ),
    roi_head=dict(
        bbox_roi_extractor=dict(out_channels=channels),
        bbox_head=dict(in_channels=channels, fc_out_channels=256, num_classes=_base_.num_classes),
    ),
    train_cfg=dict(
        rpn_proposal=dict(nms_pre=300, max_per_img=150),
        rcnn=dict(sampler=dict(num=64)),
    ),
    test_cfg=dict(rpn=dict(nms_pre=300, max_per_img=100)),
)
