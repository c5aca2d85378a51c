"""The recipe of plainmamba_pruned_imagenet.py with PlainMamba-L3: 41.5 % fewer FLOPs."""

_base_ = "./plainmamba_pruned_imagenet.py"

model = dict(
    backbone=dict(arch="L3", drop_path_rate=0.4, pruning="L3"),
    head=dict(in_channels=448),
)
load_from = "mmvssm://plainmamba_l3"
optim_wrapper = dict(clip_grad=dict(max_norm=1.0))
