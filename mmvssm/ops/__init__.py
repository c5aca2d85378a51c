"""Operators. This folder knows nothing of models."""

from .depthwise_conv import depthwise_conv
from .selective_scan import selective_scan
from .sparse_depthwise_conv import neighbor_table, sparse_depthwise_conv
from .traversal import SnakeWalks, Traversal, cross_traversal, snake_walks

__all__ = [
    "SnakeWalks",
    "Traversal",
    "cross_traversal",
    "depthwise_conv",
    "neighbor_table",
    "selective_scan",
    "snake_walks",
    "sparse_depthwise_conv",
]
