"""What runs inside mmengine: hooks, the sampler, an optimizer wrapper, safe loading."""

from .checkpoint_hook import AtomicCheckpointHook, AtomicLocalBackend
from .cpu_amp import BFloat16OptimWrapper
from .follow_schedule import FollowSchedule
from .interruption_hook import InterruptionHook
from .keep_ratio_hook import KeepRatioWarmup
from .non_finite_guard import NonFiniteError, NonFiniteGuardHook
from .packaged_configs import register_configs
from .reproducible import (
    ReproducibleResumeHook,
    ResumableBatchSampler,
    ResumableEpochLoop,
    SeededSampler,
)
from .safe_checkpoint import (
    UnsafeCheckpointError,
    guard_checkpoint_loader,
    load_checkpoint_safely,
    register_safe_globals,
)
from .unfinished_validation import UnfinishedValidationHook
from .user_error import RunFailure, Stopped, UserError, is_interruption
from .workers import init_worker

register_safe_globals()
register_configs()
guard_checkpoint_loader()

__all__ = [
    "AtomicCheckpointHook",
    "AtomicLocalBackend",
    "BFloat16OptimWrapper",
    "FollowSchedule",
    "InterruptionHook",
    "KeepRatioWarmup",
    "NonFiniteError",
    "NonFiniteGuardHook",
    "ReproducibleResumeHook",
    "ResumableBatchSampler",
    "ResumableEpochLoop",
    "RunFailure",
    "SeededSampler",
    "Stopped",
    "UnfinishedValidationHook",
    "UnsafeCheckpointError",
    "UserError",
    "guard_checkpoint_loader",
    "init_worker",
    "is_interruption",
    "load_checkpoint_safely",
    "register_safe_globals",
]
