"""GroupMamba-T on ImageNet-1k, distilled as published: 300 epochs, 1024 images a step, RegNetY-16GF as the teacher.

The paper reports 83.3 % (83.9 % for GroupMamba-S, 84.5 % for GroupMamba-B). timm downloads the teacher's weights when
training begins, 335 MB; a file of them is named by --cfg-options model.teacher.pretrained=False
model.teacher_checkpoint=FILE. Evaluation needs no teacher.
"""

_base_ = "./groupmamba_imagenet.py"

model = dict(
    type="mmvssm.DistilledClassifier",
    head=dict(
        _delete_=True,
        type="mmvssm.DistillationHead",
        num_classes=1000,
        in_channels=448,
        distillation="hard",
        distillation_weight=0.5,
        loss=dict(type="mmpretrain.LabelSmoothLoss", label_smooth_val=0.1, mode="original"),
    ),
    teacher=dict(
        type="mmpretrain.TimmClassifier",
        _scope_="mmpretrain",
        model_name="regnety_160.deit_in1k",
        pretrained=True,
    ),
)
