"""A training that meets NaN or infinity skips the step, and stops where that goes on."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Optional

import numpy as np
import torch
from mmengine.dist import all_gather_object
from mmengine.hooks import Hook
from mmengine.model import is_model_wrapper
from mmengine.runner import Runner
from torch import Tensor, nn

from ...errors import UserError
from ...processes import any_process_each
from ...registry import HOOKS

_IMAGES_SHOWN = 2
# After so many steps in a row, PyTorch's initial loss scale of 2**16 has come down to 2**-16.
_SCALING_PATIENCE = 32


class NonFiniteError(UserError):
    """Losses, gradients or weights are NaN or infinite; the message says where, and what to do."""


@HOOKS.register_module()
class NonFiniteGuardHook(Hook):
    """Skips training steps that are not finite, and stops a run that does nothing else.

    A step whose gradients hold NaN or infinity would destroy the weights for good. It is left out:
    parameters and the optimizer's state stay as they are, and buffers (batch norm's running
    statistics) go back to what they were before it. After ``patience`` such steps in a row the run
    ends, and says which losses were not finite and which module was the first to produce such a
    number: the last batch is run once more, under the same random numbers, with hooks on every
    module.

    Losses are looked at in every iteration, gradients in those that end with a step; where gradients
    are accumulated, each has a count of its own.

    Loss scaling finds infinite gradients now and then and leaves such steps out by itself; while
    the losses are finite the run ends only after 32 of these in a row, which no lower scale helped.

    In a distributed run every process decides alike.

    Cost: before each step one norm over the gradients, which the CPU waits for (mmengine waits for
    the losses in every iteration anyway, a little later), and a copy of the buffers; with several
    processes, one all-reduce of three numbers.

    Args:
        patience: How many iterations, or steps, in a row may be left out, but for the last, which
            ends the run.

    Raises:
        ValueError: If ``patience`` is not positive.
        NonFiniteError: From ``after_train_iter``, as described.
    """

    # Before any hook that uses what the step left behind, such as EMAHook.
    priority = "VERY_HIGH"

    def __init__(self, patience: int = 3) -> None:
        if patience < 1:
            raise ValueError(f"NonFiniteGuardHook: patience must be at least 1; got {patience}.")
        self.patience = patience
        # In a row: losses that were not finite, steps left out here, steps left out by loss scaling.
        self._losses = self._steps = self._scaled = 0
        self._stepped = self._step_left_out = False
        self._buffers: list[Tensor] = []
        self._random_state: tuple = ()

    def before_train(self, runner: Runner) -> None:
        """Look at gradients before every step of every optimizer."""
        for optimizer in _optimizers(runner):
            optimizer.register_step_pre_hook(self._leave_out_if_not_finite)

    def before_train_iter(
        self, runner: Runner, batch_idx: int, data_batch: Optional[Any] = None
    ) -> None:
        """Remember what a bad iteration would spoil."""
        self._stepped = self._step_left_out = False
        self._random_state = _random_state()
        self._buffers = [buffer.detach().clone() for buffer in network_of(runner).buffers()]

    def after_train_iter(
        self,
        runner: Runner,
        batch_idx: int,
        data_batch: Optional[Any] = None,
        outputs: Optional[dict] = None,
    ) -> None:
        """Count, warn, and stop the run when it is too many."""
        names = [
            name
            for name, value in (outputs or {}).items()
            if "loss" in name and not _is_finite(value)
        ]
        bad_loss, bad_step, scaled_down = any_process_each(
            bool(names), self._step_left_out, self._left_out_by_scaling(runner)
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
            what = f"the loss is not finite ({', '.join(names)})" if names else (
                "gradients are not finite"
            )  # fmt: skip
            if count < patience:
                runner.logger.warning(
                    f"Iteration {runner.iter + 1}: {what}; its step was left out, and the run stops "
                    f"after {patience} of them in a row ({count} so far)"
                )
                return
        elif self._scaled >= _SCALING_PATIENCE:
            count, what = self._scaled, "loss scaling found no finite gradients"
        else:
            return
        where = self._find_origin(runner, data_batch)
        messages: list = all_gather_object((names, what, where, _images(data_batch)))
        # What the first process says that has met it itself.
        names, what, where, images = max(messages, key=lambda m: (bool(m[2]), bool(m[0])))
        raise NonFiniteError(
            f"training stopped at iteration {runner.iter + 1}: {what}, {count} time"
            f"{'s' * (count > 1)} in a row; {where or 'where it began could not be found'}; "
            f"these steps were left out, so that the weights are still finite; {advice(runner)}"
            + f", or look at the data ({images})"
            * bool(images)
        )

    def _leave_out_if_not_finite(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        """Called by the optimizer before a step: without gradients, the step does nothing."""
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
            self._step_left_out = True

    def _left_out_by_scaling(self, runner: Runner) -> bool:
        """Whether this iteration should have ended with a step, which the loss scaler did not take."""
        wrapper = runner.optim_wrapper
        if getattr(wrapper, "loss_scaler", None) is None or self._step_left_out:
            return False
        return wrapper.should_update() and not self._stepped

    def _find_origin(self, runner: Runner, data_batch: Any) -> Optional[str]:
        """The first module or parameter whose numbers are not finite, in words."""
        network = network_of(runner)
        for name, parameter in network.named_parameters():
            if not _is_finite(parameter):
                return f"the parameter {name} is not finite itself"
        now = _random_state()
        try:
            _set_random_state(self._random_state)
            return _run_again(runner, network, data_batch)
        except Exception as error:  # what is being looked for may upset the model itself
            runner.logger.warning(f"The batch could not be run again to find the origin: {error}")
            return None
        finally:
            _set_random_state(now)


def _run_again(runner: Runner, network: nn.Module, data_batch: Any) -> Optional[str]:
    with runner.optim_wrapper.optim_context(network):
        data = network.data_preprocessor(data_batch, True)
        with _first_non_finite(network) as found:
            losses = network._run_forward(data, mode="loss")
        total, _ = network.parse_losses(losses)
    if found:
        return found[0]
    names = [name for name, value in losses.items() if not _are_finite(_tensors(value))]
    if names:
        return f"every module's numbers are finite, the loss {names[0]} is not"
    parameters = {n: p for n, p in network.named_parameters() if p.requires_grad}
    gradients = torch.autograd.grad(total, list(parameters.values()), allow_unused=True)
    # Backwards: the parameters that the losses reach first.
    for name, gradient in reversed(list(zip(parameters, gradients))):
        if gradient is not None and not _is_finite(gradient):
            return f"the first gradient that is not finite is that of {name}"
    return None


@contextmanager
def _first_non_finite(network: nn.Module) -> Iterator[list[str]]:
    """Collect which modules get or return numbers that are not finite, the first one first."""
    found: list[str] = []

    def watch(name: str, module: nn.Module) -> list:
        def note(what: str, value: Any) -> None:
            if not found and not _are_finite(_tensors(value)):
                found.append(f"the first module with such numbers is {name}, in its {what}")

        return [
            module.register_forward_pre_hook(lambda _, given: note("input", given)),
            module.register_forward_hook(lambda _, given, returned: note("output", returned)),
        ]

    handles = [
        handle
        for name, module in network.named_modules()
        if name  # the network itself returns the losses
        for handle in watch(name, module)
    ]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def non_finite_states(runner: Runner) -> list[str]:
    """Names of the parameters, buffers and optimizer states that hold NaN or infinity."""
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
    """What to change about a run whose numbers grew out of bounds, its own settings in mind."""
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
    paths = [path for path in paths if path]
    return ", ".join(paths[:_IMAGES_SHOWN]) + ", ..." * (len(paths) > _IMAGES_SHOWN)


def network_of(runner: Runner) -> nn.Module:
    """The model without what wraps it in a distributed run."""
    return runner.model.module if is_model_wrapper(runner.model) else runner.model


def _optimizers(runner: Runner) -> list[torch.optim.Optimizer]:
    wrapper = runner.optim_wrapper
    wrappers = wrapper.values() if hasattr(wrapper, "optim_wrappers") else [wrapper]
    return [wrapper.optimizer for wrapper in wrappers]


def _tensors(value: Any) -> list[Tensor]:
    """The floating-point tensors in nested tuples, lists and dictionaries."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        value = value.values()
    elif not isinstance(value, (list, tuple)):
        return []
    return [tensor for item in value for tensor in _tensors(item)]


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


def _random_state() -> tuple:
    cuda = torch.cuda.get_rng_state() if torch.cuda.is_available() else None
    return random.getstate(), np.random.get_state(), torch.get_rng_state(), cuda


def _set_random_state(state: tuple) -> None:
    python, numpy, cpu, cuda = state
    random.setstate(python)
    np.random.set_state(numpy)
    torch.set_rng_state(cpu)
    if cuda is not None:
        torch.cuda.set_rng_state(cuda)
