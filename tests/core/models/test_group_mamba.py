import importlib
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from mmengine.config import Config
from mmengine.registry import MODELS, DefaultScope
from torch import nn

from mmvssm.analysis.flops import count
from mmvssm.models import GroupMamba, GroupMambaClassifier
from mmvssm.models.backbones.group_mamba import Block, ConvFFN, GroupedVSSS, split_groups
from mmvssm.models.published import convert_groupmamba
from mmvssm.ops import cross_traversal
from mmvssm.ops.selective_scan.naive import selective_scan_naive

conv_ffn = importlib.import_module("mmvssm.ops.conv_ffn")  # the package's attribute is the function
GOLDEN = Path(__file__).parents[2] / "golden/groupmamba_small.npz"
MINI = dict(
    stem_hidden_dim=8, embed_dims=(16, 32, 48, 64), depths=(1, 2, 1, 1), mlp_ratios=(2, 2, 2, 2)
)


@pytest.fixture(scope="module")
def golden():
    values = np.load(GOLDEN)
    weights = {k[2:]: torch.from_numpy(values[k]) for k in values.files if k.startswith("w/")}
    return values, weights


def test_feature_maps_of_the_published_model(golden):
    values, weights = golden
    conversion = convert_groupmamba(weights)
    assert not conversion.unused and not conversion.missing
    config = json.loads(str(values["config"]))
    for key in ("stem_hidden_dim", "embed_dims", "depths", "mlp_ratios"):
        assert np.array_equal(conversion.arch[key], config[key])
    model = GroupMambaClassifier(conversion.arch, config["num_classes"]).eval()
    model.load_state_dict(conversion.state_dict)
    x = torch.from_numpy(values["x"])
    with torch.no_grad():
        logits = model(x)
    backbone = GroupMamba(conversion.arch).eval()
    backbone.load_state_dict(model.backbone.state_dict())
    with torch.no_grad():
        maps = backbone(x)
    for i, feature_map in enumerate(maps):
        expected = torch.from_numpy(values[f"feat{i + 1}"])
        torch.testing.assert_close(feature_map, expected, atol=1e-4, rtol=0)
    expected = torch.from_numpy(values["logits"])
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    "arch, both_heads, one_head, gflops",
    [
        ("tiny", 23_361_917, 22_912_917, 4.67),
        ("small", 34_781_555, 34_268_555, 7.23),
        ("base", 57_150_838, 56_637_838, 14.10),
    ],
)
def test_published_parameters_and_flops(arch, both_heads, one_head, gflops):
    with torch.device("meta"):
        model = GroupMambaClassifier(arch).eval()
        cost = count(model, lambda: model(torch.zeros(1, 3, 224, 224)))
    assert cost["total"].parameters == both_heads
    assert cost["total"].flops / 1e9 == pytest.approx(gflops, rel=0.01)
    parts = sum(c.flops for name, c in cost.items() if name != "total")
    assert parts == pytest.approx(cost["total"].flops, rel=1e-6)
    with torch.device("meta"):
        single = GroupMambaClassifier(arch, distillation=False)
    assert sum(p.numel() for p in single.parameters()) == one_head


def test_flops_of_one_scan_layer_by_hand():
    layer = GroupedVSSS(64)  # 4 groups of 16 channels, dt_rank 1, d_state 1
    traversal = cross_traversal(6, 5)
    cost = count(layer, lambda: layer(torch.zeros(2, 6, 5, 64), traversal))["total"]
    tokens = 2 * 6 * 5
    linear = 4 * 16 * (3 * 16 + 3 + 1)  # in, gate and out; x_proj to (dt, B, C); dt_proj
    scan = 4 * (9 * 16 * 1 + 16)
    assert cost.scan_flops == tokens * scan
    assert cost.flops == tokens * (linear + 64 * 9 + scan)


