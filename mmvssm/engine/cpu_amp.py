"""Mixed precision without a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from mmengine.model import is_model_wrapper
from mmengine.optim import OptimWrapper
from torch import Tensor, nn

from ..registry import OPTIM_WRAPPERS


@OPTIM_WRAPPERS.register_module()
class BFloat16OptimWrapper(OptimWrapper):
    """Train a detector's or segmenter's backbone and neck in bfloat16 on a CPU, by autocast.

    The heads get float32 maps: operators such as RoIAlign and NMS have no bfloat16 version for
    CPUs. Parameters, gradients and the optimiser stay float32, and bfloat16's range needs no loss
    scaling. mmengine's ``AmpOptimWrapper`` is for GPUs only.

    Takes the arguments of :class:`mmengine.optim.OptimWrapper`.
    """

    @contextmanager
    def optim_context(self, model: nn.Module) -> Iterator[None]:
        """Compute the feature maps of this training step in bfloat16."""
        network = model.module if is_model_wrapper(model) else model
        extract_feat = network.extract_feat

        def in_bfloat16(*args: object, **kwargs: object) -> tuple[Tensor, ...]:
            with torch.autocast("cpu", torch.bfloat16):
                maps = extract_feat(*args, **kwargs)
            return tuple(x.float() for x in maps)

        network.extract_feat = in_bfloat16
        try:
            with super().optim_context(model):
                yield
        finally:
            del network.extract_feat  # the class's own is seen again
