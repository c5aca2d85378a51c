"""Selective scan in vectorised PyTorch: the fallback for CPUs without the compiled kernel and for other devices.

A walk is cut into chunks of :data:`~.inputs.CHUNK_LENGTH` steps. All chunks advance together from a zero state, then a
short loop passes each chunk the final state of the chunk before. States are processed one at a time, so no tensor is
larger than ``(B, L, K, D)``.

:func:`forward` and :func:`backward` are the contract of every backend.
"""

from __future__ import annotations

from typing import NamedTuple, Optional

import torch
import torch.nn.functional as F
from torch import Tensor

from .inputs import CHUNK_LENGTH, ScanInputs, num_chunks


def forward(inputs: ScanInputs) -> tuple[Tensor, Tensor]:
    """Run the scan, so that PyTorch can differentiate it to any order.

    Returns:
        ``y (B, L, K, D)``, or ``(B, L, D)`` if the walks are summed, in the dtype of ``u``, contiguous, and
        ``states (B, K, S, D, N)`` in the accumulation dtype: the state before step ``s * CHUNK_LENGTH`` of each walk,
        ``S = ceil(L / CHUNK_LENGTH)``.
    """
    inputs = inputs.for_each_walk()
    walk, D = _Walk.along(inputs), inputs.D
    y = walk.u * D.to(walk.u.dtype) if D is not None else torch.zeros_like(walk.u)
    states = y.new_empty(inputs.states_shape)
    for n in range(inputs.A.shape[-1]):
        decay, drive = walk.recurrence(n)
        h, entry = _chunked_scan(decay, drive)
        states[..., n] = entry.transpose(1, 2)
        y += h * walk.C[..., n, None]
    y = walk.put(y, walk.order)
    return (y.sum(2) if inputs.sum_walks else y).to(inputs.u.dtype), states


