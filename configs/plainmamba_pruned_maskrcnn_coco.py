"""Mask R-CNN with a pruned PlainMamba-L1 backbone on COCO, 42.6 % fewer FLOPs in the backbone at 224x224.

Fine-tune it from dense weights: `load_from` a dense Mask R-CNN. Without, it starts from published
ImageNet-1k weights. The share of tokens that is kept falls from 1 to the preset's over the first two epochs.
"""

_base_ = ["./plainmamba_maskrcnn_coco.py"]

model = dict(backbone=dict(pruning="L1"))
custom_hooks = [dict(type="mmvssm.KeepRatioWarmup", num_iters=14660)]
