"""Depthwise 3x3 convolution and activation of channels-last maps, in one pass over memory on CPUs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Optional

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from .. import backend
from . import cpu

_FUNCTIONS = dict(identity=lambda x: x, silu=F.silu, gelu=F.gelu)


def conv_act(
    x: Tensor,
    weight: Tensor,
    bias: Optional[Tensor] = None,
    activation: str = "identity",
    padding: Sequence[int] = (1, 1),
) -> Tensor:
    """Depthwise 3x3 convolution (cross-correlation, stride 1), and an activation.

    On a CPU, one kernel reads ``x`` and writes the result; another computes all gradients from ``x`` and that of the
    result, so nothing else is stored between them. Sums are float32. Two runs give the same bits for any number of
    threads. Elsewhere, for other dtypes than float32 and bfloat16, and for second derivatives, PyTorch's functions
    compute the same.

    Args:
        x: Maps ``(B, H + 2 - sum(padding), W, C)``, channels adjacent in memory.
        weight: As in ``torch.nn.Conv2d(C, C, 3, groups=C)``, ``(C, 1, 3, 3)``.
        bias: ``(C,)``.
        activation: ``'identity'``, ``'silu'`` or ``'gelu'``, the exact one.
        padding: Rows of zeros above and below ``x``, each 0 or 1; left and right of it is always one column.

    Returns:
        ``(B, H, W, C)``, contiguous. Under autocast ``x`` takes the autocast dtype.

    Raises:
        ValueError: If an argument is not as described.
    """
    _check(x, weight, bias, activation, padding)
    if torch.compiler.is_compiling() or not _has_kernel(x, weight, bias):
        return formula(x, weight, bias, activation, padding)
    return torch.ops.mmvssm.conv_act(x, weight, bias, activation, padding)


def conv_act_gradients(
    grad_y: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    activation: str = "identity",
    padding: Sequence[int] = (1, 1),
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of :func:`conv_act`, for backward passes that need its result again.

    Args:
        grad_y: Gradient of the result.
        x: As for :func:`conv_act`, as are the others.
        weight: The same.
        bias: The same.
        activation: The same.
        padding: The same.

    Returns:
        Gradients of ``x``, ``weight`` and ``bias``, and the result.
    """
    if _has_kernel(x, weight, bias):
        return torch.ops.mmvssm.conv_act_backward(
            grad_y, x, weight, bias, activation, padding, True
        )
    with torch.enable_grad():
        inputs = [tensor.detach().requires_grad_() for tensor in (x, weight, bias)]
        y = formula(*inputs, activation, padding)
    return *torch.autograd.grad(y, inputs, grad_y), y.detach()


def formula(
    x: Tensor, weight: Tensor, bias: Optional[Tensor], activation: str, padding: Sequence[int]
) -> Tensor:
    """The same by PyTorch's functions."""
    above, below = padding
    if above != below:
        x, above = F.pad(x, (0, 0, 0, 0, above, below)), 0
    y = F.conv2d(x.permute(0, 3, 1, 2), weight, bias, padding=(above, 1), groups=weight.shape[0])
    return _FUNCTIONS[activation](y.permute(0, 2, 3, 1))


def _check(
    x: Tensor, weight: Tensor, bias: Optional[Tensor], activation: str, padding: Sequence[int]
) -> None:
    if activation not in cpu.ACTIVATIONS:
        raise ValueError(
            f"conv_act: unknown activation {activation!r}; known are {', '.join(map(repr, cpu.ACTIVATIONS))}."
        )
    if len(padding) != 2 or not set(padding) <= {0, 1}:
        raise ValueError(f"conv_act: padding must be two numbers, each 0 or 1; got {padding}.")
    if x.dim() != 4 or 0 in x.shape or x.shape[1] + sum(padding) < 3:
        raise ValueError(
            f"conv_act: x must have shape (B, H, W, C), each at least 1, and 3 rows with padding; got {tuple(x.shape)} "
            f"and padding={padding}."
        )
    channels = x.shape[3]
    if tuple(weight.shape) != (channels, 1, 3, 3):
        raise ValueError(
            f"conv_act: weight must have shape (C, 1, 3, 3) = ({channels}, 1, 3, 3); got {tuple(weight.shape)}."
        )
    if bias is not None and tuple(bias.shape) != (channels,):
        raise ValueError(
            f"conv_act: bias must have shape (C,) = ({channels},); got {tuple(bias.shape)}."
        )


