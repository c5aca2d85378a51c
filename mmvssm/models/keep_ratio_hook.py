"""Pruning that sets in gradually."""

from __future__ import annotations

from typing import Optional

from mmengine.hooks import Hook
from mmengine.model import is_model_wrapper
from mmengine.runner import Runner

from ..registry import HOOKS
from .pruning import PruningError, TokenPruning


@HOOKS.register_module()
class KeepRatioWarmup(Hook):
    """Lower the keep ratio of pruned backbones from 1 to its target, linearly, while training.

    For fine-tuning from dense weights. Validation and testing always prune fully, so that their
    metrics are those of the model that will be used. The ratio depends on the iteration alone: a
    resumed run goes on with the right one. The log shows it as ``keep_ratio``.

    Args:
        num_iters: Over how many iterations.
        begin: The iteration at which it starts; before, nothing is pruned.

    Raises:
        ValueError: If ``num_iters`` or ``begin`` is negative.
        PruningError: When training begins, if the model prunes nothing, or its alignment is ``'none'``, which packs
            only some numbers of tokens into a grid.
    """

    def __init__(self, num_iters: int, begin: int = 0) -> None:
        if num_iters < 0 or begin < 0:
            raise ValueError(
                f"KeepRatioWarmup: num_iters and begin must not be negative; got {num_iters} and {begin}."
            )
        self.num_iters = num_iters
        self.begin = begin

    def progress(self, iteration: int) -> float:
        """How much of the pruning takes place at an iteration, from 0 to 1."""
        passed = iteration - self.begin
        if passed < 0:
            return 0.0
        return min(passed / self.num_iters, 1.0) if self.num_iters else 1.0

    def before_train(self, runner: Runner) -> None:
        """Find out whether there is anything to do."""
        prunings = _prunings(runner)
        if any(pruning.alignment == "none" for pruning in prunings) and self.progress(0) < 1:
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
        """Log the ratio, the smallest where layers differ."""
        ratio = min(pruning.training_keep_ratio() for pruning in _prunings(runner))
        runner.message_hub.update_scalar("train/keep_ratio", ratio)


def _prunings(runner: Runner) -> list[TokenPruning]:
    model = runner.model.module if is_model_wrapper(runner.model) else runner.model
    found = (getattr(module, "pruning", None) for module in model.modules())
    return [pruning for pruning in found if isinstance(pruning, TokenPruning)]
