"""The ResNet-18 of resnet18_cutmix_cifar10.py, its last epochs without CutMix: the teacher of the distilled students.

    python tools/train.py configs/resnet18_finetuned_cifar10.py --cfg-options \
        load_from=work_dirs/resnet18_cutmix_cifar10/epoch_24.pth
"""

_base_ = "./resnet18_cifar10.py"

optim_wrapper = dict(optimizer=dict(lr=0.01))
train_cfg = dict(max_epochs=5)
param_scheduler = [
    dict(
        type="CosineAnnealingLR",
        eta_min=0.0,
        by_epoch=True,
        end=5,
        convert_to_iter_based=True,
    ),
]
