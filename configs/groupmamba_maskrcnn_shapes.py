"""The COCO recipe at a size that two CPU cores train in minutes, on the generated data set.

The same model, from scratch: a small GroupMamba, narrow heads, 160x160 images, fewer proposals.
"""

_base_ = ["mmdet::_base_/models/mask-rcnn_r50_fpn.py", "./_base_/shapes_instances.py"]

# Trained from scratch, the neck and the mask head need a norm.
channels = 64
norm_cfg = dict(type="BN", requires_grad=True)
model = dict(
    backbone=dict(
        _delete_=True,
        type="mmvssm.GroupMamba",
        arch=dict(
            stem_hidden_dim=16,
            embed_dims=[32, 64, 96, 128],
            depths=[1, 1, 2, 1],
            mlp_ratios=[4, 4, 4, 4],
        ),
        out_indices=(0, 1, 2, 3),
        drop_path_rate=0.0,
    ),
    neck=dict(in_channels=[32, 64, 96, 128], out_channels=channels, norm_cfg=norm_cfg),
    rpn_head=dict(
        in_channels=channels,
        feat_channels=channels,
        anchor_generator=dict(scales=[4]),
    ),
    roi_head=dict(
        bbox_roi_extractor=dict(out_channels=channels),
        bbox_head=dict(in_channels=channels, fc_out_channels=256, num_classes=_base_.num_classes),
        mask_roi_extractor=dict(out_channels=channels),
        mask_head=dict(
            num_convs=2,
            in_channels=channels,
            conv_out_channels=channels,
            num_classes=_base_.num_classes,
            norm_cfg=norm_cfg,
        ),
    ),
    train_cfg=dict(
        rpn_proposal=dict(nms_pre=300, max_per_img=150),
        rcnn=dict(sampler=dict(num=64)),
    ),
    test_cfg=dict(rpn=dict(nms_pre=300, max_per_img=100)),
)
