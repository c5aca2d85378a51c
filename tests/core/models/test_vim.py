import json
import math
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from mmengine.registry import MODELS, DefaultScope
from torch import nn

from mmvssm.analysis.flops import count
from mmvssm.analysis.pruning_view import observe_pruning
from mmvssm.models import Vim
from mmvssm.models.backbones.vim import LinePruning, VimMixer
from mmvssm.models.pruning import PrunedTokens, select, similarity_to_others
from mmvssm.models.published import convert_vim
from mmvssm.ops.selective_scan.naive import selective_scan_naive

GOLDEN = Path(__file__).parents[2] / "golden/vim_small.npz"
MINI = dict(embed_dims=16, num_layers=5, patch_size=8, stride=8, d_state=3)
PRUNING = dict(layers=(1, 3), keep_ratio=(0.5, 0.75))


@pytest.fixture(scope="module")
def golden():
    values = np.load(GOLDEN)
    weights = {k[2:]: torch.from_numpy(values[k]) for k in values.files if k.startswith("w/")}
    return values, weights, json.loads(str(values["config"]))


def like_published(config, **settings):
    arch = dict(
        embed_dims=config["embed_dim"],
        num_layers=config["depth"],
        patch_size=config["patch_size"],
        stride=config["stride"],
        d_state=config["d_state"],
    )
    return Vim(arch, img_size=config["img_size"], **settings).eval()


def build(pruning=None, **settings):
    torch.manual_seed(0)
    return Vim(MINI, img_size=(48, 64), pruning=pruning, **settings).eval()


@pytest.mark.parametrize("prefix", ["", "other/"])
@pytest.mark.parametrize("out_type, name", [("residual", "feat"), ("mixer", "mixer")])
def test_feature_maps_of_the_published_model(golden, prefix, out_type, name):
    """Also at another size, for which the position embedding is resized."""
    values, weights, config = golden
    model = like_published(config, out_indices=config["out_indices"], out_type=out_type)
    model.load_state_dict(weights, strict=False)
    with torch.no_grad():
        maps = model(torch.from_numpy(values[f"{prefix}x"]))
    for i, feature_map in zip(config["out_indices"], maps):
        expected = torch.from_numpy(values[f"{prefix}{name}{i}"])
        torch.testing.assert_close(feature_map, expected, atol=1e-4, rtol=0)
        assert feature_map.is_contiguous()


