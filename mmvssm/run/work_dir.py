"""One run to a work dir: neither over the results of an earlier one, nor beside one that goes on."""

import errno
import fcntl
import json
import os
import re
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any, Optional

from ..errors import UserError
from ..processes import on_first_process
from .checkpoints import named_checkpoint

LOCK = "training.lock"
_SHOWN = 3
_MOMENT = 1.0  # seconds that another may take to look at a lock, or to write its name
# What file systems without locks say: NFS without its lock service, Lustre mounted without "flock".
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP)
# Processes that are forked, such as data workers, must not go on to hold a lock.
_held: set[IO[str]] = set()
os.register_at_fork(after_in_child=lambda: [file.close() for file in _held])


def check_unused(work_dir: str, resumed: Optional[str]) -> None:
    """Check that a run does not overwrite, or mix with, what another left in its work dir.

    Args:
        work_dir: Where the run will write.
        resumed: The checkpoint that it continues, if it continues one.

    Raises:
        UserError: If there are checkpoints of a run that it does not continue.
    """
    folder = Path(work_dir)
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
    listing = ", ".join(found[:_SHOWN]) + ", ..." * (len(found) > _SHOWN)
    if all(name.startswith("best_") for name in found):
        raise UserError(
            f"{work_dir} holds the best checkpoints of an earlier run ({listing}) and none that --resume "
            "could go on from; name another --work-dir (make: WORK_DIRS=...), perhaps with --cfg-options "
            f"load_from={folder / found[0]} to start from those weights"
        )
    raise UserError(
        f"{work_dir} holds the checkpoints of an earlier run ({listing}); continue that with "
        "--resume (make: ARGS=--resume), or name another --work-dir (make: WORK_DIRS=...)"
    )


def _is_of_a_run(name: str) -> bool:
    return re.fullmatch(r"(epoch_\d+|iter_\d+|best_.+|interrupted)\.pth", name) is not None


@contextmanager
def lock_work_dir(work_dir: str) -> Iterator[None]:
    """Keep other runs out of a work dir, which is made, while this one writes there.

    The lock is the kernel's (``flock``), on a file that says which process holds it; so it ends with
    the process, however that ends, and neither host names nor process numbers matter. Over NFS it
    is the server's, and keeps out other machines too; of a machine that crashed, the server frees it
    after a while. On a file system without locks the run goes on with a warning. Of several
    distributed processes the first locks for all.

    Raises:
        UserError: If another run holds the lock, or the folder cannot be written to.
    """
    on_first_process(_acquire, work_dir)
    try:
        yield
    finally:
        for file in [file for file in _held if file.name == _lock_of(work_dir)]:
            _held.remove(file)
            with file:
                if _is_there(file):
                    os.unlink(file.name)


def check_not_locked(work_dir: str) -> None:
    """Check that no other run is writing to a work dir.

    Raises:
        UserError: If one is; the sentence says which.
    """
    # Where there is none, nor perhaps a folder to make it in, making it will tell.
    with suppress(OSError), open(_lock_of(work_dir)) as file:
        if not _try_lock(file, fcntl.LOCK_SH):
            _refuse(work_dir, file)


def _lock_of(work_dir: str) -> str:
    return os.path.join(work_dir, LOCK)


def _acquire(work_dir: str) -> None:
    """Make the lock file, or take that of a process that has ended."""
    path = _lock_of(work_dir)
    try:
        os.makedirs(work_dir, exist_ok=True)
        file = _take(work_dir, path)
        own = {"pid": os.getpid(), "host": socket.gethostname()}
        file.truncate(0)
        json.dump({**own, "since": time.strftime("%Y-%m-%d %H:%M:%S")}, file)
        file.flush()
    except OSError as error:
        raise UserError(f"cannot write to the work dir {work_dir}: {error.strerror}") from error
    _held.add(file)


def _take(work_dir: str, path: str) -> IO[str]:
    patience = time.monotonic() + _MOMENT
    while True:
        # Empties nothing, as long as it is another's; open until the lock is given back.
        file = open(path, "a+")  # noqa: SIM115
        if _try_lock(file, fcntl.LOCK_EX):
            if _is_there(file):  # who had it may have removed it in the meantime
                return file
        elif time.monotonic() > patience:
            with file:
                _refuse(work_dir, file)
        file.close()
        time.sleep(0.05)


def _try_lock(file: IO[str], kind: int) -> bool:
    """Whether this process now has the lock; it has until the file is closed."""
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        if kind == fcntl.LOCK_EX:
            print(
                f"warning: the file system of {file.name} has no locks ({error.strerror}): nothing keeps "
                "another run from the same --work-dir",
                flush=True,
            )
    return True


def _is_there(file: IO[str]) -> bool:
    """Whether an open file is still the one of its name."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), os.stat(file.name))
    except FileNotFoundError:
        return False


def _refuse(work_dir: str, file: IO[str]) -> None:
    holder = _read(file)
    if holder is None:
        raise UserError(
            f"another run is training into {work_dir}; wait for it, or name another --work-dir"
        )
    local = holder.get("host") == socket.gethostname()
    remedy = "" if local else f", or, if that run has ended, remove {file.name}"
    raise UserError(
        f"process {holder.get('pid')} on {holder.get('host')} has been training into {work_dir} "
        f"since {holder.get('since')}; wait for it, name another --work-dir{remedy}"
    )


def _read(file: IO[str]) -> Optional[dict[str, Any]]:
    """What a lock file says of its holder, if it can be read."""
    file.seek(0)
    try:
        holder = json.load(file)
    except (OSError, ValueError):
        return None
    return holder if isinstance(holder, dict) else None
