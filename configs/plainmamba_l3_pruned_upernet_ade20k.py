"""The recipe of plainmamba_pruned_upernet_ade20k.py with PlainMamba-L3: 41.5 % fewer FLOPs in the backbone at 224x224."""

_base_ = ["./plainmamba_l3_upernet_ade20k.py"]

model = dict(backbone=dict(pruning="L3"))
custom_hooks = [dict(type="mmvssm.KeepRatioWarmup", num_iters=16000)]
