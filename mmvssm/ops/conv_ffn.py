"""Feed-forward network with a depthwise convolution, as in GroupMamba's blocks.

Its hidden layer is up to eight times as wide as the feature map. On a CPU, large maps are processed in bands of rows
whose hidden layer fits the cache. The backward pass recomputes the hidden layer instead of storing it.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator
from typing import Optional

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from .backend import gradients_of, has_tangent
from .conv_act import conv_act, conv_act_gradients
from .linear import linear, matmul, weight_gradient

BAND_BYTES = 3 << 20
"""Approximate bytes of a band's hidden layer."""

WHOLE_BANDS = 4
"""Maps of at most this many bands are processed in one piece."""

STORED_BANDS = 8
"""Up to this many bands, keep the first linear layer's output for the backward pass instead of recomputing it."""


def conv_ffn(
    x: Tensor,
    weight1: Tensor,
    bias1: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor,
    weight2: Tensor,
    bias2: Tensor,
) -> Tensor:
    """Linear layer, depthwise convolution, GELU, linear layer (PVT v2, section 3.3).

    Args:
        x: Feature map ``(B, H, W, C)``.
        weight1: Weight of the first linear layer, to ``M`` hidden channels ``(M, C)``.
        bias1: ``(M,)``.
        conv_weight: As in ``torch.nn.Conv2d(M, M, 3, padding=1, groups=M)``, ``(M, 1, 3, 3)``.
        conv_bias: ``(M,)``.
        weight2: Weight of the second linear layer ``(C, M)``.
        bias2: ``(C,)``.

    Returns:
        ``(B, H, W, C)``. Second derivatives go through the whole map at once.
    """
    # GPUs lack a cache of that size, and compilers fuse by themselves. Check for a compiler first: comparing sizes
    # under one would specialise them.
    if (
        torch.compiler.is_compiling()
        or x.device.type != "cpu"
        or _hidden_bytes(x, weight1) <= WHOLE_BANDS * BAND_BYTES
        or has_tangent(x, weight1, bias1, conv_weight, conv_bias, weight2, bias2)
    ):
        return _whole(x, weight1, bias1, conv_weight, conv_bias, weight2, bias2)
    tensors = (x, weight1, bias1, conv_weight, conv_bias, weight2, bias2)
    dtype = x.dtype
    if torch.is_autocast_enabled("cpu"):
        dtype = torch.get_autocast_dtype("cpu")
    store = torch.is_grad_enabled() and _hidden_bytes(x, weight1) <= STORED_BANDS * BAND_BYTES
    with torch.autocast("cpu", enabled=False):
        y, _ = torch.ops.mmvssm.conv_ffn(*(tensor.to(dtype) for tensor in tensors), store)
    return y


def _whole(x, weight1, bias1, conv_weight, conv_bias, weight2, bias2) -> Tensor:
    hidden = conv_act(linear(x, weight1, bias1), conv_weight, conv_bias, "gelu")
    return linear(hidden, weight2, bias2)


def _hidden_bytes(x: Tensor, weight1: Tensor) -> int:
    return x.shape[:3].numel() * weight1.shape[0] * x.element_size()


@torch.library.custom_op("mmvssm::conv_ffn", mutates_args=())
def _in_bands(
    x: Tensor,
    weight1: Tensor,
    bias1: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor,
    weight2: Tensor,
    bias2: Tensor,
    store: bool,
) -> tuple[Tensor, Tensor]:
    """The network in bands; and, if ``store``, the first linear layer's output for the backward pass."""
    x = x.contiguous()
    stored = linear(x, weight1, bias1) if store else None
    y = torch.empty_like(x)
    for image, known, output in zip(x.split(1), _images(stored), y.split(1)):
        for top, bottom, hidden, padding in _bands(image, weight1, bias1, known):
            hidden = conv_act(hidden, conv_weight, conv_bias, "gelu", padding)
            output[:, top:bottom] = linear(hidden, weight2, bias2)
    return y, x.new_empty(0) if stored is None else stored


@_in_bands.register_fake
def _(x, weight1, bias1, conv_weight, conv_bias, weight2, bias2, store):
    hidden = (*x.shape[:3], weight1.shape[0])
    return torch.empty_like(x), x.new_empty(hidden if store else 0)


