"""Training and testing: what mmengine, mmdet and mmseg leave to do."""

from .allocator import keep_freed_memory
from .checkpoint_hook import AtomicCheckpointHook, AtomicLocalBackend
from .cpu_amp import BFloat16OptimWrapper
from .errors import UserError
from .keep_ratio_hook import KeepRatioWarmup
from .reproducible import ReproducibleResumeHook, SeededSampler
from .safe_checkpoint import (
    UnsafeCheckpointError,
    load_checkpoint_safely,
    register_safe_globals,
)
from .workers import init_worker

register_safe_globals()

__all__ = [
    "AtomicCheckpointHook",
    "AtomicLocalBackend",
    "BFloat16OptimWrapper",
    "KeepRatioWarmup",
    "ReproducibleResumeHook",
    "SeededSampler",
    "UnsafeCheckpointError",
    "UserError",
    "init_worker",
    "keep_freed_memory",
    "load_checkpoint_safely",
    "register_safe_globals",
]
