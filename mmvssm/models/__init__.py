"""Models. This folder builds on the operators and knows nothing of data sets or tools."""

from .backbones import GroupMamba, PlainMamba
from .classifiers import ClassBlock, GroupMambaClassifier
from .necks import TokenPooling, TokenRestoration

__all__ = [
    "ClassBlock",
    "GroupMamba",
    "GroupMambaClassifier",
    "PlainMamba",
    "TokenPooling",
    "TokenRestoration",
]
