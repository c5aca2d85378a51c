"""A pruned PlainMamba-L1 on ImageNet-1k, fine-tuned from dense weights for 30 epochs: 42.6 % fewer FLOPs.

The published dense weights are downloaded from their authors when training begins; --cfg-options load_from=FILE names those
that plainmamba_imagenet.py leaves. The share of tokens that is kept falls from 1 to the preset's over the first 10 of the epochs. Thirty epochs are the
pruning paper's; the learning rate, a tenth of the dense model's, is chosen here.
"""

_base_ = "./plainmamba_imagenet.py"

model = dict(backbone=dict(pruning="L1"))
load_from = "mmvssm://plainmamba_l1"

optim_wrapper = dict(optimizer=dict(lr=1e-4))
param_scheduler = [
    dict(type="LinearLR", start_factor=1e-3, by_epoch=True, end=1, convert_to_iter_based=True),
    dict(type="CosineAnnealingLR", eta_min=1e-6, by_epoch=True, begin=1),
]
train_cfg = dict(max_epochs=30)
custom_hooks = [dict(type="mmvssm.KeepRatioWarmup", num_iters=12510)]
