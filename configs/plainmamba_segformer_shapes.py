"""SegFormer's head on the generated data set, with a small PlainMamba."""

_base_ = "./plainmamba_upernet_shapes.py"

model = dict(
    decode_head=dict(
        _delete_=True,
        type="SegformerHead",
        in_channels=[64] * 4,
        in_index=[0, 1, 2, 3],
        channels=48,
        dropout_ratio=0.1,
        num_classes=_base_.num_classes,
        norm_cfg=dict(type="BN", requires_grad=True),
        align_corners=False,
        loss_decode=dict(type="CrossEntropyLoss", use_sigmoid=False, loss_weight=1.0),
    ),
    auxiliary_head=None,
)
