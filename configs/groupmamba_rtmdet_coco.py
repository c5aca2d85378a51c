"""RTMDet-m's neck and head on a GroupMamba-T backbone, on COCO: 12 epochs ("1x"), 1333x800, 16 images a step.

The recipe of groupmamba_maskrcnn_coco.py for boxes alone, not RTMDet's 300 epochs with mosaics; we know of no published result.
"""

_base_ = ["./_base_/rtmdet.py", "./_base_/coco_boxes.py"]

model = dict(
    backbone=dict(
        type="mmvssm.GroupMamba",
        arch="tiny",
        out_indices=(1, 2, 3),
        drop_path_rate=0.2,
        init_cfg=dict(type="Pretrained", checkpoint="mmvssm://groupmamba_tiny", prefix="backbone."),
    ),
    neck=dict(in_channels=[128, 348, 448]),
)
# Its heads of all strides share their convolutions.
optim_wrapper = dict(paramwise_cfg=dict(bypass_duplicate=True))
