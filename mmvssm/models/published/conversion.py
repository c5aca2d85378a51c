"""What a converter returns, and what all of them share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from torch import Tensor


class Conversion(NamedTuple):
    """What became of a published checkpoint.

    Attributes:
        state_dict: Converted weights; the backbone's begin with ``backbone.``.
        arch: The ``arch`` of the backbone that they fit: a name, or a dict where no name is known.
        unused: Published names that have no place in our model.
        missing: Names of our model for which the checkpoint holds nothing.
    """

    state_dict: dict[str, Tensor]
    arch: object
    unused: list[str]
    missing: list[str]


def fit(
    state_dict: Mapping[str, Tensor],
    origin: Mapping[str, list[str]],
    expected: Mapping[str, Tensor],
    arch: object,
) -> Conversion:
    """Keep what has a place in our model.

    Args:
        state_dict: Weights under our names.
        origin: For each of these names, the published ones.
        expected: The state dict of our model.
        arch: See :class:`Conversion`.
    """
    unused = sorted(
        {
            name
            for ours, names in origin.items()
            for name in names
            if ours not in expected or expected[ours].shape != state_dict[ours].shape
        }
    )
    kept = {
        name: state_dict[name].clone()
        for name, value in expected.items()
        if name in state_dict and state_dict[name].shape == value.shape
    }
    return Conversion(kept, arch, unused, [name for name in expected if name not in kept])


def known_arch(arch: dict, settings: Mapping[str, dict]) -> object:
    """The name of an arch among a backbone's ``arch_settings``; the arch itself where it has none."""
    return next((name for name, known in settings.items() if known == arch), arch)
