"""Launch every operator's Triton kernels, or record the launches.

Inside :func:`recorded_launches` nothing runs; launches are recorded with their exact constants and options. The tests
compile, count and emulate these launches without a GPU, from tensors on the CPU or on ``meta``.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, NamedTuple, Optional

import torch


class Launch(NamedTuple):
    """A kernel with its grid, arguments and options.

    Attributes:
        kernel: Result of ``triton.jit``. Its ``arg_names`` are the keys of ``arguments``; its ``params``, in the same
            order, tell which are ``constexpr`` and which are not specialised.
        grid: Programs along up to three axes.
        arguments: Value of every argument, constants included: a tensor, number, boolean or None.
        options: Options of Triton's compiler, such as ``num_warps`` and ``enable_fp_fusion``.
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
        kernel: Result of ``triton.jit``.
        grid: Programs along up to three axes.
        arguments: Values of all the kernel's arguments by name.
        num_warps: Warps per program.
        device: Device of the tensors.
    """
    # Triton 3.10 and later turn fused multiply-adds off by default.
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
    """Record launches instead of running them; output tensors stay uninitialised.

    Yields:
        The launches in order.
    """
    global _recorded
    before, _recorded = _recorded, []
    try:
        yield _recorded
    finally:
        _recorded = before
