"""Writing checkpoints so that a process killed at any moment leaves one to resume from."""

import os
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Callable, Optional, Union

from mmengine.dist import is_main_process
from mmengine.fileio import register_backend
from mmengine.fileio.backends import LocalBackend
from mmengine.hooks import CheckpointHook
from mmengine.runner import Runner

from ...files import write_whole
from ...processes import any_process
from ...registry import HOOKS
from .non_finite_guard import NonFiniteError, advice, network_of, non_finite_states

_BACKEND = "AtomicLocalBackend"
INTERRUPTED = "interrupted.pth"


@register_backend(_BACKEND, force=True)
class AtomicLocalBackend(LocalBackend):
    """The local disk, where a file appears whole or not at all."""

    def put(self, obj: Union[bytes, memoryview], filepath: Union[str, Path]) -> None:
        """Write ``obj`` beside ``filepath`` and then rename it, which is atomic.

        Args:
            obj: What to write.
            filepath: The file to write or replace.

        Raises:
            OSError: If it cannot be written, with the file's name; what was there before still is.
        """
        write_whole(filepath, obj)


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

    def flush(self, keep: Collection[str]) -> None:
        """Remove it all, apart from files that have been written anew in the meantime."""
        for remove, path in self._pending:
            if path not in keep:
                remove(path)


@HOOKS.register_module()
class AtomicCheckpointHook(CheckpointHook):
    """mmengine's CheckpointHook, safe against being killed while it writes, and against NaN.

    mmengine writes straight into the final file, and removes the oldest checkpoint (with
    ``max_keep_ckpts``) and the best one so far (with ``save_best``) before it writes the new one.
    Here a checkpoint on a local disk is written to a temporary file and renamed, and old ones go
    only when the new one is complete. A state with NaN or infinity in it is not saved: resuming
    from it is of no use, and it would push out a good one. Since neither weights nor running
    statistics recover from that, the run ends.

    Raises:
        NonFiniteError: If what is to be saved is not finite. Buffers that were not when training
            began may stay so.
    """

    def before_train(self, runner: Runner) -> None:
        """See the base class."""
        out_dir = str(self.out_dir or runner.work_dir)
        if self.backend_args is None and self.file_client_args is None and "://" not in out_dir:
            self.backend_args = {"backend": _BACKEND}
        super().before_train(runner)
        if is_main_process() and "://" not in out_dir:
            _remove_partial_files(Path(self.out_dir))
        parameters = {name for name, _ in network_of(runner).named_parameters()}
        self._meant_to_be = set(non_finite_states(runner)) - parameters

    def save_interrupted(self, runner: Runner, meta: dict[str, int]) -> str:
        """Save a checkpoint out of turn, in place of the one that an earlier interruption left.

        Args:
            runner: The one that is interrupted.
            meta: ``epoch`` and ``iter`` with which it is to go on.

        Returns:
            The file, ``interrupted.pth``, which ``last_checkpoint`` names from now on.
        """
        self._insist_on_finite(runner, meta["iter"])
        rotation, self.max_keep_ckpts = self.max_keep_ckpts, -1
        template, self.filename_tmpl = self.filename_tmpl, INTERRUPTED
        try:
            self._save_checkpoint_with_step(runner, meta["iter"], meta)
        finally:
            self.max_keep_ckpts, self.filename_tmpl = rotation, template
        return str(self.last_ckpt)

    def _save_checkpoint(self, runner: Runner) -> None:
        self._insist_on_finite(runner, runner.iter + (not self.by_epoch))
        super()._save_checkpoint(runner)

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
        with self._removing_later():
            super()._save_checkpoint_with_step(runner, step, meta)

    def _save_best_checkpoint(self, runner: Runner, metrics: dict) -> None:
        if self.save_best:
            self._insist_on_finite(runner, runner.iter)
            with self._removing_later():
                super()._save_best_checkpoint(runner, metrics)

    @contextmanager
    def _removing_later(self) -> Iterator[None]:
        """Remove at the end, if it is reached, what is to be removed."""
        backend = self.file_backend
        self.file_backend = later = _RemovingLater(backend)
        try:
            yield
            best = [getattr(self, "best_ckpt_path", None)]
            best += getattr(self, "best_ckpt_path_dict", {}).values()
            later.flush(keep=[self.last_ckpt, *best])
        finally:
            self.file_backend = backend

    def _insist_on_finite(self, runner: Runner, iterations: int) -> None:
        names = [name for name in non_finite_states(runner) if name not in self._meant_to_be]
        if any_process(bool(names)):
            what = f"{names[0]}{f' and {len(names) - 1} others' * (len(names) > 1)}" if names else (
                "something on another process"
            )  # fmt: skip
            last = f"the last one before is {self.last_ckpt}" if self.last_ckpt else (
                "none had been saved before"
            )  # fmt: skip
            raise NonFiniteError(
                f"the state after {iterations} iterations holds NaN or infinity in {what}, and no "
                f"checkpoint of it was saved ({last}); {advice(runner)}"
            )


def _remove_partial_files(folder: Path) -> None:
    """Remove what a run killed in the middle of a write left behind."""
    for partial in folder.glob(".*.pth.*"):
        partial.unlink(missing_ok=True)
