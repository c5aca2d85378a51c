"""A pruned PlainMamba on CIFAR-10, fine-tuned from the weights that plainmamba_cifar10.py leaves.

    python tools/train.py configs/plainmamba_pruned_cifar10.py --cfg-options \
        load_from=work_dirs/plainmamba_cifar10/epoch_10.pth
"""

_base_ = "./plainmamba_cifar10.py"

# Of 16 x 16 tokens 12 x 12 are kept, then 9 x 9 and 7 x 7: alignment='none' packs them into such grids.
model = dict(backbone=dict(pruning=dict(layers=(1, 2, 3), keep_ratio=(9 / 16, 9 / 16, 49 / 81))))

optim_wrapper = dict(optimizer=dict(lr=3e-4))
train_cfg = dict(max_epochs=3)
param_scheduler = [
    dict(
        type="CosineAnnealingLR",
        eta_min=1e-6,
        by_epoch=True,
        end=3,
        convert_to_iter_based=True,
    ),
]
custom_hooks = [dict(type="mmvssm.KeepRatioWarmup", num_iters=390)]
