"""Selective scan: the public function and its registration with PyTorch.

``naive.py`` defines the operator, ``inputs.py`` holds its arguments and checks, ``traversal.py`` makes walks over
grids. ``pytorch.py``, ``cpu.py`` and ``triton_launch.py`` are its backends.
"""

from __future__ import annotations

import math
from types import ModuleType
from typing import Optional

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from .. import backend
from . import cpu, pytorch, triton_launch
from .inputs import DIFFERENTIABLE, SCHEMA, ScanInputs
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
    sum_walks: bool = False,
) -> Tensor:
    """Selective scan (Mamba, section 3.2) along ``K`` walks over the same tokens, in one call.

    :func:`mmvssm.ops.selective_scan.naive.selective_scan_naive` has the formula. The state is float64 if any of ``u``,
    ``delta``, ``A``, ``B`` and ``C`` is, else float32; ``D``, ``delta_bias`` and ``rest`` are converted to that dtype.
    Forward and backward take ``O(B * L * K * D)`` memory: no tensor of size ``B * L * K * D * N`` exists. All
    floating-point arguments are differentiable. Second derivatives (``create_graph=True``) and forward mode go through
    PyTorch's formula, which is slower and stores ``O(B * L * K * D * N)``.

    Where walks share ``u`` or ``delta``, pass them with size 1 along ``K``; what they share of the others may be
    expanded (stride 0). Nothing is copied. If the walks share everything but ``B``, ``traversal.order`` and
    ``traversal.gap``, the CPU forward pass computes the shared part once, which halves its time at 16 states.

    Args:
        u: Values ``(B, L, K, D)``: batch, token, walk, channel; or ``(B, L, 1, D)``, and then its gradient is summed
            over the walks. Channels should be adjacent in memory.
        delta: Step sizes before bias and softplus, in either shape of ``u``.
        A: State decay rates ``(K, D, N)``, negative.
        B: Input projections ``(B, L, K, N)``.
        C: Output projections ``(B, L, K, N)``.
        D: Skip connection ``(K, D)``.
        delta_bias: Added to ``delta`` ``(K, D)``.
        traversal: Token that each step visits; by default every walk follows the order in memory.
        rest: Step size at grid positions without a token ``(K, D)``; required with ``traversal.gap``.
        delta_softplus: Whether ``delta`` passes through softplus.
        sum_walks: Whether to return the sum over the walks. The CPU adds them up while it scans.

    Returns:
        ``y (B, L, K, D)``, or ``(B, L, D)`` with ``sum_walks``, contiguous, in the order and dtype of ``u``. Autocast
        converts ``u``, ``delta``, ``B`` and ``C`` but not ``A``, ``D``, ``delta_bias`` and ``rest``.

    Raises:
        ValueError: If a shape, dtype or device does not fit. The message names the argument, its value and what we
            expected.
    """
    walks = traversal if traversal is not None else (None, None, None)
    inputs = ScanInputs(u, delta, A, B, C, D, delta_bias, *walks, rest, delta_softplus, sum_walks)
    inputs.check_once()
    y, _ = torch.ops.mmvssm.selective_scan.default(*inputs)
    return y


def _backend(u: Tensor) -> ModuleType:
    return backend.choose(u, gpu=triton_launch, cpu=cpu, fallback=pytorch)


# Registered by hand: the overhead of ``torch.library.custom_op`` exceeded the launch of a scan.
_library = torch.library.Library("mmvssm", "FRAGMENT")
_library.define(
    f"selective_scan({SCHEMA}, bool sum_walks=False) -> (Tensor y, Tensor states)",
    tags=torch.Tag.pt2_compliant_tag,
)
_library.define(
    f"selective_scan_backward(Tensor grad_y, {SCHEMA}, Tensor states) -> "
    f"({', '.join(['Tensor'] * len(DIFFERENTIABLE))})",
    tags=torch.Tag.pt2_compliant_tag,
)


@torch.library.impl(_library, "selective_scan", "CompositeExplicitAutograd")
def _scan(*inputs) -> tuple[Tensor, Tensor]:
    inputs = ScanInputs(*inputs)
    # Exported programs and direct calls skip the checks above, and kernels trust shapes.
    inputs.check_once()
    y, states = _backend(inputs.u).forward(inputs)
    # Flat, since torch.export specialises sizes of 1, and a short walk has one chunk.
    return y, states.flatten()


