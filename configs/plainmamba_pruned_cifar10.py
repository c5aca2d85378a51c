"""A pruned PlainMamba on CIFAR-10, fine-tuned from the weights that plainmamba_cifar10.py leaves.

    python tools/train.py configs/plainmamba_pruned_cifar10.py --cfg-options \
        load_from=work_dirs/plainmamba_cifar10/epoch_10.pth
"""

_base_ = "./plainmamba_cifar10.py"

model = dict(backbone=dict(pruning=dict(layers=(1, 2, 3), keep_ratio=0.6)))

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
