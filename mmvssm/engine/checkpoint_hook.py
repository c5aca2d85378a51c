"""Writing checkpoints so that a process killed at any moment leaves one to resume from."""

import os
import tempfile
from pathlib import Path
from typing import Any, Callable, Optional, Union

from mmengine.dist import is_main_process
from mmengine.fileio import register_backend
from mmengine.fileio.backends import LocalBackend
from mmengine.hooks import CheckpointHook
from mmengine.runner import Runner

from ..registry import HOOKS

_BACKEND = "AtomicLocalBackend"


@register_backend(_BACKEND, force=True)
class AtomicLocalBackend(LocalBackend):
    """The local disk, where a file appears whole or not at all."""

    def put(self, obj: Union[bytes, memoryview], filepath: Union[str, Path]) -> None:
        """Write ``obj`` beside ``filepath`` and then rename it, which is atomic.

        Args:
            obj: What to write.
            filepath: The file to write or replace.
        """
        filepath = Path(filepath)
        filepath.parent.mkdir(parents=True, exist_ok=True)
        descriptor, partial = tempfile.mkstemp(dir=filepath.parent, prefix=f".{filepath.name}.")
        try:
            # mkstemp makes files that only the owner reads; checkpoints are shared like any file.
            umask = os.umask(0)
            os.umask(umask)
            os.fchmod(descriptor, 0o666 & ~umask)
            with os.fdopen(descriptor, "wb") as file:
                file.write(obj)
                file.flush()
                os.fsync(file.fileno())
            os.replace(partial, filepath)
        except BaseException:
            Path(partial).unlink(missing_ok=True)
            raise


class _RemovingLater:
    """A file backend that keeps what it is told to remove until :meth:`flush`."""

    def __init__(self, backend: Any) -> None:
        self._backend = backend
        self._pending: list[tuple[Callable[[str], None], str]] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._backend, name)

    def remove(self, path: str) -> None:
        self._pending.append((self._backend.remove, path))

    def rmtree(self, path: str) -> None:
        self._pending.append((self._backend.rmtree, path))

    def flush(self) -> None:
        for remove, path in self._pending:
            remove(path)


@HOOKS.register_module()
class AtomicCheckpointHook(CheckpointHook):
    """mmengine's CheckpointHook, safe against being killed while it writes.

    mmengine writes straight into the final file, and with ``max_keep_ckpts`` removes the oldest
    checkpoint before it writes the new one. Here a checkpoint on a local disk is written to a
    temporary file and renamed, and the oldest goes only when the new one is complete.
    """

    def before_train(self, runner: Runner) -> None:
        """See the base class."""
        out_dir = str(self.out_dir or runner.work_dir)
        if self.backend_args is None and self.file_client_args is None and "://" not in out_dir:
            self.backend_args = {"backend": _BACKEND}
        if is_main_process() and "://" not in out_dir:
            _remove_partial_files(Path(runner.work_dir))
        super().before_train(runner)

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Let a checkpoint name only this run's own files as those that a better or newer one replaces.

        mmengine removes what a resumed checkpoint calls the best so far, file or folder, wherever
        it is; of another run's checkpoint that would be the other run's best, of a hostile one anything.
        """
        hub = checkpoint.get("message_hub")
        notes = hub.get("runtime_info") if isinstance(hub, dict) else None
        if not isinstance(notes, dict):
            return
        folder = str(runner.work_dir)
        if self.out_dir is not None:  # before_train adds the last part of the work dir to it
            folder = os.path.join(self.out_dir, os.path.basename(folder.rstrip(os.sep)))
        for name in [name for name in notes if str(name).startswith("best_ckpt")]:
            file = os.path.basename(str(notes.pop(name)))
            if file.startswith("best_") and file.endswith(".pth"):
                notes[name] = os.path.join(folder, file)
        steps = notes.get("keep_ckpt_ids", [])
        if not isinstance(steps, list) or not all(type(step) is int for step in steps):
            del notes["keep_ckpt_ids"]

    def _save_checkpoint_with_step(self, runner: Runner, step: int, meta: Optional[dict]) -> None:
        backend, self.file_backend = self.file_backend, _RemovingLater(self.file_backend)
        try:
            super()._save_checkpoint_with_step(runner, step, meta)
            self.file_backend.flush()
        finally:
            self.file_backend = backend


def _remove_partial_files(work_dir: Path) -> None:
    """Remove what a run killed in the middle of a write left behind."""
    for partial in work_dir.glob(".*.pth.*"):
        partial.unlink(missing_ok=True)
