"""Weights under the names of the published models, turned into weights under ours."""

from __future__ import annotations

import argparse
import re
from collections import OrderedDict
from collections.abc import Mapping
from contextlib import AbstractContextManager
from functools import partial
from typing import Optional

import torch
from torch import Tensor

from ..backbones.common import READERS, WRAPPINGS
from .conversion import Conversion
from .group_mamba import convert_groupmamba
from .plain_mamba import convert_plainmamba
from .spatial_mamba import convert_spatialmamba
from .vim import convert_vim
from .vmamba import convert_vmamba


class _PlainDict:
    """Stands for a configuration class in a checkpoint; what is unpickled is an ``OrderedDict``."""

    def __new__(cls, *args) -> OrderedDict:
        return OrderedDict(*args)


def inert_globals() -> AbstractContextManager:
    """Allow ``torch.load(weights_only=True)`` the training settings that published checkpoints hold beside the weights.

    They are read as plain containers; no code of the packages that wrote them is imported or run.
    """
    return torch.serialization.safe_globals(
        [(_PlainDict, "yacs.config.CfgNode"), argparse.Namespace]
    )


def unwrap(checkpoint: Mapping, key: Optional[str] = None) -> dict[str, Tensor]:
    """Find the weights in what a checkpoint file holds.

    Args:
        checkpoint: Weights by name, or such a mapping under one of :data:`WRAPPINGS`.
        key: Under which key to look instead.

    Returns:
        Weights by name, without ``module.`` before them.

    Raises:
        ValueError: If there are no weights to be found.
    """
    if key is None:
        key = next((k for k in WRAPPINGS if isinstance(checkpoint.get(k), Mapping)), None)
    if key is not None:
        if not isinstance(checkpoint.get(key), Mapping):
            raise ValueError(
                f"The checkpoint holds no weights under {key!r}; its keys are: {', '.join(map(str, checkpoint))}."
            )
        checkpoint = checkpoint[key]
    weights = {
        name.removeprefix("module."): value
        for name, value in checkpoint.items()
        if isinstance(value, Tensor)
    }
    if not weights:
        raise ValueError(
            f"The checkpoint holds no weights, neither directly nor under {', '.join(WRAPPINGS)}; its keys are: "
            f"{', '.join(map(str, checkpoint))}."
        )
    return weights


CONVERTERS = {
    "groupmamba": convert_groupmamba,
    "plainmamba": convert_plainmamba,
    "spatialmamba": convert_spatialmamba,
    "vim": convert_vim,
    "vmamba": convert_vmamba,
}
"""Converters by the name of the published model."""

_SIGNS = {
    "groupmamba": r"patch_embed1\.conv\.0\.weight|block1\.0\.attn\.mamba_g1\..*",
    "plainmamba": r"layers\.0\.mamba\..*",
    "vim": r"layers\.0\.mixer\.A_b_log",
    "spatialmamba": r"layers\.0\.blocks\.0\.(cpe1|self_attention\.state_fusion)\..*",
    # The older names of VMamba are Spatial-Mamba's too, which is looked for first.
    "vmamba": r"layers\.0\.blocks\.0\.(op|self_attention)\..*",
}


def recognise(weights: Mapping[str, Tensor]) -> Optional[str]:
    """The published model that weights are of, by their names.

    Args:
        weights: Weights by name, perhaps with ``backbone.`` before the names.

    Returns:
        One of the names of :data:`CONVERTERS`; None if they have the names of no published model.
    """
    names = [name.removeprefix("backbone.") for name in weights]
    return next(
        (model for model, sign in _SIGNS.items() if any(re.fullmatch(sign, n) for n in names)), None
    )


def convert(model: str, published: Mapping[str, Tensor]) -> Conversion:
    """Convert weights by one of :data:`CONVERTERS`; nothing is taken for granted of their names and shapes.

    Raises:
        ValueError: If they are not those of that model.
    """
    # A converter builds as many layers as the names count.
    counted = max((int(n) for name in published for n in re.findall(r"\d{1,18}", name)), default=0)
    if counted >= max(len(published), 64):
        raise ValueError(
            f"These are not the weights of a published model: one name counts to {counted}."
        )
    try:
        return CONVERTERS[model](published)
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError) as error:
        raise ValueError(
            f"These are not the weights of a published {model} model: their shapes do not fit together ({error})."
        ) from error


def read_published(model: str, weights: Mapping[str, Tensor]) -> Optional[dict[str, Tensor]]:
    """A backbone's weights under our names, where they are of a published model.

    Args:
        model: One of the names of :data:`CONVERTERS`.
        weights: Weights by name.

    Returns:
        Our names, without ``backbone.``, and what has no place in the backbone under its own name; None if the weights
        are of something else.
    """
    if recognise(weights) != model:
        return None
    conversion = convert(model, weights)
    ours = {
        name.removeprefix("backbone."): value
        for name, value in conversion.state_dict.items()
        if name.startswith("backbone.")
    }
    return {**ours, **{name: weights[name] for name in conversion.unused}}


def convert_whole(weights: Mapping[str, Tensor]) -> Optional[Conversion]:
    """Convert a whole published model, with its heads; None if the weights are of no published model.

    Args:
        weights: Weights by name. Names that are not the backbone's, of a detector's or segmenter's other parts, are
            those of mmdet 2 and mmseg 0, which mmdet 3 and mmseg 1 kept.
    """
    model = recognise(weights)
    if model is None:
        return None
    conversion = convert(model, weights)
    if not any(name.startswith("backbone.") for name in weights):
        return conversion
    others = {name: v for name, v in weights.items() if not name.startswith("backbone.")}
    return conversion._replace(
        state_dict={**conversion.state_dict, **others},
        unused=[name for name in conversion.unused if name not in others],
    )


for _backbone, _model in (
    ("GroupMamba", "groupmamba"),
    ("PlainMamba", "plainmamba"),
    ("SpatialMamba", "spatialmamba"),
    ("VMamba", "vmamba"),
    ("Vim", "vim"),
):
    READERS[_backbone] = partial(read_published, _model)
