"""The recipe of plainmamba_pruned_maskrcnn_coco.py with PlainMamba-L2: 42.7 % fewer FLOPs in the backbone at 224x224."""

_base_ = ["./plainmamba_l2_maskrcnn_coco.py"]

model = dict(backbone=dict(pruning="L2"))
custom_hooks = [dict(type="mmvssm.KeepRatioWarmup", num_iters=14660)]
