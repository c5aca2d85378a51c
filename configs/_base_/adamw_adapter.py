"""AdamW and 12 epochs ("1x") for PlainMamba-Adapter's detectors, as published: norms and biases are not decayed either."""

_base_ = ["mmdet::_base_/schedules/schedule_1x.py"]

optim_wrapper = dict(
    optimizer=dict(_delete_=True, type="AdamW", lr=1e-4, betas=(0.9, 0.999), weight_decay=0.05),
    paramwise_cfg=dict(
        custom_keys={
            "level_embed": dict(decay_mult=0.0),
            "pos_embed": dict(decay_mult=0.0),
            "norm": dict(decay_mult=0.0),
            "bias": dict(decay_mult=0.0),
            "A_log": dict(decay_mult=0.0),
            "mixer.D": dict(decay_mult=0.0),
            "direction_Bs": dict(decay_mult=0.0),
        },
    ),
)

param_scheduler = [
    dict(type="LinearLR", start_factor=0.001, by_epoch=False, begin=0, end=500),
    dict(type="MultiStepLR", by_epoch=True, begin=0, end=12, milestones=[8, 11], gamma=0.1),
]
