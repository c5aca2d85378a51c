"""Operators. This folder knows nothing of models."""

from .selective_scan import selective_scan
from .traversal import Traversal, cross_traversal

__all__ = ["Traversal", "cross_traversal", "selective_scan"]
