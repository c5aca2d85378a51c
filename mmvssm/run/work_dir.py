"""Allow one run per work dir: no overwriting of earlier runs, no two runs at once."""

import errno
import os
import re
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Optional

from filelock import FileLock, Timeout

from ..errors import UserError, shown
from ..processes import on_first_process
from .checkpoints import named_checkpoint

LOCK = "training.lock"
_PATIENCE = 1.0  # seconds that another run may hold a lock just to check it
# Errors of file systems without locks: NFS without its lock service, Lustre mounted without "flock".
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP)
_held: dict[str, FileLock] = {}


def check_unused(work_dir: str, resumed: Optional[str]) -> None:
    """Check that a run does not overwrite, or mix with, the files of another in its work dir.

    Args:
        work_dir: Work dir of the run.
        resumed: Checkpoint from which it resumes, if any.

    Raises:
        UserError: If the work dir has checkpoints of a run from which it does not resume.
    """
    folder = Path(work_dir)
    if (folder / "last_checkpoint").is_dir():
        raise UserError(
            f"{folder / 'last_checkpoint'} is a folder, and a run writes a file there; remove it"
        )
    named = named_checkpoint(folder)
    if resumed:
        path = Path(resumed).expanduser().resolve()
        if path.parent == folder.resolve() or (named and path == named.resolve()):
            return
    found = sorted(file.name for file in folder.glob("*.pth") if _is_of_a_run(file.name))
    if named and named.name not in found:  # the hook's filename_tmpl or out_dir
        found.append(str(named))
    if not found:
        return
    if all(name.startswith("best_") for name in found):
        raise UserError(
            f"{work_dir} holds the best checkpoints of an earlier run ({shown(found)}) and none that --resume "
            "could resume from; name another --work-dir (make: WORK_DIRS=...), perhaps with --cfg-options "
            f"load_from={folder / found[0]} to start from those weights"
        )
    raise UserError(
        f"{work_dir} holds the checkpoints of an earlier run ({shown(found)}); continue that with "
        "--resume (make: ARGS=--resume), or name another --work-dir (make: WORK_DIRS=...)"
    )


def _is_of_a_run(name: str) -> bool:
    return re.fullmatch(r"(epoch_\d+|iter_\d+|best_.+|interrupted)\.pth", name) is not None


@contextmanager
def lock_work_dir(work_dir: str) -> Iterator[None]:
    """Create a work dir and lock out other runs while this one writes there.

    The operating system holds the lock on the file ``training.lock`` and frees it when the process ends, even if it is
    killed. On a file system without locks, the run warns and continues. Rank 0, which alone writes
    checkpoints and logs, locks for all.

    Raises:
        UserError: If another run holds the lock, or the folder cannot be written to.
    """
    on_first_process(_acquire, work_dir)
    try:
        yield
    finally:
        lock = _held.pop(work_dir, None)
        if lock is not None:
            lock.release()


def check_not_locked(work_dir: str) -> None:
    """Check that no other run is writing to a work dir.

    Raises:
        UserError: If one is.
    """
    if os.path.lexists(_lock_file(work_dir)):
        _acquire(work_dir)
        _held.pop(work_dir).release()


def _lock_file(work_dir: str) -> str:
    return os.path.join(work_dir, LOCK)


def _acquire(work_dir: str) -> None:
    path = _lock_file(work_dir)
    if os.path.lexists(path) and not stat.S_ISREG(os.lstat(path).st_mode):
        raise UserError(f"{path} is a link or no regular file, and a lock must be one; remove it")
    lock = FileLock(path, timeout=_PATIENCE, thread_local=False)
    try:
        os.makedirs(work_dir, exist_ok=True)
        lock.acquire()
    except Timeout:
        raise UserError(
            f"another run is training into {work_dir}; wait until it ends, or name another --work-dir"
        ) from None
    except (OSError, NotImplementedError) as error:  # filelock raises the latter for ENOSYS
        if isinstance(error, OSError) and error.errno not in _NO_LOCKS:
            raise UserError(f"cannot write to the work dir {work_dir}: {error.strerror}") from error
        print(
            f"warning: the file system of {path} has no locks ({error}); do not start another run with the same "
            "--work-dir",
            flush=True,
        )
    _held[work_dir] = lock
