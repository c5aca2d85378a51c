"""Necks."""

from .feature_pyramid import FeaturePyramid
from .token_pooling import TokenPooling
from .token_restoration import TokenRestoration

__all__ = ["FeaturePyramid", "TokenPooling", "TokenRestoration"]
