import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from mmengine.registry import MODELS, DefaultScope
from torch import nn

from mmvssm.analysis.flops import count
from mmvssm.models import SpatialMamba
from mmvssm.models.backbones.spatial_mamba import (
    DILATIONS,
    Block,
    StateFusion,
    StructureAwareSSM,
)
from mmvssm.models.published import convert_spatialmamba

GOLDEN = Path(__file__).parents[2] / "golden/spatial_mamba_small.npz"
MINI = dict(embed_dims=(16, 24, 32, 40), depths=(1, 2, 1, 1), mlp_ratio=2)


@pytest.fixture(scope="module")
def golden():
    values = np.load(GOLDEN)
    weights = {k[2:]: torch.from_numpy(values[k]) for k in values.files if k.startswith("w/")}
    return values, weights


def without(weights, *starts):
    return {name: value for name, value in weights.items() if not name.startswith(starts)}


def backbone_of(conversion, **settings):
    model = SpatialMamba(conversion.arch, **settings).eval()
    weights = conversion.state_dict.items()
    model.load_state_dict(
        {n.removeprefix("backbone."): v for n, v in weights if n.startswith("backbone.")}
    )
    return model


@pytest.mark.parametrize("gradients", [False, True])
def test_feature_maps_of_the_published_model(golden, gradients):
    """With gradients the border is replicated by other means."""
    values, weights = golden
    conversion = convert_spatialmamba(without(weights, "norm.", "head."))
    assert not conversion.unused and not conversion.missing
    config = json.loads(str(values["config"]))
    assert conversion.arch["embed_dims"] == tuple(config["dims"] * 2**i for i in range(4))
    assert conversion.arch["depths"] == tuple(config["depths"])
    with torch.set_grad_enabled(gradients):
        maps = backbone_of(conversion)(torch.from_numpy(values["x"]))
    for i, feature_map in enumerate(maps):
        expected = torch.from_numpy(values[f"feat{i}"])
        torch.testing.assert_close(feature_map, expected, atol=1e-4, rtol=0)


def test_logits_of_the_published_classifier(golden):
    values, weights = golden
    conversion = convert_spatialmamba(without(weights, "outnorm"))
    assert not conversion.unused and not conversion.missing
    state = conversion.state_dict
    with torch.no_grad():
        (feature_map,) = backbone_of(conversion, out_indices=(3,))(torch.from_numpy(values["x"]))
    logits = F.linear(feature_map.mean((2, 3)), state["head.fc.weight"], state["head.fc.bias"])
    torch.testing.assert_close(logits, torch.from_numpy(values["logits"]), atol=1e-4, rtol=0)


def test_a_detectors_backbone_is_taken_out(golden):
    """Its norms of outputs go before the classifier's, if that is left in the file."""
    _, weights = golden
    detector = {f"backbone.{k}": v for k, v in without(weights, "head.").items()}
    detector["rpn_head.rpn_conv.weight"] = torch.zeros(1)
    conversion = convert_spatialmamba(detector)
    assert not conversion.missing
    assert conversion.unused == [
        "backbone.norm.bias",
        "backbone.norm.weight",
        "rpn_head.rpn_conv.weight",
    ]
    norm = conversion.state_dict["backbone.norms.3.weight"]
    assert torch.equal(norm, weights["outnorm3.weight"])


def test_other_models_are_refused(golden):
    _, weights = golden
    states = dict(weights)
    name = "layers.0.blocks.0.self_attention.A_logs"
    states[name] = weights[name].repeat(1, 4)
    for wrong in ({"layers.0.weight": torch.zeros(1)}, states):
        with pytest.raises(ValueError, match="not the weights of a published Spatial-Mamba"):
            convert_spatialmamba(wrong)


@pytest.mark.parametrize(
    "arch, parameters, gflops",
    [("T", 26_748_862, 4.5), ("S", 43_074_280, 7.1), ("B", 95_745_592, 15.8)],
)
def test_published_parameters_and_flops(arch, parameters, gflops):
    with torch.device("meta"):
        model = SpatialMamba(arch).eval()
        cost = count(model, lambda: model(torch.zeros(1, 3, 224, 224)))["total"]
    norms = 2 * sum(model.embed_dims[:3])  # of the outputs, which a classifier lacks
    head = 1001 * model.embed_dims[-1] - model.embed_dims[-1] + 1000
    assert cost.parameters - norms + head == parameters
    assert (cost.flops + head) / 1e9 == pytest.approx(gflops, rel=0.02)


