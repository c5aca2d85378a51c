"""The one place from which every operator's Triton kernels are launched.

What launches them can be replaced: inside :func:`recorded_launches` nothing runs, and what would have been launched is
noted instead. So the kernels that an operator launches, with exactly the constants and options that it launches them
with, can be compiled, counted and emulated on a machine without a GPU, from tensors on the CPU or on ``meta``.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, NamedTuple, Optional

import torch


class Launch(NamedTuple):
    """A kernel and all that it is launched with.

    Attributes:
        kernel: What ``triton.jit`` made: its ``arg_names`` are the keys of ``arguments``, in that order its ``params``
            say which are ``constexpr`` and which are not specialised.
        grid: Programs along up to three axes.
        arguments: The value of every argument, constants included: a tensor, number, boolean or None.
        options: Of Triton's compiler: ``num_warps``, ``enable_fp_fusion`` and whatever else an operator chose.
    """

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    options: dict[str, Any]


def launch(
    kernel: Any,
    grid: tuple[int, ...],
    arguments: dict[str, Any],
    *,
    num_warps: int,
    device: torch.device,
) -> None:
    """Launch a Triton kernel on the current stream of a device.

    Args:
        kernel: What ``triton.jit`` made.
        grid: Programs along up to three axes.
        arguments: The values of all the kernel's arguments, by name.
        num_warps: Warps of a program.
        device: The one that the tensors are on.
    """
    # Fused multiply-adds are off by default from triton 3.10 on.
    options = dict(num_warps=num_warps, enable_fp_fusion=True)
    if _recorded is not None:
        _recorded.append(Launch(kernel, grid, arguments, options))
        return
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        with torch.cuda.device(device):
            kernel[grid](**arguments, **options)
    else:
        kernel[grid](**arguments, **options)


_recorded: Optional[list[Launch]] = None


@contextlib.contextmanager
def recorded_launches() -> Iterator[list[Launch]]:
    """Note launches instead of making them: what they would have written is left as it was allocated.

    Yields:
        The launches, in their order.
    """
    global _recorded
    before, _recorded = _recorded, []
    try:
        yield _recorded
    finally:
        _recorded = before
