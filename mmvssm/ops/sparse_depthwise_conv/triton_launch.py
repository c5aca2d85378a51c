"""The sparse depthwise convolution on CUDA GPUs, by the kernels of ``triton_kernels.py``.

:func:`convolve` and :func:`weight_gradient` keep the contract of :mod:`mmvssm.ops.sparse_depthwise_conv.pytorch`. What
is added up across programs is added up in a fixed order: two runs agree bit for bit.

``neighbors`` is not checked: an entry beyond the tokens reads memory that is not the tensor's.
"""

from __future__ import annotations

from typing import Any, Optional

import torch
from torch import Tensor

from ..backend import accumulation_dtype
from ..triton_launcher import launch

# Of a tile, which four warps hold in registers.
_TOKENS, _LANES = 32, 64
# Tokens whose contributions to a weight's gradient one program adds up: a multiple of the tile's.
_PART = 512


def convolve(
    x: Tensor, weight: Tensor, neighbors: Tensor, bias: Optional[Tensor], reverse: bool = False
) -> Tensor:
    """See :func:`mmvssm.ops.sparse_depthwise_conv.pytorch.convolve`."""
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    # Channels adjacent, as those of the tokens are.
    taps = weight.flatten(1).t().to(accumulation_dtype(x, weight)).contiguous()
    arguments = dict(
        **_strided(x=x),
        **_sizes(x, neighbors),
        **dict(taps=taps, y=y, REVERSE=reverse),
        bias=None if bias is None else bias.contiguous(),
    )
    _launch("convolve", (_tiles(x.shape[0] * x.shape[1], _TOKENS), _channel_blocks(x)), arguments)
    return y


def weight_gradient(grad_y: Tensor, x: Tensor, neighbors: Tensor) -> Tensor:
    """See :func:`mmvssm.ops.sparse_depthwise_conv.pytorch.weight_gradient`."""
    taps, parts = neighbors.shape[-1], _tiles(x.shape[0] * x.shape[1], _PART)
    partials = x.new_empty((parts, taps, x.shape[-1]), dtype=accumulation_dtype(grad_y, x))
    arguments = dict(
        **_strided(grad_y=grad_y, x=x), **_sizes(x, neighbors), partials=partials, PART=_PART
    )
    _launch("weight_gradient", (taps, _channel_blocks(x), parts), arguments)
    return partials.sum(0).t().contiguous()


def _strided(**tensors: Tensor) -> dict[str, Any]:
    """Tensors ``(B, K, C)``, copied only where channels are not adjacent, and their strides ``*_b, *_k``."""
    arguments = {}
    for name, x in tensors.items():
        x = x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()
        arguments.update(
            {name: x, **dict(zip((f"{name}_b", f"{name}_k"), x.stride()))},
        )
    return arguments


def _sizes(x: Tensor, neighbors: Tensor) -> dict[str, Any]:
    batch, kept, channels = x.shape
    return dict(
        **dict(neighbors=neighbors.contiguous(), TAPS=neighbors.shape[-1]),
        **dict(kept=kept, tokens=batch * kept, channels=channels),
        **dict(TOKENS=_TOKENS, LANES=_LANES),
    )


def _channel_blocks(x: Tensor) -> int:
    return _tiles(x.shape[-1], _LANES)


def _tiles(size: int, tile: int) -> int:
    return -(-size // tile)


def _launch(kernel: str, grid: tuple[int, ...], values: dict[str, Any]) -> None:
    from . import triton_kernels

    function = getattr(triton_kernels, kernel)
    arguments = {name: values[name] for name in function.arg_names}
    launch(function, grid, arguments, num_warps=4, device=values["x"].device)
