"""Published models in one line of Python."""

from __future__ import annotations

import re
from importlib import import_module
from pathlib import Path
from typing import Any

from mmengine.config import Config
from mmengine.logging import print_log
from mmengine.registry import MODELS, DefaultScope
from torch import Tensor, nn

from ..errors import UserError, shown
from .weights import SCHEME, drop_pretrained, load_published
from .weights_table import PublishedModel, find_model

_CONFIGS = Path(__file__).parents[1] / ".mim/configs"


def get_model(
    name: str, pretrained: bool = True, whole: bool = False, **settings: Any
) -> nn.Module:
    """A published model's backbone, or the whole classifier, detector or segmenter.

    Args:
        name: One of :func:`mmvssm.list_models`.
        pretrained: Whether to load the published weights (see :mod:`mmvssm.models.weights`).
        whole: Whether to build the model of the published config, for which mmpretrain, mmdet or mmseg is needed.
        settings: Arguments of the backbone that differ from the config's, such as ``out_indices`` or ``pruning``.

    Returns:
        The model, in training mode.

    Raises:
        UserError: If there is no such model, or its weights cannot be found or do not fit.

    Example:
        >>> backbone = mmvssm.get_model("plainmamba_l1", pretrained=False, out_indices=(11, 23), pruning="L1")
    """
    published = find_model(name)
    model = (_build_whole if whole else _build_backbone)(published, settings)
    if pretrained:
        weights = load_published(name)["state_dict"]
        if not whole:
            weights = _under("backbone.", weights)
        _load(model, weights, f"{SCHEME}{name}")
    elif whole:
        model.init_weights()
    return model


def _build_backbone(published: PublishedModel, settings: dict[str, Any]) -> nn.Module:
    return MODELS.build(
        {"type": f"mmvssm.{published.backbone}", "arch": published.arch, **settings}
    )


def _build_whole(published: PublishedModel, settings: dict[str, Any]) -> nn.Module:
    cfg = Config.fromfile(_CONFIGS / f"{published.config}.py")
    list(drop_pretrained(cfg.model))
    cfg.model.backbone.update(settings)
    if cfg.get("data_preprocessor"):  # as mmengine's runner does
        cfg.model.setdefault("data_preprocessor", cfg.data_preprocessor)
    import_module(f"{cfg.default_scope}.utils").register_all_modules(init_default_scope=False)
    with DefaultScope.overwrite_default_scope(cfg.default_scope):
        return MODELS.build(cfg.model)


def _under(prefix: str, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights whose names begin with ``prefix``, without it."""
    return {k.removeprefix(prefix): v for k, v in weights.items() if k.startswith(prefix)}


def _load(model: nn.Module, weights: dict[str, Tensor], origin: str) -> None:
    """Load all weights that the model has. Norms of outputs depend on ``out_indices``, so they may differ.

    Raises:
        UserError: If other weights are missing, unknown to the model, or of another shape.
    """
    reshaped: list[str] = []
    missing, unknown = (), ()
    try:
        missing, unknown = model.load_state_dict(weights, strict=False)
    except RuntimeError as error:
        reshaped = re.findall(r"size mismatch for (.+?):", str(error))
    norms = [key for key in missing if "norms." in key]
    faults = {
        "missing from it": [k for k in missing if k not in norms and "num_batches" not in k],
        "unknown to the model": [key for key in unknown if "norms." not in key],
        "of another shape": reshaped,
    }
    if any(faults.values()):
        raise UserError(
            f"{origin} does not fit the model that these settings make; "
            + "; ".join(f"{what}: {shown(keys)}" for what, keys in faults.items() if keys)
        )
    if norms:
        print_log(
            f"{origin} has no norms of these outputs, which stay as initialised: {shown(norms)}",
            "current",
        )
