"""The selective scan on CUDA GPUs, by the Triton kernels of ``triton_kernels.py``, where the mathematics is.

:func:`forward` and :func:`backward` keep the contract of ``pytorch.py``. Every walk of every image goes in one launch,
tokens are read where they are, and what is added up across programs is added up in a fixed order: two runs agree bit
for bit.

``order`` and ``source`` are not checked: an entry outside the tokens reads or writes memory that is not the tensor's.
"""

from __future__ import annotations

from typing import Any, Optional

import torch
from torch import Tensor

from ..triton_launcher import launch
from .inputs import CHUNK_LENGTH, ScanInputs, num_chunks


def forward(inputs: ScanInputs) -> tuple[Tensor, Tensor]:
    """Run the scan: see :func:`mmvssm.ops.selective_scan.pytorch.forward`."""
    scan = _arguments(inputs)
    states = _taken_over("chunk_ends", scan, inputs.accumulation_dtype)
    y = torch.empty_like(inputs.u, memory_format=torch.contiguous_format)
    _launch_over_chunks("chunk_outputs", scan, states=states, y=y)
    return y, states


def backward(
    grad_y: Tensor, inputs: ScanInputs, states: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Differentiate the scan: see :func:`mmvssm.ops.selective_scan.pytorch.backward`."""
    u, delta, A, B, C, D, delta_bias, _, _, gap, rest, _ = inputs
    scan = _arguments(inputs)
    scan.update(_strided(dy=grad_y))
    adjoints = _taken_over("chunk_adjoint_ends", scan, states.dtype, backwards=True)

    du, ddelta = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (u, delta))
    dA = torch.empty_like(states)
    dD, ddelta_bias, drest = (
        None if x is None else states.new_empty(states.shape[:-1]) for x in (D, delta_bias, rest)
    )
    if rest is not None and gap is None:
        drest.zero_()
    # A single block of channels writes dB and dC as they are; several leave parts to be added up.
    blocks = _channel_blocks(scan)
    dB, dC = (
        x.new_empty((blocks, *x.shape), dtype=x.dtype if blocks == 1 else states.dtype)
        for x in (B, C)
    )
    _launch_over_chunks(
        "chunk_gradients",
        scan,
        **dict(states=states, adjoints=adjoints, du=du, ddelta=ddelta),
        **dict(dA=dA, dB=dB, dC=dC, dD=dD, ddelta_bias=ddelta_bias, drest=drest),
    )
    dB, dC = (parts[0] if blocks == 1 else parts.sum(0) for parts in (dB, dC))
    return (
        *(du, ddelta, _sum_chunks(dA, A), dB.to(B.dtype), dC.to(C.dtype)),
        *(
            u.new_empty(0) if x is None else _sum_chunks(parts, x)
            for parts, x in ((dD, D), (ddelta_bias, delta_bias), (drest, rest))
        ),
    )


def _taken_over(
    ends_kernel: str, scan: dict[str, Any], dtype: torch.dtype, backwards: bool = False
) -> Tensor:
    """What each chunk takes over from the one before it, or ``backwards`` the one after it, ``(B, K, S, D, N)``."""
    shape = (scan["images"], scan["walks"], scan["chunks"], scan["channels"], scan["N"])
    if scan["chunks"] == 1:
        return scan["A"].new_zeros(shape, dtype=dtype)
    ends = scan["A"].new_empty(shape, dtype=dtype)
    times = scan["A"].new_empty(shape[:-1], dtype=dtype)
    _launch_over_chunks(ends_kernel, scan, ends=ends, times=times)
    return _launch_hand_over(scan, ends, times, backwards)


def _sum_chunks(parts: Tensor, like: Tensor) -> Tensor:
    return parts.sum((0, 2)).to(like.dtype)


# ------------------------------------------------------------------------------------------- arguments


def _arguments(inputs: ScanInputs) -> dict[str, Any]:
    """What the kernels take, by the names they give it."""
    u, delta, A, B, C, D, delta_bias, order, source, gap, rest, delta_softplus = inputs
    batch, length, walks, channels = u.shape
    parameters = dict(A=A, D=D, delta_bias=delta_bias, rest=rest)
    return dict(
        **_strided(u=u, delta=delta, B=B, C=C),
        **_along_walks(order=order, source=source, gap=gap),
        **{name: None if x is None else x.contiguous() for name, x in parameters.items()},
        **dict(images=batch, length=length, walks=walks, channels=channels),
        **dict(chunks=num_chunks(length), N=A.shape[-1], SOFTPLUS=delta_softplus),
        LANES=min(32, _power_of_2(channels)),
    )


def _strided(**tensors: Tensor) -> dict[str, Any]:
    """Tensors ``(B, L, K, *)``, copied only where channels are not adjacent, and their strides ``*_b, *_l, *_k``."""
    arguments = {}
    for name, x in tensors.items():
        x = x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()
        arguments[name] = x
        arguments.update(zip((f"{name}_b", f"{name}_l", f"{name}_k"), x.stride()))
    return arguments


def _along_walks(**indices: Optional[Tensor]) -> dict[str, Any]:
    """Indices ``(K, L)`` or ``(B, K, L)`` and their strides ``*_b``, 0 where all images share one."""
    arguments = {}
    for name, x in indices.items():
        arguments[name] = None if x is None else x.contiguous()
        arguments[f"{name}_b"] = x.shape[1] * x.shape[2] if x is not None and x.dim() == 3 else 0
    return arguments


def _channel_blocks(scan: dict[str, Any]) -> int:
    return -(-scan["channels"] // scan["LANES"])


def _power_of_2(x: int) -> int:
    """The smallest that is not less."""
    return 1 << (x - 1).bit_length()


# -------------------------------------------------------------------------------------------- launches
# Block sizes and warps follow from the shapes by fixed rules: tuning by trial would stall the start of a training.

# Steps that a thread scans one after the other: as many as its registers hold without spilling.
_STEPS = 8
# Most groups of chunks that one round of ``hand_over`` takes.
_MAX_GROUPS = 32


def _launch_over_chunks(kernel: str, scan: dict[str, Any], **tensors: Optional[Tensor]) -> None:
    """One program for each chunk of each walk of each image, and block of channels."""
    grid = (scan["images"] * scan["walks"] * scan["chunks"], _channel_blocks(scan))
    tile = dict(STEPS=_STEPS, GROUPS=CHUNK_LENGTH // _STEPS)
    _launch(kernel, grid, {**scan, **tile, **tensors}, threads=tile["GROUPS"] * scan["LANES"])


def _launch_hand_over(scan: dict[str, Any], ends: Tensor, times: Tensor, backwards: bool) -> Tensor:
    """One program for each walk of each image, and few columns of its states: it passes through all chunks."""
    entries = torch.empty_like(ends)
    columns = scan["channels"] * scan["N"]
    tile = dict(
        STEPS=_STEPS,
        GROUPS=min(_MAX_GROUPS, _power_of_2(-(-scan["chunks"] // _STEPS))),
        COLUMNS=min(8, _power_of_2(columns)),
    )
    grid = (scan["images"] * scan["walks"], -(-columns // tile["COLUMNS"]))
    tensors = dict(ends=ends, times=times, entries=entries, columns=columns, BACKWARDS=backwards)
    _launch(
        "hand_over", grid, {**scan, **tile, **tensors}, threads=tile["GROUPS"] * tile["COLUMNS"]
    )
    return entries


def _launch(kernel: str, grid: tuple[int, int], values: dict[str, Any], threads: int) -> None:
    from . import triton_kernels

    launch(getattr(triton_kernels, kernel), grid, values, num_warps=max(1, threads // 32))
