"""Models. This folder builds on the operators and knows nothing of data sets or tools."""

from .backbones import GroupMamba, PlainMamba
from .classifiers import GroupMambaClassifier
from .necks import TokenRestoration

__all__ = ["GroupMamba", "GroupMambaClassifier", "PlainMamba", "TokenRestoration"]
