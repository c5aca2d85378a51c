"""Read regular files only, and write files atomically."""

from __future__ import annotations

import errno
import json
import os
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, Union

_PARTIAL = ".mmvssm-partial"  # in the names of files that are being written
_LONGEST_PART = 20  # characters, of up to 4 bytes each; names have at most 255 bytes


def signature(path: Union[str, Path]) -> list[int]:
    """Return the size and time of modification of a file, which change when the file does.

    Raises:
        OSError: If there is no such file.
    """
    status = os.stat(path)
    return [status.st_size, status.st_mtime_ns]


@contextmanager
def open_regular(path: Union[str, Path]) -> Iterator[BinaryIO]:
    """Open a file to read its bytes; raise an OSError if it is a folder, device or FIFO, where reading would wait."""
    at_once = getattr(os, "O_NONBLOCK", 0)
    with open(path, "rb", opener=lambda name, flags: os.open(name, flags | at_once)) as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise OSError(errno.EINVAL, "it is no regular file", str(path))
        yield file


def read_text(path: Union[str, Path], limit: int = 2**26) -> str:
    """Read a regular file, with U+FFFD for what is no UTF-8; raise an OSError if it has over ``limit`` bytes."""
    with open_regular(path) as file:
        data = file.read(limit + 1)
    if len(data) > limit:
        raise OSError(errno.EFBIG, f"it has more than {limit} bytes", str(path))
    return data.decode(errors="replace")


def read_json(path: Union[str, Path], kind: type) -> Any:
    """Read JSON whose content is a ``kind``, such as dict, from a regular file; raise OSError or ValueError if not."""
    try:
        content = json.loads(read_text(path))
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    if not isinstance(content, kind):
        raise ValueError(f"it holds a {type(content).__name__}, not a {kind.__name__}")
    return content


@contextmanager
def replacing(path: Union[str, Path]) -> Iterator[str]:
    """Yield the name of an empty file, with the suffix of ``path``, which is renamed to ``path`` in the end.

    If the process is killed or the disk is full, the old file stays. A symbolic link is replaced, not followed. A
    missing folder is created.

    Raises:
        OSError: If the file cannot be written; the error has the name of ``path``.
    """
    path = Path(path)
    partial = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, partial = tempfile.mkstemp(
            suffix=_PARTIAL + path.suffix[:_LONGEST_PART],
            prefix=f".{path.stem[:_LONGEST_PART]}.",
            dir=path.parent,
        )
        os.close(descriptor)
        yield partial
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


def write_whole(path: Union[str, Path], content: Union[str, bytes, memoryview]) -> None:
    """Write bytes, or text as UTF-8, to a temporary file, flush it to disk, and rename it: see :func:`replacing`."""
    data = content.encode() if isinstance(content, str) else content
    with replacing(path) as partial, open(partial, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def remove_partial(folder: Union[str, Path]) -> None:
    """Remove temporary files of a process that was killed while it wrote to ``folder``."""
    for partial in Path(folder).glob(f".*{_PARTIAL}*"):
        partial.unlink(missing_ok=True)