@pytest.mark.parametrize("prefix", ["", "other/"])
def test_logits_of_the_published_classifier(golden, prefix):
    values, weights, config = golden
    conversion = convert_vim(weights)
    assert not conversion.unused and not conversion.missing
    assert conversion.arch["num_layers"] == config["depth"]
    model = like_published(config, out_type="cls_token")
    state = {
        name.removeprefix("backbone."): value
        for name, value in conversion.state_dict.items()
        if name.startswith("backbone.")
    }
    model.load_state_dict(state)
    with torch.no_grad():
        (token,) = model(torch.from_numpy(values[f"{prefix}x"]))
    head = (conversion.state_dict[f"head.fc.{name}"] for name in ("weight", "bias"))
    expected = torch.from_numpy(values[f"{prefix}logits"])
    torch.testing.assert_close(F.linear(token, *head), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("img_size", [(40, 56), (64, 48)])
def test_a_classifier_s_weights_start_a_dense_backbone(golden, img_size):
    """Ours and the published ones, the position embedding resized without the class token."""
    _, weights, config = golden
    classifier = like_published(config, out_type="cls_token")
    classifier.load_state_dict(weights, strict=False)
    states = [classifier.state_dict()]  # which says of what grid its embedding is
    states += [weights] * (img_size == (40, 56))
    for state in states:
        dense = like_published(dict(config, img_size=img_size))
        missing, unexpected = dense.load_state_dict(state, strict=False)
        assert not missing and set(unexpected) <= {"head.weight", "head.bias"}
        embed = weights["pos_embed"]
        embed = torch.cat(
            [embed[:, :17], embed[:, 18:]], 1
        )  # 35 patches, the class token's place is 17
        maps = embed.transpose(1, 2).unflatten(2, (5, 7))
        grid = tuple(side // 8 for side in img_size)
        resized = F.interpolate(maps, size=grid, mode="bicubic").flatten(2).transpose(1, 2)
        torch.testing.assert_close(dense.pos_embed.data, resized)


def test_other_models_are_refused(golden):
    _, weights, _ = golden
    without = {k: v for k, v in weights.items() if "A_b_log" not in k}
    for wrong in ({"layers.0.weight": torch.zeros(1)}, without):
        with pytest.raises(ValueError, match="not the weights of a published Vim"):
            convert_vim(wrong)


@pytest.mark.parametrize(
    "arch, parameters, projections, scan",
    [
        ("T", 6_955_008, 1.293, 0.527),
        ("S", 25_411_584, 4.851, 1.053),
        ("B", 96_829_440, 18.766, 2.106),
        ("T+", None, 6.74, None),
        ("S+", None, 21.9, None),
        ("B+", None, 77.3, None),
    ],
)
def test_published_parameters_and_flops(arch, parameters, projections, scan):
    """Both directions, as they run. The papers count one."""
    with torch.device("meta"):
        model = Vim(arch, out_type="cls_token").eval()
        costs = count(model, lambda: model(torch.zeros(1, 3, 224, 224)))
    cost, layer = costs["total"], model.layers[0].mixer
    if parameters is None:
        assert cost.flops / 1e9 == pytest.approx(projections, abs=0.06)
        return
    assert cost.parameters == parameters
    head = model.embed_dims * 1000
    assert (cost.flops - cost.scan_flops + head) / 1e9 == pytest.approx(projections, abs=2e-3)
    assert cost.scan_flops / 1e9 == pytest.approx(scan, abs=1e-3)
    branch = layer.branches[1]
    tokens, inner = 197, 2 * model.embed_dims
    of_a_branch = inner * 4 + branch.x_proj.weight.numel() + branch.dt_proj.weight.numel()
    # The figures of the literature come out if D * u counts in both directions, and all else in one.
    of_a_branch = 24 * tokens * (of_a_branch + 9 * inner * 16)
    one_direction = {"T": 1.449, "S": 5.077, "B": 18.868}[arch]
    assert (cost.flops + head - of_a_branch) / 1e9 == pytest.approx(one_direction, abs=2e-3)


def test_mixer_by_hand_and_its_gradients():
    """Two scans, the second over a line that is turned round; float64."""
    torch.manual_seed(0)
    mixer = VimMixer(8, d_state=3).double()
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    x = torch.randn(2, 7, 8, dtype=torch.float64, requires_grad=True)

    def by_hand():
        total = 0
        for branch, backwards in zip(mixer.branches, (False, True)):
            line = F.linear(x, mixer.in_proj.weight)
            line = line.flip(1) if backwards else line
            padded = F.pad(line, (0, 0, 3, 0))
            taps = (padded[:, k : k + 7] * branch.conv.weight[:, 0, k] for k in range(4))
            u = F.silu(sum(taps) + branch.conv.bias)
            dt, B, C = F.linear(u, branch.x_proj.weight).split((1, 3, 3), -1)
            y = selective_scan_naive(
                *(t[:, :, None] for t in (u, F.linear(dt, branch.dt_proj.weight))),
                -branch.A_log.exp()[None],
                *(t[:, :, None] for t in (B, C)),
                branch.D[None],
                branch.dt_proj.bias[None],
            )[:, :, 0]
            total = total + (y.flip(1) if backwards else y)
        gate = F.silu(F.linear(x, mixer.gate_proj.weight))
        return F.linear(total * gate / 2, mixer.out_proj.weight)

    leaves = (x, *mixer.parameters())
    weight = torch.randn(2, 7, 8, dtype=torch.float64)
    ours, expected = mixer(x, build().dense_layout((1, 7), x.device)).mixed, by_hand()
    torch.testing.assert_close(ours, expected, atol=1e-11, rtol=1e-9)
    torch.testing.assert_close(
        torch.autograd.grad((ours * weight).sum(), leaves),
        torch.autograd.grad((expected * weight).sum(), leaves),
        atol=1e-10,
        rtol=1e-8,
    )


@pytest.mark.parametrize("stride", [8, 5])
@pytest.mark.parametrize("size", [(64, 96), (65, 97), (33, 7), (1, 1)])
@pytest.mark.parametrize("batch", [1, 2])
def test_any_input_size(size, batch, stride):
    model = Vim(dict(MINI, stride=stride)).eval()
    with torch.no_grad():
        (feature_map,) = model(torch.randn(batch, 3, *size))
    grid = tuple(math.ceil(max(side - 8, 0) / stride) + 1 for side in size)
    assert feature_map.shape == (batch, 16, *grid)
    assert feature_map.is_contiguous() and feature_map.isfinite().all()


# ------------------------------------------------------------------------------------- pruning


@pytest.mark.parametrize("alignment", ["decay", "hold", "none", "recentred"])
def test_dropped_tokens_rejoin_around_the_class_token(alignment):
    """With layers that change nothing, all tokens are back in their places."""
    pruning = dict(layers=(0, 1), keep_ratio=0.5, alignment=alignment, rejoin=3)
    model = build(pruning, out_type="cls_token")
    for layer in model.layers:
        mix = layer.forward
        layer.forward = lambda x, *rest, mix=mix: (x, mix(x, *rest)[1])
    states = list(model.walk_layers(torch.randn(2, 3, 48, 64)))
    assert states[2].pruned is not None and states[3].pruned is None
    assert torch.equal(states[3].tokens, states[0].tokens)


@pytest.mark.parametrize("out_type", ["residual", "cls_token"])
@pytest.mark.parametrize("alignment", ["decay", "hold", "none", "recentred"])
def test_keeping_everything_is_the_dense_model(alignment, out_type):
    dense = build(out_type=out_type)
    pruned = build(dict(layers=(1, 3), keep_ratio=1, alignment=alignment), out_type=out_type)
    x = torch.randn(2, 3, 48, 64)
    for a, b in zip(dense(x), pruned(x)):
        assert torch.equal(a, b)


def test_layer_with_aligned_state_equals_the_masked_layer():
    """A whole mixer over kept tokens, beside its parts over the full line with the others set to zero."""
    model = build(PRUNING).double()
    mixer, length = model.layers[2].mixer, 28
    positions = torch.stack([torch.randperm(length)[:11].sort().values for _ in range(2)])
    kept = torch.zeros(2, length, dtype=torch.bool).scatter(1, positions, True)[..., None]
    tokens = torch.randn(2, length, 16, dtype=torch.float64)
    compact = tokens[kept[..., 0]].view(2, 11, 16)
    state = PrunedTokens(compact, positions, (4, 7), tokens[:, :0], positions[:, :0])
    y = mixer(compact, model.pruned_layout(state)._replace(apart=True)).scanned
    summed = mixer(compact, model.pruned_layout(state)).scanned
    torch.testing.assert_close(summed, y.sum(2))

    x = mixer.in_proj(tokens) * kept
    dense = model.dense_layout((4, 7), x.device)
    for k, branch in enumerate(mixer.branches):
        u, *_ = branch(x, dense)
        u = u * kept  # the convolution and its bias reach pruned places, too
        dt, B, C = branch.x_proj(u).split((1, 3, 3), -1)
        operands = (u, F.linear(dt, branch.dt_proj.weight))
        expected = selective_scan_naive(
            *((t.flip(1) if k else t)[:, :, None] for t in operands),
            -branch.A_log.exp()[None],
            *((t.flip(1) if k else t)[:, :, None] for t in (B, C)),
            branch.D[None],
            branch.dt_proj.bias[None],
        )[:, :, 0]
        expected = (expected.flip(1) if k else expected)[kept[..., 0]].view_as(y[:, :, k])
        torch.testing.assert_close(y[:, :, k], expected / 2, atol=1e-10, rtol=1e-10)


def test_on_a_line_holding_the_state_is_the_shorter_line_but_for_the_convolution():
    hold, none = (build(PRUNING | dict(alignment=a)) for a in ("hold", "none"))
    x = torch.randn(2, 3, 48, 64)
    (a,), (b,) = hold(x), none(x)
    assert not torch.allclose(a.tokens, b.tokens)
    for model in (hold, none):
        for branch in (b for layer in model.layers for b in layer.mixer.branches):
            branch.conv.weight.data[..., :-1] = 0  # a token sees itself alone
    (a,), (b,) = hold(x), none(x)
    torch.testing.assert_close(a.tokens, b.tokens)


@pytest.mark.parametrize("alignment", ["decay", "hold", "none", "recentred"])
def test_what_leaves_and_what_stays(alignment):
    model = build(PRUNING | dict(alignment=alignment), out_indices=(1, 3, 4))
    outputs = model(torch.randn(2, 3, 48, 64))
    assert [isinstance(y, PrunedTokens) for y in outputs] == [False, True, True]
    for y, num_kept in zip(outputs[1:], (24, 18)):
        assert y.tokens.shape == (2, num_kept, 16) and y.grid == (6, 8)
        everywhere = torch.cat([y.positions, y.departed_positions], 1).sort(-1).values
        assert torch.equal(everywhere, torch.arange(48).expand(2, -1))
        assert (y.positions.diff(dim=-1) > 0).all()


@pytest.mark.parametrize("reduction", ["prune", "merge"])
@pytest.mark.parametrize("alignment", ["decay", "none", "recentred"])
def test_the_class_token_stays(alignment, reduction):
    """Also where it is the least important; it counts as a place of the line, but not as a token to keep."""
    pruning = PRUNING | dict(alignment=alignment, reduction=reduction)
    model = build(pruning, out_type="cls_token")
    x = torch.randn(2, 3, 48, 64)
    model.pruning.importance = lambda y, training: (
        -y.abs().mean(-1) - 1e6 * (torch.arange(y.shape[1]) == y.shape[1] // 2)
    )
    states = list(super(Vim, model).walk_layers(x))
    for state, left in ((states[2], 24), (states[4], 18)):
        positions = state.pruned.positions
        assert positions.shape == (2, left + 1)
        assert ((positions == 24).sum(1) == 1).all()  # of 48 patches, the place before the 24th
        if alignment == "recentred":
            assert (positions[:, left // 2] == 24).all()
        else:
            assert (positions.diff(dim=-1) > 0).all()
        assert not (state.pruned.departed_positions == 24).any()
    patches = list(model.walk_layers(x))
    for state in (patches[2], patches[4]):
        everywhere = torch.cat([state.pruned.positions, state.pruned.departed_positions], 1)
        assert torch.equal(everywhere.sort(1).values, torch.arange(48).expand(2, -1))
        assert state.grid == (6, 8)
    assert patches[1].importance.shape == (2, 48)


def test_the_published_score_is_of_the_mirrored_place():
    model = build(
        dict(layers=(1,), keep_ratio=0.5, metric="mirrored_gate", alignment="recentred"),
        out_type="cls_token",
    )
    x = torch.randn(1, 3, 48, 64)
    states = list(super(Vim, model).walk_layers(x))
    _, mixed = model.layers[1](states[0].tokens, model.dense_layout((1, 49), x.device))
    score = (mixed.scanned[0, :, 1] * mixed.gate[0]).sum(-1).tolist()[::-1]
    patches = sorted((i for i in range(49) if i != 24), key=lambda i: -score[i])[:24]
    kept = states[2].pruned.positions[0].tolist()
    assert sorted(set(kept) - {24}) == sorted(patches)
    assert kept[12] == 24 and kept[:12] + kept[13:] == sorted(patches)


def test_matching_is_with_the_most_similar_of_the_other_half():
    torch.manual_seed(0)
    tokens, absent = torch.randn(2, 9, 5), torch.zeros(2, 9, dtype=torch.bool)
    absent[1, 1] = absent[1, 2] = True
    importance, target = similarity_to_others(tokens, absent)
    for b in range(2):
        for i in range(9):
            others = [j for j in range(1, 9, 2) if not absent[b, j]]
            if i % 2 or absent[b, i]:
                assert target[b, i] == i and importance[b, i] >= 2
                continue
            cosines = [
                F.cosine_similarity(tokens[b, i], tokens[b, j], dim=0).item() for j in others
            ]
            assert target[b, i] == others[int(np.argmax(cosines))]
            assert importance[b, i].item() == pytest.approx(-max(cosines), abs=1e-6)
    _, dropped = select(importance, 6)
    assert (dropped % 2 == 0).all()


def test_padding_leaves_first():
    """An image of 24x40 pixels, 15 of 48 tokens, of which 24 stay after layer 1 and 18 after 3."""
    model = build(PRUNING)
    x = torch.zeros(1, 3, 48, 64)
    x[:, :, :24, :40] = torch.randn(3, 24, 40)
    inside = torch.zeros(6, 8, dtype=torch.bool)
    inside[:3, :5] = True
    for state in list(model.walk_layers(x))[2::2]:
        assert set(inside.flatten().nonzero()[:, 0].tolist()) <= set(
            state.pruned.positions[0].tolist()
        )


@pytest.mark.parametrize("out_type", ["residual", "cls_token"])
def test_what_a_picture_of_the_pruning_shows(out_type):
    layers = observe_pruning(build(PRUNING, out_type=out_type), torch.randn(1, 3, 48, 64))
    assert [(layer.index, layer.num_kept) for layer in layers] == [(1, 24), (3, 18)]
    assert all(layer.kept.shape == layer.importance.shape == (6, 8) for layer in layers)
    assert np.isfinite(layers[0].importance).all() and (layers[1].kept <= layers[0].kept).all()


@pytest.mark.parametrize("preset, low, high", [("S", 0.285, 0.305), ("S-released", 0.285, 0.305)])
def test_preset_saves_the_published_flops(preset, low, high):
    x = torch.zeros(1, 3, 224, 224)
    dense, pruned = (Vim("S", out_type="cls_token", pruning=p).eval() for p in (None, preset))
    before, after = (count(m, partial(m, x))["total"].flops for m in (dense, pruned))
    assert low < 1 - after / before < high


def test_merging_presets_leave_as_many_as_published():
    for preset, merged in (("T-merge", 5), ("S-merge", 11)):
        pruning, left = LinePruning.of(preset, 24), 196
        for layer in range(24):
            left = pruning.num_kept(layer, left)
        assert left == 196 - 11 * merged


@pytest.mark.parametrize("alignment", ["decay", "hold", "none"])
@pytest.mark.parametrize("out_type", ["residual", "cls_token"])
def test_every_parameter_of_a_pruned_model_learns(alignment, out_type):
    model = build(PRUNING | dict(alignment=alignment), out_type=out_type).train()
    (y,) = model(torch.randn(2, 3, 48, 64))
    parts = (y,) if out_type == "cls_token" else (y.tokens, y.departed)
    sum(part.square().mean() for part in parts).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().max() > 0, name


# --------------------------------------------------------------------------- as other backbones


@pytest.mark.parametrize("out_type", ["residual", "cls_token"])
@pytest.mark.parametrize("frozen_stages", [-1, 0, 2, 5])
def test_frozen_stages(frozen_stages, out_type):
    model = Vim(MINI, out_type=out_type, frozen_stages=frozen_stages, drop_path_rate=0.5).train()
    embeddings = [model.pos_embed, *model.patch_embed.parameters()]
    if out_type == "cls_token":
        embeddings += [model.cls_token, model.cls_pos_embed]
    assert all(p.requires_grad == (frozen_stages < 0) for p in embeddings)
    for i, layer in enumerate(model.layers):
        assert all(p.requires_grad != (i < frozen_stages) for p in layer.parameters())
        assert layer.training != (i < frozen_stages)


@pytest.mark.parametrize("pruning", [None, PRUNING])
def test_activation_checkpointing_changes_no_gradient(pruning):
    model = build(pruning)
    x = torch.randn(2, 3, 48, 64)
    gradients = []
    for model.with_cp in (False, True):
        (y,) = model(x)
        loss = (y if pruning is None else y.tokens).square().mean()
        gradients.append(torch.autograd.grad(loss, list(model.parameters())))
    torch.testing.assert_close(*gradients)


def test_out_indices_build_only_what_is_needed():
    model = Vim(MINI, out_indices=(1, 2))
    assert len(model.layers) == 3
    assert [tuple(y.shape) for y in model(torch.randn(1, 3, 32, 40))] == [(1, 16, 4, 5)] * 2


def test_drop_path_grows_linearly():
    rates = [layer.drop_path.drop_prob for layer in Vim(MINI, drop_path_rate=0.4).layers]
    assert rates == pytest.approx([0, 0.1, 0.2, 0.3, 0.4])


def test_initial_parameters_are_the_published_ones():
    torch.manual_seed(0)
    model = Vim("T", out_type="cls_token")
    patches = model.patch_embed.proj.weight
    assert patches.std().item() == pytest.approx((3 * 16**2) ** -0.5, rel=0.02)
    mixer = model.layers[0].mixer
    bound = (384**-0.5) / math.sqrt(24)
    assert 0.98 * bound < mixer.out_proj.weight.abs().max() <= bound
    for branch in mixer.branches:
        steps = F.softplus(branch.dt_proj.bias)
        assert steps.min() > 0.9e-3 and steps.max() < 0.11
        assert torch.allclose(branch.A_log.exp(), torch.arange(1.0, 17).expand(384, -1))
    assert all(m.eps == 1e-5 for m in model.modules() if isinstance(m, nn.LayerNorm))


@pytest.mark.parametrize(
    "arguments, words",
    [
        (dict(arch="XL"), r"unknown arch 'XL'; known are 'T', 'T\+', 'S'"),
        (dict(arch=dict(num_layers=1)), "exactly the keys"),
        (dict(arch=MINI, out_indices=(4, 5)), "out_indices must be increasing numbers of layers"),
        (dict(arch=MINI, out_type="token"), "unknown out_type 'token'; known are 'residual'"),
        (dict(arch=MINI, out_type="cls_token", out_indices=2), "leave out out_indices, or pass 4"),
        (dict(arch=MINI, out_type="mixer", pruning=PRUNING), "pruning needs out_type='residual'"),
        (dict(arch=MINI, pruning="L1"), "unknown preset 'L1'; known are 'T', 'S', 'S-released'"),
        (dict(arch=MINI, pruning=PRUNING | dict(alignment="x")), "known are .* 'recentred'"),
        (dict(arch=MINI, drop_path_rate=1.5), "drop_path_rate must be in"),
        (dict(arch=MINI, frozen_stages=6), "frozen_stages must be from -1"),
    ],
)
def test_wrong_arguments_are_named(arguments, words):
    with pytest.raises(ValueError, match=words):
        Vim(**arguments)


def test_wrong_image_is_named():
    with pytest.raises(ValueError, match=r"expected images \(B, 3, H, W\); got \(1, 4, 8, 8\)"):
        Vim(MINI)(torch.randn(1, 4, 8, 8))


@pytest.mark.parametrize("scope", ["mmengine", "mmdet", "mmseg"])
def test_registered_for_every_project(scope):
    if scope != "mmengine":
        pytest.importorskip(scope)
    with DefaultScope.overwrite_default_scope(scope):
        assert isinstance(MODELS.build(dict(type="mmvssm.Vim", arch=MINI)), Vim)


def test_autocast():
    model, x = build(), torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        (expected,) = model(x)
        with torch.autocast("cpu", torch.bfloat16):
            (feature_map,) = model(x)
    assert (feature_map.float() - expected).norm() / expected.norm() < 0.05


@pytest.mark.slow
@pytest.mark.parametrize("out_type", ["residual", "cls_token"])
@pytest.mark.parametrize("pruning", [None, PRUNING])
def test_compile_fullgraph(out_type, pruning):
    model, x = build(pruning, out_type=out_type), torch.randn(2, 3, 40, 56)
    with torch.no_grad():
        (expected,) = model(x)
        (actual,) = torch.compile(model, backend="aot_eager", fullgraph=True)(x)
    if isinstance(expected, PrunedTokens):
        expected, actual = expected.tokens, actual.tokens
    torch.testing.assert_close(actual, expected)


@pytest.mark.slow
@pytest.mark.parametrize(
    "pruning",
    [None, PRUNING | dict(follow=True), dict(layers=(0, 1), keep_ratio=0.6, rejoin=3)],
)
@pytest.mark.nightly
def test_export_with_dynamic_sizes(pruning):
    model = build(pruning, out_indices=(0, 4))
    model = nn.Sequential(model, MODELS.build(dict(type="mmvssm.TokenRestoration")))
    dims = dict.fromkeys((0, 2, 3), torch.export.Dim.DYNAMIC)
    with torch.no_grad():
        program = torch.export.export(model, (torch.randn(2, 3, 72, 100),), dynamic_shapes=(dims,))
        for size in ((1, 3, 64, 96), (3, 3, 65, 97), (1, 3, 256, 320)):
            x = torch.randn(size)
            for a, b in zip(program.module()(x), model(x)):
                torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)
