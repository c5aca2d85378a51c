"""Remember what earlier runs found in files, so that a large data set is read once."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Optional

from ..files import write_whole

_NAME = ".data_check.json"
_WORTHWHILE = 400  # images to read: below, reading takes no longer than remembering
_VERSION = 1  # raised whenever what is noted about a file changes its meaning


class Memory:
    """What earlier runs found out, in a JSON file beside the work dirs.

    An entry counts as long as its file has the size and the time of modification that it had.
    Whatever is odd about the memory, it is only forgotten; nothing in it is ever evaluated.

    Args:
        path: The file; None remembers nothing beyond this object.
    """

    def __init__(self, path: Optional[Path] = None) -> None:
        self.path = path
        self._folders: dict[str, dict[str, list]] = {}
        self._effort = 0
        try:
            content = json.loads(path.read_text(encoding="utf-8")) if path else {}
            if content.get("version") == _VERSION:
                self._folders = {k: dict(v) for k, v in content["folders"].items() if ":" in k}
        except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
            self._folders = {}

    @classmethod
    def beside(cls, work_dir: Optional[str]) -> Memory:
        """The memory that all runs share whose work dirs lie side by side, or in one of those."""
        if not work_dir:
            return cls()
        folder = Path(work_dir).absolute().parent
        around = [folder / _NAME, folder.parent / _NAME]
        return cls(next((path for path in around if os.path.isfile(path)), around[0]))

    def recall(self, kind: str, path: str) -> Optional[list]:
        """What was noted about a file that is still as it was then; not checked in any way."""
        folder, name = os.path.split(os.path.abspath(path))
        entry = self._folders.get(f"{kind}:{folder}", {}).get(name)
        try:
            known = isinstance(entry, list) and entry[:2] == _signature(path)
        except OSError:
            return None
        return entry[2:] if known else None

    def note(self, kind: str, path: str, facts: Sequence[Any], effort: float = 1) -> None:
        """Remember ``facts``, of types that JSON knows, about a file as it is now.

        Args:
            kind: What the facts are about.
            path: The file.
            facts: What was found out.
            effort: That it took, in images whose headers are read meanwhile.
        """
        folder, name = os.path.split(os.path.abspath(path))
        # A file that is not there today may be mounted tomorrow.
        with suppress(OSError):
            entry = [*_signature(path), *facts]
            self._folders.setdefault(f"{kind}:{folder}", {})[name] = entry
            self._effort += effort

    def save(self) -> bool:
        """Write the file, whole or not at all, if what is new in it took some effort.

        Returns:
            False if that is not possible there.
        """
        if not self.path or self._effort < _WORTHWHILE:
            return True
        folders = {k: v for k, v in self._folders.items() if os.path.isdir(k.split(":", 1)[1])}
        content = json.dumps({"version": _VERSION, "folders": folders})
        try:
            write_whole(self.path, content)
        except OSError:
            return False
        self._effort = 0
        return True


def _signature(path: str) -> list[int]:
    """What changes when a file does."""
    status = os.stat(path)
    return [status.st_size, status.st_mtime_ns]
