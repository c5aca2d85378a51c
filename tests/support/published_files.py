"""Files of published models, made here: our weights under the published names."""

import argparse
import re

import torch

from mmvssm.models.weights_table import PUBLISHED

_VMAMBA = (
    (r"^stages\.0\.embed\.conv1\.", "patch_embed.0."),
    (r"^stages\.0\.embed\.norm1\.", "patch_embed.2."),
    (r"^stages\.0\.embed\.conv2\.", "patch_embed.5."),
    (r"^stages\.0\.embed\.norm2\.", "patch_embed.7."),
    (r"^stages\.(\d)\.blocks\.(\d+)\.norm1\.", r"layers.\1.blocks.\2.norm."),
    (r"^stages\.", "layers."),
    (r"\.mixer\.norm\.", ".op.out_norm."),
    (r"\.mixer\.conv\.", ".op.conv2d."),
    (r"\.mixer\.", ".op."),
    (r"\.ffn\.0\.", ".mlp.fc1."),
    (r"\.ffn\.2\.", ".mlp.fc2."),
    (r"^norms\.", "outnorm"),
)
_SPATIALMAMBA = (
    (r"^stages\.0\.embed\.(conv|norm)1\.", r"patch_embed.conv1.\1."),
    (r"^stages\.0\.embed\.(conv|norm)2\.", r"patch_embed.conv2.0.\1."),
    (r"^stages\.0\.embed\.(conv|norm)3\.", r"patch_embed.conv2.1.\1."),
    (r"^stages\.0\.embed\.(conv|norm)4\.", r"patch_embed.conv3.0.\1."),
    (r"^stages\.0\.embed\.(conv|norm)5\.", r"patch_embed.conv3.1.\1."),
    (r"^stages\.", "layers."),
    (r"\.pos([12])\.", r".cpe\1."),
    (r"\.norm([12])\.", r".ln_\1."),
    (r"\.ffn\.0\.", ".mlp.fc1."),
    (r"\.ffn\.2\.", ".mlp.fc2."),
    (r"\.mixer\.conv\.", ".mixer.conv2d."),
    (r"\.mixer\.norm\.", ".mixer.out_norm."),
    (r"\.(x|dt)_proj\.weight$", r".\1_proj_weight"),
    (r"\.dt_proj_weight$", ".dt_projs_weight"),
    (r"\.dt_bias$", ".dt_projs_bias"),
    (r"\.A_log$", ".A_logs"),
    (r"\.D$", ".Ds"),
    (r"\.fusion\.convs\.0\.weight$", ".state_fusion.kernel_3"),
    (r"\.fusion\.convs\.([12])\.weight$", r".state_fusion.kernel_3_\1"),
    (r"\.fusion\.", ".state_fusion."),
    (r"\.mixer\.", ".self_attention."),
    (r"^norms\.", "outnorm"),
)
_PLAINMAMBA = (
    (r"^patch_embed\.convs\.([012])\.", r"patch_embed.stem.\1."),
    (r"^patch_embed\.patches\.", "patch_embed."),
    (r"\.mixer\.conv\.", ".mamba.conv2d."),
    (r"\.mixer\.", ".mamba."),
    (r"\.dwconv\.", ".dw.0."),
    (r"\.dwconv_norm\.", ".dw.1."),
    (r"^norms\.", "norm_layer"),
    (r"\.ffn\.conv\.", ".ffn.dwconv.dwconv."),
)
_GROUPMAMBA = (
    (r"^neck\.ffn\.0\.", "post_network.0.mlp.fc1."),
    (r"^neck\.ffn\.2\.", "post_network.0.mlp.fc2."),
    (r"^neck\.mixer\.", "post_network.0.attn."),
    (r"^neck\.", "post_network.0."),
    (r"^head\.fc\.", "head."),
    (r"^head\.distillation_fc\.", "dist_head."),
    (r"\.mixer\.", ".attn."),
    (r"\.attn\.affinity\.0\.", ".attn.fc1."),
    (r"\.attn\.affinity\.2\.", ".attn.fc2."),
    (r"\.ffn\.conv\.", ".mlp.dwconv.dwconv."),
    (r"\.ffn\.", ".mlp."),
)


def published_file(name, weights):
    """What the authors' file of a published model holds, with ``weights`` under our names for its weights."""
    family = name.partition("_")[0]
    classifier = PUBLISHED[name].task == "classification"
    published = as_published(family, weights, classifier)
    if not classifier:
        return {"state_dict": published, "meta": {"CLASSES": ("a", "b"), "mmdet_version": "2.25.0"}}
    if family == "groupmamba":
        return published
    return {"model": published, "args": argparse.Namespace(lr=1e-3), "epoch": 299}


def as_published(family, weights, classifier):
    """A model's weights under the published names.

    ``weights`` have ``backbone.`` before the backbone's, of other parts any name; a ``classifier``'s file has the
    backbone's names without it.
    """
    published = {}
    for name, value in weights.items():
        if not name.startswith("backbone.") and not classifier:
            published[name] = value
            continue
        rename = {
            "groupmamba": _group,
            "plainmamba": _plain,
            "spatialmamba": _spatial,
            "vim": _vim,
            "vmamba": _vmamba,
        }[family]
        new = rename(name.removeprefix("backbone."), value, weights, classifier)
        prefix = "" if classifier else "backbone."
        published |= {prefix + key: part for key, part in new.items()}
    return published


def _rename(pairs, name):
    for pattern, theirs in pairs:
        name = re.sub(pattern, theirs, name)
    return name