@pytest.mark.parametrize("size", [(64, 96), (65, 97), (33, 7), (40, 1), (1, 1)])
@pytest.mark.parametrize("batch", [1, 2])
def test_any_input_size(size, batch):
    model = SpatialMamba(MINI).eval()
    x = torch.randn(batch, 3, *size)
    with torch.no_grad():
        maps = model(x)
    height, width = ((side + 1) // 2 for side in size)
    for feature_map, dim in zip(maps, MINI["embed_dims"]):
        height, width = (height + 1) // 2, (width + 1) // 2
        assert feature_map.shape == (batch, dim, height, width)
        assert feature_map.is_contiguous() and feature_map.isfinite().all()
    torch.testing.assert_close(maps, tuple(y.detach() for y in model(x)))


def test_the_next_stage_continues_from_the_map_before_its_norm():
    torch.manual_seed(0)
    model, changed = SpatialMamba(MINI).eval(), SpatialMamba(MINI).eval()
    changed.load_state_dict(model.state_dict())
    with torch.no_grad():
        changed.norms["0"].weight.fill_(3)
        x = torch.randn(1, 3, 40, 56)
        first, *others = zip(model(x), changed(x))
    torch.testing.assert_close(3 * first[0], first[1])
    assert all(torch.equal(a, b) for a, b in others)


def test_mixer_by_hand_and_its_gradients():
    """States position by position, then three dilated convolutions; float64."""
    torch.manual_seed(0)
    mixer = StructureAwareSSM(8).double()
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    x = torch.randn(2, 3, 5, 8, dtype=torch.float64, requires_grad=True)

    def by_hand():
        u, gate = F.linear(x, mixer.in_proj.weight).split(16, -1)
        u = u.permute(0, 3, 1, 2)
        u = F.silu(F.conv2d(u, mixer.conv.weight, mixer.conv.bias, padding=1, groups=16))
        u = u.permute(0, 2, 3, 1)
        dt, B, C = F.linear(u, mixer.x_proj.weight).split((mixer.dt_rank, 1, 1), -1)
        delta = F.softplus(F.linear(dt, mixer.dt_proj.weight, mixer.dt_bias))
        A = -mixer.A_log[:, 0].exp()
        h, states = 0, []
        for i in range(3):
            for j in range(5):
                step = delta[:, i, j]
                h = torch.exp(step * A) * h + step * B[:, i, j] * u[:, i, j]
                states.append(h)
        states = torch.stack(states, -1).unflatten(-1, (3, 5))
        fused = 0
        for alpha, conv, r in zip(mixer.fusion.alpha, mixer.fusion.convs, (1, 3, 5)):
            padded = F.pad(states, (r, r, r, r), mode="replicate")
            fused = fused + alpha * F.conv2d(padded, conv.weight, dilation=r, groups=16)
        y = C * fused.permute(0, 2, 3, 1) + mixer.D * u
        y = F.layer_norm(y, (16,), mixer.norm.weight, mixer.norm.bias) * F.silu(gate)
        return F.linear(y, mixer.out_proj.weight)

    leaves = (x, *mixer.parameters())
    weight = torch.randn(2, 3, 5, 8, dtype=torch.float64)
    ours, expected = mixer(x), by_hand()
    torch.testing.assert_close(ours, expected, atol=1e-11, rtol=1e-9)
    torch.testing.assert_close(
        torch.autograd.grad((ours * weight).sum(), leaves),
        torch.autograd.grad((expected * weight).sum(), leaves),
        atol=1e-10,
        rtol=1e-8,
    )


def test_evaluation_between_training_steps_leaves_nothing_behind():
    """The published code kept the kernel of its first evaluation (its issue 27)."""
    torch.manual_seed(0)
    model = SpatialMamba(MINI)
    x = torch.randn(2, 3, 32, 32)

    def evaluate(model):
        with torch.inference_mode():
            return [y.clone() for y in model.eval()(x)]

    before = evaluate(model)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    sum(y.square().mean() for y in model.train()(x)).backward()
    optimizer.step()
    fresh = SpatialMamba(MINI)
    fresh.load_state_dict(model.state_dict())
    for old, now, expected in zip(before, evaluate(model), evaluate(fresh)):
        assert torch.equal(now, expected) and not torch.allclose(now, old)


@pytest.mark.parametrize("frozen_stages", [-1, 0, 2, 4])
def test_frozen_stages(frozen_stages):
    model = SpatialMamba(MINI, frozen_stages=frozen_stages, drop_path_rate=0.5).train()
    stem_frozen = not any(p.requires_grad for p in model.stages[0].embed.parameters())
    assert stem_frozen == (frozen_stages >= 0)
    for i, stage in enumerate(model.stages):
        frozen = i < frozen_stages
        parameters = [*stage.blocks.parameters(), *model.norms[str(i)].parameters()]
        assert all(p.requires_grad != frozen for p in parameters)
        assert stage.blocks[0].training != frozen
    model(torch.randn(2, 3, 32, 32))
    for i, stage in enumerate(model.stages):
        counts = {int(m.num_batches_tracked) for m in batch_norms(stage)}
        assert counts == {0 if i < frozen_stages or (i == 0 and stem_frozen) else 1}


def batch_norms(model):
    return [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]


def test_activation_checkpointing_changes_no_gradient():
    """And no statistic of BatchNorm a second time."""
    torch.manual_seed(0)
    model = SpatialMamba(MINI)
    x = torch.randn(2, 3, 32, 32)
    gradients = []
    for model.with_cp in (False, True):
        loss = sum(y.square().mean() for y in model(x))
        gradients.append(torch.autograd.grad(loss, list(model.parameters())))
    torch.testing.assert_close(*gradients)
    assert {int(norm.num_batches_tracked) for norm in batch_norms(model)} == {2}


def test_out_indices_build_only_what_is_needed():
    model = SpatialMamba(MINI, out_indices=(1,))
    assert len(model.stages) == 2 and list(model.norms) == ["1"]
    assert [tuple(y.shape) for y in model(torch.randn(1, 3, 32, 32))] == [(1, 24, 4, 4)]


def test_every_parameter_gets_a_gradient():
    """Distributed training needs that."""
    model = SpatialMamba(MINI)
    sum(y.sum() for y in model(torch.randn(1, 3, 64, 64))).backward()
    assert not [name for name, p in model.named_parameters() if p.grad is None]


def test_drop_path_grows_linearly():
    model = SpatialMamba(MINI, drop_path_rate=0.4)
    rates = [m.drop_path.drop_prob for m in model.modules() if isinstance(m, Block)]
    assert rates == pytest.approx([0, 0.1, 0.2, 0.3, 0.4])


def test_initial_parameters_are_the_published_ones():
    torch.manual_seed(0)
    model = SpatialMamba(MINI)
    for module in model.modules():
        if isinstance(module, StructureAwareSSM):
            steps = F.softplus(module.dt_bias)
            assert steps.min() > 0.9e-3 and steps.max() < 0.11
            assert (module.A_log == 0).all() and (module.D == 1).all()
            bound = module.dt_rank**-0.5
            assert 0.5 * bound < module.dt_proj.weight.abs().max() <= bound
            assert module.x_proj.weight.std() > 0.05  # PyTorch's default and not 0.02
        elif isinstance(module, StateFusion):
            assert all((p == 1).all() for p in module.parameters())
            assert tuple(conv.dilation[0] for conv in module.convs) == DILATIONS
        elif isinstance(module, (nn.LayerNorm, nn.BatchNorm2d)):
            assert module.eps == 1e-5


@pytest.mark.parametrize(
    "arguments, words",
    [
        (dict(arch="XL"), "unknown arch 'XL'; known are 'T', 'S', 'B'"),
        (dict(arch=dict(depths=(1,) * 4)), "exactly the keys"),
        (dict(arch=dict(MINI, depths=(1, 1))), r"arch\['depths'\] needs four values"),
        (dict(arch=MINI, out_indices=(3, 4)), "out_indices must be increasing numbers of stages"),
        (dict(arch=MINI, drop_path_rate=1.5), "drop_path_rate must be in"),
        (dict(arch=MINI, frozen_stages=5), "frozen_stages must be from -1"),
    ],
)
def test_wrong_arguments_are_named(arguments, words):
    with pytest.raises(ValueError, match=words):
        SpatialMamba(**arguments)


def test_wrong_image_is_named():
    with pytest.raises(ValueError, match=r"expected images \(B, 3, H, W\); got \(1, 4, 8, 8\)"):
        SpatialMamba(MINI)(torch.randn(1, 4, 8, 8))


@pytest.mark.parametrize("scope", ["mmengine", "mmdet", "mmseg"])
def test_registered_for_every_project(scope):
    if scope != "mmengine":
        pytest.importorskip(scope)
    with DefaultScope.overwrite_default_scope(scope):
        model = MODELS.build(dict(type="mmvssm.SpatialMamba", arch=MINI))
        assert isinstance(model, SpatialMamba)


def test_autocast():
    torch.manual_seed(0)
    model = SpatialMamba(MINI).eval()
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        expected = model(x)
        with torch.autocast("cpu", torch.bfloat16):
            maps = model(x)
    for a, b in zip(maps, expected):
        assert (a.float() - b).norm() / b.norm() < 0.05


@pytest.mark.slow
@pytest.mark.parametrize("gradients", [False, True])
def test_compile_fullgraph(gradients):
    torch.manual_seed(0)
    model = SpatialMamba(MINI).eval()
    x = torch.randn(1, 3, 40, 56)
    with torch.set_grad_enabled(gradients):
        expected = model(x)
        torch.testing.assert_close(
            torch.compile(model, backend="aot_eager", fullgraph=True)(x),
            expected,
            atol=1e-4,
            rtol=1e-4,
        )


@pytest.mark.slow
@pytest.mark.nightly
def test_export_with_dynamic_sizes():
    torch.manual_seed(0)
    model = SpatialMamba(MINI, out_indices=(0, 3)).eval()
    dims = dict.fromkeys((0, 2, 3), torch.export.Dim.DYNAMIC)
    with torch.no_grad():
        program = torch.export.export(model, (torch.randn(2, 3, 72, 100),), dynamic_shapes=(dims,))
        for size in ((1, 3, 64, 96), (3, 3, 65, 97), (1, 3, 256, 320)):
            x = torch.randn(size)
            for a, b in zip(program.module()(x), model(x)):
                torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)
