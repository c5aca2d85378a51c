"""RTMDet's neck and head on the generated data set, with a small GroupMamba and narrow maps."""

_base_ = ["./_base_/rtmdet.py", "./_base_/shapes_boxes.py", "./_base_/small_backbones.py"]

channels = 64
norm_cfg = dict(type="BN")
model = dict(
    backbone={**_base_.groupmamba, "out_indices": (1, 2, 3)},
    neck=dict(
        in_channels=[64, 96, 128], out_channels=channels, num_csp_blocks=1, norm_cfg=norm_cfg
    ),
    bbox_head=dict(
        num_classes=_base_.num_classes,
        in_channels=channels,
        feat_channels=channels,
        norm_cfg=norm_cfg,
    ),
    test_cfg=dict(nms_pre=1000, max_per_img=100),
)
# Its heads of all strides share their convolutions.
optim_wrapper = dict(paramwise_cfg=dict(bypass_duplicate=True))
