"""Mixed precision without a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from mmengine.model import is_model_wrapper
from mmengine.optim import OptimWrapper
from mmengine.utils import apply_to
from torch import Tensor, nn

from ...errors import UserError
from ...registry import OPTIM_WRAPPERS


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
        """Compute the feature maps of this training step in bfloat16.

        Raises:
            UserError: If the model has no ``extract_feat``, so that it is not clear what its
                feature maps are.
        """
        network = model.module if is_model_wrapper(model) else model
        extract_feat = getattr(network, "extract_feat", None)
        if extract_feat is None:
            raise UserError(
                f"--amp on a CPU computes what extract_feat does in bfloat16, which {type(network).__name__} "
                "does not have; train without --amp, or on a GPU"
            )

        def in_bfloat16(*args: object, **kwargs: object) -> tuple[Tensor, ...]:
            with torch.autocast("cpu", torch.bfloat16):
                maps = extract_feat(*args, **kwargs)
            return _in_float32(maps)

        network.extract_feat = in_bfloat16
        try:
            with super().optim_context(model):
                yield
        finally:
            del network.extract_feat  # the class's own is seen again


def _in_float32(maps: Any) -> Any:
    """Tensors in nested tuples, lists and dictionaries, as the head is to get them."""
    return apply_to(maps, lambda item: isinstance(item, Tensor), Tensor.float)
