"""Operators. This folder knows nothing of models."""

from .selective_scan import selective_scan
from .sparse_depthwise_conv import neighbor_table, sparse_depthwise_conv
from .traversal import SnakeWalks, Traversal, cross_traversal, snake_walks

__all__ = [
    "SnakeWalks",
    "Traversal",
    "cross_traversal",
    "neighbor_table",
    "selective_scan",
    "snake_walks",
    "sparse_depthwise_conv",
]
