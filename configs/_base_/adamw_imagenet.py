"""AdamW for classifiers: without weight decay for norms, biases and what a scan learns by itself.

The inherited schedule has a learning rate of 1e-3, a weight decay of 0.05 and 20 epochs of warm-up.
"""

_base_ = ["mmpretrain::_base_/schedules/imagenet_bs1024_adamw_swin.py"]

optim_wrapper = dict(
    clip_grad=dict(max_norm=5.0),
    paramwise_cfg=dict(
        custom_keys={
            "A_log": dict(decay_mult=0.0),
            "scan.D": dict(decay_mult=0.0),  # GroupMamba's
            "mixer.D": dict(decay_mult=0.0),  # PlainMamba's
            "pos_embed": dict(decay_mult=0.0),
            "direction_Bs": dict(decay_mult=0.0),
        },
    ),
)
