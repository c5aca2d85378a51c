"""Write checkpoints atomically, so that a run killed at any moment can resume."""

import os
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Callable, Optional, Union

from mmengine.dist import is_main_process
from mmengine.fileio import register_backend
from mmengine.fileio.backends import LocalBackend
from mmengine.hooks import CheckpointHook
from mmengine.runner import Runner

from ...files import remove_partial, write_whole
from ...models.blueprint import BLUEPRINT, SCOPES, write_blueprint
from ...processes import any_process
from ...registry import HOOKS
from .non_finite_guard import NonFiniteError, advice, network_of, non_finite_states

_BACKEND = "AtomicLocalBackend"
INTERRUPTED = "interrupted.pth"


@register_backend(_BACKEND, force=True)
class AtomicLocalBackend(LocalBackend):
    """Local disk with atomic writes."""

    def put(self, obj: Union[bytes, memoryview], filepath: Union[str, Path]) -> None:
        """Write ``obj`` to a temporary file beside ``filepath`` and rename it.

        Args:
            obj: Content of the file.
            filepath: File to write or replace.

        Raises:
            OSError: If the file cannot be written; the error has its name, and the old file stays.
        """
        write_whole(filepath, obj)


class _DeferredRemoval:
    """A file backend that defers removals until :meth:`flush`."""

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
        """Remove the collected files, except those in ``keep``."""
        for remove, path in self._pending:
            if path not in keep:
                remove(path)


@HOOKS.register_module()
class AtomicCheckpointHook(CheckpointHook):
    """mmengine's CheckpointHook with atomic writes and a check for NaN.

    mmengine writes straight into the final file. It removes the oldest checkpoint (``max_keep_ckpts``) and the best one
    (``save_best``) before it writes the new one. This hook writes to a temporary file on a local disk and renames it,
    and removes old checkpoints only when the new one is complete. It does not save a state with NaN or infinity, which
    would replace a good checkpoint and cannot be resumed from. The run ends, since such a state never recovers.
    ``save_best="auto"`` follows the metric of all classes even if mmdet evaluates each class as well. The checkpoints
    hold a blueprint, from which :func:`mmvssm.load` builds the model without its config.

    Raises:
        NonFiniteError: If the state is not finite. Buffers that were not finite before training are ignored.
    """

    def before_train(self, runner: Runner) -> None:
        """See the base class."""
        out_dir = str(self.out_dir or runner.work_dir)
        if self.backend_args is None and self.file_client_args is None and "://" not in out_dir:
            self.backend_args = {"backend": _BACKEND}
        super().before_train(runner)
        if is_main_process() and "://" not in out_dir:
            remove_partial(self.out_dir)
        parameters = {name for name, _ in network_of(runner).named_parameters()}
        self._meant_to_be = set(non_finite_states(runner)) - parameters

    def save_interrupted(self, runner: Runner, meta: dict[str, int]) -> str:
        """Save ``interrupted.pth``, replacing that of an earlier interruption.

        Args:
            runner: The interrupted runner.
            meta: ``epoch`` and ``iter`` to resume at.

        Returns:
            The file, which ``last_checkpoint`` names from now on.
        """
        self._check_finite(runner, meta["iter"])
        rotation, self.max_keep_ckpts = self.max_keep_ckpts, -1
        template, self.filename_tmpl = self.filename_tmpl, INTERRUPTED
        try:
            self._save_checkpoint_with_step(runner, meta["iter"], meta)
        finally:
            self.max_keep_ckpts, self.filename_tmpl = rotation, template
        return str(self.last_ckpt)

    def _save_checkpoint(self, runner: Runner) -> None:
        self._check_finite(runner, runner.iter + (not self.by_epoch))
        super()._save_checkpoint(runner)

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Add the blueprint of the model, unless the config holds more than text can."""
        model, scope = runner.cfg.get("model"), runner.cfg.get("default_scope")
        if isinstance(model, dict) and scope in SCOPES:
            with suppress(TypeError):
                checkpoint["meta"][BLUEPRINT] = write_blueprint(runner.cfg)

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Ignore a checkpoint's paths to old checkpoints if they are outside this run's folder.

        mmengine later removes the file or folder that a resumed checkpoint names as the best so far. That could be the
        best checkpoint of another run or, in a hostile file, any path.
        """
        hub = checkpoint.get("message_hub")
        notes = hub.get("runtime_info") if isinstance(hub, dict) else None
        if not isinstance(notes, dict):
            return
        folder = str(runner.work_dir)
        if self.out_dir is not None:  # before_train appends the work dir's name
            folder = os.path.join(self.out_dir, os.path.basename(folder.rstrip(os.sep)))
        for name in [name for name in notes if str(name).startswith("best_ckpt")]:
            file = os.path.basename(str(notes.pop(name)))
            if file.startswith("best_") and file.endswith(".pth"):
                notes[name] = os.path.join(folder, file)
        steps = notes.get("keep_ckpt_ids", [])
        if not isinstance(steps, list) or not all(type(step) is int for step in steps):
            del notes["keep_ckpt_ids"]

    def _save_checkpoint_with_step(self, runner: Runner, step: int, meta: Optional[dict]) -> None:
        marker = Path(runner.work_dir, "last_checkpoint")
        # mmengine would write into a link's target, and wait for a reader of a FIFO.
        if is_main_process() and (marker.is_symlink() or not marker.is_file()):
            marker.unlink(missing_ok=True)
        with self._deferred_removal():
            super()._save_checkpoint_with_step(runner, step, meta)

    def _save_best_checkpoint(self, runner: Runner, metrics: dict) -> None:
        if self.save_best:
            self._check_finite(runner, runner.iter)
            # "auto" takes the first metric, and mmdet's classwise=True puts those of single classes first.
            if next(iter(metrics), "").endswith("_precision"):
                metrics = {k: v for k, v in metrics.items() if k.endswith("_mAP")} | metrics
            with self._deferred_removal():
                super()._save_best_checkpoint(runner, metrics)

    @contextmanager
    def _deferred_removal(self) -> Iterator[None]:
        """Defer removals until the end of the context; skip them after an exception."""
        backend = self.file_backend
        self.file_backend = later = _DeferredRemoval(backend)
        try:
            yield
            best = [getattr(self, "best_ckpt_path", None)]
            best += getattr(self, "best_ckpt_path_dict", {}).values()
            later.flush(keep=[self.last_ckpt, *best])
        finally:
            self.file_backend = backend

    def _check_finite(self, runner: Runner, iterations: int) -> None:
        names = [name for name in non_finite_states(runner) if name not in self._meant_to_be]
        if any_process(bool(names)):
            others = f" and {len(names) - 1} others" * (len(names) > 1)
            what = f"{names[0]}{others}" if names else "a tensor on another rank"
            raise NonFiniteError(
                f"the state after {iterations} iterations holds NaN or infinity in {what}; we did not "
                f"save it (last checkpoint: {self.last_ckpt or 'none'}); {advice(runner)}"
            )
