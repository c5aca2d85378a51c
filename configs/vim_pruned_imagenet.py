"""The recipe of vim_small_pruned_imagenet.py with Vim-T: 10.9 % fewer FLOPs.

The pruning paper reports 75.1 % (76.1 % dense). Which layers it prunes is unknown; these give its FLOPs. The batch of 512 is
8 GPUs with 64 images each.
"""

_base_ = "./vim_small_pruned_imagenet.py"

model = dict(backbone=dict(arch="T", pruning="T"), head=dict(in_channels=192))
load_from = "mmvssm://vim_tiny"
auto_scale_lr = dict(base_batch_size=512)
