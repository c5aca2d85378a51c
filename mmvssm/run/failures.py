"""Explain in one line failures of the machine: memory, shared memory, disk, data workers, ports, Ctrl-C."""

from __future__ import annotations

import errno
import os
import re
import shutil
import signal
import threading
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Optional

import torch

from ..errors import RunFailure, Stopped, is_interruption
from .checkpoints import named_checkpoint

_SHARED_MEMORY = re.compile(r"shared memory|Bus error|\bshm\b|/dev/shm", re.IGNORECASE)
_DEAD_WORKER = re.compile(r"DataLoader worker .*(killed by signal: (?P<signal>\w+)|exited unex)")
_PORT_IN_USE = re.compile(r"EADDRINUSE|address already in use", re.IGNORECASE)
_UNDECODABLE = re.compile(
    r"^(?:AssertionError: )?failed to load image: (.+)$", re.MULTILINE
)  # mmcv's words
_LOST_RANK = re.compile(r"gloo/.*Connection (closed|reset) by peer|NCCL remote process exited")
_ONE_VALUE = "Expected more than 1 value per channel when training"  # BatchNorm's words
_FULL = (errno.ENOSPC, errno.EDQUOT)
_LOADERS = "train_dataloader, val_dataloader and test_dataloader"


@contextmanager
def run_failures(work_dir: Optional[str] = None) -> Iterator[None]:
    """Convert failures of the machine to one-line errors; bugs keep their traceback.

    Args:
        work_dir: Work dir of a training run; errors then name the checkpoint to resume from.

    Raises:
        UserError: In place of exceptions about the machine. Its ``exit_code`` is 130 for Ctrl-C, as in shells.
    """
    try:
        yield
    except BaseException as error:
        # torch's signal handler reports a dead worker by an exception at any point of the main thread.
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        if is_interruption(error):
            raise Stopped(f"interrupted{_how_to_resume(work_dir)}", signal.SIGINT) from None
        sentence = explain_failure(error)
        if sentence is None:
            raise
        raise RunFailure(sentence + _how_to_resume(work_dir)) from error


def explain_failure(error: BaseException) -> Optional[str]:
    """Explain what ended a run and what to do, in one line; return None for other kinds of errors.

    Args:
        error: The exception.
    """
    text = str(error)
    if isinstance(error, OSError) and error.errno in _FULL:
        return _about_disk(error)
    if isinstance(error, OSError) and error.errno == errno.EFBIG:
        return f"{error.filename or 'a file'} is larger than this shell or disk allows; raise `ulimit -f`"
    if isinstance(error, AssertionError) and (undecodable := _UNDECODABLE.search(text)):
        return f"{undecodable[1]} cannot be decoded; restore it, or remove it from the data set"
    if isinstance(error, torch.cuda.OutOfMemoryError):
        return (
            "out of memory on the GPU; use a smaller train_dataloader.batch_size, smaller images, --amp, or "
            "with_cp=True in the backbone"
        )
    if is_out_of_memory(error):
        return (
            "out of memory; use a smaller train_dataloader.batch_size, smaller images, or fewer data workers "
            f"(num_workers of {_LOADERS})"
        )
    if isinstance(error, (ConnectionError, EOFError)):
        return _about_worker("ended") if _is_of_a_worker(error) else None
    if not isinstance(error, (RuntimeError, ValueError)):
        return None
    if _ONE_VALUE in text:
        return (
            "a batch of one image is too small for BatchNorm on maps of one pixel, as in UPerHead's pooling; use a "
            "train_dataloader.batch_size of at least 2, with drop_last=True if an epoch may end in a batch of one, or "
            "another norm_cfg: SyncBN on several GPUs, GN on one"
        )
    if _SHARED_MEMORY.search(text) and ("worker" in text or "shm" in text):
        return _about_shared_memory()
    worker = _DEAD_WORKER.search(text)
    if worker:
        how = (
            f"was killed by signal {worker['signal']}" if worker["signal"] else "ended unexpectedly"
        )
        return _about_worker(how)
    if _LOST_RANK.search(text):
        return "the connection to another rank broke, as its process or machine ended; its own output may say why"
    if _PORT_IN_USE.search(text):
        return (
            f"port {os.environ.get('MASTER_PORT', '?')} is in use, perhaps by another run; choose another one with "
            "the environment variable PORT (tools/dist_train.sh) or MASTER_PORT"
        )
    return None


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed, on a GPU or the CPU."""
    kinds = (MemoryError, torch.cuda.OutOfMemoryError)
    return isinstance(error, kinds) or "DefaultCPUAllocator: can't allocate" in str(error)


def _is_of_a_worker(error: BaseException) -> bool:
    """Whether an error was raised while receiving a batch from a data worker."""
    frames = traceback.walk_tb(error.__traceback__)
    return any(f.f_globals.get("__name__") == "multiprocessing.resource_sharer" for f, _ in frames)


def _about_worker(how: str) -> str:
    return (
        f"a data worker {how}, most often because memory ran out; use fewer workers (num_workers of {_LOADERS}, 0 for "
        "none), or a smaller batch_size"
    )


def _about_disk(error: OSError) -> str:
    if error.filename is None:
        # Semaphores are in shared memory, and their errors name no file.
        full = os.path.isdir("/dev/shm") and shutil.disk_usage("/dev/shm").free == 0
        return _about_shared_memory() if full else "the disk is full; make room"
    return (
        f"the disk is full: {error.filename} could not be written; make room, or write to another disk; earlier files "
        "are intact"
    )


def _about_shared_memory() -> str:
    size = shutil.disk_usage("/dev/shm").total / 2**20 if os.path.isdir("/dev/shm") else 0
    return (
        f"shared memory is full (/dev/shm holds {size:.1f} MiB); data workers send batches through it: set "
        f"num_workers=0 and persistent_workers=False in {_LOADERS}, or give a container more (docker run "
        "--shm-size=8g)"
    )


def _how_to_resume(work_dir: Optional[str]) -> str:
    if work_dir is None:
        return ""
    saved = named_checkpoint(Path(work_dir))
    if saved is None:
        return "; no checkpoint was saved yet"
    return f"; --resume with the same --work-dir continues from {saved}"
