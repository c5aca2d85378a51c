"""A pruned Vim-S on ImageNet-1k, fine-tuned from dense weights for 30 epochs: 29.1 % fewer FLOPs.

The pruning paper reports 78.8 % (80.5 % dense) with alignment and 75.4 % without (model.backbone.pruning.alignment=none).
Layers, keep ratios and this fine-tuning are those of its code release, which has no alignment: 1e-5 throughout, no weight
decay, no drop path, full pruning from the first step. The batch of 256 is 4 GPUs with 64 images each.

The baseline that the release runs is pruning="S-released".
"""

_base_ = "./vim_small_imagenet.py"

model = dict(backbone=dict(pruning="S", drop_path_rate=0.0))
load_from = "mmvssm://vim_small"
train_dataloader = dict(batch_size=64)
optim_wrapper = dict(optimizer=dict(lr=1e-5, weight_decay=1e-8))
param_scheduler = [dict(type="ConstantLR", factor=1.0)]
train_cfg = dict(max_epochs=30)
auto_scale_lr = dict(base_batch_size=256)