@pytest.mark.parametrize("size", [(64, 96), (65, 97), (33, 7), (1, 1)])
@pytest.mark.parametrize("batch", [1, 2])
def test_any_input_size(size, batch):
    model = GroupMamba(MINI).eval()
    with torch.no_grad():
        maps = model(torch.randn(batch, 3, *size))
    height, width = size
    height, width = (height + 1) // 2, (width + 1) // 2  # the stem's first convolution
    for feature_map, dim in zip(maps, MINI["embed_dims"]):
        height, width = (height + 1) // 2, (width + 1) // 2
        assert feature_map.shape == (batch, dim, height, width)
        assert feature_map.isfinite().all()


def test_stem_without_gradients_is_the_same():
    """BatchNorm with fixed statistics is then made part of the convolutions."""
    torch.manual_seed(0)
    stem = GroupMamba(MINI).double().eval().stages[0].embed
    for module in stem.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            for tensor in (module.running_mean, module.weight.data, module.bias.data):
                tensor.normal_()
            module.running_var.uniform_(0.5, 2)
    x = torch.randn(2, 18, 26, 3, dtype=torch.float64)
    expected = stem(x)
    with torch.no_grad():
        torch.testing.assert_close(stem(x), expected, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("stored_bands", [0, 1_000_000])
@pytest.mark.parametrize("band_bytes", [1, 2_000, 100_000])
@pytest.mark.parametrize("size", [(1, 1), (2, 7), (11, 5)])
def test_feed_forward_in_bands_is_the_same(size, band_bytes, stored_bands, monkeypatch):
    """From a row at a time to all at once, and every gradient; nothing is computed twice in evaluation."""
    ffn = ConvFFN(16, 64).double()
    x = torch.randn(2, *size, 16, dtype=torch.float64, requires_grad=True)
    inputs = (x, *ffn.parameters())

    def run() -> tuple[torch.Tensor, ...]:
        y = ffn(x)
        return (y.detach(), *torch.autograd.grad(y.sin().sum(), inputs))

    expected = run()
    whole = count(ffn, lambda: ffn(x))["total"].flops
    monkeypatch.setattr(conv_ffn, "BAND_BYTES", band_bytes)
    monkeypatch.setattr(conv_ffn, "WHOLE_BANDS", 0)
    monkeypatch.setattr(conv_ffn, "STORED_BANDS", stored_bands)
    torch.testing.assert_close(run(), expected, atol=1e-12, rtol=1e-12)
    with torch.no_grad():
        torch.testing.assert_close(ffn(x), expected[0], atol=1e-12, rtol=1e-12)
    assert count(ffn, lambda: ffn(x))["total"].flops == whole


def test_feed_forward_in_bands_under_autocast(monkeypatch):
    ffn = ConvFFN(16, 64)
    x = torch.randn(2, 11, 5, 16, requires_grad=True)
    inputs = (x, *ffn.parameters())

    def run() -> tuple[torch.Tensor, ...]:
        with torch.autocast("cpu", torch.bfloat16):
            y = ffn(x)
        assert y.dtype == torch.bfloat16
        grads = torch.autograd.grad(y.float().sin().sum(), inputs)
        assert all(grad.dtype == torch.float32 for grad in grads)
        return (y.detach().float(), *grads)

    expected = run()
    monkeypatch.setattr(conv_ffn, "BAND_BYTES", 2_000)
    monkeypatch.setattr(conv_ffn, "WHOLE_BANDS", 0)
    for ours, theirs in zip(run(), expected):
        assert (ours - theirs).norm() < 1e-2 * theirs.norm()


def test_feed_forward_in_bands_stores_its_input_alone(monkeypatch):
    """The hidden layer, up to eight times as large, is computed again in the backward pass."""
    monkeypatch.setattr(conv_ffn, "BAND_BYTES", 2_000)
    monkeypatch.setattr(conv_ffn, "WHOLE_BANDS", 0)
    monkeypatch.setattr(conv_ffn, "STORED_BANDS", 0)
    ffn = ConvFFN(16, 128)
    x = torch.randn(1, 12, 8, 16, requires_grad=True)
    own = {p.data_ptr() for p in ffn.parameters()}
    stored = []

    def note(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.data_ptr() not in own:
            stored.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        ffn(x)
    assert stored == [x.numel()]


def test_non_contiguous_and_channels_last_images():
    model = GroupMamba(MINI).eval()
    x = torch.randn(2, 3, 48, 40)
    with torch.no_grad():
        expected = model(x)
        for same in (
            x.contiguous(memory_format=torch.channels_last),
            x.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2),
            torch.cat([x, x], 3)[..., :40],
        ):
            for a, e in zip(model(same), expected):
                torch.testing.assert_close(a, e, atol=1e-5, rtol=1e-5)


def test_maps_suit_operators_that_ignore_strides():
    """mmcv's RoIAlign silently computes something else from a map that is channels last in memory."""
    roi_align = pytest.importorskip("mmcv.ops").roi_align
    maps = GroupMamba(MINI).eval()(torch.randn(2, 3, 64, 96))
    rois = torch.tensor([[0, 1.0, 1.0, 9.0, 9.0], [1, 2.0, 3.0, 12.0, 8.0]])
    for feature_map in maps:
        actual = roi_align(feature_map, rois, (4, 4), 0.25, 2, "avg", True)
        copied = torch.empty(feature_map.shape).copy_(feature_map)
        torch.testing.assert_close(actual, roi_align(copied, rois, (4, 4), 0.25, 2, "avg", True))
    (gradient,) = torch.autograd.grad(actual.square().sum(), feature_map)
    assert gradient.abs().sum() > 0


def test_images_of_a_batch_do_not_mix():
    model = GroupMamba(MINI).eval()
    x = torch.randn(2, 3, 40, 56)
    with torch.no_grad():
        for together, alone in zip(model(x), model(x[1:])):
            torch.testing.assert_close(together[1:], alone, atol=1e-5, rtol=1e-5)


def test_scan_layer_on_its_own_has_no_uninitialised_parameters():
    torch.use_deterministic_algorithms(True)  # PyTorch then fills fresh memory with NaN
    try:
        layer = GroupedVSSS(64, d_state=3)
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(parameter.isfinite().all() for parameter in layer.parameters())
    torch.testing.assert_close(layer.A_log[0, 0].exp(), torch.tensor([1.0, 2.0, 3.0]))


def test_scan_layer_gradients_on_a_non_square_map():
    """Against four separate layers that flip and transpose the map, as the paper draws it."""
    torch.manual_seed(0)
    layer = GroupedVSSS(16).double()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    x = torch.randn(2, 3, 5, 16, dtype=torch.float64, requires_grad=True)
    y = layer(x, cross_traversal(3, 5))

    outputs = []
    for g in range(4):
        d = slice(4 * g, 4 * g + 4)

        def grouped(conv, z, g=g):
            return F.linear(z, conv.weight.unflatten(0, (4, -1))[g, :, :, 0, 0])

        gate = F.silu(grouped(layer.gate_proj, x[..., d]))
        z = grouped(layer.in_proj, x[..., d]).permute(0, 3, 1, 2)
        z = F.silu(F.conv2d(z, layer.conv.weight[d], layer.conv.bias[d], padding=1, groups=4))
        z = z.permute(0, 2, 3, 1)  # (B, H, W, 4)
        if g % 2:
            z = z.transpose(1, 2)
        walk = z.flatten(1, 2)
        if g >= 2:
            walk = walk.flip(1)
        dt, B, C = grouped(layer.x_proj, walk).split((1, 1, 1), -1)
        scanned = selective_scan_naive(
            walk[:, :, None],
            grouped(layer.dt_proj, dt)[:, :, None],
            -layer.A_log[g : g + 1].exp(),
            B[:, :, None],
            C[:, :, None],
            layer.D[g : g + 1],
            layer.dt_bias[g : g + 1],
        )[:, :, 0]
        if g >= 2:
            scanned = scanned.flip(1)
        if g % 2:
            scanned = scanned.unflatten(1, (5, 3)).transpose(1, 2).flatten(1, 2)
        normed = F.layer_norm(scanned, (4,), layer.norm.weight[g], layer.norm.bias[g])
        outputs.append(grouped(layer.out_proj, normed.unflatten(1, (3, 5)) * gate))
    expected = torch.cat(outputs, -1)
    torch.testing.assert_close(y, expected, atol=1e-10, rtol=1e-10)
    weight = torch.randn_like(y)
    wanted = [x, *layer.parameters()]
    for actual, reference in zip(
        torch.autograd.grad((y * weight).sum(), wanted),
        torch.autograd.grad((expected * weight).sum(), wanted),
    ):
        torch.testing.assert_close(actual, reference, atol=1e-10, rtol=1e-10)


def test_walks_over_all_channels_and_their_gradients():
    """Four scans, one a walk, over copies in the walk's order, summed; float64."""
    torch.manual_seed(0)
    layer = GroupedVSSS(16, num_groups=1).double()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    x = torch.randn(2, 3, 5, 16, dtype=torch.float64, requires_grad=True)
    y = layer(x, cross_traversal(3, 5))

    def linear(conv, z):
        return F.linear(z, conv.weight[:, :, 0, 0])

    tokens = linear(layer.in_proj, x).permute(0, 3, 1, 2)
    tokens = F.silu(F.conv2d(tokens, layer.conv.weight, layer.conv.bias, padding=1, groups=16))
    total = 0
    for k in range(4):
        walk = (tokens.transpose(2, 3) if k % 2 else tokens).flatten(2).transpose(1, 2)
        walk = walk.flip(1) if k >= 2 else walk
        dt, B, C = linear(layer.x_proj, walk)[..., 3 * k : 3 * k + 3].split((1, 1, 1), -1)
        delta = F.linear(dt, layer.dt_proj.weight.unflatten(0, (4, 16))[k, :, :, 0, 0])
        one = (t[k : k + 1] for t in (layer.D, layer.dt_bias))
        walk, delta, B, C = (t[:, :, None] for t in (walk, delta, B, C))
        out = selective_scan_naive(walk, delta, -layer.A_log[k : k + 1].exp(), B, C, *one)[:, :, 0]
        out = out.flip(1) if k >= 2 else out
        out = out.unflatten(1, (5, 3) if k % 2 else (3, 5))
        total = total + (out.transpose(1, 2) if k % 2 else out)
    normed = F.layer_norm(total, (16,), layer.norm.weight[0], layer.norm.bias[0])
    expected = linear(layer.out_proj, normed * F.silu(linear(layer.gate_proj, x)))
    torch.testing.assert_close(y, expected, atol=1e-10, rtol=1e-10)
    weight = torch.randn_like(y)
    wanted = [x, *layer.parameters()]
    torch.testing.assert_close(
        torch.autograd.grad((y * weight).sum(), wanted),
        torch.autograd.grad((expected * weight).sum(), wanted),
        atol=1e-10,
        rtol=1e-10,
    )


@pytest.mark.parametrize(
    "scan, channel_affinity, parameters, gflops, scan_gflops",
    [
        ("grouped", True, 20_462_224, 4.66, 0.017),
        ("grouped", False, 20_240_191, 4.66, 0.017),
        ("cross", True, 25_354_504, 5.63, 0.067),
        ("cross", False, 25_132_471, 5.63, 0.067),
    ],
)
def test_cost_of_the_ablations(scan, channel_affinity, parameters, gflops, scan_gflops):
    with torch.device("meta"):
        model = GroupMamba("tiny", scan=scan, channel_affinity=channel_affinity).eval()
        cost = count(model, lambda: model(torch.zeros(1, 3, 224, 224)))["total"]
    assert cost.parameters == parameters
    assert cost.flops / 1e9 == pytest.approx(gflops, abs=0.005)
    assert cost.scan_flops / 1e9 == pytest.approx(scan_gflops, abs=5e-4)


@pytest.mark.parametrize("scan", ["grouped", "cross"])
def test_without_channel_affinity_every_channel_counts_the_same(scan):
    torch.manual_seed(0)
    with_affinity = GroupMamba(MINI, scan=scan).eval()
    without = GroupMamba(MINI, scan=scan, channel_affinity=False).eval()
    missing, unknown = without.load_state_dict(with_affinity.state_dict(), strict=False)
    assert not missing and all(".affinity." in name for name in unknown)
    for name, parameter in with_affinity.named_parameters():
        if (
            ".affinity.2." in name
        ):  # the sigmoid is then one half, which the norm undoes but for its epsilon
            nn.init.zeros_(parameter)
        elif "skip_scale" in name:
            nn.init.constant_(parameter, 2.0)
    x = torch.randn(2, 3, 40, 56)
    torch.testing.assert_close(without(x), with_affinity(x), atol=1e-4, rtol=1e-4)
    sum(y.sum() for y in without(x)).backward()
    assert not [name for name, p in without.named_parameters() if p.grad is None]


def test_split_groups():
    x = torch.arange(2 * 3 * 8.0).view(1, 2, 3, 8)
    assert split_groups(x).shape == (1, 6, 4, 2)
    assert split_groups(x)[0, 4, 2].tolist() == x[0, 1, 1, 4:6].tolist()


def test_out_indices_build_only_what_is_needed():
    model = GroupMamba(MINI, out_indices=(0, 2))
    assert len(model.stages) == 3
    maps = model(torch.randn(1, 3, 32, 32))
    assert [m.shape[1] for m in maps] == [16, 48]


@pytest.mark.parametrize("frozen_stages", [-1, 0, 2, 4])
def test_frozen_stages(frozen_stages):
    """No gradients, no stochastic depth and no new statistics in them, and all of these in the others."""
    model = GroupMamba(MINI, frozen_stages=frozen_stages, drop_path_rate=0.2).train()
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    loss = sum(m.square().mean() for m in model(torch.randn(2, 3, 64, 64)))
    assert loss.requires_grad is (frozen_stages < 4)
    if loss.requires_grad:
        loss.backward()
    stem = [name for name, _ in model.named_parameters() if name.startswith("stages.0.embed.")]
    assert stem
    for name, parameter in model.named_parameters():
        frozen = int(name.split(".")[1]) < frozen_stages or (frozen_stages == 0 and name in stem)
        assert parameter.requires_grad is not frozen, name
        assert (parameter.grad is None) is frozen, name
    for name, buffer in model.named_buffers():
        assert torch.equal(buffer, before[name]) is (frozen_stages >= 0), name
    for i, stage in enumerate(model.stages):
        assert all(m.training is (i >= frozen_stages) for m in stage.blocks.modules())


def test_activation_checkpointing_changes_no_gradient():
    """Nor a running statistic; and stochastic depth drops the same when blocks run for the second time."""
    torch.manual_seed(0)
    plain = GroupMamba(MINI, drop_path_rate=0.5)
    saving = GroupMamba(MINI, drop_path_rate=0.5, with_cp=True)
    saving.load_state_dict(plain.state_dict())
    x = torch.randn(2, 3, 32, 48)
    for model in (plain, saving):
        torch.manual_seed(1)
        sum(m.square().mean() for m in model(x)).backward()
    for a, b in zip(saving.parameters(), plain.parameters()):
        torch.testing.assert_close(a.grad, b.grad)
    for a, b in zip(saving.buffers(), plain.buffers()):
        assert torch.equal(a, b)


@pytest.mark.parametrize("with_cp, expected", [(False, 1), (True, 2)])
def test_activation_checkpointing_runs_blocks_twice(with_cp, expected):
    model = GroupMamba(MINI, with_cp=with_cp)
    blocks = [block for stage in model.stages for block in stage.blocks]
    runs = dict.fromkeys(blocks, 0)

    def count_run(mixer, args, block):
        runs[block] += 1

    for block in blocks:
        block.mixer.register_forward_pre_hook(lambda *args, b=block: count_run(*args, b))
    sum(m.square().mean() for m in model(torch.randn(1, 3, 32, 32))).backward()
    assert set(runs.values()) == {expected}


def test_activation_checkpointing_begins_where_training_does():
    """Behind frozen parts too, whose output has no gradient."""
    model = GroupMamba(MINI, with_cp=True, frozen_stages=0)
    runs = []
    model.stages[0].blocks[0].mixer.register_forward_pre_hook(lambda *args: runs.append(args))
    sum(m.square().mean() for m in model(torch.randn(1, 3, 32, 32))).backward()
    assert len(runs) == 2


def test_a_changed_convolution_of_the_stem_counts_in_evaluation_too():
    model = GroupMamba(MINI).eval()
    for conv in model.stages[0].embed.conv[::3]:
        conv.padding_mode = "reflect"
    x = torch.randn(1, 32, 32, 3)
    with torch.no_grad():
        folded = model.stages[0].embed(x)
    torch.testing.assert_close(folded, model.stages[0].embed(x).detach())


def test_a_class_block_of_any_ratio():
    """61 / 28 times 28 is a little less than 61 in floating point."""
    arch = {**MINI, "embed_dims": (*MINI["embed_dims"][:-1], 28)}
    arch["mlp_ratios"] = (*MINI["mlp_ratios"][:-1], 61 / 28)
    assert GroupMambaClassifier(arch).eval()(torch.randn(1, 3, 32, 32)).shape == (1, 1000)


def test_epsilons_of_the_norms_are_the_published_ones():
    """Blocks and outputs are given ``partial(nn.LayerNorm, eps=1e-6)``; all others have PyTorch's default."""
    model = GroupMambaClassifier(MINI)
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.LayerNorm):
            of_block = re.fullmatch(
                r"backbone\.stages\.\d(\.blocks\.\d)?\.norm|neck\.norm[12]", name
            )
            assert module.eps == (1e-6 if of_block else 1e-5), name


