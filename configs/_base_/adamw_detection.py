"""AdamW and 12 epochs ("1x") for detectors: without weight decay for norms and for what a scan learns by itself."""

_base_ = ["mmdet::_base_/schedules/schedule_1x.py"]

optim_wrapper = dict(
    optimizer=dict(_delete_=True, type="AdamW", lr=1e-4, betas=(0.9, 0.999), weight_decay=0.05),
    paramwise_cfg=dict(
        norm_decay_mult=0.0,
        custom_keys={
            "A_log": dict(decay_mult=0.0),
            "scan.D": dict(decay_mult=0.0),  # GroupMamba's
            "mixer.D": dict(decay_mult=0.0),  # PlainMamba's
            "pos_embed": dict(decay_mult=0.0),
        },
    ),
)

param_scheduler = [
    dict(type="LinearLR", start_factor=0.001, by_epoch=False, begin=0, end=1000),
    dict(type="MultiStepLR", by_epoch=True, begin=0, end=12, milestones=[8, 11], gamma=0.1),
]