def _vim(name, value, weights, classifier):
    if ".mixer.gate_proj." in name or name == "cls_pos_embed":
        return {}
    if name.endswith(".mixer.in_proj.weight"):
        gate = weights[f"backbone.{name.replace('in_proj', 'gate_proj')}"]
        return {name: torch.cat([value, gate])}
    if name == "pos_embed":  # the class token's is in the middle
        first, second = value.tensor_split([value.shape[1] // 2], 1)
        return {name: torch.cat([first, weights["backbone.cls_pos_embed"], second], 1)}
    match = re.match(r"(layers\.\d+\.mixer\.)branches\.([01])\.(\w+)(.*)", name)
    if match:
        stem, branch, part, rest = match.groups()
        part = {"conv": "conv1d"}.get(part, part)
        if branch == "1":
            part = "A_b_log" if part == "A_log" else f"{part}_b"
        return {f"{stem}{part}{rest}": value}
    return {_rename(((r"^norm\.", "norm_f."), (r"^head\.fc\.", "head.")), name): value}


def _vmamba(name, value, weights, classifier):
    if classifier:
        name = re.sub(r"^norms\.3\.", "classifier.norm.", name)
        name = re.sub(r"^head\.fc\.", "classifier.head.", name)
    match = re.match(r"stages\.([123])\.embed\.(proj|norm)\.", name)
    if match:  # theirs ends the stage before
        part = {"proj": "1", "norm": "3"}[match[2]]
        return {f"layers.{int(match[1]) - 1}.downsample.{part}.{name[match.end() :]}": value}
    stem, _, leaf = name.rpartition(".mixer.")
    stem = f"{_rename(_VMAMBA, stem + '.')}op."
    if leaf == "x_proj.weight":
        return {f"{stem}x_proj_weight": value.unflatten(0, (4, -1))}
    if leaf == "dt_proj.weight":
        return {f"{stem}dt_projs_weight": value[:, :, 0, 0].unflatten(0, (4, -1))}
    if leaf == "dt_bias":
        return {f"{stem}dt_projs_bias": value}
    if leaf in ("A_log", "D"):
        return {f"{stem}{leaf}s": value.flatten(0, 1)}
    return {_rename(_VMAMBA, name): value}


def _spatial(name, value, weights, classifier):
    if classifier:
        name = re.sub(r"^norms\.3\.", "norm.", name)
        name = re.sub(r"^head\.fc\.", "head.", name)
    match = re.match(r"stages\.([123])\.embed\.(expand|conv|proj|norm)\.", name)
    if match:  # theirs ends the stage before
        part = dict(expand="0.conv", conv="1.conv", proj="2.conv", norm="2.norm")[match[2]]
        name = f"layers.{int(match[1]) - 1}.downsample.conv.{part}.{name[match.end() :]}"
    return {_rename(_SPATIALMAMBA, name): value}


def _plain(name, value, weights, classifier):
    last = max(int(m[1]) for m in (re.match(r"backbone\.layers\.(\d+)\.", n) for n in weights) if m)
    if classifier:
        name = name.replace(f"norms.{last}.", "ln1.")
    match = re.fullmatch(r"(layers\.\d+)\.mixer\.in_proj\.(\w+)", name)
    if match:
        gate = weights[f"backbone.{match[1]}.mixer.gate_proj.{match[2]}"]
        return {f"{match[1]}.mamba.in_proj.{match[2]}": torch.cat([value, gate])}
    if ".mixer.gate_proj." in name:
        return {}
    match = re.match(r"patch_embed\.convs\.(\d+)\.", name)
    if match and int(match[1]) > 2:
        return {f"patch_embed.convs.{int(match[1]) - 3}.{name[match.end() :]}": value}
    return {_rename(_PLAINMAMBA, name): value}


def _group(name, value, weights, classifier):
    gate = name.replace("in_proj.weight", "gate_proj.weight")
    match = re.match(r"stages\.(\d)\.(embed|blocks|norm)\.", name)
    if match:
        stage = (
            f"{dict(embed='patch_embed', blocks='block', norm='norm')[match[2]]}{int(match[1]) + 1}"
        )
        rest = name[match.end() :]
        if match[2] == "embed":
            rest = re.sub(r"^down\.", "", rest)
        elif match[2] == "blocks":  # of a block's parts, the norm of its feed-forward network
            rest = re.sub(r"^(\d+)\.norm\.", r"\1.norm2.", rest)
        name = f"{stage}.{rest}"
    stem, is_scan, leaf = name.rpartition("scan.")
    if not is_scan:
        return {_rename(_GROUPMAMBA, name): value}
    theirs = {
        "conv.weight": "conv2d.weight",
        "conv.bias": "conv2d.bias",
        "x_proj.weight": "x_proj_weight",
        "dt_proj.weight": "dt_projs_weight",
        "dt_bias": "dt_projs_bias",
        "A_log": "A_logs",
        "D": "Ds",
        "norm.weight": "out_norm.weight",
        "norm.bias": "out_norm.bias",
    }.get(leaf, leaf)
    if leaf == "gate_proj.weight":
        return {}
    parts = value.chunk(4)
    if leaf == "in_proj.weight":
        gates = weights.get(gate, weights.get(f"backbone.{gate}")).chunk(4)
        parts = [torch.cat(both) for both in zip(parts, gates)]
    new = {}
    for g, part in enumerate(parts, start=1):
        if part.dim() == 4 and not leaf.startswith("conv."):
            part = part[:, :, 0, 0]
        if leaf in ("A_log", "D", "norm.weight", "norm.bias"):
            part = part.squeeze(0)
        elif leaf in ("x_proj.weight", "dt_proj.weight"):
            part = part.unsqueeze(0)
        new[f"{_rename(_GROUPMAMBA, stem)}mamba_g{g}.{theirs}"] = part
    return new
