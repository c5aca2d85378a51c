"""Sparse depthwise convolution on CUDA GPUs, with the kernels of ``triton_kernels.py``.

:func:`convolve` and :func:`weight_gradient` keep the contract of :mod:`mmvssm.ops.sparse_depthwise_conv.pytorch`. Sums
across programs have a fixed order, so two runs agree bit for bit.

``neighbors`` is not checked: an entry beyond the tokens reads foreign memory.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any, Optional

import torch
from torch import Tensor

from ..backend import accumulation_dtype
from ..triton_launcher import launch

# Channels per tile; tokens per tile of the convolution (four warps), and of the weights' gradients (two warps, with one
# sum per tap in registers).
_LANES, _TOKENS, _GRADIENT_TOKENS = 64, 32, 8
# Tokens per program of the weights' gradients: a multiple of the tile's.
_PART = 256


def convolve(
    x: Tensor, weight: Tensor, neighbors: Tensor, bias: Optional[Tensor], reverse: bool = False
) -> Tensor:
    """See :func:`mmvssm.ops.sparse_depthwise_conv.pytorch.convolve`."""
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    # Channels have to be adjacent, as in the tokens.
    taps = weight.flatten(1).t().to(accumulation_dtype(x, weight)).contiguous()
    arguments = dict(
        **_strided(x=x),
        **_sizes(x, neighbors, _TOKENS),
        **dict(taps=taps, y=y, REVERSE=reverse, TOKENS=_TOKENS),
        bias=None if bias is None else bias.contiguous(),
    )
    grid = (x.shape[0] * arguments["parts"], _channel_blocks(x))
    _launch(_kernels().convolve, grid, arguments, 4)
    return y


def weight_gradient(grad_y: Tensor, x: Tensor, neighbors: Tensor) -> Tensor:
    """See :func:`mmvssm.ops.sparse_depthwise_conv.pytorch.weight_gradient`."""
    batch, _, channels = x.shape
    taps = neighbors.shape[-1]
    sizes = _sizes(x, neighbors, _PART)
    partials = x.new_empty(
        (batch * sizes["parts"], taps, channels), dtype=accumulation_dtype(grad_y, x)
    )
    block = _taps_of_a_program(taps)
    arguments = dict(
        **_strided(grad_y=grad_y, x=x),
        **sizes,
        **dict(partials=partials, BLOCK=block, PART=_PART, TOKENS=_GRADIENT_TOKENS),
    )
    grid = (len(partials), _channel_blocks(x), taps // block)
    _launch(_kernels().weight_gradient, grid, arguments, 2)
    return partials.sum(0).t().contiguous()


def _taps_of_a_program(taps: int) -> int:
    """Taps per program of the weights' gradients: few enough that their sums fit registers."""
    return taps if taps <= 9 else max(n for n in range(1, 12) if taps % n == 0)


def _strided(**tensors: Tensor) -> dict[str, Any]:
    """Return tensors ``(B, K, C)`` and their strides ``*_b, *_k``; copy them if channels are not adjacent."""
    arguments = {}
    for name, x in tensors.items():
        x = x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()
        arguments.update(
            {name: x, **dict(zip((f"{name}_b", f"{name}_k"), x.stride()))},
        )
    return arguments


def _sizes(x: Tensor, neighbors: Tensor, part: int) -> dict[str, Any]:
    _, kept, channels = x.shape
    return dict(
        **dict(neighbors=neighbors.contiguous(), TAPS=neighbors.shape[-1]),
        **dict(kept=kept, parts=-(-kept // part), channels=channels, LANES=_LANES),
    )


def _channel_blocks(x: Tensor) -> int:
    return -(-x.shape[-1] // _LANES)


def _launch(kernel: Any, grid: tuple[int, ...], values: dict[str, Any], num_warps: int) -> None:
    arguments = {name: values[name] for name in kernel.arg_names}
    launch(kernel, grid, arguments, num_warps=num_warps, device=values["x"].device)


def _kernels() -> ModuleType:
    """Import the kernels on first use, since they need Triton."""
    from . import triton_kernels

    return triton_kernels
