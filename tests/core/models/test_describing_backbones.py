"""What the backbones tell about themselves is what they do and what our recipes say."""

import re
import warnings
from pathlib import Path

import pytest
import torch
from mmengine.config import Config

from mmvssm.models import GroupMamba, PlainMamba, PlainMambaAdapter, SpatialMamba, Vim, VMamba
from support.tiny_backbones import ADAPTER, GROUP, PLAIN, SPATIAL, VIM, V

CONFIGS = Path(__file__).parents[3] / "configs"
BUILDERS = {
    "groupmamba": lambda: GroupMamba(GROUP),
    "groupmamba of two maps": lambda: GroupMamba(GROUP, out_indices=(1, 2)),
    "spatialmamba": lambda: SpatialMamba(SPATIAL),
    "spatialmamba of two maps": lambda: SpatialMamba(SPATIAL, out_indices=(0, 3)),
    "vmamba": lambda: VMamba(V),
    "vmamba of two maps": lambda: VMamba(V, out_indices=(0, 3)),
    "vim": lambda: Vim(VIM),
    "plainmamba": lambda: PlainMamba(PLAIN),
    "plainmamba of two maps": lambda: PlainMamba(PLAIN, out_indices=(1, 3)),
    "plainmamba_adapter": lambda: PlainMambaAdapter(**ADAPTER),
}


@pytest.fixture(params=BUILDERS)
def backbone(request):
    return BUILDERS[request.param]()


def test_channels_and_strides_are_those_of_the_maps(backbone):
    with torch.no_grad():
        maps = backbone.eval()(torch.zeros(1, 3, 64, 96))
    assert backbone.out_channels == tuple(m.shape[1] for m in maps)
    assert backbone.out_strides == tuple(64 // m.shape[2] for m in maps)
    info = backbone.feature_info
    assert [i["num_chs"] for i in info] == list(backbone.out_channels)
    assert [i["reduction"] for i in info] == list(backbone.out_strides)
    assert all(backbone.get_submodule(i["module"]) for i in info)


class TestRandomWeights:
    """Those of a backbone whose ``init_cfg`` names a checkpoint that nothing loaded."""

    @pytest.fixture
    def backbone(self, backbone, tmp_path):
        path = tmp_path / "weights.pth"
        torch.save(backbone.state_dict(), path)
        backbone.init_cfg = dict(type="Pretrained", checkpoint=str(path))
        return backbone.eval()

    def warnings_of(self, backbone):
        with warnings.catch_warnings(record=True) as caught, torch.no_grad():
            warnings.simplefilter("always")
            backbone(torch.zeros(1, 3, 64, 64))
        return [str(w.message) for w in caught if "random weights" in str(w.message)]

    def test_we_warn_once(self, backbone):
        (said,) = self.warnings_of(backbone)
        assert f"{type(backbone).__name__} runs with random weights" in said
        assert "weights.pth" in said and "init_weights()" in said
        assert not self.warnings_of(backbone)

    @pytest.mark.parametrize(
        "initialise",
        [
            lambda model: model.init_weights(),
            lambda model: model.load_state_dict({}, strict=False),
            lambda model: torch.nn.Sequential(model).load_state_dict({}, strict=False),
            lambda model: setattr(model, "init_cfg", None),
            lambda model: setattr(model, "init_cfg", dict(type="Kaiming", layer="Conv2d")),
        ],
        ids=["init_weights", "load", "load of the whole", "no init_cfg", "no checkpoint"],
    )
    def test_we_do_not_warn(self, backbone, initialise):
        initialise(backbone)
        assert not self.warnings_of(backbone)


def test_timm_takes_the_feature_info(backbone):
    timm = pytest.importorskip("timm", reason="needs timm, which make setup-pretrain installs")
    indices = range(len(backbone.out_channels))
    info = timm.models.FeatureInfo(backbone.feature_info, out_indices=tuple(indices))
    assert tuple(info.channels()) == backbone.out_channels
    assert tuple(info.reduction()) == backbone.out_strides


def names_spared_by(config, model):
    """What a config's ``custom_keys`` and the rules for norms, biases and flat parameters leave undecayed."""
    keys = Config.fromfile(CONFIGS / f"{config}.py").optim_wrapper.paramwise_cfg.custom_keys
    keys = [key for key, value in keys.items() if value.decay_mult == 0 and key != "."]
    return {
        name
        for name, p in model.named_parameters()
        if any(key in name for key in keys) and not name.endswith("bias") and "norm" not in name
    }


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("groupmamba", "_base_/adamw_imagenet"),
        ("spatialmamba", "_base_/adamw_imagenet"),
        ("vmamba", "_base_/adamw_imagenet"),
        ("plainmamba", "_base_/adamw_imagenet"),
        ("plainmamba_adapter", "plainmamba_adapter_maskrcnn_coco"),
    ],
)
def test_parameters_without_decay_are_those_of_our_recipes(name, config):
    pytest.importorskip("mmpretrain" if "imagenet" in config else "mmdet")
    model = BUILDERS[name]()
    spared = names_spared_by(config, model)
    assert model.no_weight_decay() == spared
    assert len(spared) >= 2


