"""Necks."""

from .token_pooling import TokenPooling
from .token_restoration import TokenRestoration

__all__ = ["TokenPooling", "TokenRestoration"]
