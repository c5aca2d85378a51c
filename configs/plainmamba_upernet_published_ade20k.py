"""UperNet with a PlainMamba-L1 backbone on ADE20K, as published: without a pyramid, all four maps at stride 16.

Published: 44.1 mIoU. The variant with a pyramid is plainmamba_upernet_ade20k.py. Test images have their sides rounded up to
multiples of 32.
"""

_base_ = "./plainmamba_upernet_ade20k.py"

model = dict(neck=None)
test_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="Resize", scale=(2048, 512), keep_ratio=True),
    dict(
        type="ResizeToMultiple",
        _scope_="mmseg",  # also in a config that inherits this one as mmvssm::...
        size_divisor=32,
    ),
    dict(type="LoadAnnotations", reduce_zero_label=True),
    dict(type="PackSegInputs"),
]
val_dataloader = dict(dataset=dict(pipeline=test_pipeline))
test_dataloader = val_dataloader
# Biases decay, as published.
optim_wrapper = dict(
    paramwise_cfg=dict(
        _delete_=True,
        custom_keys={
            "norm": dict(decay_mult=0.0),
            "pos_embed": dict(decay_mult=0.0),
            "A_log": dict(decay_mult=0.0),
            "mixer.D": dict(decay_mult=0.0),
            "direction_Bs": dict(decay_mult=0.0),
        },
    ),
)
