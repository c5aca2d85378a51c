"""One run to a work dir: neither over the results of an earlier one, nor beside one that goes on."""

import json
import os
import re
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Optional

from mmengine.dist import barrier, is_main_process

from .errors import UserError

LOCK = "training.lock"
_SHOWN = 3


def check_unused(work_dir: str, resumed: Optional[str]) -> None:
    """Check that a run does not overwrite, or mix with, what another left in its work dir.

    Args:
        work_dir: Where the run will write.
        resumed: The checkpoint that it continues, if it continues one.

    Raises:
        UserError: If there are checkpoints of a run that it does not continue.
    """
    folder = Path(work_dir)
    if resumed and Path(resumed).expanduser().resolve().parent == folder.resolve():
        return
    found = sorted(file.name for file in folder.glob("*.pth") if _is_of_a_run(file.name))
    if found:
        listing = ", ".join(found[:_SHOWN]) + ", ..." * (len(found) > _SHOWN)
        raise UserError(
            f"{work_dir} holds the checkpoints of an earlier run ({listing}); continue that with "
            "--resume (make: ARGS=--resume), or name another --work-dir (make: WORK_DIRS=...)"
        )


def _is_of_a_run(name: str) -> bool:
    return re.fullmatch(r"(epoch_\d+|iter_\d+|best_.+|interrupted)\.pth", name) is not None


@contextmanager
def lock_work_dir(work_dir: str) -> Iterator[None]:
    """Keep other runs out of a work dir, which is made, while this one writes there.

    The lock is a file that says which process holds it. One of a process on this machine that has
    ended is taken over. Of several distributed processes the first locks for all.

    Raises:
        UserError: If another run holds the lock, or the folder cannot be written to.
    """
    lock = Path(work_dir) / LOCK
    if not is_main_process():
        barrier()
        yield
        return
    check_not_locked(work_dir)
    own = {**_this_process(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}
    try:
        lock.parent.mkdir(parents=True, exist_ok=True)
        _acquire(lock, own)
    except OSError as error:
        raise UserError(f"cannot write to the work dir {work_dir}: {error.strerror}") from error
    barrier()
    try:
        yield
    finally:
        if _read(lock) == own:
            lock.unlink(missing_ok=True)


def check_not_locked(work_dir: str) -> None:
    """Check that no other run is writing to a work dir.

    Raises:
        UserError: If one is; the sentence says which.
    """
    lock = Path(work_dir) / LOCK
    holder = _read(lock)
    if holder is not None and not _has_ended(holder):
        _refuse(lock, holder)


def _acquire(lock: Path, own: dict[str, Any]) -> None:
    """Make the lock file, over that of a process that has ended."""
    aside = lock.with_name(f"{LOCK}.{os.getpid()}")
    while True:
        try:
            with open(lock, "x") as file:
                json.dump(own, file)
            return
        except FileExistsError:
            pass
        # Renaming, which only one of several can do, tells who may replace a lock.
        try:
            os.rename(lock, aside)
        except FileNotFoundError:
            continue
        holder = _read(aside)
        if holder is not None and not _has_ended(holder):  # it was replaced in the meantime
            os.rename(aside, lock)
            _refuse(lock, holder)
        aside.unlink()


def _refuse(lock: Path, holder: dict[str, Any]) -> None:
    local = holder.get("host") == socket.gethostname()
    remedy = "" if local else f", or, if that run has ended, remove {lock}"
    raise UserError(
        f"process {holder.get('pid')} on {holder.get('host')} has been training into {lock.parent} "
        f"since {holder.get('since')}; wait for it, name another --work-dir{remedy}"
    )


def _read(lock: Path) -> Optional[dict[str, Any]]:
    """What a lock file says; nothing if there is none, something empty if it is damaged."""
    try:
        holder = json.loads(lock.read_text())
    except FileNotFoundError:
        return None
    except (OSError, ValueError):
        return {}
    return holder if isinstance(holder, dict) else {}


def _has_ended(holder: dict[str, Any]) -> bool:
    """Whether the process that a lock names is known not to run any more."""
    if holder.get("host") != socket.gethostname():
        return not holder  # one of another machine may still run
    pid = holder.get("pid")
    if type(pid) is not int or pid <= 0:
        return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        pass
    return holder.get("started") != _started(pid)


def _this_process() -> dict[str, Any]:
    pid = os.getpid()
    return {"pid": pid, "host": socket.gethostname(), "started": _started(pid)}


def _started(pid: int) -> Optional[int]:
    """When a process began, in clock ticks since the machine did; None where that is not told."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
        return int(stat.rpartition(")")[2].split()[19])
    except (OSError, ValueError, IndexError):
        return None