def _check_kernel(x: Tensor, weight: Tensor, bias: Optional[Tensor], *settings) -> None:
    """Check what the kernel trusts, also where the operator is called directly."""
    _check(x, weight, bias, *settings)
    if not _has_kernel(x, weight, bias):
        raise ValueError(
            "conv_act: the operator takes float32 and bfloat16 on a CPU with compiled kernels."
        )


def _has_kernel(x: Tensor, weight: Tensor, bias: Optional[Tensor]) -> bool:
    tensors = [tensor for tensor in (x, weight, bias) if tensor is not None]
    return (
        all(tensor.device.type == "cpu" and tensor.dtype in cpu.DTYPES for tensor in tensors)
        and cpu.available()
        and not backend.has_tangent(*tensors)
    )


@torch.library.custom_op("mmvssm::conv_act", mutates_args=())
def _conv_act(
    x: Tensor, weight: Tensor, bias: Optional[Tensor], activation: str, padding: Sequence[int]
) -> Tensor:
    _check_kernel(x, weight, bias, activation, padding)
    return cpu.forward(x, weight, bias, activation, padding)


@_conv_act.register_fake
def _(x, weight, bias, activation, padding):
    return x.new_empty(x.shape[0], x.shape[1] - 2 + sum(padding), *x.shape[2:])


@torch.library.custom_op("mmvssm::conv_act_backward", mutates_args=())
def _conv_act_backward(
    grad_y: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Optional[Tensor],
    activation: str,
    padding: Sequence[int],
    with_y: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of ``x``, ``weight`` and the bias; and the result once more if ``with_y``, else an empty tensor."""
    _check_kernel(x, weight, bias, activation, padding)
    expected = (x.shape[0], x.shape[1] - 2 + sum(padding), *x.shape[2:])
    if tuple(grad_y.shape) != expected:
        raise ValueError(f"conv_act: grad_y must have shape {expected}; got {tuple(grad_y.shape)}.")
    grad_x, grad_weight, grad_bias, y = cpu.backward(
        grad_y, x, weight, bias, activation, padding, with_y
    )
    dtype = weight.dtype if bias is None else bias.dtype
    # Operators must not return views of one tensor.
    return (
        grad_x,
        grad_weight.to(weight.dtype, copy=True).view(weight.shape),
        grad_bias.to(dtype, copy=True),
        x.new_empty(0) if y is None else y,
    )


@_conv_act_backward.register_fake
def _(grad_y, x, weight, bias, activation, padding, with_y):
    y = x.new_empty(grad_y.shape if with_y else 0)
    return x.new_empty(x.shape), weight.new_empty(weight.shape), weight.new_empty(x.shape[3]), y


def _save_for_backward(ctx, inputs, output) -> None:
    x, weight, bias, ctx.activation, ctx.padding = inputs
    ctx.save_for_backward(x, weight, bias)


def _differentiate(ctx, grad_y: Tensor):
    settings = ctx.activation, ctx.padding
    if torch.is_grad_enabled():
        return backend.gradients_of(formula, (*ctx.saved_tensors, *settings), grad_y)
    grads = torch.ops.mmvssm.conv_act_backward(grad_y, *ctx.saved_tensors, *settings, False)
    needed = ctx.needs_input_grad[:3]
    return (*(grad if need else None for grad, need in zip(grads, needed)), None, None)


_conv_act.register_autograd(_differentiate, setup_context=_save_for_backward)

backend.register_autocast("conv_act", lowered=(0,))


@register_flop_formula(torch.ops.mmvssm.conv_act)
def _flops(x_shape, weight_shape, *args, out_shape=None, **kwargs) -> int:
    """Two for every tap, as PyTorch counts convolutions."""
    return 2 * 9 * math.prod(out_shape)


@register_flop_formula(torch.ops.mmvssm.conv_act_backward)
def _backward_flops(grad_shape, *args, **kwargs) -> int:
    """As PyTorch: once for each of the gradients of ``x`` and ``weight``."""
    return 2 * 2 * 9 * math.prod(grad_shape)
