"""The recipe of vim_plus_imagenet.py with Vim-S; published weights have 81.6 %."""

_base_ = "./vim_plus_imagenet.py"

model = dict(backbone=dict(arch="S+"), head=dict(in_channels=384))
load_from = "mmvssm://vim_small"
