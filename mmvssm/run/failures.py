"""What the surroundings can do to a run: memory, disk, network, signals, each told in one sentence."""

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
from types import SimpleNamespace
from typing import Any, Optional

import torch

from ..errors import RunFailure, Stopped, UserError, is_interruption
from ..models.pruning import PruningError

_SHARED_MEMORY = re.compile(r"shared memory|Bus error|\bshm\b|/dev/shm", re.IGNORECASE)
_KILLED_WORKER = re.compile(r"DataLoader worker .*(killed by signal: (?P<signal>\w+)|exited unex)")
_ONE_VALUE = "Expected more than 1 value per channel when training"  # says BatchNorm
_PORT_IN_USE = re.compile(r"EADDRINUSE|address already in use", re.IGNORECASE)
_NO_PEER = re.compile(
    r"connection (?:closed|reset) by peer|broken pipe|remote process has terminated", re.IGNORECASE
)
_NO_HOST = re.compile(
    r"timed out after \d+ seconds waiting for clients|failed to connect|connection refused|"
    r"could ?n.t resolve|name or service not known|ETIMEDOUT|ECONNREFUSED",
    re.IGNORECASE,
)
_FULL = (errno.ENOSPC, errno.EDQUOT)
_LOADERS = "train_dataloader, val_dataloader and test_dataloader"


@contextmanager
def run_failures(work_dir: Optional[str] = None) -> Iterator[None]:
    """Turn what can befall a run into one sentence; mistakes in the code keep their traceback.

    Args:
        work_dir: Where a training run writes; sentences then say what to resume from.

    Raises:
        UserError: In place of exceptions that are about the machine or the model's config. Its
            ``exit_code`` is 130 for Ctrl-C, as in shells.
    """
    try:
        try:
            yield
        except BaseException as error:
            # torch raises what it learns of a dead worker wherever the main thread then is. After another error (the
            # worker's connection, perhaps) that may be here, and is told instead, but nowhere below.
            if threading.current_thread() is threading.main_thread():
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            if is_interruption(error):
                raise Stopped(f"interrupted{_how_to_resume(work_dir)}", signal.SIGINT) from None
            raise
    except PruningError as error:  # a pruned model finds out about its neck only when it runs
        raise UserError(str(error)) from error
    except (RuntimeError, ValueError, OSError, MemoryError, EOFError) as error:
        sentence = explain_failure(error)
        if sentence is None:
            raise
        raise RunFailure(sentence + _how_to_resume(work_dir)) from error


def explain_failure(error: BaseException) -> Optional[str]:
    """What befell a run, in one sentence and what to do, or None where ``error`` is none of that.

    Args:
        error: What was raised.
    """
    text = str(error)
    if isinstance(error, (OSError, EOFError)) and _while_receiving(error):
        return _about_worker("ended")
    if isinstance(error, OSError):
        return _about_disk(error)
    if is_out_of_memory(error) and not isinstance(error, torch.cuda.OutOfMemoryError):
        return (
            "out of memory; use a smaller train_dataloader.batch_size, smaller images, or fewer "
            f"data workers (num_workers of {_LOADERS})"
        )
    if is_out_of_memory(error):
        return (
            "out of memory on the GPU; use a smaller train_dataloader.batch_size, smaller images, "
            "--amp, or with_cp=True in the backbone"
        )
    if _ONE_VALUE in text:
        return (
            "a batch of one image is too small for BatchNorm, which a head applies to maps of one pixel (UPerHead's "
            "pooling does); use a train_dataloader.batch_size of at least 2, with drop_last=True where an epoch may "
            "end in a batch of one, or another norm_cfg: SyncBN on several GPUs, GN on one"
        )
    if _SHARED_MEMORY.search(text) and ("worker" in text or "shm" in text):
        return _about_shared_memory()
    worker = _KILLED_WORKER.search(text)
    if worker:
        name = worker.group("signal")
        return _about_worker(f"was killed by signal {name}" if name else "ended unexpectedly")
    return _about_network(text)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed, on a GPU or the CPU."""
    return isinstance(
        error, (MemoryError, torch.cuda.OutOfMemoryError)
    ) or "DefaultCPUAllocator: can't allocate" in str(error)


def _while_receiving(error: BaseException) -> bool:
    """Whether an error was raised while a batch was taken over from a data worker, which has then ended."""
    frames = traceback.walk_tb(error.__traceback__)
    return any(Path(f.f_code.co_filename).name == "resource_sharer.py" for f, _ in frames)


def _about_worker(how: str) -> str:
    return (
        f"a data worker {how}, most often because memory ran out; use fewer of them (num_workers "
        f"of {_LOADERS}, 0 for none), or a smaller batch_size"
    )


def _about_disk(error: OSError) -> Optional[str]:
    if error.errno not in _FULL:
        return None
    if error.filename is None and _disk("/dev/shm").free == 0:
        return _about_shared_memory()  # semaphores, whose errors name no file either
    if error.filename is None:
        return "the disk is full; make room"
    folder = Path(error.filename).absolute().parent
    return (
        f"the disk is full: {error.filename} could not be written ({_megabytes(_disk(folder).free)} free "
        f"in {folder}); make room, or write to another disk; what had been saved before is still there"
    )


def _about_shared_memory() -> str:
    return (
        f"shared memory is full (/dev/shm holds {_megabytes(_disk('/dev/shm').total)}), through which data "
        "workers hand over their batches; set num_workers=0 and persistent_workers=False in "
        f"{_LOADERS}, or give a container more (docker run --shm-size=8g)"
    )


def _about_network(text: str) -> Optional[str]:
    address = f"{os.environ.get('MASTER_ADDR', '?')}:{os.environ.get('MASTER_PORT', '?')}"
    if _PORT_IN_USE.search(text):
        return (
            f"port {os.environ.get('MASTER_PORT', '?')} is in use, perhaps by another run; choose "
            "another one with the environment variable PORT (tools/dist_train.sh) or MASTER_PORT"
        )
    if _NO_PEER.search(text):
        return "another process of this run ended; the reason is in its own output"
    if _NO_HOST.search(text):
        return (
            f"the processes of this run did not find each other at {address}; check MASTER_ADDR, the "
            "port, the firewall between the machines, and that all of them were started"
        )
    return None


def _how_to_resume(work_dir: Optional[str]) -> str:
    if work_dir is None:
        return ""
    marker = Path(work_dir) / "last_checkpoint"
    saved = Path(marker.read_text(errors="replace").strip()) if marker.is_file() else None
    if saved is None or not saved.is_file():
        return "; no checkpoint had been saved yet"
    return f"; --resume with the same --work-dir goes on from {saved}"


def _disk(folder: str | Path) -> Any:
    try:
        return shutil.disk_usage(folder)
    except OSError:
        return SimpleNamespace(total=None, free=None)


def _megabytes(count: Optional[int]) -> str:
    return "an unknown number of bytes" if count is None else f"{count / 2**20:.1f} MiB"