def test_drop_path_grows_linearly():
    model = GroupMamba(MINI, drop_path_rate=0.4)
    rates = [block.drop_path.drop_prob for stage in model.stages for block in stage.blocks]
    assert rates == pytest.approx([0, 0.1, 0.2, 0.3, 0.4])


def test_drop_path_drops_whole_branches_of_single_images():
    torch.manual_seed(0)
    block = Block(16, 2, drop_path_rate=0.5).train()
    x, traversal = torch.randn(64, 2, 3, 16), cross_traversal(2, 3)
    mixed = x + 2 * block.mixer(x, traversal)
    fates = [
        with_ffn(block, y) for y in (x, mixed)
    ]  # not mixed or mixed; then not fed forward or fed
    candidates = torch.stack([x, fates[0], mixed, fates[1]])
    distance = (block(x, traversal) - candidates).flatten(2).abs().amax(2)
    assert (distance.amin(0) < 1e-4).all()
    assert set(distance.argmin(0).tolist()) == {0, 1, 2, 3}


def with_ffn(block, x):
    return x + 2 * block.ffn(block.norm(x))


@pytest.mark.parametrize(
    "arguments, words",
    [
        (dict(arch="huge"), "unknown arch 'huge'; known are 'tiny', 'small', 'base'"),
        (dict(scan="both"), "unknown scan 'both'; known are 'grouped', 'cross'"),
        (dict(arch=dict(embed_dims=(16,) * 4)), "exactly the keys"),
        (dict(arch={**MINI, "depths": (1, 2)}), "needs four values"),
        (dict(arch={**MINI, "embed_dims": (16, 30, 48, 64)}), "multiple of 4"),
        (dict(out_indices=(0, 4)), "from 0 to 3; got"),
        (dict(out_indices=(1, 0)), "increasing"),
        (dict(out_indices=()), "increasing"),
        (dict(frozen_stages=5), "frozen_stages must be from -1"),
        (dict(drop_path_rate=1.5), "drop_path_rate must be in"),
    ],
)
def test_wrong_arguments_are_named(arguments, words):
    with pytest.raises(ValueError, match=words):
        GroupMamba(**{"arch": MINI, **arguments})


def test_wrong_image_is_named():
    with pytest.raises(ValueError, match=r"expected images \(B, 3, H, W\).*\(2, 1, 32, 32\)"):
        GroupMamba(MINI)(torch.zeros(2, 1, 32, 32))


def test_pretrained_weights_by_prefix(golden, tmp_path):
    conversion = convert_groupmamba(golden[1])
    path = tmp_path / "converted.pth"
    torch.save({"state_dict": conversion.state_dict, "meta": {"arch": conversion.arch}}, path)
    init_cfg = dict(type="Pretrained", checkpoint=str(path), prefix="backbone.")
    model = GroupMamba(conversion.arch, init_cfg=init_cfg)
    model.init_weights()
    for name, value in model.state_dict().items():
        assert torch.equal(value, conversion.state_dict[f"backbone.{name}"])


@pytest.mark.parametrize("scope", ["mmengine", "mmdet", "mmseg"])
def test_registered_for_every_project(scope):
    pytest.importorskip(scope)
    cfg = Config(dict(custom_imports=dict(imports=["mmvssm"]), backbone=dict(arch=MINI)))
    cfg.backbone.type = "mmvssm.GroupMamba"
    with DefaultScope.overwrite_default_scope(scope):
        registry = MODELS
        if scope != "mmengine":
            registry = __import__(f"{scope}.registry", fromlist=["MODELS"]).MODELS
        assert isinstance(registry.build(cfg.backbone), GroupMamba)