def test_timm_s_parameter_groups_spare_them(backbone):
    timm = pytest.importorskip("timm", reason="needs timm, which make setup-pretrain installs")
    from timm.optim import param_groups_weight_decay

    assert timm
    spared, _ = param_groups_weight_decay(
        backbone, 0.05, no_weight_decay_list=backbone.no_weight_decay()
    )
    assert spared["weight_decay"] == 0.0
    given = {id(p) for p in spared["params"]}
    named = dict(backbone.named_parameters())
    assert {id(named[name]) for name in backbone.no_weight_decay()} <= given


def depths(model, prefix=""):
    return {
        name: model.get_layer_depth(prefix + name, prefix) for name, _ in model.named_parameters()
    }


def test_layers_are_numbered_from_the_stem_to_the_last_block(backbone):
    found = depths(backbone, "backbone.")
    (total,) = {total for _, total in found.values()}
    blocks = {
        name for name, _ in found.items() if re.search(r"(stages\.\d+\.blocks|layers)\.", name)
    }
    order = [found[name][0] for name in found if name in blocks]
    assert order == sorted(order)  # they are registered in the order in which they run
    assert set(order) == set(range(1, total - 1))
    assert backbone.get_layer_depth("head.weight", "backbone.") == (total - 1, total)
    assert found == depths(backbone)


@pytest.mark.parametrize(
    ("builder", "parameter", "layer"),
    [
        ("groupmamba", "stages.0.embed.conv.0.weight", 0),
        ("groupmamba", "stages.0.norm.weight", 1),
        ("groupmamba", "stages.1.embed.proj.weight", 1),
        ("groupmamba", "stages.1.blocks.1.ffn.fc1.weight", 3),
        ("groupmamba", "stages.3.norm.bias", 6),
        ("groupmamba of two maps", "stages.2.norm.bias", 4),
        ("spatialmamba", "stages.0.embed.norm5.weight", 0),
        ("spatialmamba", "stages.3.embed.proj.weight", 4),
        ("spatialmamba", "stages.3.blocks.0.mixer.fusion.alpha", 5),
        ("spatialmamba", "norms.0.weight", 6),
        ("vmamba", "stages.0.embed.conv1.weight", 0),
        ("vmamba", "stages.3.embed.proj.weight", 4),
        ("vmamba", "norms.0.weight", 6),
        ("vim", "pos_embed", 0),
        ("vim", "layers.3.mixer.branches.1.D", 4),
        ("plainmamba", "pos_embed", 0),
        ("plainmamba", "patch_embed.convs.0.weight", 0),
        ("plainmamba", "layers.0.mixer.A_log", 1),
        ("plainmamba", "norms.3.weight", 5),
        ("plainmamba_adapter", "layers.3.mixer.A_log", 4),
        ("plainmamba_adapter", "interactions.0.injector.gamma", 5),
        ("plainmamba_adapter", "level_embed", 5),
    ],
)
def test_layer_of_a_parameter(builder, parameter, layer):
    model = BUILDERS[builder]()
    assert parameter in dict(model.named_parameters())
    assert model.get_layer_depth(parameter)[0] == layer


@pytest.mark.parametrize(
    "build",
    [
        lambda **settings: GroupMamba(GROUP, out_indices=(2,), **settings),
        lambda **settings: GroupMamba(GROUP, out_indices=(2,), out_type="unnormed", **settings),
        lambda **settings: SpatialMamba(SPATIAL, out_indices=(2,), **settings),
        lambda **settings: VMamba(V, out_indices=(2,), **settings),
        lambda **settings: PlainMamba(PLAIN, **settings),
        lambda **settings: PlainMamba(
            PLAIN, pruning=dict(layers=(0, 1), keep_ratio=0.5), **settings
        ),
    ],
)
def test_a_single_output_can_leave_without_its_tuple(build):
    wrapped, bare = build().eval(), build(unwrap_single=True).eval()
    bare.load_state_dict(wrapped.state_dict())
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        (expected,), found = wrapped(x), bare(x)
    assert type(found) is type(expected)
    assert torch.equal(*(getattr(output, "tokens", output) for output in (expected, found)))


@pytest.mark.parametrize(
    "build",
    [
        lambda: GroupMamba(GROUP, unwrap_single=True),
        lambda: SpatialMamba(SPATIAL, out_indices=(1, 3), unwrap_single=True),
        lambda: VMamba(V, out_indices=(1, 3), unwrap_single=True),
        lambda: PlainMamba(PLAIN, out_indices=(1, 3), unwrap_single=True),
        lambda: PlainMambaAdapter(**ADAPTER, unwrap_single=True),
    ],
)
def test_several_outputs_stay_a_tuple(build):
    with pytest.raises(ValueError, match="unwrap_single=True needs exactly one output; there are"):
        build()


def test_a_recogniser_of_mmaction_takes_it():
    pytest.importorskip("mmaction.models", reason="mmaction's Recognizer2D expects no tuple")
    from mmaction.structures import ActionDataSample
    from mmengine.registry import MODELS, DefaultScope

    backbone = dict(type="mmvssm.VMamba", arch=V, out_indices=(3,), unwrap_single=True)
    head = dict(type="TSNHead", num_classes=5, in_channels=40)
    with DefaultScope.overwrite_default_scope("mmaction"):
        model = MODELS.build(dict(type="Recognizer2D", backbone=backbone, cls_head=head))
    samples = [ActionDataSample().set_gt_label(1) for _ in range(2)]
    model.loss(torch.randn(2, 3, 3, 32, 32), samples)["loss_cls"].backward()
    assert not [name for name, p in model.named_parameters() if p.grad is None]
