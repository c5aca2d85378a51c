"""UperNet with a Vim-T backbone on ADE20K: 60k iterations, 512x512 crops, 32 images a step.

The paper reports 41.0 mIoU. The published script's numbers: what each layer adds to the tokens becomes a map, and tests slide
a window of 512x512 in steps of 341. The backbone starts from published ImageNet-1k weights; the paper's came from an older
pre-training, which was not released.

The batch of 32 is 4 GPUs with 8 images each; with another number of GPUs, pass --auto-scale-lr.
"""

_base_ = "./plainmamba_upernet_ade20k.py"

embed_dims = 192
model = dict(
    backbone=dict(
        _delete_=True,
        type="mmvssm.Vim",
        arch="T",
        img_size=512,
        out_indices=(5, 11, 17, 23),
        out_type="mixer",
        drop_path_rate=0.1,
        init_cfg=dict(type="Pretrained", checkpoint="mmvssm://vim_tiny", prefix="backbone."),
    ),
    test_cfg=dict(_delete_=True, mode="slide", crop_size=(512, 512), stride=(341, 341)),
)

train_dataloader = dict(batch_size=8)
optim_wrapper = dict(
    optimizer=dict(lr=2e-4, weight_decay=0.1),
    # As published: matrices are decayed, A_log among them.
    paramwise_cfg=dict(
        _delete_=True,
        norm_decay_mult=0.0,
        bias_decay_mult=0.0,
        flat_decay_mult=0.0,
        custom_keys={"pos_embed": dict(decay_mult=0.0)},
    ),
)
auto_scale_lr = dict(base_batch_size=32)
train_cfg = dict(max_iters=60000, val_interval=6000)
param_scheduler = [
    dict(type="LinearLR", start_factor=1e-6, by_epoch=False, begin=0, end=1500),
    dict(type="PolyLR", power=1.0, eta_min=0.0, by_epoch=False, begin=1500, end=60000),
]
default_hooks = dict(checkpoint=dict(interval=6000))
