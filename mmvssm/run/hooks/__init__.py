"""Hooks, samplers, a training loop and an optimizer wrapper that our runs add to mmengine's."""

from .checkpoint_hook import AtomicCheckpointHook, AtomicLocalBackend
from .cpu_amp import BFloat16OptimWrapper
from .follow_schedule import FollowSchedule
from .interruption_hook import InterruptionHook, UnfinishedValidationHook
from .non_finite_guard import NonFiniteError, NonFiniteGuardHook
from .reproducible import (
    ReproducibleResumeHook,
    ResumableBatchSampler,
    ResumableEpochLoop,
    SeededSampler,
)
from .workers import init_worker

__all__ = [
    "AtomicCheckpointHook",
    "AtomicLocalBackend",
    "BFloat16OptimWrapper",
    "FollowSchedule",
    "InterruptionHook",
    "NonFiniteError",
    "NonFiniteGuardHook",
    "ReproducibleResumeHook",
    "ResumableBatchSampler",
    "ResumableEpochLoop",
    "SeededSampler",
    "UnfinishedValidationHook",
    "init_worker",
]
