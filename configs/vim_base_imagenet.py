"""The recipe of vim_small_imagenet.py with Vim-B; published weights have 81.9 %."""

_base_ = "./vim_small_imagenet.py"

model = dict(backbone=dict(arch="B"), head=dict(in_channels=768))
