"""Feature pyramid: maps of several strides from maps of one stride."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Optional, Union

from mmcv.cnn import build_norm_layer
from mmengine.model import BaseModule
from torch import Tensor, nn

from ...registry import MODELS

NAMES = {
    4: "upsample_4x",
    2: "upsample_2x",
    1: "identity",
    0.5: "downsample_2x",
    0.25: "downsample_4x",
}
"""What the part for each factor is called: as in ``mmseg.Feature2Pyramid``, so that its checkpoints load."""


@MODELS.register_module()
class FeaturePyramid(BaseModule):
    """Rescale the maps of a plain backbone, each by its own factor (ViTDet, ECCV 2022, arXiv 2203.16527).

    Factors 4 and 2 are learned transposed convolutions, 1 is the identity, 0.5 and 0.25 are max pooling. From stride 16
    ``rescales=(4, 2, 1, 0.5)`` makes strides 4, 8, 16 and 32, and ``(2, 1, 0.5)`` makes 8, 16 and 32.

    Choose only the factors that the head reads, and in the backbone as many ``out_indices``, or one: then every
    parameter gets a gradient, as ``DistributedDataParallel`` expects by default.

    Args:
        in_channels: Channels of each input, or one number for all. Outputs have as many.
        rescales: Factors by which the maps grow, each at most once.
        norm_cfg: The norm in the fourfold upsampling.
        init_cfg: mmengine initialisation.

    Raises:
        ValueError: If a factor is unknown or there twice, or if ``in_channels`` has another length than ``rescales``.
    """

    def __init__(
        self,
        in_channels: Union[int, Sequence[int]],
        rescales: Sequence[float] = (4, 2, 1, 0.5),
        norm_cfg: Optional[dict] = None,
        init_cfg: Optional[dict] = None,
    ) -> None:
        super().__init__(init_cfg)
        rescales = tuple(rescales)
        if not rescales or not set(rescales) <= set(NAMES) or len(set(rescales)) < len(rescales):
            raise ValueError(
                f"FeaturePyramid: rescales must be different numbers of {', '.join(map(str, NAMES))}; got {rescales}."
            )
        channels = [in_channels] * len(rescales) if isinstance(in_channels, int) else in_channels
        if len(channels) != len(rescales):
            raise ValueError(
                f"FeaturePyramid: in_channels must be one number, or one for each of rescales, {len(rescales)}; got "
                f"{list(channels)}."
            )
        self.rescales = rescales
        norm_cfg = dict(type="SyncBN") if norm_cfg is None else norm_cfg
        for factor, dim in zip(rescales, channels):
            self.add_module(NAMES[factor], _rescaling(factor, dim, norm_cfg))

    def forward(self, inputs: Union[Tensor, Sequence[Tensor]]) -> tuple[Tensor, ...]:
        """Rescale.

        Args:
            inputs: Maps ``(B, C, h, w)``, one for each of ``rescales``; or one map for all of them, with or without a
                sequence around it.

        Returns:
            For each factor ``r`` a map ``(B, C, r * h, r * w)``, rounded down.

        Raises:
            ValueError: If there is another number of inputs.
        """
        inputs = (inputs,) if isinstance(inputs, Tensor) else tuple(inputs)
        if len(inputs) == 1:
            inputs *= len(self.rescales)
        if len(inputs) != len(self.rescales):
            raise ValueError(
                f"FeaturePyramid: rescales has {len(self.rescales)} factors, which need one input or as many; got "
                f"{len(inputs)}."
            )
        return tuple(
            self.get_submodule(NAMES[factor])(x) for factor, x in zip(self.rescales, inputs)
        )


def _rescaling(factor: float, dim: int, norm_cfg: dict) -> nn.Module:
    if factor < 1:
        size = round(1 / factor)
        return nn.MaxPool2d(kernel_size=size, stride=size)
    if factor == 1:
        return nn.Identity()

    def double() -> nn.Module:
        return nn.ConvTranspose2d(dim, dim, kernel_size=2, stride=2)

    if factor == 2:
        return nn.Sequential(double())
    return nn.Sequential(double(), build_norm_layer(norm_cfg, dim)[1], nn.GELU(), double())
