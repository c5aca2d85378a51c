"""The recipe of vim_imagenet.py with Vim-S; the paper reports 80.5 %."""

_base_ = "./vim_imagenet.py"

model = dict(backbone=dict(arch="S", drop_path_rate=0.05), head=dict(in_channels=384))
optim_wrapper = dict(optimizer=dict(weight_decay=0.05))
