"""Compile an operator's launches for an absent GPU, exactly as a launch on it would."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.compiler import CompiledKernel
from triton.runtime import driver

from mmvssm.ops.triton_launcher import Launch


def compile_launch(launch: Launch, capability: int) -> CompiledKernel:
    """Compile a kernel as Triton would for these arguments, with the same constants and alignment.

    Args:
        launch: A launch from :func:`mmvssm.ops.triton_launcher.recorded_launches`.
        capability: Compute capability of the GPU, such as 90.
    """
    with _absent_gpu(capability):
        return launch.kernel.warmup(grid=launch.grid, **launch.arguments, **launch.options)


def parameters(compiled: CompiledKernel, launch: Launch) -> list[object]:
    """Return the values of the kernel's parameters, without constants and Triton's own memory."""
    kinds = compiled.src.signature
    given = [launch.arguments[name] for name, kind in kinds.items() if kind != "constexpr"]
    return [*given, 0, 0]


@contextmanager
def _absent_gpu(capability: int) -> Iterator[None]:
    before = driver._active
    driver.set_active(_AbsentGpu(capability))
    try:
        yield
    finally:
        driver._active = before


class _AbsentGpu(DriverBase):
    """The part of a driver that Triton needs before a launch."""

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        return self.capability  # by which Triton keeps what it compiled

    def get_current_stream(self, device: int) -> int:
        return 0

    @classmethod
    def is_active(cls) -> bool:
        return True

    def map_python_to_cpp_type(self, ty: str) -> str:
        raise NotImplementedError

    def get_active_torch_device(self) -> object:
        raise NotImplementedError

    def get_benchmarker(self) -> object:
        raise NotImplementedError
