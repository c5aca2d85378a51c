"""Spatial-Mamba-T on ImageNet-1k: 300 epochs, 1024 images a step.

The paper reports 83.5 %. The recipe of vmamba_imagenet.py, which is the published one but for MESA: from a quarter of the
epochs on, the published training adds a loss against the averaged model's outputs. We have not implemented that.
"""

_base_ = "./vmamba_imagenet.py"

model = dict(backbone=dict(type="mmvssm.SpatialMamba"), head=dict(in_channels=512))
