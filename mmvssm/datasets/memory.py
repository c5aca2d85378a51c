"""Save what a run finds in files, so that later runs need not read a large data set again."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Optional

from ..files import read_json, signature, write_whole

_NAME = ".data_check.json"
_WORTHWHILE = 400  # images; reading fewer again takes no longer than saving them
_VERSION = 2  # raise it when the format of the findings changes


class Memory:
    """Findings of earlier runs, in a JSON file beside the work dirs.

    An entry is valid while its file keeps its size and modification time. We ignore a damaged memory.

    Args:
        path: The JSON file; None keeps the findings in this object only.
    """

    def __init__(self, path: Optional[Path] = None) -> None:
        self.path = path
        self._folders: dict[str, dict[str, list]] = {}
        self._effort = 0
        try:
            content = read_json(path, dict) if path else {}
            if content.get("version") == _VERSION:
                self._folders = {k: dict(v) for k, v in content["folders"].items() if ":" in k}
        except (OSError, ValueError, TypeError, KeyError, AttributeError):
            self._folders = {}

    @classmethod
    def beside(cls, work_dir: Optional[str]) -> Memory:
        """Return the memory of all runs whose work dirs lie side by side, or inside one of those."""
        if not work_dir:
            return cls()
        folder = Path(work_dir).absolute().parent
        around = [folder / _NAME, folder.parent / _NAME]
        return cls(next((path for path in around if os.path.isfile(path)), around[0]))

    def recall(self, kind: str, path: str) -> Optional[list]:
        """Return the facts about a file, not validated; None if there are none or the file has changed."""
        folder, name = os.path.split(os.path.abspath(path))
        entry = self._folders.get(f"{kind}:{folder}", {}).get(name)
        try:
            known = isinstance(entry, list) and entry[:2] == signature(path)
        except OSError:
            return None
        return entry[2:] if known else None

    def note(self, kind: str, path: str, facts: Sequence[Any], effort: float = 1) -> None:
        """Store facts about a file in its current state.

        Args:
            kind: Kind of the facts.
            path: The file.
            facts: Values that JSON can store.
            effort: Time that it took to find them, in headers of images read.
        """
        folder, name = os.path.split(os.path.abspath(path))
        # A file that is missing now may be mounted later.
        with suppress(OSError):
            entry = [*signature(path), *facts]
            self._folders.setdefault(f"{kind}:{folder}", {})[name] = entry
            self._effort += effort

    def save(self) -> bool:
        """Write the file atomically if its new entries took some effort.

        Returns:
            False if the file cannot be written.
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
