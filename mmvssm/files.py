"""Writing a file whole or not at all."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Union


def write_whole(path: Union[str, Path], content: Union[str, bytes, memoryview]) -> None:
    """Write a file that takes its name when it is complete and on the disk.

    A process that is killed, or a disk that is full, leaves what was there before. A symbolic link is replaced, not
    followed.

    Args:
        path: The file to write or replace; its folder is made where it is missing.
        content: Text is written as UTF-8.

    Raises:
        OSError: If it cannot be written, with the file's name.
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
        # mkstemp makes files that only their owner reads.
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(partial, 0o666 & ~umask)
        os.replace(partial, path)
    except BaseException as error:
        if partial:
            Path(partial).unlink(missing_ok=True)
        if isinstance(error, OSError):  # errors of writing name no file
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise
