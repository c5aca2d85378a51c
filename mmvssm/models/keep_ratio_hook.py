"""Increase the pruning of a backbone gradually while it trains."""

from __future__ import annotations

from typing import Optional

from mmengine.hooks import Hook
from mmengine.model import is_model_wrapper
from mmengine.runner import Runner

from ..registry import HOOKS
from .pruning import PruningError, TokenPruning


@HOOKS.register_module()
class KeepRatioWarmup(Hook):
    """Lower the keep ratio of pruned backbones linearly from 1 to its target during training.

    For fine-tuning from dense weights. Validation and testing always prune fully, so that their metrics are those of
    the final model. The ratio depends on the iteration alone, so a resumed run has the same one. The hook logs it as
    ``keep_ratio``.

    Args:
        num_iters: Length of the warm-up in iterations.
        begin: First iteration of the warm-up; before it, the model prunes nothing.

    Raises:
        ValueError: If ``num_iters`` or ``begin`` is negative.
        PruningError: When training begins, if the model prunes nothing, or if its alignment is ``'none'``, which cannot
            pack every number of tokens into a grid.
    """

    # Times in iterations, which --epochs and --iters change. Their sum, the end, is at most half of a run.
    schedule_settings = ("num_iters", "begin")

    def __init__(self, num_iters: int, begin: int = 0) -> None:
        if num_iters < 0 or begin < 0:
            raise ValueError(
                f"KeepRatioWarmup: num_iters and begin must not be negative; got {num_iters} and {begin}."
            )
        self.num_iters = num_iters
        self.begin = begin

    def progress(self, iteration: int) -> float:
        """The share of the pruning at an iteration, from 0 to 1."""
        passed = iteration - self.begin
        if passed < 0:
            return 0.0
        return min(passed / self.num_iters, 1.0) if self.num_iters else 1.0

    def before_train(self, runner: Runner) -> None:
        """Check that the model prunes, in a way that can change gradually."""
        prunings = _prunings(runner)
        packs = any(pruning.alignment in pruning.needs_grid for pruning in prunings)
        if packs and self.progress(0) < 1:
            raise PruningError(
                "KeepRatioWarmup: alignment='none' cannot pack every number of tokens that a warm-up passes through; "
                "set num_iters=0, or choose alignment='decay' or 'hold'."
            )
        if not prunings:
            raise PruningError(
                "KeepRatioWarmup: the model has no pruned backbone; set the backbone's pruning, or remove the hook."
            )

    def before_train_iter(
        self, runner: Runner, batch_idx: int, data_batch: Optional[dict] = None
    ) -> None:
        """Set the ratio for this iteration."""
        for pruning in _prunings(runner):
            pruning.progress = self.progress(runner.iter)

    def after_train_iter(
        self,
        runner: Runner,
        batch_idx: int,
        data_batch: Optional[dict] = None,
        outputs: Optional[dict] = None,
    ) -> None:
        """Log the smallest ratio of all layers."""
        ratio = min(pruning.training_keep_ratio() for pruning in _prunings(runner))
        runner.message_hub.update_scalar("train/keep_ratio", ratio)


def _prunings(runner: Runner) -> list[TokenPruning]:
    model = runner.model.module if is_model_wrapper(runner.model) else runner.model
    found = (getattr(module, "pruning", None) for module in model.modules())
    return [pruning for pruning in found if isinstance(pruning, TokenPruning)]
