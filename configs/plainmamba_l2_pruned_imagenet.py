"""The recipe of plainmamba_pruned_imagenet.py with PlainMamba-L2: 42.7 % fewer FLOPs."""

_base_ = "./plainmamba_pruned_imagenet.py"

model = dict(
    backbone=dict(arch="L2", drop_path_rate=0.2, pruning="L2"),
    head=dict(in_channels=384),
)
load_from = "mmvssm://plainmamba_l2"
optim_wrapper = dict(clip_grad=dict(max_norm=1.0))
