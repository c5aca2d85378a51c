"""Feed-forward network with a depthwise convolution, as in GroupMamba's blocks.

Its hidden layer is up to eight times as wide as the feature map. On a CPU, large maps are processed in bands of rows
whose hidden layer fits the cache. The backward pass recomputes the hidden layer instead of storing it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple, Optional

import torch
import torch.nn.functional as F
from torch import Tensor

from .backend import gradients_of

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
        or _hidden_bytes(x, weight1) <= (WHOLE_BANDS * BAND_BYTES)
    ):
        return _whole(x, weight1, bias1, conv_weight, conv_bias, weight2, bias2)
    tensors = (x, weight1, bias1, conv_weight, conv_bias, weight2, bias2)
    dtype = x.dtype
    if torch.is_autocast_enabled("cpu"):
        dtype = torch.get_autocast_dtype("cpu")
    store = torch.is_grad_enabled() and _hidden_bytes(x, weight1) <= STORED_BANDS * BAND_BYTES
    with torch.autocast("cpu", enabled=False):
        return _InBands.apply(store, *(tensor.to(dtype) for tensor in tensors))


def _whole(x, weight1, bias1, conv_weight, conv_bias, weight2, bias2) -> Tensor:
    hidden = F.linear(x, weight1, bias1).permute(0, 3, 1, 2)
    hidden = F.conv2d(hidden, conv_weight, conv_bias, padding=1, groups=conv_weight.shape[0])
    return F.linear(F.gelu(hidden.permute(0, 2, 3, 1)), weight2, bias2)


def _hidden_bytes(x: Tensor, weight1: Tensor) -> int:
    return x.shape[:3].numel() * weight1.shape[0] * x.element_size()


class _InBands(torch.autograd.Function):
    """The network in bands. Backward keeps the inputs and, if ``store``, the first linear layer's output."""

    @staticmethod
    def forward(ctx, store, x, weight1, bias1, conv_weight, conv_bias, weight2, bias2):
        stored = x.new_empty(*x.shape[:3], weight1.shape[0]) if store else None
        parameters = (weight1, bias1, conv_weight, conv_bias, weight2, bias2)
        ctx.save_for_backward(x, stored, *parameters)
        x = x.contiguous()
        y = torch.empty_like(x)
        for i, (image, output) in enumerate(zip(x.split(1), y.split(1))):
            linear = _Linear(image, weight1, bias1, stored[i : i + 1] if store else None)
            bands = _bands(linear, conv_weight, conv_bias)
            for top, bottom, _, convolved in bands:
                torch.ops.aten.gelu.out(convolved, out=convolved)
                output_rows = _rows(output[:, top:bottom])
                torch.addmm(bias2, _rows(convolved), weight2.t(), out=output_rows)
        return y

    @staticmethod
    def backward(ctx, grad_y):
        x, stored, *parameters = ctx.saved_tensors
        if torch.is_grad_enabled():
            return None, *gradients_of(_whole, (x, *parameters), grad_y)
        weight1, bias1, conv_weight, conv_bias, weight2, _ = parameters
        x, grad_y = x.contiguous(), grad_y.contiguous()
        grad_x = torch.empty_like(x)
        # Sums over bands, in float32 or wider.
        wide = torch.promote_types(x.dtype, torch.float32)
        parameters = (weight1, bias1, conv_weight, conv_bias, weight2, weight2[:, 0])
        totals = [torch.zeros_like(p, dtype=wide) for p in parameters]
        grad_weight1, grad_bias1, grad_conv_weight, grad_conv_bias, grad_weight2, grad_bias2 = (
            totals
        )
        for i, (image, image_grad, output_grad) in enumerate(
            zip(x.split(1), grad_x.split(1), grad_y.split(1))
        ):
            height = image.shape[1]
            carried = 0  # gradient from the band above at the two rows of `hidden` that both use
            known = None if stored is None else stored[i : i + 1]
            linear = _Linear(image, weight1, bias1, known, known is not None)
            bands = _bands(linear, conv_weight, conv_bias)
            for top, bottom, hidden, convolved in bands:
                if top == 0:
                    work = torch.empty_like(convolved)
                band = work[:, : bottom - top]
                grad = _rows(output_grad[:, top:bottom])
                torch.ops.aten.gelu.out(convolved, out=band)
                _add_product(grad_weight2, grad.t(), _rows(band))
                grad_bias2 += grad.sum(0)
                torch.mm(grad, weight2, out=_rows(band))
                torch.ops.aten.gelu_backward.grad_input(band, convolved, grad_input=band)
                grad, band_grad_weight, band_grad_bias = torch.ops.aten.convolution_backward(
                    band.permute(0, 3, 1, 2),
                    hidden.permute(0, 3, 1, 2),
                    conv_weight,
                    conv_bias.shape,
                    *((1, 1), (0, 1), (1, 1)),  # stride, padding, dilation
                    *(False, (0, 0), conv_bias.shape[0]),  # not transposed; groups
                    (True, True, True),
                )
                grad_conv_weight += band_grad_weight
                grad_conv_bias += band_grad_bias
                grad = grad.permute(0, 2, 3, 1).contiguous()  # rows top - 1 to bottom
                grad[:, :2] += carried
                carried = grad[:, -2:].clone()
                # The next band completes the gradients of the last two rows.
                first, last = max(top - 1, 0), bottom if bottom == height else bottom - 1
                grad = _rows(grad[:, first - top + 1 : last - top + 1])
                torch.mm(grad, weight1, out=_rows(image_grad[:, first:last]))
                _add_product(grad_weight1, grad.t(), _rows(image[:, first:last]))
                grad_bias1 += grad.sum(0)
        return None, grad_x, *(total.to(x.dtype) for total in totals)


