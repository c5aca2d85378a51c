"""PlainMamba-L1 on ImageNet-1k: 300 epochs, 1024 images a step.

The paper reports 77.9 %. The recipe is that of groupmamba_imagenet.py, which the published one resembles, with the
published drop path rate and without averaged weights, which only the larger models were given. The published one warms up
for 15 epochs, and its 8 GPUs had 256 images each at twice the rate.
"""

_base_ = "./groupmamba_imagenet.py"

embed_dims = 192
model = dict(
    backbone=dict(_delete_=True, type="mmvssm.PlainMamba", arch="L1", drop_path_rate=0.2),
    neck=dict(_delete_=True, type="mmvssm.TokenPooling"),
    head=dict(in_channels=embed_dims),
)

custom_hooks = []