def backward(
    grad_y: Tensor, inputs: ScanInputs, states: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Differentiate the scan.

    Args:
        grad_y: Gradient of ``y``, or of its sum, for each walk: ``(B, L, K, D)``, any strides.
        inputs: The inputs of :func:`forward`.
        states: The states that :func:`forward` returned.

    Returns:
        Gradients of ``u, delta, A, B, C, D, delta_bias, rest``, contiguous, each in the shape and dtype of its tensor;
        an empty tensor ``(0,)`` for each of the last three that is None.
    """
    u, delta, A, B, C, D, delta_bias, *_, rest, delta_softplus, _ = inputs
    walk = _Walk.along(inputs.for_each_walk())
    grad_y = walk.take(grad_y, walk.order)
    grad_u = grad_y * D.to(walk.u.dtype) if D is not None else torch.zeros_like(walk.u)
    grad_step, grad_elapsed = torch.zeros_like(walk.u), torch.zeros_like(walk.u)
    grad_A = A.new_empty(A.shape, dtype=walk.u.dtype)
    grad_B, grad_C = torch.empty_like(walk.B), torch.empty_like(walk.C)
    for n in range(A.shape[-1]):
        decay, drive = walk.recurrence(n)
        h, _ = _chunked_scan(decay, drive, states[..., n].transpose(1, 2))
        grad_C[..., n] = (grad_y * h).sum(-1)
        # g_t = dL/dh_t = C_t dy_t + decay_{t+1} g_{t+1}: the same recurrence, walked backwards.
        later_decay = F.pad(decay[:, 1:], (0, 0, 0, 0, 0, 1))
        g, _ = _chunked_scan(later_decay.flip(1), (grad_y * walk.C[..., n, None]).flip(1))
        g = g.flip(1)
        earlier_h = F.pad(h[:, :-1], (0, 0, 0, 0, 1, 0))
        grad_exponent = g * earlier_h * decay
        grad_elapsed += grad_exponent * walk.A[..., n]
        grad_A[..., n] = (grad_exponent * walk.elapsed).sum((0, 1))
        g_B = g * walk.B[..., n, None]
        grad_step += g_B * walk.u
        grad_u += g_B * walk.step
        grad_B[..., n] = (g * walk.step * walk.u).sum(-1)

    grad_step += grad_elapsed
    if delta_softplus:
        grad_step = grad_step * walk.slope
    absent = u.new_empty(0)
    grad_rest = absent
    if rest is not None:
        grad_rest = rest.new_zeros(rest.shape)
        if walk.gap is not None:
            grad_rest = (grad_elapsed * walk.gap).sum((0, 1)).to(rest.dtype)
    return (
        walk.put(grad_u, walk.order).sum_to_size(u.shape).to(u.dtype),
        walk.put(grad_step, walk.source).sum_to_size(delta.shape).to(delta.dtype),
        grad_A.to(A.dtype),
        walk.put(grad_B, walk.source).to(B.dtype),
        walk.put(grad_C, walk.source).to(C.dtype),
        (grad_y * walk.u).sum((0, 1)).to(D.dtype) if D is not None else absent,
        grad_step.sum((0, 1)).to(delta_bias.dtype) if delta_bias is not None else absent.clone(),
        grad_rest if rest is not None else absent.clone(),
    )


class _Walk(NamedTuple):
    """Inputs in step order and the accumulation dtype, ``(B, L, K, D)`` or ``(B, L, K, N)``."""

    u: Tensor
    step: Tensor
    slope: Optional[Tensor]
    elapsed: Tensor
    gap: Optional[Tensor]
    A: Tensor
    B: Tensor
    C: Tensor
    order: Optional[Tensor]
    source: Optional[Tensor]

    @classmethod
    def along(cls, inputs: ScanInputs) -> _Walk:
        u, delta, A, B, C, _, delta_bias, order, source, gap, rest, delta_softplus, _ = inputs
        dtype = inputs.accumulation_dtype
        order = _token_index(order)
        source = order if source is None else _token_index(source)
        raw = cls.take(delta, source).to(dtype)
        if delta_bias is not None:
            raw = raw + delta_bias.to(dtype)
        step = F.softplus(raw) if delta_softplus else raw
        slope = torch.sigmoid(raw) if delta_softplus else None
        elapsed = step
        if gap is not None:
            gap = (gap if gap.dim() == 3 else gap[None]).transpose(1, 2)[..., None].to(dtype)
            elapsed = step + gap * rest.to(dtype)
        return cls(
            cls.take(u, order).to(dtype),
            step,
            slope,
            elapsed,
            gap,
            A.to(dtype),
            cls.take(B, source).to(dtype),
            cls.take(C, source).to(dtype),
            order,
            source,
        )

    @staticmethod
    def take(x: Tensor, index: Optional[Tensor]) -> Tensor:
        """Return tokens in step order."""
        return x if index is None else x[_grid_index(x, index)]

    @staticmethod
    def put(x: Tensor, index: Optional[Tensor]) -> Tensor:
        """Invert :meth:`take`."""
        if index is None:
            return x.contiguous()
        y = torch.empty_like(x, memory_format=torch.contiguous_format)
        y[_grid_index(x, index)] = x
        return y

    def recurrence(self, n: int) -> tuple[Tensor, Tensor]:
        """``decay`` and ``drive`` of ``h_t = decay_t * h_{t-1} + drive_t`` for state ``n``, each ``(B, L, K, D)``."""
        return torch.exp(self.elapsed * self.A[..., n]), self.step * self.u * self.B[..., n, None]


def _token_index(order: Optional[Tensor]) -> Optional[Tensor]:
    """``(B or 1, L, K)`` from ``(K, L)`` or ``(B, K, L)``."""
    if order is None:
        return None
    return (order if order.dim() == 3 else order[None]).transpose(1, 2).long()


def _grid_index(x: Tensor, index: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    batch = torch.arange(x.shape[0], device=x.device)[:, None, None]
    return batch, index, torch.arange(x.shape[2], device=x.device)


def _chunked_scan(
    decay: Tensor, drive: Tensor, entry: Optional[Tensor] = None
) -> tuple[Tensor, Tensor]:
    """Solve ``h_t = decay_t * h_{t-1} + drive_t`` for all ``t``.

    Args:
        decay: ``(B, L, K, D)``.
        drive: ``(B, L, K, D)``.
        entry: State before each chunk ``(B, S, K, D)``; computed if None.

    Returns:
        ``h (B, L, K, D)`` and ``entry``.
    """
    length = decay.shape[1]
    chunks = num_chunks(length)
    missing = chunks * CHUNK_LENGTH - length
    if missing:
        decay, drive = (F.pad(x, (0, 0, 0, 0, 0, missing)) for x in (decay, drive))
    decay = decay.unflatten(1, (chunks, CHUNK_LENGTH)).unbind(2)
    drive = drive.unflatten(1, (chunks, CHUNK_LENGTH)).unbind(2)
    if entry is None:
        end, fade = drive[0], decay[0]
        for decay_t, drive_t in zip(decay[1:], drive[1:]):
            end = torch.addcmul(drive_t, decay_t, end)
            fade = fade * decay_t
        entries = [torch.zeros_like(end[:, 0])]
        for s in range(1, chunks):
            entries.append(torch.addcmul(end[:, s - 1], fade[:, s - 1], entries[-1]))
        entry = torch.stack(entries, dim=1)
    h, steps = entry, []
    for decay_t, drive_t in zip(decay, drive):
        h = torch.addcmul(drive_t, decay_t, h)
        steps.append(h)
    return torch.stack(steps, dim=2).flatten(1, 2)[:, :length], entry
