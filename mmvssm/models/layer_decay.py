"""Layer-wise learning-rate decay for every backbone that knows its layers, in any project on mmengine."""

from __future__ import annotations

from typing import Optional, Union

from mmengine.optim import DefaultOptimWrapperConstructor
from torch import nn

from ..registry import OPTIM_WRAPPER_CONSTRUCTORS


@OPTIM_WRAPPER_CONSTRUCTORS.register_module()
class LayerDecayOptimWrapperConstructor(DefaultOptimWrapperConstructor):
    """mmengine's constructor, which then lowers the learning rates of a backbone from its last layer to its first.

    It multiplies the learning rate of parameters in layer ``i`` of ``n`` by ``layer_decay_rate ** (n - 1 - i)``
    (ELECTRA, ICLR 2020, arXiv 2003.10555). All else in ``paramwise_cfg`` keeps mmengine's meaning, ``lr_mult``
    included, which the constructors of mmdet, mmseg and mmpretrain ignore.

    Args:
        optim_wrapper_cfg: Settings of the optimizer wrapper and of its optimizer, whose ``lr`` must be set.
        paramwise_cfg: As mmengine's, and ``layer_decay_rate``, in (0, 1]. The model's parts named ``backbone`` need a
            method ``get_layer_depth(param_name, prefix)``, as our backbones and many of mmpretrain have.

    Raises:
        ValueError: If ``layer_decay_rate`` or ``lr`` is missing or out of range; when called, if no backbone of the
            model knows its layers.
    """

    def __init__(self, optim_wrapper_cfg: dict, paramwise_cfg: Optional[dict] = None) -> None:
        super().__init__(optim_wrapper_cfg, paramwise_cfg)
        rate = self.paramwise_cfg.get("layer_decay_rate")
        if rate is None or not 0 < rate <= 1 or self.base_lr is None:
            raise ValueError(
                "LayerDecayOptimWrapperConstructor: needs paramwise_cfg=dict(layer_decay_rate=...), in (0, 1], and the "
                f"optimizer's lr; got layer_decay_rate={rate} and lr={self.base_lr}."
            )

    def add_params(
        self,
        params: list[dict],
        module: nn.Module,
        prefix: str = "",
        is_dcn_module: Optional[Union[int, float]] = None,
    ) -> None:
        """Append a group for each parameter of a module and of its children.

        Args:
            params: Groups so far.
            module: The whole model, or, when mmengine calls this method for each child, a part of it.
            prefix: The part's name; empty for the whole model.
            is_dcn_module: mmengine's: whether the part is in a deformable convolution.

        Raises:
            ValueError: If no backbone of the model knows its layers.
        """
        super().add_params(params, module, prefix, is_dcn_module)
        if prefix:
            return
        scales = _scales(module, self.paramwise_cfg["layer_decay_rate"])
        for group in params:
            scale = scales.get(group["params"][0], 1.0)
            group["lr"] = group.get("lr", self.base_lr) * scale


def _scales(model: nn.Module, rate: float) -> dict[nn.Parameter, float]:
    """By what to multiply the learning rate of each parameter of the backbones."""
    backbones = {
        name: part
        for name, part in model.named_modules()
        if name.rpartition(".")[2] == "backbone" and hasattr(part, "get_layer_depth")
    }
    if not backbones:
        raise ValueError(
            "LayerDecayOptimWrapperConstructor: no backbone of the model has the method get_layer_depth; use another "
            "constructor."
        )
    scales = {}
    for prefix, backbone in backbones.items():
        for name, parameter in backbone.named_parameters(prefix):
            layer, count = backbone.get_layer_depth(name, f"{prefix}.")
            scales[parameter] = rate ** (count - 1 - layer)
    return scales
