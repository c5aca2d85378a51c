"""A small GroupMamba on CIFAR-10 with a convolutional teacher, that of resnet18_cutmix_cifar10.py.

How to train the teacher is said there; then:

    python tools/train.py configs/groupmamba_distilled_cifar10.py
"""

_base_ = ["./groupmamba_cifar10.py"]

model = dict(
    type="mmvssm.DistilledClassifier",
    head=dict(
        _delete_=True,
        type="mmvssm.DistillationHead",
        num_classes=10,
        in_channels=96,
        distillation="hard",
        distillation_weight=0.5,
        loss=dict(type="mmpretrain.LabelSmoothLoss", label_smooth_val=0.1, mode="original"),
    ),
    teacher=dict(
        type="mmpretrain.ImageClassifier",
        _scope_="mmpretrain",
        backbone=dict(type="mmpretrain.ResNet_CIFAR", depth=18, base_channels=32, stem_channels=32),
        neck=dict(type="mmpretrain.GlobalAveragePooling"),
        head=dict(
            type="mmpretrain.LinearClsHead", _scope_="mmpretrain", num_classes=10, in_channels=256
        ),
    ),
    teacher_checkpoint="work_dirs/resnet18_cutmix_again_cifar10/epoch_24.pth",
)
