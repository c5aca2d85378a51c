import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from mmengine.registry import MODELS, DefaultScope
from torch import nn

from mmvssm.analysis.flops import count
from mmvssm.models import VMamba
from mmvssm.models.backbones.vmamba import SS2D, Block
from mmvssm.models.published import convert_vmamba
from mmvssm.ops import cross_traversal
from mmvssm.ops.selective_scan.naive import selective_scan_naive

GOLDEN = Path(__file__).parents[2] / "golden/vmamba_small.npz"
MINI = dict(embed_dims=(16, 24, 32, 40), depths=(1, 2, 1, 1), ssm_ratio=2, mlp_ratio=2)


@pytest.fixture(scope="module")
def golden():
    values = np.load(GOLDEN)
    weights = {k[2:]: torch.from_numpy(values[k]) for k in values.files if k.startswith("w/")}
    return values, weights


def without(weights, *starts):
    return {name: value for name, value in weights.items() if not name.startswith(starts)}


def test_feature_maps_of_the_published_model(golden):
    values, weights = golden
    conversion = convert_vmamba(without(weights, "classifier."))
    assert not conversion.unused and not conversion.missing
    config = json.loads(str(values["config"]))
    assert conversion.arch["embed_dims"] == tuple(config["dims"])
    assert conversion.arch["depths"] == tuple(config["depths"])
    model = VMamba(conversion.arch).eval()
    model.load_state_dict(
        {name.removeprefix("backbone."): v for name, v in conversion.state_dict.items()}
    )
    with torch.no_grad():
        maps = model(torch.from_numpy(values["x"]))
    for i, feature_map in enumerate(maps):
        expected = torch.from_numpy(values[f"feat{i}"])
        torch.testing.assert_close(feature_map, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("older", [False, True])
def test_logits_of_the_published_classifier(golden, older):
    """Also with the names of older files, whose linear layers are 1x1 convolutions."""
    values, weights = golden
    weights = without(weights, "outnorm")
    if older:
        weights = {
            name.replace("classifier.", "")
            .replace(".blocks.0.norm.", ".blocks.0.ln_1.")
            .replace(".op.", ".self_attention."): value[:, :, None, None]
            if value.dim() == 2 and name.endswith(("proj.weight", "fc1.weight", "fc2.weight"))
            else value
            for name, value in weights.items()
        }
    conversion = convert_vmamba(weights)
    assert not conversion.unused and not conversion.missing
    state = conversion.state_dict
    model = VMamba(conversion.arch, out_indices=(3,)).eval()
    model.load_state_dict(
        {n.removeprefix("backbone."): v for n, v in state.items() if n.startswith("backbone.")}
    )
    with torch.no_grad():
        (feature_map,) = model(torch.from_numpy(values["x"]))
    logits = F.linear(feature_map.mean((2, 3)), state["head.fc.weight"], state["head.fc.bias"])
    torch.testing.assert_close(logits, torch.from_numpy(values["logits"]), atol=1e-4, rtol=0)


def test_a_detectors_backbone_is_taken_out(golden):
    _, weights = golden
    detector = {f"backbone.{k}": v for k, v in without(weights, "classifier.").items()}
    detector["rpn_head.rpn_conv.weight"] = torch.zeros(1)
    conversion = convert_vmamba(detector)
    assert conversion.unused == ["rpn_head.rpn_conv.weight"] and not conversion.missing


def test_other_models_are_refused(golden):
    _, weights = golden
    gated = dict(weights)
    name = "layers.0.blocks.0.op.in_proj.weight"
    gated[name] = weights[name].repeat(2, 1)
    for wrong in ({"layers.0.weight": torch.zeros(1)}, gated):
        with pytest.raises(ValueError, match="not the weights of a published VMamba"):
            convert_vmamba(wrong)


@pytest.mark.parametrize(
    "arch, parameters, gflops",
    [("T", 29_478_528, 4.88), ("S", 49_377_216, 8.67), ("B", 87_530_752, 15.30)],
)
def test_published_parameters_and_flops(arch, parameters, gflops):
    with torch.device("meta"):
        model = VMamba(arch).eval()
        cost = count(model, lambda: model(torch.zeros(1, 3, 224, 224)))["total"]
    norms = 2 * sum(model.embed_dims)  # of the outputs, which the published count leaves out
    assert cost.parameters == parameters + norms
    classifier = model.embed_dims[-1] * 1000
    assert (cost.flops + classifier) / 1e9 == pytest.approx(gflops, abs=0.006)


@pytest.mark.parametrize("size", [(64, 96), (65, 97), (33, 7), (1, 1)])
@pytest.mark.parametrize("batch", [1, 2])
def test_any_input_size(size, batch):
    model = VMamba(MINI).eval()
    with torch.no_grad():
        maps = model(torch.randn(batch, 3, *size))
    height, width = ((side + 1) // 2 for side in size)
    for feature_map, dim in zip(maps, MINI["embed_dims"]):
        height, width = (height + 1) // 2, (width + 1) // 2
        assert feature_map.shape == (batch, dim, height, width)
        assert feature_map.is_contiguous() and feature_map.isfinite().all()


def test_the_next_stage_continues_from_the_map_before_its_norm():
    torch.manual_seed(0)
    model, changed = VMamba(MINI).eval(), VMamba(MINI).eval()
    changed.load_state_dict(model.state_dict())
    with torch.no_grad():
        changed.norms["0"].weight.fill_(3)
        x = torch.randn(1, 3, 40, 56)
        first, *others = zip(model(x), changed(x))
    torch.testing.assert_close(3 * first[0], first[1])
    assert all(torch.equal(a, b) for a, b in others)


def test_mixer_by_hand_and_its_gradients():
    """Four scans, one a walk, over copies in the walk's order; float64."""
    torch.manual_seed(0)
    mixer = SS2D(8, 12, d_state=3).double()
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    x = torch.randn(2, 3, 5, 8, dtype=torch.float64, requires_grad=True)

    def by_hand():
        tokens = F.linear(x, mixer.in_proj.weight).permute(0, 3, 1, 2)
        tokens = F.silu(F.conv2d(tokens, mixer.conv.weight, padding=1, groups=12))
        maps = (tokens, tokens.transpose(2, 3))
        sequences = [m.flatten(2).transpose(1, 2) for m in maps]
        sequences += [s.flip(1) for s in sequences]
        x_proj = mixer.x_proj.weight.view(4, -1, 12)
        dt_proj = mixer.dt_proj.weight.view(4, 12, -1)
        total = 0
        for k, u in enumerate(sequences):
            dt, B, C = F.linear(u, x_proj[k]).split((mixer.dt_rank, 3, 3), -1)
            delta = F.linear(dt, dt_proj[k])
            y = selective_scan_naive(
                *(t[:, :, None] for t in (u, delta)),
                -mixer.A_log[k : k + 1].exp(),
                *(t[:, :, None] for t in (B, C)),
                mixer.D[k : k + 1],
                mixer.dt_bias[k : k + 1],
            )[:, :, 0]
            y = y.flip(1) if k >= 2 else y
            grid = (3, 5) if k % 2 == 0 else (5, 3)
            y = y.unflatten(1, grid)
            total = total + (y if k % 2 == 0 else y.transpose(1, 2))
        return F.linear(mixer.norm(total), mixer.out_proj.weight)

    leaves = (x, *mixer.parameters())
    weight = torch.randn(2, 3, 5, 8, dtype=torch.float64)
    ours, expected = mixer(x, cross_traversal(3, 5)), by_hand()
    torch.testing.assert_close(ours, expected, atol=1e-11, rtol=1e-9)
    torch.testing.assert_close(
        torch.autograd.grad((ours * weight).sum(), leaves),
        torch.autograd.grad((expected * weight).sum(), leaves),
        atol=1e-10,
        rtol=1e-8,
    )


@pytest.mark.parametrize("frozen_stages", [-1, 0, 2, 4])
def test_frozen_stages(frozen_stages):
    model = VMamba(MINI, frozen_stages=frozen_stages, drop_path_rate=0.5).train()
    stem_frozen = not any(p.requires_grad for p in model.stages[0].embed.parameters())
    assert stem_frozen == (frozen_stages >= 0)
    for i, stage in enumerate(model.stages):
        frozen = i < frozen_stages
        parameters = [*stage.blocks.parameters(), *model.norms[str(i)].parameters()]
        assert all(p.requires_grad != frozen for p in parameters)
        assert stage.blocks[0].training != frozen


def test_activation_checkpointing_changes_no_gradient():
    torch.manual_seed(0)
    model = VMamba(MINI)
    x = torch.randn(2, 3, 32, 32)
    gradients = []
    for model.with_cp in (False, True):
        loss = sum(y.square().mean() for y in model(x))
        gradients.append(torch.autograd.grad(loss, list(model.parameters())))
    torch.testing.assert_close(*gradients)


def test_out_indices_build_only_what_is_needed():
    model = VMamba(MINI, out_indices=(1,))
    assert len(model.stages) == 2 and list(model.norms) == ["1"]
    assert [tuple(y.shape) for y in model(torch.randn(1, 3, 32, 32))] == [(1, 24, 4, 4)]


def test_every_parameter_gets_a_gradient():
    """Distributed training needs that."""
    model = VMamba(MINI)
    sum(y.sum() for y in model(torch.randn(1, 3, 64, 64))).backward()
    assert not [name for name, p in model.named_parameters() if p.grad is None]


def test_drop_path_grows_linearly():
    model = VMamba(MINI, drop_path_rate=0.4)
    rates = [m.drop_path.drop_prob for m in model.modules() if isinstance(m, Block)]
    assert rates == pytest.approx([0, 0.1, 0.2, 0.3, 0.4])


def test_initial_parameters_are_the_published_ones():
    torch.manual_seed(0)
    model = VMamba(MINI)
    for module in model.modules():
        if isinstance(module, SS2D):
            steps = F.softplus(module.dt_bias)
            assert steps.min() > 0.9e-3 and steps.max() < 0.11
            assert (module.A_log == 0).all() and (module.D == 1).all()
            bound = module.dt_rank**-0.5
            assert 0.5 * bound < module.dt_proj.weight.abs().max() <= bound
            assert module.x_proj.weight.std() > 0.05  # PyTorch's default and not 0.02
        elif isinstance(module, nn.LayerNorm):
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
        VMamba(**arguments)


def test_wrong_image_is_named():
    with pytest.raises(ValueError, match=r"expected images \(B, 3, H, W\); got \(1, 4, 8, 8\)"):
        VMamba(MINI)(torch.randn(1, 4, 8, 8))


@pytest.mark.parametrize("scope", ["mmengine", "mmdet", "mmseg"])
def test_registered_for_every_project(scope):
    if scope != "mmengine":
        pytest.importorskip(scope)
    with DefaultScope.overwrite_default_scope(scope):
        assert isinstance(MODELS.build(dict(type="mmvssm.VMamba", arch=MINI)), VMamba)


def test_autocast():
    torch.manual_seed(0)
    model = VMamba(MINI).eval()
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        expected = model(x)
        with torch.autocast("cpu", torch.bfloat16):
            maps = model(x)
    for a, b in zip(maps, expected):
        assert (a.float() - b).norm() / b.norm() < 0.05


@pytest.mark.slow
def test_compile_fullgraph():
    torch.manual_seed(0)
    model = VMamba(MINI).eval()
    x = torch.randn(1, 3, 40, 56)
    with torch.no_grad():
        expected = model(x)
        torch.testing.assert_close(
            torch.compile(model, backend="aot_eager", fullgraph=True)(x), expected
        )


@pytest.mark.nightly
def test_export_with_dynamic_sizes():
    torch.manual_seed(0)
    model = VMamba(MINI, out_indices=(0, 3)).eval()
    dims = dict.fromkeys((0, 2, 3), torch.export.Dim.DYNAMIC)
    with torch.no_grad():
        program = torch.export.export(model, (torch.randn(2, 3, 72, 100),), dynamic_shapes=(dims,))
        for size in ((1, 3, 64, 96), (3, 3, 65, 97), (1, 3, 256, 320)):
            x = torch.randn(size)
            for a, b in zip(program.module()(x), model(x)):
                torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)
