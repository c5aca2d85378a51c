"""AdamW and 160k iterations for segmenters: without weight decay for norms and for what a scan learns by itself."""

_base_ = ["mmseg::_base_/schedules/schedule_160k.py"]

optim_wrapper = dict(
    optimizer=dict(_delete_=True, type="AdamW", lr=6e-5, betas=(0.9, 0.999), weight_decay=0.01),
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
auto_scale_lr = dict(enable=False, base_batch_size=16)

param_scheduler = [
    dict(type="LinearLR", start_factor=1e-6, by_epoch=False, begin=0, end=1500),
    dict(type="PolyLR", power=1.0, eta_min=0.0, by_epoch=False, begin=1500, end=160000),
]

default_hooks = dict(checkpoint=dict(save_best="mIoU"))
