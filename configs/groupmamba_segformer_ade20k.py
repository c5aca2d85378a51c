"""SegFormer's head on a GroupMamba-T backbone, on ADE20K: 160k iterations, 512x512 crops, 16 images a step.

The recipe of groupmamba_upernet_ade20k.py without its auxiliary head; we know of no published result.
"""

_base_ = "./groupmamba_upernet_ade20k.py"

model = dict(
    decode_head=dict(
        _delete_=True,
        type="SegformerHead",
        in_channels=[64, 128, 348, 448],
        in_index=[0, 1, 2, 3],
        channels=256,
        dropout_ratio=0.1,
        num_classes=150,
        norm_cfg=dict(type="SyncBN", requires_grad=True),
        align_corners=False,
        loss_decode=dict(type="CrossEntropyLoss", use_sigmoid=False, loss_weight=1.0),
    ),
    auxiliary_head=None,
)
