"""What every backbone tells about itself, under the names that mmpretrain and timm ask for."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from typing import Any, Union

import torch
from mmengine.model import BaseModule, PretrainedInit
from torch import nn

PRETRAINED = ("Pretrained", PretrainedInit)
"""Types of an ``init_cfg`` that names a checkpoint."""
NOT_DECAYED = (
    "A_log",
    "D",
    "direction_Bs",
    "pos_embed",
    "cls_pos_embed",
    "cls_token",
    "level_embed",
)
"""Last names of parameters of two and more dimensions that our recipes train without weight decay."""


class Backbone(BaseModule):
    """A backbone that describes its outputs and its parameters.

    A subclass calls :meth:`describe_outputs` in its constructor, passes what it returns through :meth:`pack`, and
    defines :meth:`layer_prefixes`.

    Attributes:
        out_channels: Channels of each map that ``forward`` returns.
        out_strides: Stride of each of these maps, in pixels of the image.
        unwrap_single: Whether ``forward`` returns its only map itself instead of a tuple.
    """

    out_channels: tuple[int, ...]
    out_strides: tuple[int, ...]
    unwrap_single: bool
    _is_loaded = False  # whether weights were loaded, or we warned that they were not

    def describe_outputs(
        self,
        channels: Iterable[int],
        strides: Iterable[int],
        modules: Iterable[str],
        unwrap_single: bool,
    ) -> None:
        """Set the attributes.

        Args:
            channels: Of each map.
            strides: Of each map.
            modules: Name of the module that each map leaves; a norm may follow.
            unwrap_single: See the attribute.

        Raises:
            ValueError: If ``unwrap_single`` is set and there are several maps.
        """
        self.out_channels, self.out_strides = tuple(channels), tuple(strides)
        self._out_modules = tuple(modules)
        self.unwrap_single = unwrap_single
        if unwrap_single and len(self.out_channels) != 1:
            raise ValueError(
                f"{type(self).__name__}: unwrap_single=True needs exactly one output; there are "
                f"{len(self.out_channels)}."
            )

    @property
    def feature_info(self) -> list[dict[str, Any]]:
        """``num_chs``, ``reduction`` (the stride) and ``module`` of each output, for ``timm.models.FeatureInfo``."""
        outputs = zip(self.out_channels, self.out_strides, self._out_modules)
        return [dict(num_chs=c, reduction=s, module=m) for c, s, m in outputs]

    def no_weight_decay(self) -> set[str]:
        """Names of parameters to train without weight decay, besides biases and norms (timm's manner)."""
        return {
            name for name, _ in self.named_parameters() if name.rpartition(".")[2] in NOT_DECAYED
        }

    def get_layer_depth(self, param_name: str, prefix: str = "") -> tuple[int, int]:
        """The layer that a parameter belongs to, for layer-wise learning-rate decay (mmpretrain's manner).

        Args:
            param_name: Name of the parameter.
            prefix: What the names of the backbone's parameters begin with.

        Returns:
            The number of the layer, and the number of layers. Layer 0 is the stem. The last layer is what follows the
            blocks: norms of outputs alone, and parameters outside of the backbone.
        """
        layers = self.layer_prefixes()
        depth = len(layers)
        if param_name.startswith(prefix):
            name = param_name[len(prefix) :]
            depth = next((i for i, names in enumerate(layers) if name.startswith(names)), depth)
        return depth, len(layers) + 1

    def layer_prefixes(self) -> list[tuple[str, ...]]:
        """For the stem and for each block, what the names of its parameters begin with."""
        raise NotImplementedError

    def pack(self, maps: Iterable[Any]) -> Union[tuple[Any, ...], Any]:
        """The maps as a tuple, or the only one itself, as ``unwrap_single`` says.

        We warn once if the maps are made by random weights although ``init_cfg`` names a checkpoint.
        """
        if not (torch.compiler.is_compiling() or self._is_loaded or self._is_init):
            self._warn_of_random_weights()
        maps = tuple(maps)
        return maps[0] if self.unwrap_single else maps

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._is_loaded = True
        super()._load_from_state_dict(*args, **kwargs)

    def _warn_of_random_weights(self) -> None:
        self._is_loaded = True
        init_cfgs = [self.init_cfg] if isinstance(self.init_cfg, dict) else self.init_cfg or []
        for init_cfg in init_cfgs:
            if init_cfg.get("type") in PRETRAINED:
                warnings.warn(
                    f"{type(self).__name__} runs with random weights: {init_cfg.get('checkpoint')} of its init_cfg is "
                    "loaded by init_weights(), which nothing called.",
                    stacklevel=2,
                )


def stage_prefixes(stages: Sequence[nn.Module]) -> list[tuple[str, ...]]:
    """:meth:`Backbone.layer_prefixes` of ``stages`` with ``embed``, ``blocks`` and perhaps ``norm``.

    A stage's down-sampling and its norm belong to the block before them.
    """
    layers: list[tuple[str, ...]] = [()]
    for i, stage in enumerate(stages):
        layers[-1] += (f"stages.{i}.embed.",)
        layers += [(f"stages.{i}.blocks.{k}.",) for k in range(len(stage.blocks))]
        layers[-1] += (f"stages.{i}.norm.",)
    return layers
