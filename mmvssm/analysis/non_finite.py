"""Find the module of a model where NaN or infinity begins."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Optional

import torch
from mmengine.model import is_model_wrapper
from torch import Tensor, nn


def find_origin(model: nn.Module, data_batch: Any) -> Optional[str]:
    """Run a training batch through a model and name its first module whose numbers are not finite.

    This updates BatchNorm's running statistics, as any training batch does. Call it with the model and the batch of a
    run that stopped, under ``torch.autocast`` if that run used ``--amp``::

        model = runner.model
        batch = next(iter(runner.train_dataloader))
        print(find_origin(model, batch))

    Args:
        model: A detector, segmenter or classifier of mmdet, mmseg or mmpretrain, in training mode.
        data_batch: A batch from its data loader.

    Returns:
        One line of text; None if losses and gradients are finite.
    """
    if is_model_wrapper(model):  # of a distributed run
        model = model.module
    for name, parameter in model.named_parameters():
        if not parameter.isfinite().all():
            return f"the parameter {name} is not finite itself"
    data = model.data_preprocessor(data_batch, True)
    with _first_non_finite(model) as found:
        losses = model(**data, mode="loss") if isinstance(data, dict) else model(*data, mode="loss")
    if found:
        return found[0]
    total, _ = model.parse_losses(losses)
    for name, value in losses.items():
        if not _are_finite(value):
            return f"the numbers of every module are finite, the loss {name} is not"
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    gradients = torch.autograd.grad(total, list(parameters.values()), allow_unused=True)
    # In reverse, since the backward pass reaches the last parameters first.
    for name, gradient in reversed(list(zip(parameters, gradients))):
        if gradient is not None and not gradient.isfinite().all():
            return f"the first gradient that is not finite is that of {name}"
    return None


@contextmanager
def _first_non_finite(model: nn.Module) -> Iterator[list[str]]:
    """Collect, in order, the modules that get or return numbers that are not finite."""
    found: list[str] = []

    def watch(name: str, module: nn.Module) -> list:
        def note(what: str, value: Any) -> None:
            if not found and not _are_finite(value):
                found.append(f"the first module with such numbers is {name}, in its {what}")

        return [
            module.register_forward_pre_hook(lambda _, given: note("input", given)),
            module.register_forward_hook(lambda _, given, returned: note("output", returned)),
        ]

    handles = [
        handle
        for name, module in model.named_modules()
        if name  # the model itself returns the losses
        for handle in watch(name, module)
    ]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def _are_finite(value: Any) -> bool:
    """Whether the floating-point tensors in nested tuples, lists and dictionaries are finite."""
    if isinstance(value, Tensor):
        return bool(value.isfinite().all())
    if isinstance(value, dict):
        value = value.values()
    elif not isinstance(value, (list, tuple)):
        return True
    return all(map(_are_finite, value))
