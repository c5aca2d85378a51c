import pytest
import torch

from mmvssm.models import GroupMambaClassifier
from mmvssm.models.published import convert_groupmamba, unwrap
from support.published_groupmamba import published_weights


def test_unwrap_usual_wrappings():
    weights = {"a.weight": torch.zeros(2)}
    prefixed = {"module.a.weight": torch.zeros(2)}
    for checkpoint in (
        weights,
        prefixed,
        {"model": weights, "epoch": 3},
        {"state_dict": prefixed},
        {"state_dict_ema": weights, "state_dict": {"other": torch.ones(1)}},
        {"model_ema": prefixed, "model": {"other": torch.ones(1)}},
    ):
        assert list(unwrap(checkpoint)) == ["a.weight"]
    assert list(unwrap({"model_ema": {}, "model": weights}, "model")) == ["a.weight"]


@pytest.mark.parametrize(
    "checkpoint, key, words",
    [
        ({"epoch": 3}, None, "holds no weights.*its keys are: epoch"),
        ({"model": {"a": torch.zeros(1)}}, "ema", "no weights under 'ema'"),
    ],
)
def test_unwrap_without_weights(checkpoint, key, words):
    with pytest.raises(ValueError, match=words):
        unwrap(checkpoint, key)


def test_named_arch_is_recognised():
    weights = published_weights(32, (64, 128, 348, 448), (3, 4, 9, 3), (8, 8, 4, 4), 10)
    conversion = convert_groupmamba(weights)
    assert conversion.arch == "tiny"
    assert not conversion.unused and not conversion.missing
    model = GroupMambaClassifier("tiny", 10)
    model.load_state_dict(conversion.state_dict)


def test_unused_and_missing_are_reported():
    weights = published_weights(8, (16, 32, 48, 64), (1, 1, 1, 1), (2, 2, 2, 2), 10)
    weights["teacher.weight"] = torch.zeros(3)
    weights["block2.0.attn.mamba_g1.extra"] = torch.zeros(3)
    del weights["block1.0.attn.mamba_g3.in_proj.weight"]
    weights["head.bias"] = torch.zeros(11)
    del weights["dist_head.bias"]
    conversion = convert_groupmamba(weights)
    assert conversion.unused == [
        "block1.0.attn.mamba_g1.in_proj.weight",
        "block1.0.attn.mamba_g2.in_proj.weight",
        "block1.0.attn.mamba_g4.in_proj.weight",
        "block2.0.attn.mamba_g1.extra",
        "head.bias",
        "teacher.weight",
    ]
    block = "backbone.stages.0.blocks.0.mixer.scan"
    assert sorted(conversion.missing) == [
        f"{block}.gate_proj.weight",
        f"{block}.in_proj.weight",
        "head.distillation_fc.bias",
        "head.fc.bias",
    ]


def test_other_models_are_refused():
    with pytest.raises(ValueError, match="not the weights of a published GroupMamba"):
        convert_groupmamba({"layers.0.weight": torch.zeros(1)})
