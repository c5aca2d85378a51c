"""The ResNet-18 of resnet18_cifar10.py, trained on with CutMix, twice: the teacher of groupmamba_distilled_cifar10.py.

    python tools/train.py configs/resnet18_cifar10.py
    python tools/train.py configs/resnet18_cutmix_cifar10.py --cfg-options \
        load_from=work_dirs/resnet18_cifar10/epoch_40.pth
    python tools/train.py configs/resnet18_cutmix_cifar10.py --work-dir work_dirs/resnet18_cutmix_again_cifar10 \
        --cfg-options load_from=work_dirs/resnet18_cutmix_cifar10/epoch_24.pth randomness.seed=1

tools/experiments/accuracy.py does all that, and takes the mean of the last two trainings' weights.
"""

_base_ = "./resnet18_cifar10.py"

model = dict(
    train_cfg=dict(augments=[dict(type="mmpretrain.CutMix", alpha=1.0)], probs=[0.5]),
)
optim_wrapper = dict(optimizer=dict(lr=0.05))
train_cfg = dict(max_epochs=24)
param_scheduler = [
    dict(
        type="CosineAnnealingLR",
        eta_min=0.0,
        by_epoch=True,
        end=24,
        convert_to_iter_based=True,
    ),
]
