"""Mixed precision on CPUs."""

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

    The heads get float32 maps, since RoIAlign, NMS and others have no bfloat16 version for CPUs. Parameters, gradients
    and the optimizer stay float32; bfloat16 needs no loss scaling. mmengine's ``AmpOptimWrapper`` is for GPUs only.

    Takes the arguments of :class:`mmengine.optim.OptimWrapper`.
    """

    @contextmanager
    def optim_context(self, model: nn.Module) -> Iterator[None]:
        """Compute the feature maps of this training step in bfloat16.

        Raises:
            UserError: If the model has no ``extract_feat``, so its feature maps are unknown.
        """
        network = model.module if is_model_wrapper(model) else model
        extract_feat = getattr(network, "extract_feat", None)
        if extract_feat is None:
            raise UserError(
                f"--amp on a CPU runs the model's extract_feat in bfloat16, which {type(network).__name__} "
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
            del network.extract_feat  # uncovers the class's method


def _in_float32(maps: Any) -> Any:
    """Convert tensors in nested tuples, lists and dictionaries to float32."""
    return apply_to(maps, lambda item: isinstance(item, Tensor), Tensor.float)
