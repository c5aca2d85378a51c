"""The selective-scan operator: its public function, checks, registration with PyTorch and choice of backend."""

from __future__ import annotations

from typing import Optional

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from . import scan_cpu, scan_torch, scan_triton
from .traversal import Traversal


def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Optional[Tensor] = None,
    delta_bias: Optional[Tensor] = None,
    *,
    traversal: Optional[Traversal] = None,
    rest: Optional[Tensor] = None,
    delta_softplus: bool = True,
) -> Tensor:
    """Selective scan (Mamba, section 3.2) along ``K`` walks over the same tokens, in one call.

    What it computes is written down in :func:`mmvssm.ops.reference.selective_scan_reference`. The
    state is float32 (float64 for float64 inputs) whatever the dtype of the inputs. Memory is
    ``O(B * L * K * D)``, forward and backward: no tensor of size ``B * L * K * D * N`` exists. All
    floating-point arguments are differentiable, once.

    ``u`` and ``delta`` may be expanded along ``K`` (stride 0) where walks share them: nothing is copied. Where all but
    ``B``, ``traversal.order`` and ``traversal.gap`` is expanded so, the forward pass on a CPU takes half the time at
    state 16: it computes once what the walks share.

    Args:
        u: Values ``(B, L, K, D)``: batch, token, walk, channel. Channels should be adjacent in memory.
        delta: Step sizes before bias and softplus ``(B, L, K, D)``.
        A: State decay rates ``(K, D, N)``, negative.
        B: Input projections ``(B, L, K, N)``.
        C: Output projections ``(B, L, K, N)``.
        D: Skip connection ``(K, D)``.
        delta_bias: Added to ``delta`` ``(K, D)``.
        traversal: Which token each step visits; by default every walk follows the order in memory.
        rest: Step size at grid positions that are absent from the tokens ``(K, D)``; needed where
            ``traversal.gap`` is given.
        delta_softplus: Whether ``delta`` passes through softplus.

    Returns:
        ``y (B, L, K, D)``, contiguous, each token's output at the token's place, in the dtype of ``u``. Under autocast
        ``u``, ``delta``, ``B`` and ``C`` take the autocast dtype; ``A``, ``D``, ``delta_bias`` and
        ``rest`` keep theirs.

    Raises:
        ValueError: If a shape or dtype does not fit; the message names the argument, its shape and the shape expected.
    """
    order, source, gap = traversal if traversal is not None else (None, None, None)
    _check(u, delta, A, B, C, D, delta_bias, order, source, gap, rest)
    y, _ = torch.ops.mmvssm.selective_scan(
        u, delta, A, B, C, D, delta_bias, order, source, gap, rest, delta_softplus
    )
    return y


def _check(u, delta, A, B, C, D, delta_bias, order, source, gap, rest) -> None:
    if u.dim() != 4:
        raise ValueError(
            f"selective_scan: u must have shape (B, L, K, D), batch, token, walk, channel; got {tuple(u.shape)}."
        )
    batch, length, walks, channels = u.shape
    if A.dim() != 3:
        raise ValueError(
            f"selective_scan: A must have shape (K, D, N), walk, channel, state; got {tuple(A.shape)}."
        )
    if 0 in (batch, length, walks, channels, A.shape[-1]):
        raise ValueError(
            f"selective_scan: every dimension must be at least 1; got u {tuple(u.shape)} and A {tuple(A.shape)}."
        )
    states = A.shape[-1]
    expected = {
        "delta": (delta, (batch, length, walks, channels)),
        "A": (A, (walks, channels, states)),
        "B": (B, (batch, length, walks, states)),
        "C": (C, (batch, length, walks, states)),
        "D": (D, (walks, channels)),
        "delta_bias": (delta_bias, (walks, channels)),
        "rest": (rest, (walks, channels)),
    }
    for name, (tensor, shape) in expected.items():
        if tensor is None:
            continue
        if tuple(tensor.shape) != shape:
            raise ValueError(
                f"selective_scan: {name} must have shape {shape} to go with u of shape {tuple(u.shape)} and A of shape "
                f"{tuple(A.shape)}; got {tuple(tensor.shape)}."
            )
    floating = [("u", u), *((name, tensor) for name, (tensor, _) in expected.items())]
    for name, tensor in floating:
        if tensor is not None and not tensor.is_floating_point():
            raise ValueError(f"selective_scan: {name} must be floating point; got {tensor.dtype}.")
    for name, index in (("order", order), ("source", source), ("gap", gap)):
        if index is None:
            continue
        if tuple(index.shape) not in ((walks, length), (batch, walks, length)):
            raise ValueError(
                f"selective_scan: traversal.{name} must have shape (K, L) = {(walks, length)} or (B, K, L) = "
                f"{(batch, walks, length)}; got {tuple(index.shape)}."
            )
        if index.dtype != torch.int32:
            raise ValueError(f"selective_scan: traversal.{name} must be int32; got {index.dtype}.")
    if gap is not None and rest is None:
        raise ValueError(
            "selective_scan: traversal.gap needs rest, the step size at absent positions."
        )


