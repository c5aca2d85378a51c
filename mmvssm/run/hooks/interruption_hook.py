"""Save a checkpoint and stop when a training run receives SIGTERM."""

from __future__ import annotations

import signal
import threading
from typing import Any, Optional

from mmengine.dist import all_gather_object, barrier
from mmengine.hooks import EMAHook, Hook
from mmengine.runner import IterBasedTrainLoop, Runner

from ...errors import Stopped
from ...processes import any_process
from ...registry import HOOKS
from .checkpoint_hook import AtomicCheckpointHook
from .reproducible import ResumableEpochLoop


@HOOKS.register_module()
class InterruptionHook(Hook):
    """Save and stop at SIGTERM, which Slurm and Kubernetes send some time before they kill a job.

    The run finishes the current iteration (with gradient accumulation, the step), :class:`AtomicCheckpointHook` saves a
    checkpoint, and the hook raises :class:`Stopped`. With :func:`make_reproducible`, the resumed run repeats an
    uninterrupted one exactly, even from the middle of an epoch. An interrupted validation is neither finished nor
    repeated.

    In a distributed run one rank needs to get the signal: after every iteration the ranks share it by an all-reduce of
    one number. During validation they do so while all ranks have samples left, then after the next training iteration.

    Ctrl-C stops a run at once, or after the current iteration if the KeyboardInterrupt got lost: in a bare ``except``,
    or because it was raised during garbage collection.

    Raises:
        Stopped: After SIGTERM, with exit code 143.
        KeyboardInterrupt: After Ctrl-C.
    """

    # Run after all other hooks.
    priority = "LOWEST"

    def __init__(self) -> None:
        self._received = self._interrupted = False
        self._previous: dict[int, Any] = {}
        self._common_val_iterations = 0

    def before_train(self, runner: Runner) -> None:
        """Install signal handlers, if this is the main thread; Python allows no other."""
        if threading.current_thread() is threading.main_thread():
            self._previous[signal.SIGTERM] = signal.signal(signal.SIGTERM, self._note)
            if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
                self._previous[signal.SIGINT] = signal.signal(signal.SIGINT, self._interrupt)

    def after_train(self, runner: Runner) -> None:
        """Listen no longer."""
        self._restore()

    def after_train_iter(
        self,
        runner: Runner,
        batch_idx: int,
        data_batch: Optional[Any] = None,
        outputs: Optional[dict] = None,
    ) -> None:
        """Save and stop after a signal, unless gradients are being accumulated."""
        self._raise_if_interrupted()
        if not any_process(self._received):
            return
        complete = getattr(runner.optim_wrapper, "should_update", lambda: True)
        if complete():
            self._stop(runner, runner.iter + 1, batch_idx + 1)

    def before_val_epoch(self, runner: Runner) -> None:
        """Find the number of iterations that all ranks have; samplers may give some ranks more."""
        self._common_val_iterations = min(all_gather_object(_length(runner.val_dataloader)))

    def after_val_iter(
        self,
        runner: Runner,
        batch_idx: int,
        data_batch: Optional[Any] = None,
        outputs: Optional[Any] = None,
    ) -> None:
        """Save and stop after a signal."""
        self._raise_if_interrupted()
        if batch_idx < self._common_val_iterations and any_process(self._received):
            for hook in runner.hooks:
                if isinstance(hook, EMAHook):  # swaps the raw weights back before we save
                    hook.after_val_epoch(runner)
            self._stop(runner, runner.iter, 0)

    def _note(self, *_: Any) -> None:
        self._received = True

    def _interrupt(self, *_: Any) -> None:
        self._interrupted = True
        raise KeyboardInterrupt

    def _raise_if_interrupted(self) -> None:
        if self._interrupted:
            self._restore()
            raise KeyboardInterrupt

    def _restore(self) -> None:
        while self._previous:
            signal.signal(*self._previous.popitem())

    def _stop(self, runner: Runner, iteration: int, batches_of_epoch: int) -> None:
        saving = next((h for h in runner.hooks if isinstance(h, AtomicCheckpointHook)), None)
        loop = runner.train_loop
        if saving is None:
            saved = "nothing was saved, since default_hooks.checkpoint is no CheckpointHook"
        elif isinstance(loop, (ResumableEpochLoop, IterBasedTrainLoop)) or not batches_of_epoch:
            if isinstance(loop, ResumableEpochLoop) and batches_of_epoch:
                loop.remember(batches_of_epoch)
            path = saving.save_interrupted(runner, dict(epoch=runner.epoch, iter=iteration))
            saved = f"--resume with the same --work-dir continues from {path}"
        else:
            saved = (
                f"a {type(loop).__name__} cannot resume within an epoch, so --resume repeats epoch {runner.epoch + 1} "
                f"from {saving.last_ckpt}"
            )
        barrier()  # a launcher ends all ranks as soon as one has ended
        self._restore()
        raise Stopped(f"stopped by SIGTERM after iteration {iteration}; {saved}", signal.SIGTERM)


def _length(loader: Any) -> int:
    """Return the number of batches of a data loader, 0 if unknown."""
    try:
        return len(loader)
    except TypeError:
        return 0


@HOOKS.register_module()
class UnfinishedValidationHook(Hook):
    """Does nothing; kept for configs saved by version 0.1."""
