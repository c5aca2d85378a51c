"""mamba-ssm's ``selective_scan_fn`` on this package's operator.

Models written for mamba-ssm run on a CPU, or on a GPU without a CUDA build, once they import the function from here.
"""

from __future__ import annotations

from typing import Optional, Union

import torch
import torch.nn.functional as F
from torch import Tensor

from .selective_scan import selective_scan

_STATE_ELEMENTS = 2**24
"""Most elements ``(B, D, chunk, N)`` per step of the last state's computation."""


def selective_scan_fn(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Optional[Tensor] = None,
    z: Optional[Tensor] = None,
    delta_bias: Optional[Tensor] = None,
    delta_softplus: bool = False,
    return_last_state: bool = False,
) -> Union[Tensor, tuple[Tensor, Tensor]]:
    """Selective scan with the arguments and layouts of ``mamba_ssm.ops.selective_scan_interface.selective_scan_fn``.

    Args:
        u: Values ``(B, D, L)``: batch, channel, token.
        delta: Step sizes ``(B, D, L)``.
        A: State decay rates ``(D, N)``, real.
        B: Input projections ``(B, N, L)``; ``(B, G, N, L)`` for ``G`` groups of channels; or ``(D, N)``, the same for
            all tokens.
        C: Output projections, in any of the shapes of ``B``.
        D: Skip connection ``(D,)``.
        z: Gate ``(B, D, L)``; the output is multiplied by its SiLU.
        delta_bias: Added to ``delta`` ``(D,)``.
        delta_softplus: Whether ``delta`` passes through softplus.
        return_last_state: Whether to also return the state after the last token.

    Returns:
        ``(B, D, L)`` in the dtype of ``u``; with ``return_last_state`` also the state ``(B, D, N)``, in float64 if
        ``u`` is, else float32.

    Raises:
        ValueError: If ``A``, ``B`` or ``C`` is complex, or if a shape does not fit.
    """
    if any(x.is_complex() for x in (A, B, C)):
        raise ValueError(
            "selective_scan_fn: A, B and C must be real; complex states are not supported."
        )
    if u.dim() != 3 or delta.shape != u.shape or A.dim() != 2 or A.shape[0] != u.shape[1]:
        raise ValueError(
            "selective_scan_fn: expected u and delta (B, D, L) and A (D, N); got "
            f"{tuple(u.shape)}, {tuple(delta.shape)} and {tuple(A.shape)}."
        )
    groups = 1
    for name, x in (("B", B), ("C", C)):
        groups = max(groups, _groups_of(name, x, u, A))
    B, C = (_by_token(x, u, groups) for x in (B, C))

    def grouped(x: Tensor) -> Tensor:
        """Reshape ``(D, ...)`` to ``(groups, D / groups, ...)``."""
        return x.unflatten(0, (groups, -1))

    # Round a gated output only once, after the gate.
    values = u if z is None else u.to(torch.promote_types(u.dtype, torch.float32))
    y = selective_scan(
        *(x.transpose(1, 2).contiguous().unflatten(2, (groups, -1)) for x in (values, delta)),
        grouped(A),
        B,
        C,
        None if D is None else grouped(D),
        None if delta_bias is None else grouped(delta_bias),
        delta_softplus=delta_softplus,
    )
    y = y.flatten(2).transpose(1, 2)
    if z is not None:
        y = y * F.silu(z)
    y = y.to(u.dtype)
    if not return_last_state:
        return y
    return y, _last_state(u, delta, A, B, delta_bias, delta_softplus)


def _groups_of(name: str, x: Tensor, u: Tensor, A: Tensor) -> int:
    """Number of channel groups that have separate projections."""
    batch, channels, length = u.shape
    states = A.shape[1]
    if x.shape == (channels, states):
        return channels
    if x.shape == (batch, states, length):
        return 1
    if (
        x.dim() == 4
        and x.shape == (batch, x.shape[1], states, length)
        and channels % x.shape[1] == 0
    ):
        return x.shape[1]
    raise ValueError(
        f"selective_scan_fn: {name} must be (D, N), (B, N, L) or (B, G, N, L) with D a multiple of G, here "
        f"{(channels, states)}, {(batch, states, length)} or {(batch, 'G', states, length)}; got {tuple(x.shape)}."
    )


def _by_token(x: Tensor, u: Tensor, groups: int) -> Tensor:
    """Bring projections of any allowed shape to ``(B, L, groups, N)``."""
    batch, _, length = u.shape
    if x.dim() == 2:
        return x.expand(batch, length, *x.shape)
    if x.dim() == 3:
        x = x[:, None]
    if x.shape[1] < groups:  # gradients of the copies are summed, which half precision would round
        x = x.to(torch.promote_types(x.dtype, torch.float32))
    return x.permute(0, 3, 1, 2).repeat_interleave(groups // x.shape[1], 2)


def _last_state(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    delta_bias: Optional[Tensor],
    delta_softplus: bool,
) -> Tensor:
    """Sum the tokens' contributions to the state ``(B, D, N)``, each decayed by the step sizes after it."""
    dtype = torch.promote_types(u.dtype, torch.float32)
    step = delta.to(dtype)
    if delta_bias is not None:
        step = step + delta_bias.to(dtype)[:, None]
    if delta_softplus:
        step = F.softplus(step)
    later = step.flip(-1).cumsum(-1).flip(-1) - step  # sum of the step sizes after each token
    values = step * u.to(dtype)
    batch, channels, length = u.shape
    B = B.to(dtype).repeat_interleave(channels // B.shape[2], 2)  # (B, L, D, N)
    chunk = max(1, _STATE_ELEMENTS // (batch * channels * A.shape[1]))
    state = values.new_zeros(batch, channels, A.shape[1])
    for start in range(0, length, chunk):
        part = slice(start, start + chunk)
        decay = torch.exp(later[:, :, part, None] * A.to(dtype)[:, None])
        state = state + torch.einsum("bdl,bdln,bldn->bdn", values[:, :, part], decay, B[:, part])
    return state
