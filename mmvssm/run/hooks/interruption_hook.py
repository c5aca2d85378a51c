"""A training run that is told to end saves where it is."""

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
    """At SIGTERM, which Slurm and Kubernetes send some time before they kill, save and end.

    The iteration under way is finished (with gradient accumulation, the step), a checkpoint is saved
    by :class:`AtomicCheckpointHook`, and :class:`Stopped` raised. With what
    :func:`make_reproducible` adds, the resumed run repeats an uninterrupted one exactly, in the
    middle of an epoch too. A validation under way is not finished, and not repeated by the resumed run.

    In a distributed run it is enough that one process gets the signal: all of them ask each other
    after every iteration, by an all-reduce of one number; in a validation as long as all of them have
    samples left, and again after the next iteration of training.

    Ctrl-C ends a run at once, as everywhere in Python, or after the iteration under way where something made away with
    it: a bare ``except`` does, and what is raised while Python collects garbage.

    Raises:
        Stopped: With exit code 143, when SIGTERM was received.
        KeyboardInterrupt: After Ctrl-C.
    """

    # When everything else has seen the iteration.
    priority = "LOWEST"

    def __init__(self) -> None:
        self._received = self._interrupted = False
        self._previous: dict[int, Any] = {}
        self._common_val_iterations = 0

    def before_train(self, runner: Runner) -> None:
        """Listen from now on, if this is the main thread; signals go to no other."""
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
        """Save and end, if told to and if no gradients are being accumulated."""
        self._insist_on_interruption()
        if not any_process(self._received):
            return
        complete = getattr(runner.optim_wrapper, "should_update", lambda: True)
        if complete():
            self._stop(runner, runner.iter + 1, batch_idx + 1)

    def before_val_epoch(self, runner: Runner) -> None:
        """Find out how many iterations all processes have; samplers may give some of them more."""
        self._common_val_iterations = min(all_gather_object(_length(runner.val_dataloader)))

    def after_val_iter(
        self,
        runner: Runner,
        batch_idx: int,
        data_batch: Optional[Any] = None,
        outputs: Optional[Any] = None,
    ) -> None:
        """Save and end, if told to."""
        self._insist_on_interruption()
        if batch_idx < self._common_val_iterations and any_process(self._received):
            for hook in runner.hooks:
                if isinstance(hook, EMAHook):  # validates averaged weights, and swaps them back
                    hook.after_val_epoch(runner)
            self._stop(runner, runner.iter, 0)

    def _note(self, *_: Any) -> None:
        self._received = True

    def _interrupt(self, *_: Any) -> None:
        self._interrupted = True
        raise KeyboardInterrupt

    def _insist_on_interruption(self) -> None:
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
            saved = "nothing was saved, since default_hooks.checkpoint is none of mmengine's"
        elif isinstance(loop, (ResumableEpochLoop, IterBasedTrainLoop)) or not batches_of_epoch:
            if isinstance(loop, ResumableEpochLoop) and batches_of_epoch:
                loop.remember(batches_of_epoch)
            path = saving.save_interrupted(runner, dict(epoch=runner.epoch, iter=iteration))
            saved = f"--resume with the same --work-dir continues from {path}"
        else:
            saved = (
                f"a {type(loop).__name__} cannot go on within an epoch, so that epoch {runner.epoch + 1} "
                f"is repeated from its beginning, by --resume from {saving.last_ckpt}"
            )
        barrier()  # a launcher ends the others as soon as the first has ended
        self._restore()
        raise Stopped(f"stopped by SIGTERM after iteration {iteration}; {saved}", signal.SIGTERM)


def _length(loader: Any) -> int:
    """The batches of a data loader, 0 where it cannot tell."""
    try:
        return len(loader)
    except TypeError:
        return 0


@HOOKS.register_module()
class UnfinishedValidationHook(Hook):
    """A hook that does nothing. Configs that version 0.1 saved name it."""
