"""Weights of the published Vim."""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from ..backbones.vim import Vim
from .conversion import Conversion, fit, known_arch

_RENAMES = (
    (r"^norm_f\.", "norm."),
    (r"^head\.", "head.fc."),
    (r"\.mixer\.(conv1d|x_proj|dt_proj)\.", r".mixer.branches.0.\1."),
    (r"\.mixer\.(conv1d|x_proj|dt_proj)_b\.", r".mixer.branches.1.\1."),
    (r"\.conv1d\.", ".conv."),
    (r"\.mixer\.(A_log|D)$", r".mixer.branches.0.\1"),
    (r"\.mixer\.(A|D)_b(_log)?$", r".mixer.branches.1.\1\2"),
)


def convert_vim(published: Mapping[str, Tensor]) -> Conversion:
    """Convert a published Vim, a classification model or a segmenter's backbone.

    Args:
        published: Weights under the published names, perhaps with ``backbone.`` before them.

    Returns:
        Weights of a :class:`~mmvssm.models.backbones.Vim`, with ``backbone.`` before each name; with
        ``out_type='cls_token'`` where they have a class token. The linear layer of the head is ``head.fc``.

    Raises:
        ValueError: If the weights aren't those of a Vim.
    """
    weights = {name.removeprefix("backbone."): value for name, value in published.items()}
    arch = _arch(weights)
    state_dict, origin = {}, {}
    for name, value in weights.items():
        for ours, part in _parts(name, value, "cls_token" in weights).items():
            ours = ours if ours.startswith("head.fc.") else f"backbone.{ours}"
            state_dict[ours], origin[ours] = part, [name]
    patches = state_dict["backbone.pos_embed"].shape[1]
    settings = Vim.arch_settings[arch] if isinstance(arch, str) else arch
    with torch.device("meta"):
        model = Vim(arch, out_type="cls_token" if "cls_token" in weights else "residual")
        model.pos_embed = torch.nn.Parameter(torch.zeros(1, patches, settings["embed_dims"]))
    head = {name: value for name, value in state_dict.items() if name.startswith("head.fc.")}
    expected = {f"backbone.{name}": value for name, value in model.state_dict().items()} | head
    return fit(state_dict, origin, expected, arch)


def _parts(name: str, value: Tensor, with_class_token: bool) -> dict[str, Tensor]:
    """Our parameters that a published one becomes."""
    if name.endswith(".mixer.in_proj.weight"):
        u, gate = value.chunk(2)
        return {name: u, name.replace("in_proj", "gate_proj"): gate}
    if name == "pos_embed" and with_class_token:
        middle = (value.shape[1] - 1) // 2  # the class token's place
        patches = torch.cat([value[:, :middle], value[:, middle + 1 :]], 1)
        return {name: patches, "cls_pos_embed": value[:, middle : middle + 1]}
    for pattern, ours in _RENAMES:
        name = re.sub(pattern, ours, name)
    return {name: value}


def _arch(published: Mapping[str, Tensor]) -> object:
    """Read the arch off the shapes. The stride is not in them: a large position embedding is that of a "+" model."""
    try:
        layers = [re.match(r"layers\.(\d+)\.", name) for name in published]
        patch = published["patch_embed.proj.weight"]
        overlapping = published["pos_embed"].shape[1] >= 27 * 27 and patch.shape[-1] == 16
        arch = dict(
            embed_dims=patch.shape[0],
            num_layers=1 + max(int(m[1]) for m in layers if m),
            patch_size=patch.shape[-1],
            stride=8 if overlapping else patch.shape[-1],
            d_state=published["layers.0.mixer.A_log"].shape[1],
        )
        published["layers.0.mixer.A_b_log"]
    except (KeyError, ValueError) as error:
        raise ValueError(
            "These are not the weights of a published Vim model: expected names such as pos_embed, "
            f"patch_embed.proj.weight and layers.0.mixer.A_b_log; found {', '.join(list(published)[:3])} ..."
        ) from error
    return known_arch(arch, Vim.arch_settings)