def _backend(u: Tensor):
    if u.is_cuda and scan_triton.available():
        return scan_triton
    if u.device.type == "cpu" and scan_cpu.available():
        return scan_cpu
    return scan_torch


@torch.library.custom_op("mmvssm::selective_scan", mutates_args=())
def _scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Optional[Tensor],
    delta_bias: Optional[Tensor],
    order: Optional[Tensor],
    source: Optional[Tensor],
    gap: Optional[Tensor],
    rest: Optional[Tensor],
    delta_softplus: bool,
) -> tuple[Tensor, Tensor]:
    return _backend(u).forward(
        u, delta, A, B, C, D, delta_bias, order, source, gap, rest, delta_softplus
    )


@_scan.register_fake
def _(u, delta, A, B, C, D, delta_bias, order, source, gap, rest, delta_softplus):
    batch, length, walks, channels = u.shape
    dtype = scan_torch.accumulation_dtype(u, delta, A, B, C)
    states = (batch, walks, scan_torch.num_chunks(length), channels, A.shape[-1])
    return u.new_empty(u.shape), u.new_empty(states, dtype=dtype)


@torch.library.custom_op("mmvssm::selective_scan_backward", mutates_args=())
def _scan_backward(
    grad_y: Tensor,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Optional[Tensor],
    delta_bias: Optional[Tensor],
    order: Optional[Tensor],
    source: Optional[Tensor],
    gap: Optional[Tensor],
    rest: Optional[Tensor],
    delta_softplus: bool,
    states: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    return _backend(u).backward(
        grad_y, u, delta, A, B, C, D, delta_bias, order, source, gap, rest, delta_softplus, states
    )


@_scan_backward.register_fake
def _(grad_y, u, delta, A, B, C, D, delta_bias, order, source, gap, rest, delta_softplus, states):
    def like(x: Optional[Tensor]) -> Tensor:
        return u.new_empty(0) if x is None else x.new_empty(x.shape)

    return tuple(like(x) for x in (u, delta, A, B, C, D, delta_bias, rest))


def _save_for_backward(ctx, inputs, output) -> None:
    *tensors, ctx.delta_softplus = inputs
    ctx.save_for_backward(*tensors, output[1])
    ctx.set_materialize_grads(False)


def _differentiate(ctx, grad_y: Optional[Tensor], _grad_states: Optional[Tensor]):
    *inputs, states = ctx.saved_tensors
    if grad_y is None:
        return (None,) * 12
    du, ddelta, dA, dB, dC, dD, dbias, drest = torch.ops.mmvssm.selective_scan_backward(
        grad_y, *inputs, ctx.delta_softplus, states
    )
    D, delta_bias, rest = inputs[5], inputs[6], inputs[10]
    return (
        *(du, ddelta, dA, dB, dC),
        *(None if D is None else dD, None if delta_bias is None else dbias),
        *(None, None, None),  # order, source and gap are integers
        *(None if rest is None else drest, None),
    )


_scan.register_autograd(_differentiate, setup_context=_save_for_backward)


def _register_autocast(device_type: str, dispatch_key: str) -> None:
    def scan(u, delta, A, B, C, *rest):
        dtype = torch.get_autocast_dtype(device_type)
        u, delta, B, C = (x if x.dtype == torch.float64 else x.to(dtype) for x in (u, delta, B, C))
        with torch.autocast(device_type, enabled=False):
            return torch.ops.mmvssm.selective_scan(u, delta, A, B, C, *rest)

    _library.impl("selective_scan", scan, dispatch_key)


_library = torch.library.Library("mmvssm", "FRAGMENT")
_register_autocast("cpu", "AutocastCPU")
_register_autocast("cuda", "AutocastCUDA")


@register_flop_formula(torch.ops.mmvssm.selective_scan)
def selective_scan_flops(u_shape, delta_shape, A_shape, *args, out_shape=None, **kwargs) -> int:
    """``9 L D N + L D`` per image and walk, as the vision Mamba papers count (VMamba, appendix)."""
    batch, length, walks, channels = u_shape
    return batch * walks * length * channels * (9 * A_shape[-1] + 1)


@register_flop_formula(torch.ops.mmvssm.selective_scan_backward)
def selective_scan_backward_flops(
    grad_shape, u_shape, delta_shape, A_shape, *args, out_shape=None, **kwargs
) -> int:
    """Twice the forward pass, the usual estimate where a pass is not counted operation by operation."""
    return 2 * selective_scan_flops(u_shape, delta_shape, A_shape)
