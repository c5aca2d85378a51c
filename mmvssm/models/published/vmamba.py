"""Weights of the published VMamba."""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from ..backbones.vmamba import NUM_WALKS, VMamba
from .conversion import Conversion, fit, known_arch

_RENAMES = (
    # Names of older files first, as the published loader changes them.
    (r"\.ln_1\.", ".norm."),
    (r"\.self_attention\.", ".op."),
    (r"^norm\.", "classifier.norm."),
    (r"^head\.", "classifier.head."),
    (r"^patch_embed\.0\.", "stages.0.embed.conv1."),
    (r"^patch_embed\.2\.", "stages.0.embed.norm1."),
    (r"^patch_embed\.5\.", "stages.0.embed.conv2."),
    (r"^patch_embed\.7\.", "stages.0.embed.norm2."),
    (r"^layers\.(\d)\.blocks\.(\d+)\.norm\.", r"stages.\1.blocks.\2.norm1."),
    (r"^layers\.(\d)\.blocks\.", r"stages.\1.blocks."),
    (r"\.mlp\.fc1\.", ".ffn.0."),
    (r"\.mlp\.fc2\.", ".ffn.2."),
    (r"\.op\.", ".mixer."),
    (r"\.mixer\.conv2d\.", ".mixer.conv."),
    (r"\.mixer\.out_norm\.", ".mixer.norm."),
    (r"\.x_proj_weight$", ".x_proj.weight"),
    (r"\.dt_projs_weight$", ".dt_proj.weight"),
    (r"\.dt_projs_bias$", ".dt_bias"),
    (r"\.A_logs$", ".A_log"),
    (r"\.Ds$", ".D"),
    (r"^outnorm(\d)\.", r"norms.\1."),
    (r"^classifier\.norm\.", "norms.3."),
    (r"^classifier\.head\.", "head.fc."),
)


def convert_vmamba(published: Mapping[str, Tensor]) -> Conversion:
    """Convert a published VMamba, a classification model or a detector's or segmenter's backbone.

    Args:
        published: Weights under the published names, perhaps with ``backbone.`` before them.

    Returns:
        Weights of a :class:`~mmvssm.models.backbones.VMamba`, with ``backbone.`` before each name. Of a classification
        model, the norm before the head is that of the last stage's output, and the linear layer is ``head.fc``.

    Raises:
        ValueError: If the weights aren't those of a VMamba.
    """
    # Detectors have heads of other names beside the backbone, which have no place here.
    whole = any(name.startswith("backbone.") for name in published)
    names = {
        name: _rename(name.removeprefix("backbone."))
        for name in published
        if not whole or name.startswith("backbone.")
    }
    weights = {ours: published[name] for name, ours in names.items()}
    arch = _arch(weights, published)
    state_dict, origin = {}, {name: [name] for name in published if name not in names}
    for name, ours in names.items():
        value = published[name]
        if ours.endswith(".x_proj.weight"):
            value = value.flatten(0, 1)
        elif ours.endswith(".dt_proj.weight"):
            value = value.flatten(0, 1)[:, :, None, None]
        elif ours.endswith((".A_log", ".D")):
            value = value.unflatten(0, (NUM_WALKS, -1))
        elif value.dim() == 4 and value.shape[2:] == (
            1,
            1,
        ):  # linear layers of channels-first models
            value = value.flatten(1)
        ours = ours if ours.startswith("head.") else f"backbone.{ours}"
        state_dict[ours], origin[ours] = value, [name]
    out_indices = sorted(
        {3, *(int(m[1]) for m in (re.match(r"norms\.(\d)\.", n) for n in weights) if m)}
    )
    with torch.device("meta"):
        model = VMamba(arch, out_indices=out_indices)
    head = {name: value for name, value in state_dict.items() if name.startswith("head.fc.")}
    expected = {f"backbone.{name}": value for name, value in model.state_dict().items()} | head
    return fit(state_dict, origin, expected, arch)


def _rename(name: str) -> str:
    for pattern, ours in _RENAMES:
        name = re.sub(pattern, ours, name)
    match = re.match(r"layers\.(\d)\.downsample\.([13])\.", name)
    if match:  # theirs ends a stage, ours begins the next
        part = {"1": "proj", "3": "norm"}[match[2]]
        return f"stages.{int(match[1]) + 1}.embed.{part}.{name[match.end() :]}"
    return name


def _arch(weights: Mapping[str, Tensor], published: Mapping[str, Tensor]) -> object:
    """Read the arch off the shapes of weights under our names."""
    try:
        blocks = [re.match(r"stages\.(\d)\.blocks\.(\d+)\.", name) for name in weights]
        dims = tuple(weights[f"stages.{i}.blocks.0.norm1.weight"].shape[0] for i in range(4))
        mixer = weights["stages.0.blocks.0.mixer.in_proj.weight"]
        arch = dict(
            embed_dims=dims,
            depths=tuple(
                1 + max(int(b[2]) for b in blocks if b and b[1] == str(i)) for i in range(4)
            ),
            ssm_ratio=mixer.shape[0] / dims[0],
            mlp_ratio=weights["stages.0.blocks.0.ffn.0.weight"].shape[0] / dims[0],
        )
        if weights["stages.0.blocks.0.mixer.norm.weight"].shape[0] != mixer.shape[0]:
            raise ValueError("the mixer has a gate")  # VMamba's first version
    except (KeyError, ValueError) as error:
        raise ValueError(
            "These are not the weights of a published VMamba model of the second version: expected names such as "
            "patch_embed.0.weight, layers.0.blocks.0.op.in_proj.weight and layers.0.blocks.0.mlp.fc1.weight; found "
            f"{', '.join(list(published)[:3])} ..."
        ) from error
    return known_arch(arch, VMamba.arch_settings)
