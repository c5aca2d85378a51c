"""UperNet with a pruned PlainMamba-L1 backbone on ADE20K, 42.6 % fewer FLOPs in the backbone at 224x224.

Fine-tune it from dense weights: `load_from` a dense UperNet. Without, it starts from published
ImageNet-1k weights. The share of tokens that is kept falls from 1 to the preset's over the first 16,000 iterations.
"""

_base_ = ["./plainmamba_upernet_ade20k.py"]

model = dict(backbone=dict(pruning="L1"))
custom_hooks = [dict(type="mmvssm.KeepRatioWarmup", num_iters=16000)]
