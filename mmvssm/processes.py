"""Collectives between the ranks of a run, and a link between a worker and its parent."""

import atexit
import ctypes
import os
import platform
import signal
import sys
from contextlib import suppress
from datetime import timedelta
from functools import lru_cache
from pathlib import Path
from typing import Any, Callable

import torch
from mmengine.dist import all_gather_object, all_reduce, get_rank, get_world_size, is_distributed

from .errors import UserError, is_first_of_machine, one_line, user_mistakes
from .files import signature, write_whole

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
    return _on_some(get_rank() == 0, function, args)[0]


def on_each_machine(function: Callable[..., Any], *args: Any) -> list[Any]:
    """Call ``function`` on the first rank of each machine and return all results on all ranks, rank 0's first.

    For what machines with disks of their own have each to do; with a common disk they do the same. Waits as
    :func:`on_first_process` does.

    Raises:
        UserError: On every other rank, if ``function`` raises anything on one of these.
    """
    return _on_some(is_first_of_machine(), function, args)


def on_own_machine(function: Callable[..., Any], *args: Any) -> Any:
    """Call ``function`` as :func:`on_each_machine` does, and return on each rank what its own machine gave."""
    # torchrun numbers the machines, and containers may share a name.
    machine = platform.node(), os.environ.get("GROUP_RANK")
    return dict(on_each_machine(lambda: (machine, function(*args))))[machine]


def _on_some(calls: bool, function: Callable[..., Any], args: tuple) -> list[Any]:
    """Call ``function`` on the ranks for which ``calls`` is true; return their results on all ranks."""
    if not is_distributed():
        return [function(*args)]
    group = _patient_group()  # before the wait: creating it has a short timeout
    outcome = error = None
    if calls:
        try:
            outcome = (function(*args), None)
        except BaseException as raised:  # of any kind, else the other ranks hang
            error = raised
            outcome = (None, (_reason(error), getattr(error, "exit_code", 1)))
    try:
        outcomes = [found for found in all_gather_object(outcome, group) if found is not None]
    finally:
        if error is not None:
            raise error
    for _, failure in outcomes:
        if failure is not None:
            reason, code = failure
            error = UserError(reason)
            error.exit_code = code
            raise error
    return [result for result, _ in outcomes]


def _reason(error: BaseException) -> str:
    """Return what other ranks tell about an error of this one."""
    if not isinstance(error, UserError):
        return f"rank {get_rank()} ended with {type(error).__name__} ({one_line(error)})"
    return f"on {platform.node()} (rank {get_rank()}): {error}" if get_rank() else str(error)


def share_file(path: str, copy: str) -> str:
    """Send rank 0's file to the machines whose disk lacks it.

    Args:
        path: The file, which rank 0 can read.
        copy: Where another machine keeps what it receives, until its process ends.

    Returns:
        ``path`` on rank 0's machine and with a common disk, else ``copy``.

    Raises:
        UserError: If a machine cannot write its copy.
    """
    source = os.path.expanduser(path)
    sent, here = on_first_process(signature, source), None
    with suppress(OSError):
        here = signature(source)
    if not any_process(here != sent):
        return path
    if get_rank() == 0:
        content = torch.from_file(source, size=sent[0], dtype=torch.uint8)
    else:
        content = torch.empty(sent[0], dtype=torch.uint8)
    torch.distributed.broadcast(content, 0, group=_patient_group())

    def keep() -> None:
        if here != sent:
            with user_mistakes("cannot keep what rank 0 sends", (OSError,)):
                write_whole(copy, content.numpy())
            atexit.register(Path(copy).unlink, missing_ok=True)

    on_each_machine(keep)
    return path if here == sent else copy


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
