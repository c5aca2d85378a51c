"""The recipe of plainmamba_pruned_imagenet.py as the code release of the pruning paper fine-tunes its ViMs.

30 epochs of AdamW at 1e-5 throughout (5e-6 x batch / 512, of which 1e-5 is the floor), weight decay 1e-8, no drop path, weights
averaged with a decay of 0.99996, and full pruning from the first step. The batch of 512 is 8 GPUs with 64 images each.
"""

_base_ = "./plainmamba_pruned_imagenet.py"

model = dict(backbone=dict(drop_path_rate=0.0))

train_dataloader = dict(batch_size=64)
optim_wrapper = dict(optimizer=dict(lr=1e-5, weight_decay=1e-8))
param_scheduler = [dict(type="ConstantLR", factor=1.0)]
auto_scale_lr = dict(base_batch_size=512)
custom_hooks = [
    dict(
        type="mmpretrain.EMAHook",
        momentum=4e-5,
        update_buffers=True,
        priority="ABOVE_NORMAL",
    )
]