@pytest.mark.parametrize("dtype", [torch.bfloat16])
def test_autocast(dtype):
    model = GroupMamba(MINI)
    x = torch.randn(2, 3, 48, 40)
    with torch.no_grad():
        expected = model.eval()(x)
    with torch.autocast("cpu", dtype=dtype):
        maps = model(x)
    for actual, reference in zip(maps, expected):
        error = (actual.float() - reference).norm() / reference.norm()
        assert error < 0.05
    sum(m.float().square().mean() for m in maps).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.slow
def test_compile_fullgraph():
    model = GroupMamba(MINI).eval()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    x = torch.randn(1, 3, 40, 56, requires_grad=True)
    actual, expected = compiled(x), model(x)
    for a, e in zip(actual, expected):
        torch.testing.assert_close(a, e, atol=1e-4, rtol=1e-4)
    (a,) = torch.autograd.grad(sum(m.square().mean() for m in actual), x)
    (e,) = torch.autograd.grad(sum(m.square().mean() for m in expected), x)
    torch.testing.assert_close(a, e, atol=1e-5, rtol=1e-3)


@pytest.mark.nightly
def test_compile_fullgraph_inductor():
    model = GroupMamba(MINI, out_indices=(0,)).eval()
    compiled = torch.compile(model, fullgraph=True)
    x = torch.randn(1, 3, 40, 56)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x)[0], model(x)[0], atol=1e-4, rtol=1e-4)


