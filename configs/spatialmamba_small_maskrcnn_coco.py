"""The recipe of spatialmamba_maskrcnn_coco.py with Spatial-Mamba-S; the paper reports 49.2 box AP and 44.0 mask AP."""

_base_ = "./spatialmamba_maskrcnn_coco.py"

model = dict(
    backbone=dict(
        arch="S", drop_path_rate=0.3, init_cfg=dict(checkpoint="mmvssm://spatialmamba_small")
    )
)
