"""Models. This folder builds on the operators and knows nothing of data sets or tools."""

from . import published  # also teaches the backbones their published names
from .backbones import GroupMamba, PlainMamba, PlainMambaAdapter, SpatialMamba, Vim, VMamba
from .classifiers import ClassBlock, GroupMambaClassifier
from .keep_ratio_hook import KeepRatioWarmup
from .layer_decay import LayerDecayOptimWrapperConstructor
from .necks import FeaturePyramid, TokenPooling, TokenRestoration

__all__ = [
    "ClassBlock",
    "FeaturePyramid",
    "GroupMamba",
    "GroupMambaClassifier",
    "KeepRatioWarmup",
    "LayerDecayOptimWrapperConstructor",
    "PlainMamba",
    "PlainMambaAdapter",
    "SpatialMamba",
    "TokenPooling",
    "TokenRestoration",
    "VMamba",
    "Vim",
    "published",
]