@torch.library.register_fake("mmvssm::selective_scan", lib=_library)
def _(*inputs):
    inputs = ScanInputs(*inputs)
    inputs.check_devices()
    states = inputs.u.new_empty(math.prod(inputs.states_shape), dtype=inputs.accumulation_dtype)
    return inputs.u.new_empty(inputs.y_shape), states


@torch.library.impl(_library, "selective_scan_backward", "CompositeExplicitAutograd")
def _scan_backward(grad_y, *inputs_and_states) -> tuple[Tensor, ...]:
    *inputs, states = inputs_and_states
    inputs = ScanInputs(*inputs, sum_walks=grad_y.dim() == 3)
    inputs.check_once()
    if grad_y.shape != inputs.y_shape or states.numel() != math.prod(inputs.states_shape):
        raise ValueError(
            f"selective_scan_backward: grad_y must have the shape of y, {inputs.y_shape}, and states "
            f"{math.prod(inputs.states_shape)} elements; got {tuple(grad_y.shape)} and {states.numel()}."
        )
    others = dict(u=inputs.u, states=states)
    backend.check_devices("selective_scan_backward", "grad_y", grad_y, others)
    grad_y = inputs.grad_of_each_walk(grad_y)
    return _backend(grad_y).backward(grad_y, inputs, states.view(inputs.states_shape))


@torch.library.register_fake("mmvssm::selective_scan_backward", lib=_library)
def _(grad_y, *inputs_and_states):
    inputs = ScanInputs(*inputs_and_states[:-1])
    tensors = (getattr(inputs, name) for name in DIFFERENTIABLE)
    return tuple(grad_y.new_empty(0) if x is None else x.new_empty(x.shape) for x in tensors)


class _Differentiable(torch.autograd.Function):
    """The operator with its gradients."""

    @staticmethod
    def forward(ctx, *inputs):
        y, states = _without_autograd(*inputs)
        *tensors, ctx.delta_softplus, ctx.sum_walks = inputs
        ctx.save_for_backward(*tensors, states)
        ctx.mark_non_differentiable(states)
        ctx.set_materialize_grads(False)
        return y, states

    @staticmethod
    def backward(ctx, grad_y: Optional[Tensor], _grad_states: Optional[Tensor]):
        *tensors, states = ctx.saved_tensors
        inputs = ScanInputs(*tensors, ctx.delta_softplus, ctx.sum_walks)
        grads = dict.fromkeys(ScanInputs._fields)
        if grad_y is not None and torch.is_grad_enabled():
            return backend.gradients_of(_formula, inputs, grad_y)
        if grad_y is not None:
            found = torch.ops.mmvssm.selective_scan_backward.default(
                grad_y, *tensors, ctx.delta_softplus, states
            )
            for name, grad in zip(DIFFERENTIABLE, found):
                grads[name] = None if getattr(inputs, name) is None else grad
        return tuple(grads.values())


def _formula(*inputs) -> Tensor:
    return pytorch.forward(ScanInputs(*inputs))[0]


def _without_autograd(*inputs) -> tuple[Tensor, Tensor]:
    with torch._C._AutoDispatchBelowAutograd():
        return torch.ops.mmvssm.selective_scan.default(*inputs)


@torch.library.impl(_library, "selective_scan", "Autograd")
def _with_autograd(*inputs) -> tuple[Tensor, Tensor]:
    if backend.has_tangent(*inputs):
        y, states = pytorch.forward(ScanInputs(*inputs))
        return y, states.flatten()
    if torch.is_grad_enabled() and any(getattr(x, "requires_grad", False) for x in inputs):
        return _Differentiable.apply(
            *ScanInputs(*inputs)
        )  # without the defaults, which PyTorch leaves out
    return _without_autograd(*inputs)


backend.register_autocast(
    "selective_scan", lowered=[ScanInputs._fields.index(x) for x in ("u", "delta", "B", "C")]
)


@register_flop_formula(torch.ops.mmvssm.selective_scan)
def selective_scan_flops(u_shape, delta_shape, A_shape, *args, out_shape=None, **kwargs) -> int:
    """Count ``9 L D N + L D`` per image and walk, as the vision Mamba papers do (VMamba, appendix)."""
    batch, length, _, channels = u_shape
    walks, _, states = A_shape
    return batch * walks * length * channels * (9 * states + 1)


@register_flop_formula(torch.ops.mmvssm.selective_scan_backward)
def selective_scan_backward_flops(
    grad_shape, u_shape, delta_shape, A_shape, *args, out_shape=None, **kwargs
) -> int:
    """Count twice the forward pass, the usual estimate."""
    return 2 * selective_scan_flops(u_shape, delta_shape, A_shape)
