"""Weights of the published Spatial-Mamba."""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from ..backbones.spatial_mamba import SpatialMamba
from .conversion import Conversion, fit, known_arch

_RENAMES = (
    (r"^patch_embed\.conv1\.", "patch_embed.1."),
    (r"^patch_embed\.conv2\.0\.", "patch_embed.2."),
    (r"^patch_embed\.conv2\.1\.", "patch_embed.3."),
    (r"^patch_embed\.conv3\.0\.", "patch_embed.4."),
    (r"^patch_embed\.conv3\.1\.", "patch_embed.5."),
    (r"^patch_embed\.(\d)\.(conv|norm)\.", r"stages.0.embed.\2\1."),
    (r"^layers\.(\d)\.blocks\.", r"stages.\1.blocks."),
    (r"\.cpe([12])\.", r".pos\1."),
    (r"\.ln_([12])\.", r".norm\1."),
    (r"\.mlp\.fc1\.", ".ffn.0."),
    (r"\.mlp\.fc2\.", ".ffn.2."),
    (r"\.self_attention\.", ".mixer."),
    (r"\.mixer\.conv2d\.", ".mixer.conv."),
    (r"\.mixer\.out_norm\.", ".mixer.norm."),
    (r"\.x_proj_weight$", ".x_proj.weight"),
    (r"\.dt_projs_weight$", ".dt_proj.weight"),
    (r"\.dt_projs_bias$", ".dt_bias"),
    (r"\.A_logs$", ".A_log"),
    (r"\.Ds$", ".D"),
    (r"\.state_fusion\.kernel_3$", ".fusion.convs.0.weight"),
    (r"\.state_fusion\.kernel_3_([12])$", r".fusion.convs.\1.weight"),
    (r"\.state_fusion\.", ".fusion."),
    (r"^outnorm(\d)\.", r"norms.\1."),
    (r"^norm\.", "norms.3."),
    (r"^head\.", "head.fc."),
)
_MERGING = {"0.conv": "expand", "1.conv": "conv", "2.conv": "proj", "2.norm": "norm"}


def convert_spatialmamba(published: Mapping[str, Tensor]) -> Conversion:
    """Convert a published Spatial-Mamba, a classification model or a detector's or segmenter's backbone.

    Args:
        published: Weights under the published names, perhaps with ``backbone.`` before them.

    Returns:
        Weights of a :class:`~mmvssm.models.backbones.SpatialMamba`, with ``backbone.`` before each name. Of a
        classification model, the norm before the head is that of the last stage's output, and the linear layer is
        ``head.fc``.

    Raises:
        ValueError: If the weights aren't those of a Spatial-Mamba.
    """
    # Detectors have heads of other names beside the backbone, which have no place here.
    whole = any(name.startswith("backbone.") for name in published)
    names = {
        name: _rename(name.removeprefix("backbone."))
        for name in published
        if not whole or name.startswith("backbone.")
    }
    if any(name.removeprefix("backbone.").startswith("outnorm3.") for name in names):
        # The classifier's norm, if it is there too, is not that of the last stage's output.
        for name in [n for n in names if n.removeprefix("backbone.").startswith("norm.")]:
            del names[name]
    weights = {ours: published[name] for name, ours in names.items()}
    arch = _arch(weights, published)
    state_dict, origin = {}, {name: [name] for name in published if name not in names}
    for name, value in published.items():
        if name in names:
            ours = names[name]
            ours = ours if ours.startswith("head.") else f"backbone.{ours}"
            state_dict[ours], origin[ours] = value, [name]
    out_indices = sorted(
        {3, *(int(m[1]) for m in (re.match(r"norms\.(\d)\.", n) for n in weights) if m)}
    )
    with torch.device("meta"):
        model = SpatialMamba(arch, out_indices=out_indices)
    head = {name: value for name, value in state_dict.items() if name.startswith("head.fc.")}
    expected = {f"backbone.{name}": value for name, value in model.state_dict().items()} | head
    return fit(state_dict, origin, expected, arch)


def _rename(name: str) -> str:
    for pattern, ours in _RENAMES:
        name = re.sub(pattern, ours, name)
    match = re.match(r"layers\.(\d)\.downsample\.conv\.(\d\.\w+)\.", name)
    if match and match[2] in _MERGING:  # theirs ends a stage, ours begins the next
        return f"stages.{int(match[1]) + 1}.embed.{_MERGING[match[2]]}.{name[match.end() :]}"
    return name


def _arch(weights: Mapping[str, Tensor], published: Mapping[str, Tensor]) -> object:
    """Read the arch off the shapes of weights under our names."""
    try:
        blocks = [re.match(r"stages\.(\d)\.blocks\.(\d+)\.", name) for name in weights]
        dims = tuple(weights[f"stages.{i}.blocks.0.norm1.weight"].shape[0] for i in range(4))
        depths = tuple(1 + max(int(b[2]) for b in blocks if b and b[1] == str(i)) for i in range(4))
        hidden_dim = weights["stages.0.blocks.0.ffn.0.weight"].shape[0]
        if weights["stages.0.blocks.0.mixer.A_log"].shape != (2 * dims[0], 1):
            raise ValueError("the scan has other channels or states")
    except (KeyError, ValueError) as error:
        raise ValueError(
            "These are not the weights of a published Spatial-Mamba model: expected names such as "
            "patch_embed.conv1.conv.weight, layers.0.blocks.0.cpe1.weight and "
            "layers.0.blocks.0.self_attention.state_fusion.alpha; found "
            f"{', '.join(list(published)[:3])} ..."
        ) from error
    arch = dict(embed_dims=dims, depths=depths, mlp_ratio=hidden_dim / dims[0])
    return known_arch(arch, SpatialMamba.arch_settings)
