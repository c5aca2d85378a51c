"""The demo of PlainMamba-Adapter on the generated data set, pruned: a quarter of the tokens reaches the end."""

_base_ = "./plainmamba_adapter_maskrcnn_shapes.py"

model = dict(backbone=dict(pruning=dict(layers=(1, 3), keep_ratio=0.5)))
custom_hooks = [dict(type="mmvssm.KeepRatioWarmup", num_iters=400)]
