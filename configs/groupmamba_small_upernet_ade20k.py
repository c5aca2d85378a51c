"""UperNet with a GroupMamba-S backbone on ADE20K; all else as for GroupMamba-T."""

_base_ = "./groupmamba_upernet_ade20k.py"

model = dict(
    backbone=dict(
        arch="small",
        drop_path_rate=0.3,
        init_cfg=dict(checkpoint="mmvssm://groupmamba_small"),
    ),
    decode_head=dict(in_channels=[64, 128, 348, 512]),
    auxiliary_head=dict(in_channels=348),
)