def test_initial_scan_parameters_are_mambas():
    """Drawn by ``reset_scan_parameters`` (Mamba, section 3.6), whatever the parameters held before."""
    scan = GroupedVSSS(64)
    with torch.no_grad():
        for parameter in scan.parameters():
            parameter.fill_(7.0)
    scan.reset_scan_parameters()
    assert (scan.D == 1).all()
    torch.testing.assert_close(scan.A_log.exp(), torch.ones_like(scan.A_log))
    steps = F.softplus(scan.dt_bias)
    assert 0.0009 < steps.min() < 0.01 and 0.02 < steps.max() < 0.11
    bound = scan.dt_rank**-0.5
    assert 0.5 * bound < scan.dt_proj.weight.abs().max() <= bound
    for proj in (scan.in_proj, scan.gate_proj, scan.out_proj):
        assert proj.weight.std().item() == pytest.approx(0.02, rel=0.2)


def test_names_of_scan_parameters_that_version_0_1_saved():
    """They load strictly, and the parameters keep the order by which optimizers save their states."""
    layer, other = GroupedVSSS(64, d_state=3), GroupedVSSS(64, d_state=3)
    for parameter in layer.parameters():
        nn.init.normal_(parameter)
    before = {"A_log": "A_logs", "D": "Ds"}
    saved = {f"scan.{before.get(name, name)}": p for name, p in layer.state_dict().items()}
    assert list(saved)[:3] == ["scan.dt_bias", "scan.A_logs", "scan.Ds"]
    nn.ModuleDict(dict(scan=other)).load_state_dict(saved, strict=True)
    for name, parameter in other.state_dict().items():
        assert torch.equal(parameter, layer.state_dict()[name]), name
