"""Weights of a published GroupMamba as its training code names them, made up here from the paper's table of sizes."""

import math

import torch


def published_weights(stem_hidden_dim, embed_dims, depths, mlp_ratios, num_classes):
    """Random weights under the published parameter names."""
    shapes = {}

    def module(name, *weight, bias=True):
        shapes[f"{name}.weight"] = weight
        if bias:
            shapes[f"{name}.bias"] = weight[:1]

    def layer(name, dim):
        module(f"{name}.fc1", dim // 16, dim)
        module(f"{name}.fc2", dim, dim // 16)
        module(f"{name}.norm", dim)
        module(f"{name}.proj", dim, dim)
        shapes[f"{name}.skip_scale"] = (1,)
        d = dim // 4
        dt_rank = math.ceil(d / 16)
        for g in range(1, 5):
            group = f"{name}.mamba_g{g}"
            module(f"{group}.in_proj", 2 * d, d, bias=False)
            module(f"{group}.conv2d", d, 1, 3, 3)
            shapes[f"{group}.x_proj_weight"] = (1, dt_rank + 2, d)
            shapes[f"{group}.dt_projs_weight"] = (1, d, dt_rank)
            shapes[f"{group}.dt_projs_bias"] = (1, d)
            shapes[f"{group}.A_logs"] = (d, 1)
            shapes[f"{group}.Ds"] = (d,)
            module(f"{group}.out_norm", d)
            module(f"{group}.out_proj", d, d, bias=False)

    channels = 3
    for i, index in enumerate((0, 3, 6)):
        size = 7 if i == 0 else 3
        shapes[f"patch_embed1.conv.{index}.weight"] = (stem_hidden_dim, channels, size, size)
        channels = stem_hidden_dim
        for leaf in ("weight", "bias", "running_mean", "running_var"):
            shapes[f"patch_embed1.conv.{index + 1}.{leaf}"] = (channels,)
        shapes[f"patch_embed1.conv.{index + 1}.num_batches_tracked"] = ()
    for i, (dim, depth, ratio) in enumerate(zip(embed_dims, depths, mlp_ratios), start=1):
        module(f"patch_embed{i}.proj", dim, channels, 3, 3)
        module(f"patch_embed{i}.norm", dim)
        module(f"norm{i}", dim)
        for j in range(depth):
            block = f"block{i}.{j}"
            layer(f"{block}.attn", dim)
            module(f"{block}.norm2", dim)
            module(f"{block}.mlp.fc1", ratio * dim, dim)
            module(f"{block}.mlp.dwconv.dwconv", ratio * dim, 1, 3, 3)
            module(f"{block}.mlp.fc2", dim, ratio * dim)
        channels = dim
    layer("post_network.0.attn", channels)
    for name in ("norm1", "norm2"):
        module(f"post_network.0.{name}", channels)
    module("post_network.0.mlp.fc1", mlp_ratios[-1] * channels, channels)
    module("post_network.0.mlp.fc2", channels, mlp_ratios[-1] * channels)
    module("head", num_classes, channels)
    module("dist_head", num_classes, channels)
    generator = torch.Generator().manual_seed(0)
    return {
        name: torch.tensor(1) if not shape else torch.randn(shape, generator=generator)
        for name, shape in shapes.items()
    }
