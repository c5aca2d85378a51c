"""Image classifiers: what the backbones are pre-trained as."""

from .group_mamba_classifier import GroupMambaClassifier

__all__ = ["GroupMambaClassifier"]
