"""Skip training steps with NaN or infinity, and stop a run that has too many in a row."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Optional

import torch
from mmengine.dist import all_gather_object
from mmengine.hooks import Hook
from mmengine.model import is_model_wrapper
from mmengine.runner import Runner
from torch import Tensor, nn

from ...errors import UserError, shown
from ...processes import any_process_each
from ...registry import HOOKS

# After so many steps in a row, PyTorch's initial loss scale of 2**16 has come down to 2**-16.
_SCALING_PATIENCE = 32


class NonFiniteError(UserError):
    """Losses, gradients or weights are NaN or infinite; the message tells where and what to change."""


@HOOKS.register_module()
class NonFiniteGuardHook(Hook):
    """Skips training steps that are not finite and stops the run after too many in a row.

    A step with NaN or infinite gradients would destroy the weights. The hook skips it: parameters and the optimizer's
    state stay, and buffers (batch norm's running statistics) are restored. After ``patience`` such steps in a row it
    stops the run and names the losses that were not finite.
    :func:`mmvssm.analysis.non_finite.find_origin` finds the module where they begin.

    The hook checks losses in every iteration and gradients before every step, and counts both separately, since
    gradients may be accumulated. Loss scaling finds infinite gradients now and then and skips such steps itself; while
    the losses are finite, the run stops only after 32 of these in a row.

    In a distributed run all ranks decide alike.

    Cost: before each step a norm over the gradients, for which the CPU waits (mmengine waits for the losses anyway, a
    little later), and a copy of the buffers; with several ranks, one all-reduce of three numbers.

    Args:
        patience: Number of skipped iterations, or steps, in a row after which the run stops.

    Raises:
        ValueError: If ``patience`` is not positive.
        NonFiniteError: From ``after_train_iter``, after ``patience`` of them.
    """

    # Run before hooks that use the step's result, such as EMAHook.
    priority = "VERY_HIGH"

    def __init__(self, patience: int = 3) -> None:
        if patience < 1:
            raise ValueError(f"NonFiniteGuardHook: patience must be at least 1; got {patience}.")
        self.patience = patience
        # Counts in a row: losses that were not finite, steps skipped here, steps skipped by loss scaling.
        self._losses = self._steps = self._scaled = 0
        self._stepped = self._step_skipped = False
        self._buffers: list[Tensor] = []

    def before_train(self, runner: Runner) -> None:
        """Register a check of the gradients before every step of every optimizer."""
        for optimizer in _optimizers(runner):
            optimizer.register_step_pre_hook(self._skip_if_not_finite)

    def before_train_iter(
        self, runner: Runner, batch_idx: int, data_batch: Optional[Any] = None
    ) -> None:
        """Copy the buffers, to restore them after a bad iteration."""
        self._stepped = self._step_skipped = False
        self._buffers = [buffer.detach().clone() for buffer in network_of(runner).buffers()]

    def after_train_iter(
        self,
        runner: Runner,
        batch_idx: int,
        data_batch: Optional[Any] = None,
        outputs: Optional[dict] = None,
    ) -> None:
        """Count bad iterations, warn, and stop the run after too many."""
        names = [
            name
            for name, value in (outputs or {}).items()
            if "loss" in name and not _is_finite(value)
        ]
        bad_loss, bad_step, scaled_down = any_process_each(
            bool(names), self._step_skipped, self._skipped_by_scaling(runner)
        )
        self._losses = self._losses + 1 if bad_loss else 0
        if bad_step:
            self._steps += 1
        elif self._stepped:
            self._steps = 0
        if scaled_down:
            self._scaled += 1
        elif self._stepped:
            self._scaled = 0
        if bad_loss or bad_step:
            with torch.no_grad():
                for buffer, before in zip(network_of(runner).buffers(), self._buffers):
                    buffer.copy_(before)
            count, patience = max(self._losses, self._steps), self.patience
            what = "gradients are not finite"
            if names:
                what = f"the loss is not finite ({', '.join(names)})"
            if count < patience:
                runner.logger.warning(
                    f"Iteration {runner.iter + 1}: {what}; we skipped its step, and stop the run after {patience} of "
                    f"them in a row ({count} so far)"
                )
                return
        elif self._scaled >= _SCALING_PATIENCE:
            count, what = self._scaled, "loss scaling found no finite gradients"
        else:
            return
        messages: list = all_gather_object((names, what, _images(data_batch)))
        names, what, images = max(messages, key=lambda m: bool(m[0]))  # from a rank with bad losses
        data = f", or look at the data ({images})" if images else ""
        raise NonFiniteError(
            f"training stopped at iteration {runner.iter + 1}: {what}, {count} times in a row; we skipped these steps, "
            f"so the weights are unchanged; {advice(runner)}{data}; to find the module where it begins, call "
            "mmvssm.analysis.non_finite.find_origin(model, batch)"
        )

    def _skip_if_not_finite(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        """Drop gradients that are not finite, as a pre-hook of the step; without gradients the step does nothing."""
        gradients = [
            parameter.grad
            for group in optimizer.param_groups
            for parameter in group["params"]
            if parameter.grad is not None
        ]
        if _are_finite(gradients):
            self._stepped = True
        else:
            optimizer.zero_grad(set_to_none=True)
            self._step_skipped = True

    def _skipped_by_scaling(self, runner: Runner) -> bool:
        """Whether the loss scaler skipped a step that was due in this iteration."""
        wrapper = runner.optim_wrapper
        if getattr(wrapper, "loss_scaler", None) is None or self._step_skipped:
            return False
        return wrapper.should_update() and not self._stepped


def non_finite_states(runner: Runner) -> list[str]:
    """List names of the parameters, buffers and optimizer states that hold NaN or infinity."""
    states = dict(network_of(runner).state_dict())
    for number, optimizer in enumerate(_optimizers(runner)):
        for index, state in optimizer.state_dict()["state"].items():
            states.update(
                (f"optimizer {number}, parameter {index}, {name}", value)
                for name, value in state.items()
            )
    tensors = {name: value for name, value in states.items() if isinstance(value, Tensor)}
    if _are_finite(tensors.values()):
        return []
    return [name for name, value in tensors.items() if not _is_finite(value)]


def advice(runner: Runner) -> str:
    """Suggest changes for a diverged run, given its current settings."""
    rates = [rate for rates in _learning_rates(runner) for rate in rates]
    advice = f"lower the learning rate (optim_wrapper.optimizer.lr, now {max(rates):.3g})"
    wrapper = runner.optim_wrapper
    if not getattr(wrapper, "clip_grad_kwargs", None):
        advice += ", clip gradients (optim_wrapper.clip_grad=dict(max_norm=1.0))"
    if type(wrapper).__name__ in ("AmpOptimWrapper", "BFloat16OptimWrapper"):
        advice += ", train in float32 (without --amp)"
    return advice


def _learning_rates(runner: Runner) -> Iterable[list[float]]:
    return ([group["lr"] for group in o.param_groups] for o in _optimizers(runner))


def _images(data_batch: Any) -> str:
    samples = data_batch.get("data_samples", []) if isinstance(data_batch, dict) else []
    paths = [str(getattr(sample, "img_path", "")) for sample in samples]
    return shown([path for path in paths if path])


def network_of(runner: Runner) -> nn.Module:
    """Return the model without the wrapper of a distributed run."""
    return runner.model.module if is_model_wrapper(runner.model) else runner.model


def _optimizers(runner: Runner) -> list[torch.optim.Optimizer]:
    wrapper = runner.optim_wrapper
    wrappers = wrapper.values() if hasattr(wrapper, "optim_wrappers") else [wrapper]
    return [wrapper.optimizer for wrapper in wrappers]


def _is_finite(value: Any) -> bool:
    return bool(torch.as_tensor(value).isfinite().all())


def _are_finite(tensors: Iterable[Tensor]) -> bool:
    """Whether all numbers are finite; waits for the device once."""
    largest = [
        torch.linalg.vector_norm(tensor.detach(), torch.inf)
        for tensor in tensors
        if tensor.is_floating_point() and tensor.numel()
    ]
    if not largest:
        return True
    device = largest[0].device
    return _is_finite(torch.stack([norm.float().to(device) for norm in largest]))
