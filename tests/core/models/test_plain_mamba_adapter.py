import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.registry import MODELS, DefaultScope
from torch import nn

from mmvssm.analysis.flops import count
from mmvssm.models import PlainMambaAdapter
from mmvssm.models.backbones.plain_mamba_adapter import (
    Extractor,
    Injector,
    _attend,
    _attend_in_graph,
    _attention,
    reference_points,
)
from mmvssm.models.published import convert_plainmamba

GOLDEN = Path(__file__).parents[2] / "golden/plainmamba_adapter_small.npz"
ARCH = dict(
    embed_dims=24,
    num_layers=4,
    patch_size=16,
    num_convs_patch_embed=1,
    layers_with_dwconv=(0,),
    d_state=2,
)
MINI = dict(
    arch=ARCH, img_size=64, conv_inplane=8, interaction_indexes=((0, 0), (1, 3)), init_values=0.5
)


def build(**arguments):
    torch.manual_seed(0)
    model = PlainMambaAdapter(**{**MINI, **arguments})
    for module in model.modules():  # so that they read where they would not at first
        if hasattr(module, "sampling_offsets"):
            nn.init.normal_(module.sampling_offsets.weight, std=0.5)
            nn.init.normal_(module.attention_weights.weight, std=0.5)
    return model


@pytest.fixture(scope="module")
def golden():
    values = np.load(GOLDEN)
    weights = {k[2:]: torch.from_numpy(values[k]) for k in values.files if k.startswith("w/")}
    return values, weights


@pytest.mark.parametrize("prefix", ["", "backbone."])
def test_feature_maps_of_the_published_model(golden, prefix):
    values, weights = golden
    conversion = convert_plainmamba({prefix + name: v for name, v in weights.items()})
    assert not conversion.unused and not conversion.missing
    config = json.loads(str(values["config"]))
    model = PlainMambaAdapter(
        conversion.arch,
        img_size=config["img_size"],
        conv_inplane=config["conv_inplane"],
        interaction_indexes=config["interaction_indexes"],
    ).eval()
    model.load_state_dict(
        {name.removeprefix("backbone."): v for name, v in conversion.state_dict.items()}
    )
    with torch.no_grad():
        maps = model(torch.from_numpy(values["x"]))
    for i, feature_map in enumerate(maps, 1):
        expected = torch.from_numpy(values[f"feat{i}"])
        torch.testing.assert_close(feature_map, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    "arch, whole, spm, interactions, up",
    [
        ("L1", 9_796_464, 1_171_520, 1_116_912, 147_648),
        ("L2", 31_590_224, 1_307_456, 3_928_272, 590_208),
        ("L3", 58_103_712, 1_352_768, 5_436_192, 803_264),
    ],
)
def test_published_parameters(arch, whole, spm, interactions, up):
    with torch.device("meta"):
        model = PlainMambaAdapter(arch)
    for module, expected in (
        (model, whole),
        (model.spm, spm),
        (model.interactions, interactions),
        (model.up, up),
    ):
        assert sum(p.numel() for p in module.parameters()) == expected


@pytest.mark.slow
@pytest.mark.parametrize(
    "arch, gflops", [("L1", 101.6), pytest.param("L2", 250.4, marks=pytest.mark.nightly)]
)
def test_published_flops_at_800x1280(arch, gflops):
    model = PlainMambaAdapter(arch).eval()
    cost = count(model, lambda: model(torch.zeros(1, 3, 800, 1280)))["total"]
    assert cost.flops / 1e9 == pytest.approx(gflops, abs=0.1)  # a sum of six rounded numbers


def test_deformable_attention_by_hand_and_its_gradients():
    """Bilinear reading with zeros outside, written out; float64."""
    torch.manual_seed(0)
    attention = _attention(8, 2, 2, 3, ratio=0.5).double()
    for parameter in attention.parameters():
        nn.init.normal_(parameter, std=0.4)
    grids = ((3, 4), (2, 2))
    query = torch.randn(2, 5, 8, dtype=torch.float64, requires_grad=True)
    values = torch.randn(2, 16, 8, dtype=torch.float64, requires_grad=True)
    points = torch.rand(1, 5, 2, dtype=torch.float64)

    def read(level, x, y):
        """``level (h, w, C)`` at a place in pixels, whose centres are at half-integers."""
        height, width, _ = level.shape
        total = 0
        for row in (int((y - 0.5).floor()), int((y - 0.5).floor()) + 1):
            for column in (int((x - 0.5).floor()), int((x - 0.5).floor()) + 1):
                if 0 <= row < height and 0 <= column < width:
                    share = (1 - (y - 0.5 - row).abs()) * (1 - (x - 0.5 - column).abs())
                    total = total + share * level[row, column]
        return total

    def by_hand():
        v = attention.value_proj(values).unflatten(2, (2, 2))
        offsets = attention.sampling_offsets(query).view(2, 5, 2, 2, 3, 2)
        weights = (
            attention.attention_weights(query).view(2, 5, 2, 6).softmax(-1).view(2, 5, 2, 2, 3)
        )
        rows = []
        for b in range(2):
            for q in range(5):
                heads = []
                for head in range(2):
                    total = torch.zeros(2, dtype=torch.float64)
                    first = 0
                    for i, (h, w) in enumerate(grids):
                        level = v[b, first : first + h * w, head].unflatten(0, (h, w))
                        first += h * w
                        for p in range(3):
                            dx, dy = offsets[b, q, head, i, p]
                            x, y = points[0, q, 0] * w + dx, points[0, q, 1] * h + dy
                            total = total + weights[b, q, head, i, p] * read(level, x, y)
                    heads.append(total)
                rows.append(torch.cat(heads))
        return attention.output_proj(torch.stack(rows).view(2, 5, 4)) + query

    leaves = (query, values, *attention.parameters())
    ours, expected = _attend(attention, query, values, query, points, grids), by_hand()
    torch.testing.assert_close(ours, expected, atol=1e-10, rtol=1e-8)
    factor = torch.randn_like(ours)
    torch.testing.assert_close(
        torch.autograd.grad((ours * factor).sum(), leaves),
        torch.autograd.grad((expected * factor).sum(), leaves),
        atol=1e-9,
        rtol=1e-7,
    )


def test_reference_points_are_centres():
    points = reference_points([(1, 2), (2, 1)], torch.zeros(1))
    expected = [[0.25, 0.5], [0.75, 0.5], [0.5, 0.25], [0.5, 0.75]]
    assert points.tolist() == [expected]


@pytest.mark.parametrize("size", [(64, 96), (97, 130), (33, 65), (15, 17), (1, 1)])
@pytest.mark.parametrize(
    "pruning",
    [
        None,
        dict(layers=(0, 1), keep_ratio=0.6),
        dict(layers=(0, 1), keep_ratio=0.6, follow=True),
    ],
)
def test_any_input_size(size, pruning):
    model = build(pruning=pruning).eval()
    with torch.no_grad():
        maps = model(torch.randn(2, 3, *size))
    for stride, feature_map in zip((4, 8, 16, 32), maps):
        assert feature_map.shape == (2, 24, *(math.ceil(side / stride) for side in size))
        assert feature_map.is_contiguous() and feature_map.isfinite().all()


def test_keeping_all_tokens_is_the_dense_model_bit_for_bit():
    dense, pruned = build().eval(), build(pruning=dict(layers=(0, 2), keep_ratio=1.0)).eval()
    pruned.load_state_dict(dense.state_dict())
    x = torch.randn(2, 3, 64, 96)
    with torch.no_grad():
        assert all(map(torch.equal, pruned(x), dense(x)))


@pytest.mark.parametrize("alignment", ["decay", "hold", "none"])
def test_pruned_layers_see_kept_tokens_and_extractors_see_full_maps(alignment):
    pruning = dict(layers=(0, 1), keep_ratio=0.5, alignment=alignment)
    model = build(pruning=pruning).eval()
    seen = {"layer": [], "injector": [], "extractor": []}

    def note(kind, which):
        return lambda module, args: seen[kind].append(args[which].shape[1])

    for layer in model.layers:
        layer.register_forward_pre_hook(note("layer", 0))
    for module in model.modules():
        if isinstance(module, Injector):
            module.register_forward_pre_hook(note("injector", 0))
        elif isinstance(module, Extractor):
            module.register_forward_pre_hook(note("extractor", 2))
    with torch.no_grad():
        model(torch.randn(1, 3, 64, 96))
    assert seen["layer"] == [24, 12, 6, 6]
    assert seen["injector"] == [24, 12]
    assert seen["extractor"] == [24] * 4


def test_dropped_tokens_keep_their_last_value_in_what_extractors_read():
    model = build(pruning=dict(layers=(1,), keep_ratio=0.25)).eval()
    read = []
    model.interactions[1].extractor.register_forward_pre_hook(lambda m, args: read.append(args[2]))
    x = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        model(x)
        states = list(model.walk_layers(x))
    tokens = states[1].tokens  # of all positions, since the first pruning is after this layer
    last = states[3]
    kept = last.pruned.positions[0]
    dropped = [i for i in range(24) if i not in kept.tolist()]
    assert len(dropped) == 18
    torch.testing.assert_close(read[0][0, dropped], tokens[0, dropped])
    torch.testing.assert_close(read[0][0, kept], last.tokens[0])


def test_pruning_saves_flops_and_every_parameter_gets_a_gradient():
    model = build(pruning=dict(layers=(0,), keep_ratio=0.5))
    maps = model(torch.randn(2, 3, 64, 96))
    sum(y.square().mean() for y in maps).backward()
    assert not [name for name, p in model.named_parameters() if p.grad is None]
    flops = [
        count(m, lambda m=m: m(torch.zeros(1, 3, 64, 96)))["layers"].flops
        for m in (build().eval(), model.eval())
    ]
    assert flops[1] == pytest.approx(flops[0] * (1 + 3 * 0.5) / 4, rel=0.2)


def test_activation_checkpointing_changes_no_gradient():
    model = build(pruning=dict(layers=(1,), keep_ratio=0.5)).double()
    x = torch.randn(1, 3, 64, 64, dtype=torch.float64)
    gradients = []
    for model.with_cp in (False, True):
        loss = sum(y.square().mean() for y in model(x))
        gradients.append(torch.autograd.grad(loss, list(model.parameters())))
    torch.testing.assert_close(*gradients)


def test_it_starts_as_published():
    torch.manual_seed(0)
    model = PlainMambaAdapter(**{**MINI, "init_values": 0.0})
    injector = model.interactions[0].injector
    assert (injector.gamma == 0).all()
    assert (injector.attn.sampling_offsets.weight == 0).all()
    assert (injector.attn.attention_weights.weight == 0).all()
    bias = injector.attn.sampling_offsets.bias.view(6, 3, 4, 2)
    assert bias[0, 0].tolist() == [[1, 0], [2, 0], [3, 0], [4, 0]]
    assert model.level_embed.std().item() == pytest.approx(1, abs=0.2)
    extractor = model.interactions[0].extractor
    assert extractor.ffn.conv.weight.std().item() == pytest.approx(0.471, abs=0.12)
    assert extractor.ffn.fc1.weight.std().item() == pytest.approx(0.02, abs=0.004)
    model.init_weights()  # mmengine's, which must not undo it
    assert (injector.attn.sampling_offsets.weight == 0).all()


@pytest.mark.parametrize(
    "arguments, words",
    [
        (dict(out_indices=(3,)), "out_indices has no meaning here"),
        (dict(interaction_indexes=((0, 1), (3, 3))), "cover layers 0 to 3 in order"),
        (dict(interaction_indexes=None), "interaction_indexes must be pairs"),
        (dict(deform_num_heads=5), "multiples of deform_num_heads=5"),
        (dict(arch={**ARCH, "patch_size": 8}), "patch_size must be 16"),
    ],
)
def test_wrong_arguments_are_named(arguments, words):
    with pytest.raises(ValueError, match=words):
        PlainMambaAdapter(**{**MINI, **arguments})


@pytest.mark.parametrize("scope", ["mmdet", "mmseg"])
def test_registered_for_every_project(scope):
    pytest.importorskip(scope)
    with DefaultScope.overwrite_default_scope(scope):
        assert isinstance(
            MODELS.build(dict(type="mmvssm.PlainMambaAdapter", **MINI)), PlainMambaAdapter
        )


def test_autocast():
    model = build(pruning=dict(layers=(1,), keep_ratio=0.5)).eval()
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        expected = model(x)
        with torch.autocast("cpu", torch.bfloat16):
            maps = model(x)
    for a, b in zip(maps, expected):
        assert a.isfinite().all() and (a.float() - b).norm() / b.norm() < 0.3


def test_attention_in_a_graph_is_that_of_mmcv():
    torch.manual_seed(0)
    attention = _attention(24, 3, 2, 4, 0.5).double()
    for layer in (attention.sampling_offsets, attention.attention_weights):
        nn.init.normal_(layer.weight, std=0.5)
    grids = ((5, 7), (3, 2))
    query = torch.randn(2, 11, 24, dtype=torch.float64)
    values = torch.randn(2, 41, 24, dtype=torch.float64)
    points = torch.rand(2, 11, 2, dtype=torch.float64)
    torch.testing.assert_close(
        _attend_in_graph(attention, query, values, points, grids),
        _attend(attention, query, values, torch.zeros_like(query), points, grids),
    )


@pytest.mark.slow
@pytest.mark.nightly
@pytest.mark.parametrize("pruning", [None, dict(layers=(1,), keep_ratio=0.5)])
def test_export_with_dynamic_sizes(pruning):
    """Of any height and width. The batch is fixed: PyTorch proves nothing of an image alone."""
    model = build(pruning=pruning).eval()
    dims = dict.fromkeys((2, 3), torch.export.Dim.DYNAMIC)
    with torch.no_grad():
        program = torch.export.export(model, (torch.randn(1, 3, 72, 100),), dynamic_shapes=(dims,))
        for size in ((64, 96), (65, 97), (33, 171), (256, 320)):
            x = torch.randn(1, 3, *size)
            with (
                torch.enable_grad()
            ):  # as in the program, BatchNorm is then no part of convolutions
                expected = model(x)
            for a, b in zip(program.module()(x), expected):
                torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


@pytest.mark.slow
def test_compile_fullgraph():
    model = build(pruning=dict(layers=(1,), keep_ratio=0.5)).eval()
    x = torch.randn(1, 3, 64, 80)
    with torch.no_grad():
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)(x)
        for a, b in zip(compiled, model(x)):
            torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)
