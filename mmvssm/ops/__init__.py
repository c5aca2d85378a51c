"""Operators. This folder depends only on torch and does not import models.

The selective scan and the depthwise convolution over kept tokens are folders with several backends; each ``pytorch.py``
defines the contract. The other modules speed up CPUs by processing maps in pieces that fit the cache.
"""

from .backend import onnxruntime_library
from .chunks import in_chunks
from .conv_act import conv_act
from .conv_ffn import conv_ffn
from .depthwise_conv import centred, depthwise_conv, line_conv
from .dilated_conv import dilated_conv
from .linear import linear
from .selective_scan import selective_scan
from .selective_scan.traversal import (
    SnakeWalks,
    Traversal,
    cross_traversal,
    line_walks,
    snake_walks,
)
from .sparse_depthwise_conv import neighbor_table, sparse_depthwise_conv

__all__ = [
    "SnakeWalks",
    "Traversal",
    "centred",
    "conv_act",
    "conv_ffn",
    "cross_traversal",
    "depthwise_conv",
    "dilated_conv",
    "in_chunks",
    "line_conv",
    "line_walks",
    "linear",
    "neighbor_table",
    "onnxruntime_library",
    "selective_scan",
    "snake_walks",
    "sparse_depthwise_conv",
]
