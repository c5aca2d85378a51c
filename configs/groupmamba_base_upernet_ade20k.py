"""UperNet with a GroupMamba-B backbone on ADE20K; all else as for GroupMamba-T."""

_base_ = "./groupmamba_upernet_ade20k.py"

model = dict(
    backbone=dict(
        arch="base",
        drop_path_rate=0.5,
        init_cfg=dict(checkpoint="mmvssm://groupmamba_base"),
    ),
    decode_head=dict(in_channels=[96, 192, 424, 512]),
    auxiliary_head=dict(in_channels=424),
)
