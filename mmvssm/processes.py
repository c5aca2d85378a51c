"""Collectives between the ranks of a run, and a link between a worker and its parent."""

import ctypes
import os
import signal
import sys
from datetime import timedelta
from functools import lru_cache
from typing import Any, Callable

import torch
from mmengine.dist import (
    all_reduce,
    broadcast_object_list,
    get_world_size,
    is_distributed,
    is_main_process,
)

from .errors import UserError, one_line

_PATIENCE = timedelta(days=7)
_PR_SET_PDEATHSIG = 1


def any_process(condition: bool) -> bool:
    """Whether ``condition`` holds on at least one rank; an all-reduce of one number.

    Args:
        condition: This rank's condition.
    """
    return any_process_each(condition)[0]


def any_process_each(*conditions: bool) -> list[bool]:
    """Apply :func:`any_process` to several conditions in one all-reduce.

    Args:
        conditions: This rank's conditions; every rank has to pass the same number.
    """
    if get_world_size() == 1:
        return [bool(condition) for condition in conditions]
    flags = torch.tensor([float(condition) for condition in conditions])
    all_reduce(flags, op="max")
    return [bool(flag) for flag in flags]


def on_first_process(function: Callable[..., Any], *args: Any) -> Any:
    """Call ``function`` on rank 0 and return its result on all ranks.

    The other ranks wait for days, where other collectives fail after minutes.

    Raises:
        UserError: On every other rank, if ``function`` raises anything on rank 0.
    """
    if not is_distributed():
        return function(*args)
    group = _patient_group()  # before the wait: creating it has a short timeout
    result = failure = error = None
    if is_main_process():
        try:
            result = function(*args)
        except BaseException as raised:  # of any kind, else the other ranks hang
            error = raised
            failure = (_reason(error), getattr(error, "exit_code", 1))
    outcome = [result, failure]
    try:
        broadcast_object_list(outcome, group=group)
    finally:
        if error is not None:
            raise error
    result, failure = outcome
    if failure is not None:
        reason, code = failure
        error = UserError(reason)  # rank 0 reports it
        error.exit_code = code
        raise error
    return result


def _reason(error: BaseException) -> str:
    if isinstance(error, UserError):
        return str(error)
    return f"rank 0 ended with {type(error).__name__} ({one_line(error)})"


@lru_cache(maxsize=1)
def _patient_group() -> torch.distributed.ProcessGroup:
    """Group all ranks over gloo, which can wait longer than NCCL's watchdog allows."""
    return torch.distributed.new_group(backend="gloo", timeout=_PATIENCE)


def end_with_parent() -> None:
    """On Linux, ask the kernel to end this worker when its parent ends for any reason."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        parent = torch.multiprocessing.parent_process()
        if parent is not None and os.getppid() != parent.pid:  # it has already ended
            os._exit(1)
