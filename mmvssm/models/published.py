"""Weights under the names of the published models, turned into weights under ours."""

from __future__ import annotations

import argparse
import math
import re
from collections import OrderedDict
from collections.abc import Mapping
from contextlib import AbstractContextManager
from functools import partial
from typing import NamedTuple, Optional

import torch
from torch import Tensor

from .backbones.common import READERS, WRAPPINGS
from .backbones.group_mamba import NUM_GROUPS, GroupMamba
from .backbones.plain_mamba import PlainMamba
from .backbones.plain_mamba_adapter import PlainMambaAdapter
from .backbones.vmamba import NUM_WALKS, VMamba
from .classifiers import GroupMambaClassifier


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
    arch = _groupmamba_arch(published)
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
    return _fit(state_dict, origin, expected, arch)


def convert_plainmamba(published: Mapping[str, Tensor]) -> Conversion:
    """Convert a published PlainMamba, a classification model or a detector's or segmenter's backbone.

    Args:
        published: Weights under the published names, perhaps with ``backbone.`` before them.

    Returns:
        Weights of a :class:`~mmvssm.models.backbones.PlainMamba`, or of a
        :class:`~mmvssm.models.backbones.PlainMambaAdapter` where the names are those of one, with ``backbone.`` before
        each name. Norms of intermediate outputs are among them where the checkpoint has any, and the linear layer of a
        classification model's head, which makes them those of ``configs/plainmamba*_imagenet.py``.

    Raises:
        ValueError: If the weights aren't those of a PlainMamba.
    """
    names = {name: name.removeprefix("backbone.") for name in published}
    weights = {names[name]: value for name, value in published.items()}
    arch = _plainmamba_arch(weights)
    last = max(int(m[1]) for m in (re.match(r"layers\.(\d+)\.", name) for name in weights) if m)
    norms = [re.fullmatch(r"norm_layer(\d+)\.weight", name) for name in weights]
    out_indices = sorted({last, *(int(m[1]) for m in norms if m)})
    # Of a classifier's: what other heads have, such as detectors', has no place here.
    head = {name: weights[name] for name in ("head.fc.weight", "head.fc.bias") if name in weights}
    state_dict, origin = {}, {}
    for name, value in weights.items():
        for ours, part in _plainmamba_parts(name, value, last).items():
            ours = ours if ours in head else f"backbone.{ours}"
            state_dict[ours], origin[ours] = part, [name]
    grid = math.isqrt(weights["pos_embed"].shape[1])
    patch_size = 2 * weights["patch_embed.projection.weight"].shape[-1]
    with torch.device("meta"):
        if any(name.startswith("interactions.") for name in weights):
            model = _adapter_like(weights, arch, grid * patch_size)
        else:
            model = PlainMamba(arch, img_size=grid * patch_size, out_indices=out_indices)
    expected = {f"backbone.{name}": value for name, value in model.state_dict().items()} | head
    return _fit(state_dict, origin, expected, arch)


def _fit(state_dict, origin, expected, arch) -> Conversion:
    """Keep what has a place in our model; ``origin`` gives the published names of each of our names."""
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


def _groupmamba_arch(published: Mapping[str, Tensor]) -> object:
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
    known = GroupMamba.arch_settings.items()
    return next((name for name, settings in known if settings == arch), arch)


_PLAINMAMBA_RENAMES = (
    (r"^patch_embed\.stem\.", "patch_embed.convs."),
    (r"^patch_embed\.projection\.", "patch_embed.patches.projection."),
    (r"^layers\.(\d+)\.mamba\.conv2d\.", r"layers.\1.mixer.conv."),
    (r"^layers\.(\d+)\.mamba\.", r"layers.\1.mixer."),
    (r"^layers\.(\d+)\.dw\.0\.", r"layers.\1.dwconv."),
    (r"^layers\.(\d+)\.dw\.1\.", r"layers.\1.dwconv_norm."),
    (r"^norm_layer(\d+)\.", r"norms.\1."),
    (r"\.ffn\.dwconv\.dwconv\.", ".ffn.conv."),
)


def _plainmamba_parts(name: str, value: Tensor, last: int) -> dict[str, Tensor]:
    """Our parameters that a published one becomes."""
    match = re.fullmatch(r"(layers\.\d+)\.mamba\.in_proj\.(weight|bias)", name)
    if match:
        layer, leaf = match.groups()
        x, gate = value.chunk(2)
        return {f"{layer}.mixer.in_proj.{leaf}": x, f"{layer}.mixer.gate_proj.{leaf}": gate}
    # The stem is the first of our convolutions, three modules each.
    match = re.fullmatch(r"patch_embed\.convs\.(\d+)\.(.*)", name)
    if match:
        return {f"patch_embed.convs.{int(match[1]) + 3}.{match[2]}": value}
    match = re.fullmatch(r"ln1\.(.*)", name)
    if match:
        return {f"norms.{last}.{match[1]}": value}
    for pattern, ours in _PLAINMAMBA_RENAMES:
        name = re.sub(pattern, ours, name)
    return {name: value}