def _save_for_backward(ctx, inputs, output) -> None:
    *tensors, ctx.store = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(*tensors, *([output[1]] if ctx.store else []))


def _differentiate(ctx, grad_y: Tensor, _: Optional[Tensor]):
    x, *parameters = ctx.saved_tensors
    stored = parameters.pop() if ctx.store else None
    if torch.is_grad_enabled():
        return *gradients_of(_whole, (x, *parameters), grad_y), None
    x = x.contiguous()
    weight1, bias1, conv_weight, conv_bias, weight2, _ = parameters
    grad_y = grad_y.contiguous()
    grad_x = torch.empty_like(x)
    # Sums over bands, in float32 or wider.
    wide = torch.promote_types(x.dtype, torch.float32)
    parameters = (weight1, bias1, conv_weight, conv_bias, weight2, weight2[:, 0])
    totals = [torch.zeros_like(p, dtype=wide) for p in parameters]
    grad_weight1, grad_bias1, grad_conv_weight, grad_conv_bias, grad_weight2, grad_bias2 = totals
    for image, known, image_grad, output_grad in zip(
        x.split(1), _images(stored), grad_x.split(1), grad_y.split(1)
    ):
        height = image.shape[1]
        carried = 0  # gradient from the band above at the two rows of `hidden` that both use
        for top, bottom, hidden, padding in _bands(image, weight1, bias1, known):
            grad = _rows(output_grad[:, top:bottom])
            grad_activated = matmul(grad, weight2).view(1, bottom - top, *hidden.shape[2:])
            grad_hidden, band_grad_weight, band_grad_bias, activated = conv_act_gradients(
                grad_activated, hidden, conv_weight, conv_bias, "gelu", padding
            )
            grad_weight2 += weight_gradient(grad, _rows(activated))
            grad_bias2 += grad.sum(0)
            grad_conv_weight += band_grad_weight
            grad_conv_bias += band_grad_bias
            grad_hidden[:, :2] += carried
            carried = grad_hidden[:, -2:].clone()
            # The next band completes the gradients of the last two rows.
            first, last = max(top - 1, 0), bottom if bottom == height else bottom - 1
            grad = _rows(grad_hidden[:, : last - first])
            image_grad[:, first:last] = matmul(grad, weight1).view(1, last - first, *x.shape[2:])
            grad_weight1 += weight_gradient(grad, _rows(image[:, first:last]))
            grad_bias1 += grad.sum(0)
    return grad_x, *(total.to(x.dtype) for total in totals), None


_in_bands.register_autograd(_differentiate, setup_context=_save_for_backward)


@register_flop_formula(torch.ops.mmvssm.conv_ffn)
def _flops(x_shape, weight1_shape, *args, out_shape=None, **kwargs) -> int:
    """Two for each multiply-add, without the rows that two bands compute."""
    hidden_dim, dim = weight1_shape
    return 2 * math.prod(x_shape[:3]) * hidden_dim * (2 * dim + 9)


def _images(stored: Optional[Tensor]) -> Iterable[Optional[Tensor]]:
    return itertools.repeat(None) if stored is None else stored.split(1)


def _bands(
    image: Tensor, weight: Tensor, bias: Tensor, known: Optional[Tensor]
) -> Iterator[tuple[int, int, Tensor, tuple[int, int]]]:
    """Run the first linear layer on an image ``(1, H, W, C)`` band by band.

    Yields:
        ``top`` and ``bottom`` row of a band; the layer's output, or that part of ``known``, at rows ``top - 1`` to
        ``bottom``, as far as the image has them; and the number of those that it lacks, above and below.
    """
    height = image.shape[1]
    bands = min(max(round(_hidden_bytes(image, weight) / BAND_BYTES), 1), height)
    rows = math.ceil(height / bands)  # bands of about equal size
    for top in range(0, height, rows):
        bottom = min(top + rows, height)
        first, last = max(top - 1, 0), min(bottom + 1, height)
        rows_above, rows_below = int(top == 0), int(bottom == height)
        if known is None:
            yield top, bottom, linear(image[:, first:last], weight, bias), (rows_above, rows_below)
        else:
            yield top, bottom, known[:, first:last], (rows_above, rows_below)


def _rows(x: Tensor) -> Tensor:
    """View ``(..., C)`` as a matrix."""
    return x.view(-1, x.shape[-1])
