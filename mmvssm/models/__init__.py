"""Models. This folder builds on the operators and knows nothing of data sets or tools."""

from .backbones import GroupMamba
from .classifiers import GroupMambaClassifier

__all__ = ["GroupMamba", "GroupMambaClassifier"]
