"""Operators. This folder needs torch alone and knows nothing of models.

A folder for each operator with backends of its own, where ``pytorch.py`` sets the contract: the selective scan and the
depthwise convolution over kept tokens. Beside them what CPUs work out in pieces that stay in the cache.
"""

from .backend import onnxruntime_library
from .chunks import in_chunks
from .conv_ffn import conv_ffn
from .depthwise_conv import depthwise_conv
from .selective_scan import selective_scan
from .selective_scan.traversal import SnakeWalks, Traversal, cross_traversal, snake_walks
from .sparse_depthwise_conv import neighbor_table, sparse_depthwise_conv

__all__ = [
    "SnakeWalks",
    "Traversal",
    "conv_ffn",
    "cross_traversal",
    "depthwise_conv",
    "in_chunks",
    "neighbor_table",
    "onnxruntime_library",
    "selective_scan",
    "snake_walks",
    "sparse_depthwise_conv",
]
