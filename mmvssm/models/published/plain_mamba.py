"""Weights of the published PlainMamba and PlainMamba-Adapter."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping

import torch
from torch import Tensor

from ..backbones.plain_mamba import PlainMamba
from ..backbones.plain_mamba_adapter import PlainMambaAdapter
from .conversion import Conversion, fit, known_arch


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
    arch = _arch(weights)
    last = max(int(m[1]) for m in (re.match(r"layers\.(\d+)\.", name) for name in weights) if m)
    norms = [re.fullmatch(r"norm_layer(\d+)\.weight", name) for name in weights]
    out_indices = sorted({last, *(int(m[1]) for m in norms if m)})
    # Of a classifier's: what other heads have, such as detectors', has no place here.
    head = {name: weights[name] for name in ("head.fc.weight", "head.fc.bias") if name in weights}
    state_dict, origin = {}, {}
    for name, value in weights.items():
        for ours, part in _parts(name, value, last).items():
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
    return fit(state_dict, origin, expected, arch)


_RENAMES = (
    (r"^patch_embed\.stem\.", "patch_embed.convs."),
    (r"^patch_embed\.projection\.", "patch_embed.patches.projection."),
    (r"^layers\.(\d+)\.mamba\.conv2d\.", r"layers.\1.mixer.conv."),
    (r"^layers\.(\d+)\.mamba\.", r"layers.\1.mixer."),
    (r"^layers\.(\d+)\.dw\.0\.", r"layers.\1.dwconv."),
    (r"^layers\.(\d+)\.dw\.1\.", r"layers.\1.dwconv_norm."),
    (r"^norm_layer(\d+)\.", r"norms.\1."),
    (r"\.ffn\.dwconv\.dwconv\.", ".ffn.conv."),
)


def _parts(name: str, value: Tensor, last: int) -> dict[str, Tensor]:
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
    for pattern, ours in _RENAMES:
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


def _arch(published: Mapping[str, Tensor]) -> object:
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
    return known_arch(arch, PlainMamba.arch_settings)
