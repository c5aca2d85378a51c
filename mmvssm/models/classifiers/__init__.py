"""Image classifiers: what the backbones are pre-trained as, see ``mmvssm.pretraining``."""

from .group_mamba_classifier import ClassBlock, GroupMambaClassifier

__all__ = ["ClassBlock", "GroupMambaClassifier"]
