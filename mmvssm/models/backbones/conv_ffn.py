"""The feed-forward network of GroupMamba's blocks.

Its hidden layer is up to eight times as wide as the feature map. On a CPU a large one is never there as a whole: the
network works through the map in bands of rows whose hidden layer stays in the cache, and computes it again in the
backward pass instead of storing it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

BAND_BYTES = 3 << 20
"""Memory that the hidden layer of a band takes, about."""

WHOLE_BANDS = 4
"""Maps of up to as many bands are worked on as a whole."""


class ConvFFN(nn.Module):
    """Feed-forward network with a depthwise convolution between its linear layers (PVT v2, section 3.3)."""

    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden_dim)
        self.conv = nn.Conv2d(hidden_dim, hidden_dim, kernel_size=3, padding=1, groups=hidden_dim)
        self.fc2 = nn.Linear(hidden_dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """``(B, H, W, dim)`` to the same shape."""
        hidden_bytes = x.shape[:3].numel() * self.fc1.out_features * x.element_size()
        # A GPU has no cache of that size, and a compiler fuses in ways of its own.
        if (
            hidden_bytes <= WHOLE_BANDS * BAND_BYTES
            or x.device.type != "cpu"
            or torch.compiler.is_compiling()
        ):
            hidden = self.conv(self.fc1(x).permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
            return self.fc2(F.gelu(hidden))
        layers = (self.fc1, self.conv, self.fc2)
        tensors = [x, *(p for layer in layers for p in (layer.weight, layer.bias))]
        dtype = x.dtype
        if torch.is_autocast_enabled("cpu"):
            dtype = torch.get_autocast_dtype("cpu")
        with torch.autocast("cpu", enabled=False):
            return _InBands.apply(*(tensor.to(dtype) for tensor in tensors))


class _InBands(torch.autograd.Function):
    """The same, of which nothing but the inputs is kept for the backward pass."""

    @staticmethod
    def forward(ctx, x, weight1, bias1, conv_weight, conv_bias, weight2, bias2):
        x = x.contiguous()
        ctx.save_for_backward(x, weight1, bias1, conv_weight, conv_bias, weight2)
        y = torch.empty_like(x)
        for image, output in zip(x.split(1), y.split(1)):
            bands = _bands(image, weight1, bias1, conv_weight, conv_bias)
            for top, bottom, _, convolved in bands:
                torch.ops.aten.gelu.out(convolved, out=convolved)
                output_rows = _rows(output[:, top:bottom])
                torch.addmm(bias2, _rows(convolved), weight2.t(), out=output_rows)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_y):
        x, weight1, bias1, conv_weight, conv_bias, weight2 = ctx.saved_tensors
        grad_y = grad_y.contiguous()
        grad_x = torch.empty_like(x)
        # Sums over bands: in float32 where the rest is narrower.
        wide = torch.promote_types(x.dtype, torch.float32)
        parameters = (weight1, bias1, conv_weight, conv_bias, weight2, weight2[:, 0])
        totals = [torch.zeros_like(p, dtype=wide) for p in parameters]
        grad_weight1, grad_bias1, grad_conv_weight, grad_conv_bias, grad_weight2, grad_bias2 = (
            totals
        )
        for image, image_grad, output_grad in zip(x.split(1), grad_x.split(1), grad_y.split(1)):
            height = image.shape[1]
            carried = 0  # the band above's gradient at the two rows of `hidden` that they share
            bands = _bands(image, weight1, bias1, conv_weight, conv_bias)
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
                grad = grad.permute(0, 2, 3, 1).contiguous()  # at rows top - 1 to bottom
                grad[:, :2] += carried
                carried = grad[:, -2:].clone()
                # Those of the last two rows are complete with the next band.
                first, last = max(top - 1, 0), bottom if bottom == height else bottom - 1
                grad = _rows(grad[:, first - top + 1 : last - top + 1])
                torch.mm(grad, weight1, out=_rows(image_grad[:, first:last]))
                _add_product(grad_weight1, grad.t(), _rows(image[:, first:last]))
                grad_bias1 += grad.sum(0)
        return grad_x, *(total.to(x.dtype) for total in totals)


def _bands(
    image: Tensor, weight: Tensor, bias: Tensor, conv_weight: Tensor, conv_bias: Tensor
) -> Iterator[tuple[int, int, Tensor, Tensor]]:
    """Run the first linear layer and the convolution on one image ``(1, H, W, dim)``, nothing twice.

    Yields:
        For each band of rows ``top`` to ``bottom`` these two, the hidden layer before the convolution at rows
        ``top - 1`` to ``bottom``, zero outside the map, and after it at the band's rows. The former is overwritten
        by the next band.
    """
    height, width = image.shape[1:3]
    hidden_bytes = height * width * weight.shape[0] * image.element_size()
    bands = min(max(round(hidden_bytes / BAND_BYTES), 1), height)
    rows = math.ceil(height / bands)  # so that all bands are about as large
    buffer = image.new_zeros(1, rows + 2, width, weight.shape[0])

    def linear(first: int, last: int, to: int) -> None:
        if first < last:
            to_rows = _rows(buffer[:, to : to + last - first])
            torch.addmm(bias, _rows(image[:, first:last]), weight.t(), out=to_rows)

    linear(0, 1, 1)
    for top in range(0, height, rows):
        bottom = min(top + rows, height)
        linear(top + 1, min(bottom + 1, height), 2)
        hidden = buffer[:, : bottom - top + 2]
        if bottom == height:
            hidden[:, -1] = 0
        convolved = F.conv2d(
            hidden.permute(0, 3, 1, 2),
            conv_weight,
            conv_bias,
            padding=(0, 1),
            groups=conv_weight.shape[0],
        )
        yield top, bottom, hidden, convolved.permute(0, 2, 3, 1).contiguous()
        buffer[:, :2] = hidden[:, -2:].clone()


def _rows(x: Tensor) -> Tensor:
    """``(..., C)`` as a matrix that shares its memory."""
    return x.view(-1, x.shape[-1])


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    if total.dtype == a.dtype:
        total.addmm_(a, b)
    else:
        total += a @ b
