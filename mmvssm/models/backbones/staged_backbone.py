"""What backbones of four stages share whose outputs alone are normalised: the walk over stages, and freezing."""

from __future__ import annotations

from collections.abc import Collection
from typing import Union

import torch
from torch import Tensor

from .base import Backbone, stage_prefixes
from .common import resolve_arch


class StagedBackbone(Backbone):
    """Four stages, each of which continues from the map of the one before, and a norm for each output.

    A subclass sets ``in_channels``, ``out_indices``, ``frozen_stages`` and ``with_cp``. It builds ``stages``, which
    take maps ``(B, H, W, C)`` and ``with_cp`` and have ``embed`` and ``blocks``, and ``norms`` by the stage's number.
    """

    def forward(self, x: Tensor) -> Union[tuple[Tensor, ...], Tensor]:
        """Compute the feature maps.

        Args:
            x: Images ``(B, in_channels, H, W)``, of any size.

        Returns:
            For each of ``out_indices`` a map ``(B, embed_dims[i], h, w)``, contiguous in memory, where ``h`` and ``w``
            are ``H`` and ``W`` halved, rounding up, as often as the stride says. A tuple, but for ``unwrap_single``.

        Raises:
            ValueError: If ``x`` has another number of dimensions or channels.
        """
        if x.dim() != 4 or x.shape[1] != self.in_channels:
            raise ValueError(
                f"{type(self).__name__}: expected images (B, {self.in_channels}, H, W); got {tuple(x.shape)}."
            )
        x = x.contiguous(memory_format=torch.channels_last).permute(0, 2, 3, 1)
        maps = []
        for i, stage in enumerate(self.stages):
            x = stage(x, with_cp=self.with_cp)
            if i in self.out_indices:
                # mmcv's RoIAlign reads memory as if every tensor were contiguous.
                maps.append(self.norms[str(i)](x).permute(0, 3, 1, 2).contiguous())
        return self.pack(maps)

    def layer_prefixes(self) -> list[tuple[str, ...]]:
        """See :func:`stage_prefixes`."""
        return stage_prefixes(self.stages)

    def train(self, mode: bool = True) -> StagedBackbone:
        """Set the training mode of all but the frozen stages."""
        super().train(mode)
        self._freeze_stages()
        return self

    def _freeze_stages(self) -> None:
        frozen = [self.stages[0].embed] if self.frozen_stages >= 0 else []
        frozen += self.stages[: max(self.frozen_stages, 0)]
        frozen += [norm for i, norm in self.norms.items() if int(i) < self.frozen_stages]
        for module in frozen:
            module.eval()
            module.requires_grad_(False)


def resolve_staged_arch(
    owner: str, arch: Union[str, dict], settings: dict[str, dict], keys: Collection[str]
) -> dict:
    """:func:`~.common.resolve_arch` of an arch whose ``embed_dims`` and ``depths`` have a value for each stage.

    Raises:
        ValueError: If the name is unknown, the keys are others, or there are not four values.
    """
    arch = resolve_arch(owner, arch, settings, keys)
    for key in ("embed_dims", "depths"):
        if len(arch[key]) != 4:
            raise ValueError(
                f"{owner}: arch[{key!r}] needs four values, one a stage; got {arch[key]}."
            )
    return arch
