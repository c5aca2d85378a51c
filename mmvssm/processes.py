"""Functions that the processes of a run call together, and one that ties a worker to its parent."""

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

from .errors import UserError, one_sentence

_PATIENCE = timedelta(days=7)
_PR_SET_PDEATHSIG = 1


def any_process(condition: bool) -> bool:
    """Whether ``condition`` holds in at least one process; a collective of one number.

    Args:
        condition: What this process found.
    """
    return any_process_each(condition)[0]


def any_process_each(*conditions: bool) -> list[bool]:
    """:func:`any_process` of each of several conditions, in one collective of as many numbers.

    Args:
        conditions: What this process found; as many in every process.
    """
    if get_world_size() == 1:
        return [bool(condition) for condition in conditions]
    flags = torch.tensor([float(condition) for condition in conditions])
    all_reduce(flags, op="max")
    return [bool(flag) for flag in flags]


def on_first_process(function: Callable[..., Any], *args: Any) -> Any:
    """Call ``function`` in the first of several processes; all of them get what it returns.

    The others wait for days, not for the few minutes after which other collectives fail.

    Raises:
        UserError: In every other process, whatever was raised in the first.
    """
    if not is_distributed():
        return function(*args)
    group = _patient_group()  # before the wait: its making is not patient
    result = failure = error = None
    if is_main_process():
        try:
            result = function(*args)
        except BaseException as raised:  # the others must not wait for ever, whatever it is
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
    return f"the first process ended with {type(error).__name__} ({one_sentence(error)})"


@lru_cache(maxsize=1)
def _patient_group() -> torch.distributed.ProcessGroup:
    """All processes once more, over gloo, which also waits longer than NCCL's watchdog lets it."""
    return torch.distributed.new_group(backend="gloo", timeout=_PATIENCE)


def end_with_parent() -> None:
    """Ask the kernel, on Linux, to end this worker process when its parent ends, however that does."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        parent = torch.multiprocessing.parent_process()
        if parent is not None and os.getppid() != parent.pid:  # it was already gone
            os._exit(1)
