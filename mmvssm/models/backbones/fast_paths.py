"""Fused computations in place of calls of layers, where nothing but speed and memory can tell the difference.

Each function takes the layers. It calls them if a compiler looks, which fuses in its own way, or if one of them is not
plain.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from ... import ops
from ...ops import conv_act, conv_ffn, dilated_conv, in_chunks
from .common import convolve


def is_plain(module: nn.Module, *kinds: type[nn.Module]) -> bool:
    """Whether a module does just what its type does with its own parameters.

    If so, a fused computation may replace the call. Hooks, replaced forwards (LoRA, quantisation), parametrizations and
    tensor subclasses only act when the module itself is called; any of them returns False. Global hooks don't count:
    PyTorch's FLOP counter installs them, and should count what runs without it.

    Args:
        module: The module.
        kinds: The types that it may have, exactly.
    """
    if type(module) not in kinds or "forward" in module.__dict__:
        return False
    if (
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    ):
        return False
    # While a compiler traces, it replaces parameters by tensors of its own types.
    return torch.compiler.is_compiling() or all(
        p is None or type(p) in (nn.Parameter, Tensor) for p in module._parameters.values()
    )


def is_plain_depthwise(conv: nn.Module) -> bool:
    """Whether a module is a plain depthwise convolution, of stride 1 and an odd size, that keeps the map's size."""
    if not is_plain(conv, nn.Conv2d):
        return False
    size = conv.kernel_size[0]
    return (
        conv.groups == conv.in_channels == conv.out_channels
        and size % 2 == 1
        and conv.kernel_size == (size, size)
        and conv.padding == (size // 2, size // 2)
        and conv.stride == conv.dilation == (1, 1)
        and conv.padding_mode == "zeros"
    )


def is_plain_dilated(conv: nn.Module) -> bool:
    """Whether a module is a plain depthwise 3x3 convolution that replicates the border and keeps the map's size."""
    return (
        is_plain(conv, nn.Conv2d)
        and conv.groups == conv.in_channels == conv.out_channels
        and conv.kernel_size == (3, 3)
        and conv.padding == conv.dilation == (conv.dilation[0],) * 2
        and conv.stride == (1, 1)
        and conv.padding_mode == "replicate"
        and conv.bias is None
    )


def folded_stem(layers: nn.Sequential, x: Tensor) -> Tensor:
    """Convolutions, each with BatchNorm and an activation, on images ``(B, C, H, W)``; see :func:`conv_norm`."""
    if (
        torch.is_grad_enabled()
        or torch.compiler.is_compiling()
        or not is_plain(layers, nn.Sequential)
    ):
        return layers(x)
    for conv, norm, activation in zip(layers[::3], layers[1::3], layers[2::3]):
        x = activation(conv_norm(conv, norm, x))
    return x


def conv_norm(conv: nn.Module, norm: nn.Module, x: Tensor) -> Tensor:
    """``norm(conv(x))`` of images ``(B, C, H, W)``, where ``norm`` is BatchNorm.

    In evaluation the statistics of BatchNorm are fixed, and its product becomes part of the convolution.
    """
    if (
        torch.is_grad_enabled()
        or torch.compiler.is_compiling()
        or not is_plain(conv, nn.Conv2d)
        or not is_plain(norm, nn.BatchNorm2d, nn.SyncBatchNorm)
        or norm.training
        or norm.running_mean is None
    ):
        return norm(conv(x))
    weight, bias = fuse_conv_bn_weights(
        conv.weight,
        conv.bias,
        norm.running_mean,
        norm.running_var,
        norm.eps,
        norm.weight,
        norm.bias,
    )
    return conv._conv_forward(x, weight, bias)


def linear(layer: nn.Module, x: Tensor) -> Tensor:
    """What a linear layer makes of ``x (..., in_features)``, see :func:`mmvssm.ops.linear`."""
    return ops.linear(x, layer.weight, layer.bias) if is_plain(layer, nn.Linear) else layer(x)


def mlp(layers: nn.Module, x: Tensor) -> Tensor:
    """Linear layer, activation, linear layer."""
    if not is_plain(layers, nn.Sequential):
        return layers(x)
    fc1, activation, fc2 = layers
    return linear(fc2, activation(linear(fc1, x)))


def feed_forward(fc1: nn.Module, conv: nn.Module, fc2: nn.Module, x: Tensor) -> Tensor:
    """Linear layer, depthwise convolution, GELU, linear layer on a map ``(B, H, W, C)``, see :func:`conv_ffn`."""
    layers = (fc1, conv, fc2)
    plain = (
        not torch.compiler.is_compiling()
        and is_plain(fc1, nn.Linear)
        and is_plain_depthwise(conv)
        and is_plain(fc2, nn.Linear)
        and all(layer.bias is not None for layer in layers)
    )
    if not plain:
        return fc2(F.gelu(convolve(conv, fc1(x))))
    return conv_ffn(x, *(p for layer in layers for p in (layer.weight, layer.bias)))


def conv_silu(conv: nn.Module, x: Tensor) -> Tensor:
    """``silu(conv(x))`` of maps ``(B, H, W, C)``, where ``conv`` is depthwise and 3x3, see :func:`conv_act`."""
    plain = is_plain_depthwise(conv) and conv.kernel_size == (3, 3)
    if torch.compiler.is_compiling() or not plain:
        return F.silu(convolve(conv, x))
    return conv_act(x, conv.weight, conv.bias, "silu")


def modulated_norm(norm: nn.Module, scanned: Tensor, affinity: Tensor, x: Tensor) -> Tensor:
    """``norm(scanned * affinity * x)`` of maps ``(B, H, W, C)``, and ``affinity (B, 1, 1, C)``."""
    if torch.compiler.is_compiling() or not is_plain(norm, nn.LayerNorm):
        return norm(scanned * affinity * x)

    def compute(
        scanned: Tensor, x: Tensor, affinity: Tensor, weight: Tensor, bias: Tensor
    ) -> Tensor:
        product = scanned * affinity * x
        return F.layer_norm(product, norm.normalized_shape, weight, bias, norm.eps)

    y = in_chunks(
        compute,
        (scanned.flatten(1, 2), x.flatten(1, 2)),
        (affinity.flatten(1, 2),),
        (norm.weight, norm.bias),
    )
    return y.view(x.shape)


def gated_norm(norm: nn.Module, kind: type[nn.Module], y: Tensor, gate: Tensor) -> Tensor:
    """``norm(y) * silu(gate)`` of tokens ``(B, L, ...)``.

    Args:
        norm: The norm.
        kind: Its type where nothing replaced it. It has ``normalize(y, weight, bias)``.
        y: Tokens.
        gate: The same shape.
    """
    if torch.compiler.is_compiling() or not is_plain(norm, kind):
        return norm(y) * F.silu(gate)

    def compute(y: Tensor, gate: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return norm.normalize(y, weight, bias) * F.silu(gate)

    return in_chunks(compute, (y, gate), parameters=(norm.weight, norm.bias))


def fused_states(convs: nn.ModuleList, alpha: Tensor, x: Tensor) -> Tensor:
    """Sum of dilated depthwise convolutions of maps ``(B, H, W, C)``, each times its number in ``alpha``.

    The factors become part of the kernels, anew in each call, so they always are those of the current weights.
    """
    plain = (
        not torch.compiler.is_compiling()
        and is_plain(convs, nn.ModuleList)
        and all(is_plain_dilated(conv) for conv in convs)
    )
    if not plain:
        return sum(a * convolve(conv, x) for a, conv in zip(alpha, convs))
    weights = [a * conv.weight for a, conv in zip(alpha, convs)]
    return dilated_conv(x, weights, [conv.dilation[0] for conv in convs])


def linear_without_bias(layer: nn.Module, x: Tensor) -> Tensor:
    """What a linear layer makes of ``x (..., in_features)``, less its bias."""
    if is_plain(layer, nn.Linear):
        return ops.linear(x, layer.weight)
    return layer(x) - bias_of(layer, x.shape[-1], x)


def bias_of(linear: nn.Module, in_features: int, like: Tensor) -> Tensor:
    """The bias of a linear layer, or what a module in its place makes of zero.

    Args:
        linear: The layer.
        in_features: Channels of its input; another module may not know them.
        like: A tensor of the dtype and on the device of its input.
    """
    bias = getattr(linear, "bias", None)
    if isinstance(bias, Tensor):
        return bias
    return linear(like.new_zeros(1, in_features))[0]
