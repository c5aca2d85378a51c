"""Reference selective scan: one plain loop, any dtype, differentiable by autograd.

The tests compare every faster version in this folder with this one.
"""

from __future__ import annotations

import functools
from typing import Optional

import torch
import torch.nn.functional as F
from torch import Tensor


def selective_scan_naive(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Optional[Tensor] = None,
    delta_bias: Optional[Tensor] = None,
    order: Optional[Tensor] = None,
    source: Optional[Tensor] = None,
    gap: Optional[Tensor] = None,
    rest: Optional[Tensor] = None,
    delta_softplus: bool = True,
    sum_walks: bool = False,
) -> Tensor:
    """Selective scan (Mamba, section 3.2) along several walks over the same tokens, step by step.

    For walk ``k``, with ``i = order[k, t]`` and ``j = source[k, t]``, per channel and state::

        step_t = softplus(delta[j] + delta_bias)
        h_t    = exp((step_t + gap[k, t] * rest) * A) * h_{t-1} + step_t * B[j] * u[i]     h_{-1} = 0
        y[i]   = sum over states of C[j] * h_t, plus D * u[i]

    It computes in the widest of float32 and the inputs' dtypes; pass float64 for a reference to compare with.

    Args:
        u: Values ``(B, L, K, D)``: batch, token, walk, channel; ``(B, L, 1, D)`` if the walks share them.
        delta: Step sizes before bias and softplus, in either shape of ``u``.
        A: State decay rates ``(K, D, N)``, negative.
        B: Input projections ``(B, L, K, N)``.
        C: Output projections ``(B, L, K, N)``.
        D: Skip connection ``(K, D)``.
        delta_bias: Added to ``delta`` ``(K, D)``.
        order: Token whose ``u`` step ``t`` reads and whose ``y`` it writes ``(K, L)`` or ``(B, K, L)``: a permutation
            of the tokens for each walk; by default the order in memory.
        source: Token whose ``delta``, ``B`` and ``C`` step ``t`` reads, shaped like ``order``: also a permutation; by
            default ``order``.
        gap: Number of absent grid positions since the walk's previous step, shaped like ``order``; by default 0.
        rest: Step size at an absent position ``(K, D)``.
        delta_softplus: Whether ``delta`` passes through softplus.
        sum_walks: Whether to sum over the walks.

    Returns:
        ``y (B, L, K, D)``, or ``(B, L, D)`` if summed, in the order and dtype of ``u``.
    """
    floating = (x for x in (u, delta, A, B, C, D, delta_bias, rest) if x is not None)
    dtype = functools.reduce(torch.promote_types, (x.dtype for x in floating), torch.float32)
    batch, length, _, _ = u.shape
    walks = A.shape[0]
    u, delta = (x.expand(-1, -1, walks, -1) for x in (u, delta))
    in_memory = torch.arange(length, device=u.device).expand(batch, walks, length)
    order = in_memory if order is None else order.long().expand(batch, walks, length)
    source = order if source is None else source.long().expand(batch, walks, length)
    row = torch.arange(batch, device=u.device)[:, None]
    walk = torch.arange(walks, device=u.device)[None, :]

    step = delta.to(dtype)
    if delta_bias is not None:
        step = step + delta_bias.to(dtype)
    if delta_softplus:
        step = F.softplus(step)

    A = A.to(dtype)
    h = u.new_zeros((batch, *A.shape), dtype=dtype)
    outputs = []
    for t in range(length):
        i, j = order[:, :, t], source[:, :, t]
        u_t = u[row, i, walk].to(dtype)
        step_t = step[row, j, walk]
        B_t, C_t = B[row, j, walk].to(dtype), C[row, j, walk].to(dtype)
        elapsed = step_t
        if gap is not None:
            elapsed = elapsed + gap.expand(batch, walks, length)[:, :, t, None] * rest.to(dtype)
        h = torch.exp(elapsed[..., None] * A) * h + (step_t * u_t)[..., None] * B_t[:, :, None]
        y_t = (h * C_t[:, :, None]).sum(-1)
        if D is not None:
            y_t = y_t + D.to(dtype) * u_t
        outputs.append(y_t)

    # Step t's output belongs to token order[t]: undo the permutation.
    at_token = order.argsort(-1).transpose(1, 2)
    y = torch.stack(outputs, dim=1)[row[..., None], at_token, walk[None]]
    return (y.sum(2) if sum_walks else y).to(u.dtype)
