"""A pruned Vim on CIFAR-10, fine-tuned from the weights that vim_cifar10.py leaves.

    python tools/train.py configs/vim_pruned_cifar10.py --cfg-options \
        load_from=work_dirs/vim_cifar10/epoch_10.pth
"""

_base_ = "./vim_cifar10.py"

# After a sixth, a third and half of the layers, as in plainmamba_pruned_cifar10.py.
model = dict(backbone=dict(pruning=dict(layers=(0, 1, 2), keep_ratio=(46 / 64, 33 / 46, 23 / 33))))

optim_wrapper = dict(optimizer=dict(lr=5e-4))
train_cfg = dict(max_epochs=3)
param_scheduler = [
    dict(type="CosineAnnealingLR", eta_min=1e-6, by_epoch=True, end=3, convert_to_iter_based=True),
]
custom_hooks = [dict(type="mmvssm.KeepRatioWarmup", num_iters=390)]
