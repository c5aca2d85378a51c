"""Write files atomically."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Union


def write_whole(path: Union[str, Path], content: Union[str, bytes, memoryview]) -> None:
    """Write a temporary file, flush it to disk, and rename it to ``path``.

    If the process is killed or the disk is full, the old file stays. A symbolic link is replaced, not followed.

    Args:
        path: File to write or replace; a missing folder is created.
        content: Bytes, or text to write as UTF-8.

    Raises:
        OSError: If the file cannot be written; the error has the file's name.
    """
    path = Path(path)
    data = content.encode() if isinstance(content, str) else content
    partial = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, partial = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name[:100]}.")
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        # mkstemp makes files that only their owner can read.
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(partial, 0o666 & ~umask)
        os.replace(partial, path)
    except BaseException as error:
        if partial:
            Path(partial).unlink(missing_ok=True)
        if isinstance(error, OSError):  # write errors do not name the file
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise
