import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from mmengine.registry import MODELS, DefaultScope
from torch import Tensor

from mmvssm.analysis.flops import count
from mmvssm.models import PlainMamba, TokenRestoration
from mmvssm.models.backbones.plain_mamba import Layout, PlainMambaMixer
from mmvssm.models.pruning import PRESETS, PrunedTokens, TokenPruning, with_dropped
from mmvssm.models.published import convert_plainmamba
from mmvssm.ops import snake_walks
from mmvssm.ops.selective_scan import cpu as scan_cpu
from mmvssm.ops.selective_scan.naive import selective_scan_naive

CONFIGS = Path(__file__).parents[3] / "configs"
GOLDEN = Path(__file__).parents[2] / "golden/plainmamba_small.npz"
MINI = dict(
    embed_dims=16,
    num_layers=5,
    patch_size=8,
    num_convs_patch_embed=1,
    layers_with_dwconv=(0, 3),
    d_state=4,
)
PRUNING = dict(layers=(1, 3), keep_ratio=(0.5, 0.75))
OUT_INDICES = (0, 1, 2, 3, 4)


def build(pruning=None, seed=0, **settings):
    torch.manual_seed(seed)
    settings = dict(arch=MINI, img_size=48, out_indices=OUT_INDICES) | settings
    model = PlainMamba(pruning=pruning, **settings)
    for norm in model.modules():
        if isinstance(norm, (torch.nn.BatchNorm1d, torch.nn.BatchNorm2d)):
            torch.nn.init.uniform_(norm.running_var, 0.5, 2)
            torch.nn.init.normal_(norm.running_mean)
    return model.eval()


def values(output):
    return output.tokens if isinstance(output, PrunedTokens) else output


# ----------------------------------------------------------------------------------- the published model


def test_feature_maps_of_the_published_model():
    golden = np.load(GOLDEN)
    weights = {k[2:]: torch.from_numpy(golden[k]) for k in golden.files if k.startswith("w/")}
    config = json.loads(str(golden["config"]))
    conversion = convert_plainmamba(weights)
    assert not conversion.unused and not conversion.missing
    for key in ("embed_dims", "num_layers", "patch_size", "num_convs_patch_embed"):
        assert conversion.arch[key] == config[key]
    assert conversion.arch["layers_with_dwconv"] == tuple(config["layers_with_dwconv"])
    model = PlainMamba(
        conversion.arch, img_size=config["img_size"], out_indices=config["out_indices"]
    ).eval()
    model.load_state_dict(
        {name.removeprefix("backbone."): x for name, x in conversion.state_dict.items()}
    )
    with torch.no_grad():
        maps = model(torch.from_numpy(golden["x"]))
    assert len(maps) == 2
    for i, feature_map in zip(config["out_indices"], maps):
        expected = torch.from_numpy(golden[f"feat{i}"])
        torch.testing.assert_close(feature_map, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    "arch, parameters, gflops, scan_gflops",
    [
        ("L1", 7_358_656, 1.965, 1.048),
        ("L2", 25_760_832, 5.979, 2.095),
        ("L3", 50_507_456, 10.766, 3.667),
    ],
)
def test_published_parameters_and_flops(arch, parameters, gflops, scan_gflops):
    model = PlainMamba(arch).eval()
    cost = count(model, lambda: model(torch.zeros(1, 3, 224, 224)))["total"]
    assert cost.parameters == parameters
    assert cost.scan_flops / 1e9 == pytest.approx(scan_gflops, rel=0.01)
    assert (cost.flops - cost.scan_flops) / 1e9 == pytest.approx(gflops, rel=0.01)

    pruned = PlainMamba(arch, pruning=arch).eval()
    saved = (
        1 - count(pruned, lambda: pruned(torch.zeros(1, 3, 224, 224)))["total"].flops / cost.flops
    )
    assert saved >= 0.40
    for config in CONFIGS.glob("plainmamba*_pruned_*.py"):
        if config.name.split("_")[1] == ("pruned" if arch == "L1" else arch.lower()):
            said = re.search(r"([\d.]+) % fewer FLOPs", config.read_text())
            assert said is None or said[1] == f"{100 * saved:.1f}", config
    if arch == "L3":  # what the pruning paper reports
        assert saved == pytest.approx(0.416, abs=0.005)


def flops_by_hand(arch, height, width, tokens, embedded=6):
    """``tokens``: how many each layer has; ``embedded``: rows and columns of the position embedding."""
    dim, state = arch["embed_dims"], arch["d_state"]
    inner, rank = 2 * dim, math.ceil(dim / 16)
    hidden, half = 64, arch["patch_size"] // 2
    pixels, patches = (height // 2) * (width // 2), tokens[0]
    flops = pixels * hidden * (3 * 49 + arch["num_convs_patch_embed"] * hidden * 9)
    flops += patches * half * half * hidden * dim
    rows, columns = height // arch["patch_size"], width // arch["patch_size"]
    flops += embedded * rows * (embedded + columns) * dim  # the embedding, by rows and by columns
    for i, k in enumerate(tokens):
        linear = 2 * dim * inner + inner * (rank + 2 * state) + rank * inner + inner * dim
        scan = 4 * (9 * inner * state + inner)
        flops += k * (linear + 49 * inner + scan)
        flops += k * 9 * dim if i in arch["layers_with_dwconv"] else 0
    return flops


@pytest.mark.parametrize("pruning", [None, PRUNING])
def test_flops_by_hand(pruning):
    model = build(pruning)
    cost = count(model, lambda: model(torch.zeros(1, 3, 48, 64)))["total"]
    tokens = [48, 48, 48, 48, 48] if pruning is None else [48, 48, 24, 24, 18]
    assert cost.flops == flops_by_hand(MINI, 48, 64, tokens)


# ---------------------------------------------------------------------------------------- as a backbone


@pytest.mark.parametrize("size", [(48, 72), (50, 71), (8, 8), (3, 5)])
@pytest.mark.parametrize("batch", [1, 2])
def test_any_input_size(size, batch):
    model = build()
    with torch.no_grad():
        maps = model(torch.randn(batch, 3, *size))
    grid = [math.ceil(math.ceil(s / 2) / 4) for s in size]
    for feature_map in maps:
        assert feature_map.shape == (batch, 16, *grid)
        assert feature_map.is_contiguous() and feature_map.isfinite().all()


def test_embedding_without_gradients_is_the_same():
    """BatchNorm with fixed statistics is then made part of the convolutions."""
    embed = build(arch=MINI | dict(num_convs_patch_embed=2)).double().patch_embed
    x = torch.randn(2, 3, 35, 48, dtype=torch.float64)
    expected, grid = embed(x)
    with torch.no_grad():
        tokens, same_grid = embed(x)
    torch.testing.assert_close(tokens, expected, atol=1e-12, rtol=1e-12)
    assert same_grid == grid


def test_registered_in_every_scope():
    with DefaultScope.overwrite_default_scope("mmengine"):
        model = MODELS.build(dict(type="mmvssm.PlainMamba", arch=MINI))
    assert isinstance(model, PlainMamba) and model.out_indices == (4,)


@pytest.mark.parametrize("pruning", [None, PRUNING])
def test_checkpointing_gives_the_same_gradients_and_statistics(pruning):
    """BatchNorm counts a batch once; and stochastic depth drops the same when layers run for the second time."""
    plain, frugal = (build(pruning, with_cp=w, drop_path_rate=0.5).train() for w in (False, True))
    x = torch.randn(2, 3, 48, 56)
    for model in (plain, frugal):
        torch.manual_seed(1)
        sum(values(y).square().sum() for y in model(x)).backward()
    for (name, a), b in zip(plain.named_parameters(), frugal.parameters()):
        torch.testing.assert_close(a.grad, b.grad, msg=lambda m, n=name: f"{n}: {m}")
    counted = [b for name, b in plain.named_buffers() if name.endswith("num_batches_tracked")]
    assert len(counted) == 4 and all(count == 1 for count in counted)
    for (name, a), b in zip(plain.named_buffers(), frugal.buffers()):
        assert torch.equal(a, b), name


@pytest.mark.parametrize("with_cp, expected", [(False, 1), (True, 2)])
def test_checkpointing_runs_mixers_twice(with_cp, expected):
    model = build(with_cp=with_cp).train()
    runs = dict.fromkeys(range(len(model.layers)), 0)

    def count_run(i):
        runs[i] += 1

    for i, layer in enumerate(model.layers):
        layer.mixer.register_forward_pre_hook(lambda *args, i=i: count_run(i))
    sum(y.square().sum() for y in model(torch.randn(2, 3, 16, 16))).backward()
    assert set(runs.values()) == {expected}


def test_drop_path_grows_linearly_and_drops_single_images():
    model = build(drop_path_rate=0.5).train()
    rates = [layer.drop_path.drop_prob for layer in model.layers]
    assert rates == pytest.approx([0, 0.125, 0.25, 0.375, 0.5])
    layer, layout = model.layers[-1], model.dense_layout((2, 3), torch.device("cpu"))
    x = torch.randn(64, 6, 16)
    torch.nn.init.normal_(layer.mixer.out_proj.weight)
    candidates = torch.stack([x, x + 2 * layer.mixer(layer.norm(x), layout)[0]])
    distance = (layer(x, layout)[0] - candidates).flatten(2).abs().amax(2)
    assert (distance.amin(0) < 1e-6).all() and (distance.amax(0) > 1e-3).all()
    assert set(distance.argmin(0).tolist()) == {0, 1}


def test_epsilons_of_the_norms_are_the_published_ones():
    """The outputs' ``norm_cfg`` says 1e-6; layers have PyTorch's default."""
    for name, module in build().named_modules():
        if isinstance(module, torch.nn.LayerNorm):
            assert module.eps == (1e-6 if name.startswith("norms.") else 1e-5), name


def test_frozen_parts():
    model = build(frozen_stages=2).train()
    frozen = [model.patch_embed, *model.layers[:2]]
    assert not any(m.training for part in frozen for m in part.modules())
    assert not any(p.requires_grad for part in frozen for p in part.parameters())
    assert not model.pos_embed.requires_grad
    assert all(p.requires_grad for layer in model.layers[2:] for p in layer.parameters())


# -------------------------------------------------------------------------------- position embeddings


def resized(model, grid):
    maps = model.pos_embed.detach().unflatten(1, model.embed_grid).permute(0, 3, 1, 2)
    maps = F.interpolate(maps, size=grid, mode="bicubic", align_corners=False)
    return maps.flatten(2).transpose(1, 2)


def test_position_embeddings_follow_the_grid_where_all_has_to_be_deterministic():
    """On a GPU the backward pass of PyTorch's bicubic interpolation is not, and PyTorch refuses it."""
    model = build()
    x = torch.randn(1, 3, 24, 40)
    expected = model(x)
    sum(y.square().sum() for y in expected).backward()
    gradient, model.pos_embed.grad = model.pos_embed.grad, None
    torch.use_deterministic_algorithms(True)
    try:
        maps = model(x)
        sum(y.square().sum() for y in maps).backward()
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(map(torch.equal, maps, expected))
    torch.testing.assert_close(model.pos_embed.grad, gradient)


def test_position_embeddings_of_another_grid_stay_exact_under_autocast():
    model = build()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = model._pos_embed_for((5, 7))
    torch.testing.assert_close(actual.detach(), resized(model, (5, 7)))
    assert torch.autograd.grad(actual.sum(), model.pos_embed)[0].isfinite().all()


def load(target, source, anonymous):
    """Call ``load_state_dict``, perhaps with a file that lacks the embedding's grid."""
    weights = source.state_dict()
    target.load_state_dict(dict(weights) if anonymous else weights)
    return target.pos_embed.detach()


@pytest.mark.parametrize(
    "trained, wanted",
    [(48, 64), ((32, 128), 64), (64, (32, 128)), ((32, 128), (128, 32)), ((24, 40), (40, 48))],
    ids=str,
)
def test_position_embedding_of_another_grid_is_resized_when_loaded(trained, wanted, recwarn):
    """Also if both have the same number of positions, 8x8 and 4x16."""
    source, target = build(img_size=trained), build(img_size=wanted, seed=1)
    actual = load(target, source, anonymous=False)
    torch.testing.assert_close(actual, resized(source, target.embed_grid))
    assert not recwarn


def test_position_embedding_of_the_same_grid_is_loaded_as_it_is():
    source, target = build(img_size=(32, 128)), build(img_size=(32, 128), seed=1)
    assert torch.equal(load(target, source, anonymous=False), source.pos_embed)


def test_grid_of_the_position_embedding_survives_a_checkpoint(tmp_path):
    """mmengine saves and loads a whole detector."""
    from mmengine.runner.checkpoint import get_state_dict, load_checkpoint, save_checkpoint

    source = torch.nn.ModuleDict(dict(backbone=build(img_size=(32, 128))))
    target = torch.nn.ModuleDict(dict(backbone=build(img_size=64, seed=1)))
    save_checkpoint(dict(state_dict=get_state_dict(source)), str(tmp_path / "model.pth"))
    load_checkpoint(target, str(tmp_path / "model.pth"), strict=True)
    torch.testing.assert_close(
        target["backbone"].pos_embed.detach(), resized(source["backbone"], (8, 8))
    )


@pytest.mark.parametrize("trained, wanted", [(48, 64), (64, 64), ((24, 40), (24, 40))], ids=str)
def test_position_embedding_that_does_not_say_its_grid(trained, wanted, recwarn):
    """Published files have none: we assume the model's grid if the number of positions fits, else a square."""
    source, target = build(img_size=trained), build(img_size=wanted, seed=1)
    actual = load(target, source, anonymous=True)
    torch.testing.assert_close(actual, resized(source, target.embed_grid))
    assert not recwarn


@pytest.mark.parametrize(
    "trained, wanted, likely", [(64, (32, 128), "4x16"), (48, (32, 128), "6x6")], ids=str
)
def test_position_embedding_that_may_be_of_several_grids(trained, wanted, likely):
    source, target = build(img_size=trained), build(img_size=wanted, seed=1)
    words = rf"does not say of what grid; it is taken for {likely}\. .* build the model with the img_size"
    with pytest.warns(UserWarning, match=words):
        load(target, source, anonymous=True)


def test_position_embedding_of_an_unknown_grid():
    source, target = build(img_size=(24, 40)), build(img_size=48)
    words = (
        "has 15 positions and does not say of what grid, and they are no square: build the model"
    )
    with pytest.raises(ValueError, match=words):
        load(target, source, anonymous=True)


def test_position_embedding_of_another_width_is_refused_by_pytorch():
    source, target = build(arch=MINI | dict(embed_dims=32)), build()
    with pytest.raises(RuntimeError, match="size mismatch for pos_embed"):
        load(target, source, anonymous=False)


# ------------------------------------------------------------------------------------- initial values


def test_initial_step_sizes_are_mambas():
    """Log-uniform from 0.001 to 0.1 for a bias that counts once."""
    model = PlainMamba(MINI | dict(embed_dims=64))
    for layer in model.layers:
        steps = F.softplus(layer.mixer.dt_proj.bias)
        assert 0.0009 < steps.min() < 0.003 and 0.03 < steps.max() < 0.11
        bound = layer.mixer.dt_rank**-0.5
        assert 0.8 * bound < layer.mixer.dt_proj.weight.abs().max() <= bound
        assert layer.mixer.dt_proj.weight.std().item() == pytest.approx(bound / 3**0.5, rel=0.2)


def test_initial_values_of_the_published_training_can_be_asked_for():
    """Its config gives every linear layer a bias of zero, that of the step sizes too."""
    init_cfg = dict(type="TruncNormal", layer="Linear", std=0.02, bias=0.0)
    model = PlainMamba(MINI, init_cfg=init_cfg)
    model.init_weights()
    for layer in model.layers:
        assert not layer.mixer.dt_proj.bias.any()
        assert layer.mixer.dt_proj.weight.abs().max() <= 2  # where TruncNormal cuts off
        assert layer.mixer.dt_proj.weight.std() < 0.04


@pytest.mark.parametrize("raster_source", [True, False])
@pytest.mark.parametrize("double_step_bias", [True, False])
def test_scan_is_the_published_one(raster_source, double_step_bias):
    """Step by step: u from the walk's token; delta, B and C from the raster's, or all from the walk's."""
    torch.manual_seed(0)
    mixer = PlainMambaMixer(4, 3, double_step_bias).double()
    mixer.direction_Bs.data.normal_()
    mixer.dt_proj.bias.data.normal_()
    x, delta = torch.randn(2, 2, 12, 8, dtype=torch.float64)
    B, C = torch.randn(2, 2, 12, 3, dtype=torch.float64)
    walks = snake_walks(3, 4, raster_source=raster_source)
    actual = mixer.scan(x, delta, B, C, walks)

    expected = torch.zeros_like(x)
    plain = snake_walks(3, 4, raster_source=False)
    bias = mixer.dt_proj.bias * (2 if double_step_bias else 1)
    for k, order in enumerate(plain.traversal.order.long()):
        source = torch.arange(12) if raster_source else order
        direction = mixer.direction_Bs[plain.arrival[k, order]]
        y = selective_scan_naive(
            x[:, order, None],
            delta[:, source, None],
            -torch.exp(mixer.A_log)[None],
            (B[:, source] + direction)[:, :, None],
            C[:, source, None],
            mixer.D[None],
            bias[None],
        )
        expected[:, order] += y[:, :, 0]
    torch.testing.assert_close(actual, expected, atol=1e-10, rtol=1e-10)


# ---------------------------------------------------------------------------------------------- pruned


@pytest.mark.parametrize("rejoin", [None, 4])
@pytest.mark.parametrize("alignment", ["decay", "hold", "none"])
def test_keeping_all_is_the_dense_model_bit_for_bit(alignment, rejoin):
    dense = build()
    pruned = build(dict(layers=(0, 2), keep_ratio=1, alignment=alignment, rejoin=rejoin))
    x = torch.randn(2, 3, 48, 64)
    for a, b in zip(dense(x), pruned(x)):
        assert torch.equal(a, b)


@pytest.mark.parametrize("raster_source", [True, False])
def test_compact_layer_with_nothing_pruned_equals_the_dense_layer(raster_source):
    """The machinery for kept tokens, given all of them."""
    model = build(PRUNING, raster_source=raster_source).double()
    tokens = torch.randn(2, 30, 16, dtype=torch.float64)
    everything = PrunedTokens(
        tokens, torch.arange(30).expand(2, -1), (5, 6), tokens[:, :0], torch.zeros(2, 0).long()
    )
    compact = model.pruned_layout(everything)
    dense = model.dense_layout((5, 6), tokens.device)
    for layer in model.layers:
        for a, e in zip(layer(tokens, compact), layer(tokens, dense)):
            torch.testing.assert_close(a, e, atol=1e-10, rtol=1e-10)


def test_layer_with_aligned_state_equals_the_masked_layer():
    """A whole mixer over kept tokens, beside its parts over the full grid with the others masked."""
    torch.manual_seed(0)
    model = build(PRUNING, raster_source=False).double()
    mixer = model.layers[2].mixer
    mixer.direction_Bs.data.normal_()
    grid, batch = (4, 7), 2
    positions = torch.stack([torch.randperm(28)[:11].sort().values for _ in range(batch)])
    kept = torch.zeros(batch, 28, dtype=torch.bool).scatter(1, positions, True)[..., None]
    tokens = torch.randn(batch, 28, 16, dtype=torch.float64)
    compact_tokens = tokens[kept[..., 0]].view(batch, 11, 16)
    state = PrunedTokens(compact_tokens, positions, grid, tokens[:, :0], positions[:, :0])
    out, y = mixer(compact_tokens, model.pruned_layout(state))

    dense = Layout(snake_walks(*grid, raster_source=False), grid)
    x = mixer.in_proj(tokens) * kept
    x = F.silu(dense.convolve(mixer.conv, x)) * kept
    dt, B, C = mixer.x_proj(x).split((mixer.dt_rank, 4, 4), dim=-1)
    expected = mixer.scan(x, F.linear(dt, mixer.dt_proj.weight), B, C, dense.walks)
    expected = expected[kept[..., 0]].view_as(y)
    torch.testing.assert_close(y, expected, atol=1e-10, rtol=1e-10)
    gated = mixer.out_proj(expected * F.silu(mixer.gate_proj(compact_tokens)))
    torch.testing.assert_close(out, gated, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("alignment", ["decay", "hold", "none"])
def test_what_leaves_and_what_stays(alignment):
    model = build(PRUNING | dict(alignment=alignment))
    outputs = model(torch.randn(2, 3, 48, 64))
    assert [isinstance(y, PrunedTokens) for y in outputs] == [False, False, True, True, True]
    for y, num_kept in zip(outputs[2:], (24, 24, 18)):
        assert y.tokens.shape == (2, num_kept, 16) and y.grid == (6, 8)
        assert y.departed.shape == (2, 48 - num_kept, 16)
        everywhere = torch.cat([y.positions, y.departed_positions], 1).sort(-1).values
        assert torch.equal(everywhere, torch.arange(48).expand(2, -1))
        assert (y.positions.diff(dim=-1) > 0).all()


@pytest.mark.parametrize("baseline", [dict(reduction="merge"), dict(metric="random")])
def test_baselines_leave_as_many_and_learn(baseline):
    model = build(PRUNING | baseline).train()
    x = torch.randn(2, 3, 48, 64)
    x[1, :, 40:] = 0  # padding, which goes first here, too
    outputs = model(x)
    assert [values(y).shape[-1] for y in outputs[2:]] == [16] * 3
    assert [y.tokens.shape[1] for y in outputs[2:]] == [24, 24, 18]
    assert outputs[2].departed_positions[1].sort().values[-8:].tolist() == list(range(40, 48))
    sum(values(y).square().mean() for y in outputs).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_merged_tokens_stand_for_all():
    """With the layers between taken out, what is left has the mean of all that there was."""
    model = build(dict(layers=(0, 1, 2), keep_ratio=0.6, reduction="merge"))
    for layer in model.layers:
        layer.forward = lambda x, *_: (x, x)
    states = list(model.walk_layers(torch.randn(2, 3, 48, 64)))
    everything, left = states[0].tokens, states[3].tokens
    assert left.shape[1] == 11  # of 48, 29 and 18
    # The sizes are not told: they solve for the mean, as 16 channels and 11 tokens let them.
    sizes = torch.linalg.lstsq(left.transpose(1, 2), everything.sum(1)[..., None]).solution[..., 0]
    torch.testing.assert_close(sizes, sizes.round(), atol=1e-2, rtol=0)
    assert (sizes.round() >= 1).all() and sizes.sum(1).round().tolist() == [48, 48]


def test_departed_tokens_keep_their_last_value():
    model = build(PRUNING)
    states = list(model.walk_layers(torch.randn(2, 3, 48, 64)))
    pruned = states[4].pruned
    for b in range(2):
        for n, position in enumerate(pruned.departed_positions[b].tolist()):
            if n < 24:  # left after layer 1, which had all tokens
                expected = states[1].tokens[b, position]
            else:  # left after layer 3
                index = states[3].pruned.positions[b].tolist().index(position)
                expected = states[3].tokens[b, index]
            assert torch.equal(pruned.departed[b, n], expected)


FOLLOWING = dict(layers=(1, 3), keep_ratio=0.5, follow=True)


@pytest.mark.parametrize("settings", [{}, dict(reduction="merge")])
def test_followers_change_and_the_others_do_not(settings):
    model, plain = (build(FOLLOWING | settings | dict(follow=f)) for f in (True, False))
    x = torch.randn(2, 3, 48, 64)
    for actual, expected in zip(model(x), plain(x)):
        if isinstance(actual, torch.Tensor):
            assert torch.equal(actual, expected)
            continue
        assert torch.equal(actual.tokens, expected.tokens)
        assert torch.equal(actual.departed_positions, expected.departed_positions)
        assert not torch.allclose(actual.departed, expected.departed)


@pytest.mark.parametrize("rejoin", [None, 4])
def test_followers_change_as_the_others_do(rejoin):
    """If all kept tokens change by the same, so do the dropped ones, over several prunings."""
    model = build(FOLLOWING | dict(layers=(0, 2), rejoin=rejoin))
    for layer in model.layers:
        layer.forward = lambda x, layout, with_cp: (x + 1, torch.randn_like(x))
    x = torch.randn(2, 3, 48, 64)
    embedded = model.embed(x).tokens
    for i, state in enumerate(model.walk_layers(x)):
        tokens = state.tokens
        assert (state.pruned is None) == (i in (0, rejoin))
        if state.pruned is not None:
            tokens = with_dropped(tokens, state.pruned).flatten(2).transpose(1, 2)
        torch.testing.assert_close(tokens, embedded + i + 1)


def test_followers_have_gradients():
    model = build(FOLLOWING).double()
    restored = TokenRestoration()(model(torch.randn(1, 3, 48, 64, dtype=torch.float64)))
    pruned = model(torch.randn(1, 3, 48, 64, dtype=torch.float64))[4]
    assert restored[4].isfinite().all()
    gradients = torch.autograd.grad(pruned.departed.sum(), model.layers[4].parameters())
    assert any(g.abs().sum() > 0 for g in gradients)  # of a layer that dropped tokens do not enter


REJOINING = dict(layers=(0, 1), keep_ratio=0.5, rejoin=3)


def test_dropped_tokens_rejoin_with_their_last_value():
    model = build(REJOINING)
    states = list(model.walk_layers(torch.randn(2, 3, 48, 64)))
    assert [state.tokens.shape[1] for state in states] == [48, 24, 12, 48, 48]
    assert [state.pruned is None for state in states] == [True, False, False, True, True]
    left = states[2].pruned
    for b in range(2):
        returned = torch.empty(48, 16)
        returned[left.positions[b]] = states[2].tokens[b]
        returned[left.departed_positions[b]] = left.departed[b]
        layout = model.dense_layout((6, 8), returned.device)
        expected, _ = model.layers[3](returned[None], layout)
        torch.testing.assert_close(states[3].tokens[b : b + 1], expected)


def test_layers_are_dense_once_tokens_rejoined():
    model = build(REJOINING)
    outputs = model(torch.randn(2, 3, 48, 64))
    kinds = [Tensor, PrunedTokens, PrunedTokens, Tensor, Tensor]
    assert [type(y) for y in outputs] == kinds
    cost = count(model, lambda: model(torch.zeros(1, 3, 48, 64)))["total"]
    assert cost.flops == flops_by_hand(MINI, 48, 64, [48, 24, 12, 48, 48])


def test_dropped_tokens_learn_from_layers_that_they_rejoin():
    model = build(REJOINING).train()
    model(torch.randn(2, 3, 48, 64))[-1].square().mean().backward()
    for name, parameter in model.named_parameters():
        if not name.startswith("norms.") or name.startswith("norms.4"):
            assert parameter.grad is not None and parameter.grad.isfinite().all(), name


@pytest.mark.parametrize("metric", ["clip", "value", "l1", "l2"])
def test_the_most_important_tokens_stay(metric):
    model = build(dict(layers=(1,), keep_ratio=0.3, metric=metric))
    x = torch.randn(1, 3, 48, 64)
    states = list(model.walk_layers(x))
    # The definition, from the layer's own scan.
    _, y = model.layers[1](states[0].tokens, model.dense_layout((6, 8), x.device))
    score = {
        "clip": lambda t: max(t, 0.0),
        "value": lambda t: t,
        "l1": abs,
        "l2": lambda t: t * t,
    }[metric]
    importance = [sum(map(score, token)) / len(token) for token in y[0].tolist()]
    ranked = sorted(range(48), key=lambda i: (-importance[i], i))
    assert states[2].pruned.positions[0].tolist() == sorted(ranked[:15])
    scores = states[1].importance[0]
    if metric == "l2":
        scores = scores.square()
    torch.testing.assert_close(scores, torch.tensor(importance), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("metric", ["clip", "value"])
def test_padding_leaves_first(metric):
    """Images of 24x40 and 40x32 pixels, 15 and 20 of 48 tokens, of which 24 stay after layer 1 and 18 after 3."""
    model = build(PRUNING | dict(metric=metric))
    x = torch.zeros(2, 3, 48, 64)
    x[0, :, :24, :40], x[1, :, :40, :32] = torch.randn(3, 24, 40), torch.randn(3, 40, 32)
    inside = torch.zeros(2, 6, 8, dtype=torch.bool)
    inside[0, :3, :5], inside[1, :5, :4] = True, True
    states = list(model.walk_layers(x))
    for positions in (states[2].pruned.positions, states[4].pruned.positions):
        kept = torch.zeros(2, 48, dtype=torch.bool).scatter(1, positions, True)
        seen = inside.flatten(1)
        # All of the first image's, and as many of the second's as there is room for.
        assert (seen & kept).sum(1).tolist() == [15, min(20, positions.shape[1])]
    # What is reported is how important they are.
    assert states[1].importance.isfinite().all()


@pytest.mark.parametrize("alignment", ["decay", "hold", "none"])
def test_every_parameter_of_a_pruned_model_learns(alignment):
    model = build(PRUNING | dict(alignment=alignment)).train()
    outputs = model(torch.randn(2, 3, 48, 64))
    loss = sum((y.tokens.square().mean() + y.departed.abs().mean()) for y in outputs[2:])
    (loss + sum(y.square().mean() for y in outputs[:2])).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().max() > 0 or name.endswith("gate_proj.bias"), name


def test_two_runs_agree_bit_for_bit():
    model = build(PRUNING).train()
    x = torch.randn(2, 3, 48, 64)
    gradients = []
    for _ in range(2):
        model.zero_grad()
        sum(values(y).square().sum() for y in model(x)).backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients))


@pytest.mark.parametrize("alignment", ["decay", "hold", "none"])
def test_half_precision(alignment):
    """Under autocast to bfloat16: nearly the same first maps, finite gradients, the same numbers of tokens."""
    model = build(PRUNING | dict(alignment=alignment)).train()
    model.patch_embed.eval()
    narrow = []
    model.layers[0].mixer.out_proj.register_forward_hook(lambda m, x, y: narrow.append(y.dtype))
    x = torch.randn(2, 3, 48, 64)
    expected = model(x)
    with torch.autocast("cpu", torch.bfloat16):
        actual = model(x)
    assert narrow == [torch.float32, torch.bfloat16]
    for a, e in zip(actual, expected):
        assert type(a) is type(e) and values(a).shape == values(e).shape
    # As far as nothing is pruned; later on, tokens that are nearly as important change places.
    for a, e in zip(actual[:2], expected[:2]):
        assert 0 < (a.float() - e).norm() < 0.02 * e.norm()
    sum(values(y).float().square().sum() for y in actual).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")
@pytest.mark.parametrize("alignment", ["decay", "hold", "none"])
def test_gpu_agrees_with_cpu(alignment):
    model = build(PRUNING | dict(alignment=alignment))
    x = torch.randn(2, 3, 48, 64)
    with torch.no_grad():
        expected = model(x)
        actual = model.cuda()(x.cuda())
    for a, e in zip(actual, expected):
        torch.testing.assert_close(values(a).cpu(), values(e), atol=1e-3, rtol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("pruning", [None, PRUNING])
def test_compiles_as_one_graph(pruning):
    model = build(pruning)
    x = torch.randn(1, 3, 48, 64)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        for a, e in zip(compiled(x), model(x)):
            torch.testing.assert_close(values(a), values(e), atol=1e-5, rtol=1e-5)


@pytest.mark.skipif(not scan_cpu.available(), reason="no compiled kernel")
@pytest.mark.parametrize("pruning", [None, PRUNING, PRUNING | dict(alignment="hold")])
def test_the_four_walks_run_together_on_a_cpu(pruning, monkeypatch):
    """They share the decay of the state, which we compute once for all."""
    together = []
    forward = scan_cpu.forward

    def spy(inputs):
        together.append(scan_cpu.runs_walks_together(inputs))
        return forward(inputs)

    monkeypatch.setattr(scan_cpu, "forward", spy)
    model = build(pruning)
    with torch.no_grad():
        model(torch.randn(2, 3, 48, 64))
    assert together == [True] * len(model.layers)


# ------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    "settings, words",
    [
        (dict(arch="L4"), "unknown arch 'L4'; known are 'L1', 'L2', 'L3'"),
        (dict(arch=dict(embed_dims=8)), "an arch dict has exactly the keys"),
        (dict(arch=MINI | dict(patch_size=15)), "patch_size must be even; got 15"),
        (dict(arch=MINI | dict(layers_with_dwconv=[5])), "layers_with_dwconv must be from 0 to 4"),
        (dict(out_indices=(3, 1)), "out_indices must be increasing numbers of layers from 0 to 4"),
        (dict(drop_path_rate=1.0), r"drop_path_rate must be in \[0, 1\); got 1.0"),
        (dict(frozen_stages=6), r"frozen_stages must be from -1 \(nothing\) to 5"),
        (dict(pruning="L7"), "unknown preset 'L7'; known are 'L1', 'L2', 'L3'"),
    ],
)
def test_bad_settings(settings, words):
    with pytest.raises(ValueError, match=words):
        PlainMamba(**(dict(arch=MINI) | settings))


def test_bad_images():
    with pytest.raises(ValueError, match=r"expected images \(B, 3, H, W\); got \(3, 48, 48\)"):
        build()(torch.zeros(3, 48, 48))


def test_a_grid_that_cannot_be_packed():
    model = build(dict(layers=(1,), keep_ratio=0.6, alignment="none"))
    with pytest.raises(ValueError, match="cannot pack the 29 tokens kept of a 6x8 grid"):
        model(torch.zeros(1, 3, 48, 64))  # 29 is prime


@pytest.mark.parametrize(
    "arch, layers, tokens",
    [("L1", 24, [118, 71, 43]), ("L2", 24, [128, 84, 55]), ("L3", 36, [138, 97, 68])],
)
def test_presets_fit_their_models(arch, layers, tokens):
    """Three times of the 14x14 tokens of a 224x224 image the share that the preset's name stands for."""
    assert PlainMamba.arch_settings[arch]["num_layers"] == layers
    pruning = TokenPruning.of(arch, layers)
    assert pruning.alignment == "decay"
    kept = [196]
    for i in range(layers):
        kept.append(pruning.num_kept(i, kept[-1]))
    assert [n for n, before in zip(kept[1:], kept) if n != before] == tokens


@pytest.mark.parametrize("arch, out_indices", [("L1", (5, 11, 17, 23)), ("L3", (8, 17, 26, 35))])
def test_presets_of_a_pyramid_reduce_after_its_first_map(arch, out_indices):
    preset = PRESETS[f"{arch}-pyramid"]
    assert set(out_indices[:3]) < set(preset["layers"]) and min(preset["layers"]) == out_indices[0]
    dense, pruned = (
        PlainMamba(arch, out_indices=out_indices, pruning=p).eval() for p in (None, preset)
    )
    x = torch.zeros(1, 3, 224, 224)
    costs = [count(m, lambda m=m: m(x))["total"].flops for m in (dense, pruned)]
    assert 0.41 < 1 - costs[1] / costs[0] < 0.44


def test_every_model_has_a_preset_for_classes_and_one_for_a_pyramid():
    archs = set(PlainMamba.arch_settings)
    assert set(PRESETS) == archs | {f"{arch}-pyramid" for arch in archs}
