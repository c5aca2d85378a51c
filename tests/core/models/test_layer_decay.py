"""Learning rates that fall from layer to layer, in models of mmdet, mmseg and mmpretrain."""

from copy import deepcopy

import pytest
import torch
from mmengine.config import Config
from mmengine.optim import build_optim_wrapper
from mmengine.registry import MODELS, DefaultScope

import mmvssm  # noqa: F401
from support.tiny_backbones import GROUP, PLAIN, SPATIAL, VIM, V
from support.tiny_configs import CONFIGS

KEYS = {"A_log": dict(decay_mult=0.0), "pos_embed": dict(decay_mult=0.0, lr_mult=0.1)}
SETTINGS = dict(
    constructor="mmvssm.LayerDecayOptimWrapperConstructor",
    optimizer=dict(type="AdamW", lr=1.0, weight_decay=0.05),
    paramwise_cfg=dict(layer_decay_rate=0.5, norm_decay_mult=0.0, custom_keys=KEYS),
)
BACKBONES = {
    "groupmamba": dict(type="mmvssm.GroupMamba", arch=GROUP),
    "spatialmamba": dict(type="mmvssm.SpatialMamba", arch=SPATIAL),
    "vmamba": dict(type="mmvssm.VMamba", arch=V),
    "vim": dict(type="mmvssm.Vim", arch=VIM),
    "plainmamba": dict(type="mmvssm.PlainMamba", arch=PLAIN, out_indices=(0, 1, 2, 3)),
}


def build_model(project, backbone, device="meta"):
    """A model of a project."""
    pytest.importorskip(project, reason=f"a model of {project}")
    if project == "mmpretrain":
        head = dict(type="LinearClsHead", num_classes=3, in_channels=8)
        model = dict(type="ImageClassifier", backbone=backbone, head=head)
    else:
        method = "maskrcnn" if project == "mmdet" else "upernet"
        model = Config.fromfile(CONFIGS / f"groupmamba_{method}_shapes.py").model
        model.backbone = backbone
    with DefaultScope.overwrite_default_scope(project), torch.device(device):
        return MODELS.build(model)


def groups_by_name(model, settings, project):
    with DefaultScope.overwrite_default_scope(project):
        optimizer = build_optim_wrapper(model, deepcopy(settings)).optimizer
    names = {parameter: name for name, parameter in model.named_parameters()}
    groups = {names[p]: group for group in optimizer.param_groups for p in group["params"]}
    assert groups.keys() == set(names.values())
    return groups


@pytest.mark.parametrize("project", ["mmdet", "mmseg", "mmpretrain"])
@pytest.mark.parametrize("backbone", BACKBONES)
def test_rates_fall_from_the_head_to_the_stem(project, backbone):
    model = build_model(project, BACKBONES[backbone])
    groups = groups_by_name(model, SETTINGS, project)
    plain = deepcopy(SETTINGS)
    del plain["constructor"], plain["paramwise_cfg"]["layer_decay_rate"]
    expected = groups_by_name(model, plain, project)  # by mmengine's own constructor
    layers = set()
    for name, group in groups.items():
        layer, count = model.backbone.get_layer_depth(name, "backbone.")
        layers.add(layer)
        assert group["lr"] == pytest.approx(expected[name]["lr"] * 0.5 ** (count - 1 - layer))
        assert group["weight_decay"] == expected[name]["weight_decay"]
    assert layers == set(range(count))
    if backbone == "plainmamba":
        assert groups["backbone.pos_embed"]["lr"] == pytest.approx(0.1 * 0.5**5)


@pytest.mark.parametrize("backbone", BACKBONES)
def test_mmpretrain_s_own_constructor_gives_the_same_rates(backbone):
    model = build_model("mmpretrain", BACKBONES[backbone])
    settings = deepcopy(SETTINGS)
    del settings["paramwise_cfg"]["custom_keys"]["pos_embed"]["lr_mult"]  # it ignores that one
    ours = groups_by_name(model, settings, "mmpretrain")
    settings["constructor"] = "mmpretrain.LearningRateDecayOptimWrapperConstructor"
    theirs = groups_by_name(model, settings, "mmpretrain")
    for key in ("lr", "weight_decay"):
        assert {n: g[key] for n, g in ours.items()} == {n: g[key] for n, g in theirs.items()}


def test_backbones_of_mmpretrain_in_a_detector():
    pytest.importorskip("mmpretrain", reason="its backbones know their layers too")
    backbone = dict(type="mmpretrain.ConvNeXt", arch="atto", out_indices=(0, 1, 2, 3))
    model = build_model("mmdet", backbone, "cpu")  # it does not build on the meta device
    groups = groups_by_name(model, SETTINGS, "mmdet")
    assert groups["backbone.downsample_layers.0.0.weight"]["lr"] == 0.5**7
    assert groups["backbone.stages.3.1.gamma"]["lr"] == 0.5
    assert groups["rpn_head.rpn_cls.weight"]["lr"] == 1.0


def test_a_backbone_inside_of_another_model():
    model = torch.nn.ModuleDict({"student": build_model("mmseg", BACKBONES["vmamba"])})
    groups = groups_by_name(model, SETTINGS, "mmseg")
    assert groups["student.backbone.stages.0.embed.conv1.weight"]["lr"] == 0.5**6
    assert groups["student.decode_head.conv_seg.weight"]["lr"] == 1.0


def test_frozen_parameters_have_no_group():
    model = build_model("mmseg", dict(BACKBONES["vmamba"], frozen_stages=1))
    with DefaultScope.overwrite_default_scope("mmseg"):
        optimizer = build_optim_wrapper(model, deepcopy(SETTINGS)).optimizer
    given = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert given == {id(p) for p in model.parameters() if p.requires_grad}


@pytest.mark.parametrize(
    "wrong", [dict(paramwise_cfg=dict(norm_decay_mult=0.0)), dict(paramwise_cfg=None)]
)
def test_a_missing_rate_is_named(wrong):
    with pytest.raises(ValueError, match=r"needs paramwise_cfg=dict\(layer_decay_rate="):
        build_optim_wrapper(torch.nn.Linear(1, 1), deepcopy({**SETTINGS, **wrong}))


def test_a_model_without_layers_is_refused():
    with pytest.raises(ValueError, match="no backbone of the model has the method get_layer_depth"):
        build_optim_wrapper(torch.nn.Linear(1, 1), deepcopy(SETTINGS))
