"""The recipe of plainmamba_imagenet.py with PlainMamba-L2, and averaged weights (EMA), as published."""

_base_ = "./plainmamba_imagenet.py"

model = dict(
    backbone=dict(arch="L2", drop_path_rate=0.2),
    head=dict(in_channels=384),
)
optim_wrapper = dict(clip_grad=dict(max_norm=1.0))
custom_hooks = [
    dict(
        type="mmpretrain.EMAHook",
        momentum=1e-4,
        update_buffers=True,  # BatchNorm's statistics too, or they would be those of other weights
        priority="ABOVE_NORMAL",
    )
]
