"""Vim-T fine-tuned with overlapping patches, of stride 8: 30 epochs at a learning rate of 1e-5.

The paper reports 78.3 %. It starts from the published weights of stride 16, whose position embedding is resized.
"""

_base_ = "./vim_imagenet.py"

model = dict(backbone=dict(arch="T+"))
load_from = "mmvssm://vim_tiny"
optim_wrapper = dict(optimizer=dict(lr=1e-5, weight_decay=1e-8))
param_scheduler = [dict(type="ConstantLR", factor=1.0)]
train_cfg = dict(max_epochs=30)
