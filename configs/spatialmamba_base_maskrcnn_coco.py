"""The recipe of spatialmamba_maskrcnn_coco.py with Spatial-Mamba-B; the paper reports 50.4 box AP and 45.1 mask AP."""

_base_ = "./spatialmamba_maskrcnn_coco.py"

model = dict(
    backbone=dict(
        arch="B", drop_path_rate=0.5, init_cfg=dict(checkpoint="mmvssm://spatialmamba_base")
    ),
    neck=dict(in_channels=[96, 192, 384, 768]),
)
