"""Token restoration: feature maps from the tokens of a pruned backbone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Optional, Union

import torch
from mmengine.model import BaseModule, Sequential
from torch import Tensor, nn

from ...registry import MODELS
from ..pruning import PrunedTokens, restore_map

FILLS = ("last", "zero", "mask_token")


@MODELS.register_module()
class TokenRestoration(BaseModule):
    """Scatter kept tokens back to their places and fill the places of pruned ones.

    Put it before the other necks, which then see maps as if from a dense backbone::

        neck=[
            dict(type='mmvssm.TokenRestoration'),
            dict(type='mmvssm.FeaturePyramid', in_channels=192),
            dict(type='FPN', in_channels=[192] * 4, out_channels=256, num_outs=5),
        ]

    Maps of a backbone that pruned nothing pass through unchanged. mmpose ignores lists of necks; there,
    put the other necks into this one::

        neck=dict(type='mmvssm.TokenRestoration', then=[dict(type='FeatureMapProcessor', select_index=0)])

    Args:
        fill: Value at the position of a dropped token: ``'last'``, the token's last value (dense tasks suffer without
            it: SViT, WACV 2024); ``'zero'``; or ``'mask_token'``, a learned vector.
        refine: Whether a depthwise 3x3 convolution, which starts as the identity, refines filled positions by their
            surroundings. Kept tokens do not change.
        in_channels: Channels of each input, or one number for all. Needed for ``fill='mask_token'`` and
            ``refine=True``, which have parameters for each input.
        then: Configs of necks to run after it, in this order.
        init_cfg: mmengine initialisation.

    Raises:
        ValueError: If ``fill`` is unknown, or ``in_channels`` is missing where it is needed.
    """

    def __init__(
        self,
        fill: str = "last",
        refine: bool = False,
        in_channels: Optional[Union[int, Sequence[int]]] = None,
        init_cfg: Optional[dict] = None,
        then: Sequence[dict] = (),
    ) -> None:
        super().__init__(init_cfg)
        if fill not in FILLS:
            raise ValueError(
                f"TokenRestoration: unknown fill {fill!r}; known are {', '.join(map(repr, FILLS))}."
            )
        learned = refine or fill == "mask_token"
        if learned and in_channels is None:
            raise ValueError(
                "TokenRestoration: fill='mask_token' and refine=True need in_channels, the channels of each of the "
                "backbone's outputs."
            )
        self.fill = fill
        self.shared = isinstance(in_channels, int)
        channels = [in_channels] if self.shared else list(in_channels or [])
        self.num_inputs = len(channels) if learned and not self.shared else None
        self.mask_tokens = self.refiners = None
        if fill == "mask_token":
            self.mask_tokens = nn.ParameterList(torch.zeros(c) for c in channels)
            for token in self.mask_tokens:
                nn.init.trunc_normal_(token, std=0.02)
        if refine:
            self.refiners = nn.ModuleList(
                nn.Conv2d(c, c, kernel_size=3, padding=1, groups=c) for c in channels
            )
            for conv in self.refiners:
                nn.init.zeros_(conv.weight)
                nn.init.zeros_(conv.bias)
        self.then = Sequential(*map(MODELS.build, then)) if then else None

    def forward(
        self, inputs: Union[Sequence[Union[Tensor, PrunedTokens]], Tensor, PrunedTokens]
    ) -> Any:
        """Restore maps.

        Args:
            inputs: A backbone's outputs: maps ``(B, C, H, W)`` or
                :class:`~mmvssm.models.pruning.PrunedTokens`; one alone counts as a tuple of one.

        Returns:
            A tuple of maps ``(B, C, H, W)``, contiguous; or what the last neck of ``then`` makes of it.

        Raises:
            ValueError: If there are not as many inputs as ``in_channels``.
        """
        if isinstance(inputs, (Tensor, PrunedTokens)):
            inputs = (inputs,)
        if self.num_inputs not in (None, len(inputs)):
            raise ValueError(
                f"TokenRestoration: in_channels names {self.num_inputs} inputs, but the backbone has {len(inputs)} "
                "outputs."
            )
        maps = tuple(self._restore(i, x) for i, x in enumerate(inputs))
        return maps if self.then is None else self.then(maps)

    def _restore(self, i: int, x: Union[Tensor, PrunedTokens]) -> Tensor:
        which = 0 if self.shared else i
        if isinstance(x, Tensor):
            # In training every parameter takes part in every step, because distributed training waits for all
            # gradients; where nothing was pruned, the parameters have no effect.
            learns = self.training and not (self.mask_tokens is None and self.refiners is None)
            if not learns:
                return x
            absent, maps = x.new_zeros((x.shape[0], 1, *x.shape[-2:]), dtype=torch.bool), x
        else:
            absent, maps = _absent(x), self._scatter(x)
        if self.mask_tokens is not None:
            token = self.mask_tokens[which].to(maps.dtype)
            maps = torch.where(absent, token[:, None, None], maps)
        if self.refiners is not None:
            maps = torch.where(absent, maps + self.refiners[which](maps), maps)
        return maps.contiguous()

    def _scatter(self, x: PrunedTokens) -> Tensor:
        """``(B, C, H, W)`` with the last values, or zeros, where tokens were pruned."""
        tokens, positions = x.tokens, x.positions
        if self.fill == "last":
            tokens = torch.cat([tokens, x.departed.to(tokens.dtype)], 1)
            positions = torch.cat([positions, x.departed_positions], 1)
        return restore_map(tokens, positions, x.grid)


def _absent(x: PrunedTokens) -> Tensor:
    """``(B, 1, H, W)``: where a token was pruned."""
    absent = torch.zeros(
        (x.tokens.shape[0], x.grid[0] * x.grid[1]), dtype=torch.bool, device=x.tokens.device
    )
    return absent.scatter(1, x.departed_positions, True).view(-1, 1, *x.grid)