class _Linear(NamedTuple):
    """The first linear layer on one image ``(1, H, W, dim)``."""

    image: Tensor
    weight: Tensor
    bias: Tensor
    stored: Optional[Tensor]  # (1, H, W, hidden_dim): buffer for its output
    known: bool = False  # whether the buffer is filled already

    def __call__(self, first: int, last: int, out: Tensor) -> None:
        """Write the output for rows ``first`` to ``last`` into the first rows of ``out``."""
        if first == last:
            return
        out = out[:, : last - first]
        to = out if self.stored is None else self.stored[:, first:last]
        if not self.known:
            rows = _rows(self.image[:, first:last])
            torch.addmm(self.bias, rows, self.weight.t(), out=_rows(to))
        if self.stored is not None:
            out.copy_(to)


def _bands(
    linear: _Linear, conv_weight: Tensor, conv_bias: Tensor
) -> Iterator[tuple[int, int, Tensor, Tensor]]:
    """Run the first linear layer and the convolution band by band, each row once.

    Yields:
        ``top`` and ``bottom`` row of the band; the convolution's input at rows ``top - 1`` to ``bottom``, zero outside
        the map and overwritten by the next band; and its output at the band's rows.
    """
    height, width = linear.image.shape[1:3]
    hidden_dim = conv_bias.shape[0]
    hidden_bytes = height * width * hidden_dim * conv_bias.element_size()
    bands = min(max(round(hidden_bytes / BAND_BYTES), 1), height)
    rows = math.ceil(height / bands)  # bands of about equal size
    buffer = linear.image.new_zeros(1, rows + 2, width, hidden_dim)
    linear(0, 1, buffer[:, 1:])
    for top in range(0, height, rows):
        bottom = min(top + rows, height)
        linear(top + 1, min(bottom + 1, height), buffer[:, 2:])
        hidden = buffer[:, : bottom - top + 2]
        if bottom == height:
            hidden[:, -1] = 0
        convolved = F.conv2d(
            hidden.permute(0, 3, 1, 2),
            conv_weight,
            conv_bias,
            padding=(0, 1),
            groups=hidden_dim,
        )
        yield top, bottom, hidden, convolved.permute(0, 2, 3, 1).contiguous()
        buffer[:, :2] = hidden[:, -2:].clone()


def _rows(x: Tensor) -> Tensor:
    """View ``(..., C)`` as a matrix."""
    return x.view(-1, x.shape[-1])


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    if total.dtype == a.dtype:
        total.addmm_(a, b)
    else:
        total += a @ b
