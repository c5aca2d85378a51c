"""UperNet with a pruned Vim-S backbone on ADE20K, 29 % fewer FLOPs in the backbone at 224x224.

Fine-tune it from dense weights: `load_from` a dense UperNet. Without, it starts from published ImageNet-1k weights. The
share of tokens that is kept falls from 1 to the preset's over the first 6,000 iterations.
"""

_base_ = "./vim_small_upernet_ade20k.py"

model = dict(backbone=dict(pruning="S"))
custom_hooks = [dict(type="mmvssm.KeepRatioWarmup", num_iters=6000)]
