"""The Vim demo on the generated data set, pruned: half of the tokens go after layer 1, half of the rest after 3."""

_base_ = "./vim_upernet_shapes.py"

model = dict(backbone=dict(pruning=dict(layers=(1, 3), keep_ratio=0.5)))
custom_hooks = [dict(type="mmvssm.KeepRatioWarmup", num_iters=300)]
