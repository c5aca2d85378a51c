"""Run operators on an emulated GPU: compile their Triton kernels and execute the PTX in NumPy.

Needs Triton, but no GPU and no driver.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import numpy as np
import offline
import ptx_emulator
import torch
from torch import Tensor

from mmvssm.ops import triton_launcher


@contextmanager
def emulated_gpu(capability: int) -> Iterator[list[triton_launcher.Launch]]:
    """Emulate, inside the context, each kernel that operators launch on CPU tensors.

    Memory from ``torch.empty`` is filled with NaN, which shows elements that are never written.

    Args:
        capability: Compute capability of the GPU, such as 90.

    Yields:
        The launches so far.

    Raises:
        ptx_emulator.EmulationError: At a launch whose kernel accesses invalid memory or has a race.
    """
    launches = _Emulated()
    launches.capability = capability
    deterministic = torch.are_deterministic_algorithms_enabled()
    with mock.patch.object(triton_launcher, "_recorded", launches):
        torch.use_deterministic_algorithms(True)
        try:
            yield launches
        finally:
            torch.use_deterministic_algorithms(deterministic)


class _Emulated(list):
    def append(self, launch: triton_launcher.Launch) -> None:
        super().append(launch)
        emulate(launch, self.capability)


def emulate(launch: triton_launcher.Launch, capability: int) -> None:
    """Compile a kernel and execute it on the memory of its tensors."""
    compiled = offline.compile_launch(launch, capability)
    memory = ptx_emulator.Memory()
    addresses = _place(launch.arguments.values(), memory)
    arguments = [
        addresses[x.untyped_storage().data_ptr()] + x.storage_offset() * x.element_size()
        if isinstance(x, Tensor)
        else x
        for x in offline.parameters(compiled, launch)
    ]
    program = ptx_emulator.parse(compiled.asm["ptx"])
    ptx_emulator.run(program, launch.grid, arguments, compiled.metadata.shared, memory)


def _place(arguments, memory: ptx_emulator.Memory) -> dict[int, int]:
    """Put the tensors' storages into memory; only bytes of tensors may be accessed."""
    tensors: dict[int, list[Tensor]] = {}
    for x in arguments:
        if isinstance(x, Tensor):
            tensors.setdefault(x.untyped_storage().data_ptr(), []).append(x)
    addresses = {}
    for start, views in tensors.items():
        size = views[0].untyped_storage().nbytes()
        data = np.frombuffer((ctypes.c_uint8 * size).from_address(start), np.uint8)
        valid = np.zeros(size, bool)
        for x in views:
            valid[_bytes(x)] = True
        # Kernels may be compiled for tensors that are aligned.
        addresses[start] = memory.place(data, valid, offset=start % 256)
    return addresses


def _bytes(x: Tensor) -> np.ndarray:
    """List the positions of a tensor's bytes in its storage."""
    place = np.array([x.storage_offset()])
    for size, stride in zip(x.shape, x.stride()):
        place = (place[:, None] + (np.arange(size) * stride)[None, :]).ravel()
        place = np.unique(place) if stride == 0 else place
    return (place[:, None] * x.element_size() + np.arange(x.element_size())).ravel()