def _adapter_like(weights: Mapping[str, Tensor], arch: object, img_size: int) -> PlainMambaAdapter:
    """An adapter of the shapes of published weights. Which layers lie between interactions they do not say."""
    matches = [re.match(r"interactions\.(\d+)\.", name) for name in weights]
    count = 1 + max(int(m[1]) for m in matches if m)
    layers = (PlainMamba.arch_settings[arch] if isinstance(arch, str) else arch)["num_layers"]
    bounds = [layers * i // count for i in range(count + 1)]
    extractor = "interactions.0.extractor"
    dim = weights["level_embed"].shape[1]
    ffn = weights.get(f"{extractor}.ffn.fc1.weight")
    n_points = 4  # heads and points are known by their product alone
    return PlainMambaAdapter(
        arch,
        img_size=img_size,
        conv_inplane=weights["spm.fc1.weight"].shape[1],
        n_points=n_points,
        deform_num_heads=weights[f"{extractor}.attn.attention_weights.weight"].shape[0] // n_points,
        interaction_indexes=[(a, b - 1) for a, b in zip(bounds, bounds[1:])],
        with_cffn=ffn is not None,
        cffn_ratio=0.25 if ffn is None else ffn.shape[0] / dim,
        deform_ratio=weights[f"{extractor}.attn.value_proj.weight"].shape[0] / dim,
        use_extra_extractor=any(".extra_extractors." in name for name in weights),
    )


def _plainmamba_arch(published: Mapping[str, Tensor]) -> object:
    """Read the arch off the shapes."""
    try:
        layers = [re.match(r"layers\.(\d+)\.(\w+)", name) for name in published]
        arch = dict(
            embed_dims=published["patch_embed.projection.weight"].shape[0],
            num_layers=1 + max(int(m[1]) for m in layers if m),
            patch_size=2 * published["patch_embed.projection.weight"].shape[-1],
            num_convs_patch_embed=sum(
                value.dim() == 4
                for name, value in published.items()
                if name.startswith("patch_embed.convs.")
            ),
            layers_with_dwconv=tuple(sorted({int(m[1]) for m in layers if m and m[2] == "dw"})),
            d_state=published["layers.0.mamba.A_log"].shape[1],
        )
        published["pos_embed"]
    except (KeyError, ValueError) as error:
        raise ValueError(
            "These are not the weights of a published PlainMamba model: expected names such as pos_embed, "
            f"patch_embed.projection.weight and layers.0.mamba.A_log; found {', '.join(list(published)[:3])} ..."
        ) from error
    known = PlainMamba.arch_settings.items()
    return next((name for name, settings in known if settings == arch), arch)


_VMAMBA_RENAMES = (
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
        name: _rename_vmamba(name.removeprefix("backbone."))
        for name in published
        if not whole or name.startswith("backbone.")
    }
    weights = {ours: published[name] for name, ours in names.items()}
    arch = _vmamba_arch(weights, published)
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
    return _fit(state_dict, origin, expected, arch)


def _rename_vmamba(name: str) -> str:
    for pattern, ours in _VMAMBA_RENAMES:
        name = re.sub(pattern, ours, name)
    match = re.match(r"layers\.(\d)\.downsample\.([13])\.", name)
    if match:  # theirs ends a stage, ours begins the next
        part = {"1": "proj", "3": "norm"}[match[2]]
        return f"stages.{int(match[1]) + 1}.embed.{part}.{name[match.end() :]}"
    return name


def _vmamba_arch(weights: Mapping[str, Tensor], published: Mapping[str, Tensor]) -> object:
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
    known = VMamba.arch_settings.items()
    return next((name for name, settings in known if settings == arch), arch)


CONVERTERS = {
    "groupmamba": convert_groupmamba,
    "plainmamba": convert_plainmamba,
    "vmamba": convert_vmamba,
}
"""Converters by the name of the published model."""

_SIGNS = {
    "groupmamba": r"patch_embed1\.conv\.0\.weight|block1\.0\.attn\.mamba_g1\..*",
    "plainmamba": r"layers\.0\.mamba\..*",
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
    ("VMamba", "vmamba"),
):
    READERS[_backbone] = partial(read_published, _model)
