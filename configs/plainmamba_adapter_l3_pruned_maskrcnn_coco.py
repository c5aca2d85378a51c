"""The recipe of plainmamba_adapter_l3_maskrcnn_coco.py with PlainMamba-Adapter-L3, pruned by its preset."""

_base_ = "./plainmamba_adapter_l3_maskrcnn_coco.py"

model = dict(backbone=dict(pruning="L3"))
custom_hooks = [dict(type="mmvssm.KeepRatioWarmup", num_iters=10000)]
