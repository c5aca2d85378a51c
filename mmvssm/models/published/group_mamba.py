"""Weights of the published GroupMamba."""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from ..backbones.group_mamba import NUM_GROUPS, GroupMamba
from ..classifiers import GroupMambaClassifier
from .conversion import Conversion, fit, known_arch


def convert_groupmamba(published: Mapping[str, Tensor]) -> Conversion:
    """Convert a published GroupMamba classification model.

    Args:
        published: Weights under the published names.

    Returns:
        Weights of a :class:`~mmvssm.models.classifiers.GroupMambaClassifier`, which are those of
        ``configs/groupmamba*_distilled_imagenet.py``, too.

    Raises:
        ValueError: If the weights aren't those of a GroupMamba.
    """
    arch = _arch(published)
    groups: dict[str, dict[int, Tensor]] = {}
    state_dict, origin = {}, {}
    for name, value in published.items():
        match = re.fullmatch(r"(.*)\.mamba_g([1-4])\.(.*)", name)
        if match:
            stem, group, leaf = match.groups()
            groups.setdefault(f"{stem}|{leaf}", {})[int(group)] = value
        else:
            ours = _rename(name)
            state_dict[ours], origin[ours] = value, [name]
    for key, parts in groups.items():
        stem, leaf = key.split("|")
        names = [f"{stem}.mamba_g{g}.{leaf}" for g in sorted(parts)]
        if len(parts) == NUM_GROUPS and leaf in _MERGE:
            for leaf_ours, value in _MERGE[leaf]([parts[g] for g in sorted(parts)]).items():
                ours = f"{_rename(stem + '.')}scan.{leaf_ours}"
                state_dict[ours], origin[ours] = value, names
        else:
            for name in names:
                origin[name] = [name]
                state_dict[name] = parts[int(name.split(".mamba_g")[1][0])]

    heads = [published[k].shape[0] for k in ("head.weight", "dist_head.weight") if k in published]
    with torch.device("meta"):
        model = GroupMambaClassifier(arch, num_classes=heads[0] if heads else 1000)
    expected = model.state_dict()
    return fit(state_dict, origin, expected, arch)


_RENAMES = (
    (r"^patch_embed1\.(proj|norm)\.", r"backbone.stages.0.embed.down.\1."),
    (r"^head\.", "head.fc."),
    (r"^dist_head\.", "head.distillation_fc."),
    (r"^post_network\.0\.mlp\.fc1\.", "neck.ffn.0."),
    (r"^post_network\.0\.mlp\.fc2\.", "neck.ffn.2."),
    (r"^post_network\.0\.", "neck."),
    (r"\.attn\.", ".mixer."),
    (r"\.mixer\.fc1\.", ".mixer.affinity.0."),
    (r"\.mixer\.fc2\.", ".mixer.affinity.2."),
    (r"\.mlp\.dwconv\.dwconv\.", ".ffn.conv."),
    (r"\.mlp\.", ".ffn."),
    (r"^(block\d\.\d+)\.norm2\.", r"\1.norm."),
)
_STAGE_RENAMES = (
    (r"^patch_embed(\d)\.", "embed."),
    (r"^block(\d)\.", "blocks."),
    (r"^norm(\d)\.", "norm."),
)


def _rename(name: str) -> str:
    for pattern, ours in _RENAMES:
        name = re.sub(pattern, ours, name)
    for pattern, ours in _STAGE_RENAMES:
        match = re.match(pattern, name)
        if match:
            return f"backbone.stages.{int(match[1]) - 1}.{ours}{name[match.end() :]}"
    return name


def _stacked(leaf: str):
    return lambda parts: {leaf: torch.stack([part.squeeze(0) for part in parts])}


def _pointwise(leaf: str):
    """Linear layers of the groups as one 1x1 convolution in groups."""
    return lambda parts: {leaf: torch.cat([p.squeeze(0) for p in parts])[:, :, None, None]}


def _in_proj(parts: list[Tensor]) -> dict[str, Tensor]:
    value, gate = zip(*(part.chunk(2) for part in parts))
    return {
        **_pointwise("in_proj.weight")(list(value)),
        **_pointwise("gate_proj.weight")(list(gate)),
    }


_MERGE = {
    "in_proj.weight": _in_proj,
    "conv2d.weight": lambda parts: {"conv.weight": torch.cat(parts)},
    "conv2d.bias": lambda parts: {"conv.bias": torch.cat(parts)},
    "x_proj_weight": _pointwise("x_proj.weight"),
    "dt_projs_weight": _pointwise("dt_proj.weight"),
    "dt_projs_bias": _stacked("dt_bias"),
    "A_logs": lambda parts: {"A_log": torch.stack(parts)},
    "Ds": lambda parts: {"D": torch.stack(parts)},
    "out_norm.weight": lambda parts: {"norm.weight": torch.stack(parts)},
    "out_norm.bias": lambda parts: {"norm.bias": torch.stack(parts)},
    "out_proj.weight": _pointwise("out_proj.weight"),
}
"""For each parameter of a published group, ours in which the four groups' are merged."""


def _arch(published: Mapping[str, Tensor]) -> object:
    """Read the arch off the shapes."""
    try:
        stages = range(1, 5)
        blocks = [re.match(r"block(\d)\.(\d+)\.", name) for name in published]
        dims = tuple(published[f"norm{i}.weight"].shape[0] for i in stages)
        arch = dict(
            stem_hidden_dim=published["patch_embed1.conv.0.weight"].shape[0],
            embed_dims=dims,
            depths=tuple(
                1 + max(int(b[2]) for b in blocks if b and b[1] == str(i)) for i in stages
            ),
            mlp_ratios=tuple(
                published[f"block{i}.0.mlp.fc1.weight"].shape[0] / dim
                for i, dim in zip(stages, dims)
            ),
        )
    except (KeyError, ValueError) as error:
        raise ValueError(
            "These are not the weights of a published GroupMamba model: expected names such as "
            "patch_embed1.conv.0.weight, norm1.weight and block1.0.mlp.fc1.weight; found "
            f"{', '.join(list(published)[:3])} ..."
        ) from error
    return known_arch(arch, GroupMamba.arch_settings)
