"""Token pooling: one vector for an image, of what a backbone leaves, pruned or not."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Union

from mmengine.model import BaseModule
from torch import Tensor

from ...registry import MODELS
from ..pruning import PrunedTokens


@MODELS.register_module()
class TokenPooling(BaseModule):
    """The mean of the tokens, for a classifier's head; of a pruned backbone, of those that are left (PlainMamba)."""

    def forward(self, inputs: Sequence[Union[Tensor, PrunedTokens]]) -> tuple[Tensor, ...]:
        """Pool.

        Args:
            inputs: A backbone's outputs: maps ``(B, C, H, W)`` or :class:`~mmvssm.models.pruning.PrunedTokens`.

        Returns:
            For each ``(B, C)``.
        """
        return tuple(x.mean((2, 3)) if isinstance(x, Tensor) else x.tokens.mean(1) for x in inputs)
