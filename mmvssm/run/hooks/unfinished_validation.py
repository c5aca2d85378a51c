"""A validation that did not end, whatever ended the run, is made up for when the run goes on."""

from __future__ import annotations

from pathlib import Path
from typing import Optional

from mmengine.dist import is_main_process
from mmengine.hooks import Hook
from mmengine.runner import Runner

from ...processes import any_process
from ...registry import HOOKS


@HOOKS.register_module()
class UnfinishedValidationHook(Hook):
    """Validates first, where a run that goes on was ended in the validation after its last iteration.

    mmengine saves a checkpoint, validates, and goes on from that checkpoint with the next iteration,
    so that a validation which was interrupted, killed or broken by a mistake would be missing, and with it
    the best checkpoint or a step of a schedule that follows a metric. While one is under way a file in
    the work dir, ``unfinished_validation``, says after which iteration.
    """

    # When everything else is ready to train, and has seen what was measured.
    priority = "LOWEST"

    def __init__(self) -> None:
        self._note: Optional[Path] = None

    def before_train(self, runner: Runner) -> None:
        """Validate, if that is what this run was doing when it ended."""
        self._note = Path(runner.work_dir, "unfinished_validation")
        unfinished = is_main_process() and runner.iter > 0 and self._read() == str(runner.iter)
        if any_process(unfinished) and runner.val_loop is not None:
            runner.logger.info(
                f"The validation after iteration {runner.iter} did not end; it is done first"
            )
            runner.val_loop.run()

    def after_train(self, runner: Runner) -> None:
        """Whatever is validated from now on is no part of a training."""
        self._note = None

    def before_val_epoch(self, runner: Runner) -> None:
        """Note that it begins."""
        if self._note is not None and is_main_process():
            self._note.write_text(str(runner.iter))

    def after_val_epoch(self, runner: Runner, metrics: Optional[dict[str, float]] = None) -> None:
        """Note that it ended."""
        if self._note is not None and is_main_process():
            self._note.unlink(missing_ok=True)

    def _read(self) -> str:
        try:
            return self._note.read_text()
        except (OSError, ValueError):  # it is not there, or is no text
            return ""
