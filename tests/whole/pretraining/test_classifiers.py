"""GroupMamba and PlainMamba as mmpretrain's classifiers."""

from pathlib import Path

import numpy as np
import pytest
import torch

from mmvssm.models import GroupMambaClassifier
from mmvssm.models.published import convert_groupmamba, convert_plainmamba
from mmvssm.registry import MODELS
from support.pretraining import require_mmpretrain

require_mmpretrain()

GOLDEN = Path(__file__).parents[2] / "golden"


def read(name):
    values = np.load(GOLDEN / f"{name}.npz")
    weights = {k[2:]: torch.from_numpy(values[k]) for k in values.files if k.startswith("w/")}
    return values, weights


def build(**model):
    return MODELS.build(dict(type="mmpretrain.ImageClassifier", **model)).eval()


def groupmamba(arch, num_classes, head):
    return build(
        backbone=dict(type="mmvssm.GroupMamba", arch=arch, out_indices=(3,), out_type="unnormed"),
        neck=dict(
            type="mmvssm.ClassBlock",
            in_channels=arch["embed_dims"][-1],
            mlp_ratio=arch["mlp_ratios"][-1],
        ),
        head=dict(type=head, num_classes=num_classes, in_channels=arch["embed_dims"][-1]),
    )


def test_logits_of_the_published_groupmamba():
    values, weights = read("groupmamba_small")
    conversion = convert_groupmamba(weights)
    num_classes = weights["head.weight"].shape[0]
    model = groupmamba(conversion.arch, num_classes, "mmvssm.DistillationHead")
    model.load_state_dict(conversion.state_dict)
    x = torch.from_numpy(values["x"])
    with torch.no_grad():
        logits, predictions = model(x), model(x, mode="predict")
    expected = torch.from_numpy(values["logits"])
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)
    scores = torch.stack([sample.pred_score for sample in predictions])
    torch.testing.assert_close(scores, expected.softmax(1), atol=1e-4, rtol=0)


@pytest.mark.parametrize("distillation", [True, False])
def test_weights_are_those_of_the_model_without_mmpretrain(distillation):
    arch = dict(
        stem_hidden_dim=8, embed_dims=(16, 16, 16, 16), depths=(1, 1, 1, 1), mlp_ratios=(2, 2, 2, 2)
    )
    head = "mmvssm.DistillationHead" if distillation else "mmpretrain.LinearClsHead"
    model = groupmamba(arch, 3, head)
    alone = GroupMambaClassifier(arch, 3, distillation=distillation).eval()
    alone.load_state_dict(model.state_dict())
    x = torch.randn(2, 3, 40, 24)
    with torch.no_grad():
        assert torch.equal(model(x), alone(x))


@pytest.mark.parametrize("pruning", [None, dict(layers=(0, 1), keep_ratio=0.5)])
def test_plainmamba_classifies_the_mean_of_the_tokens_that_are_left(pruning):
    """The published model also has the final norm before the mean, and a linear head."""
    values, weights = read("plainmamba_small")
    torch.manual_seed(0)
    dim = weights["pos_embed"].shape[2]
    weights = {f"backbone.{name}": value for name, value in weights.items()}
    weights |= {"head.fc.weight": torch.randn(5, dim), "head.fc.bias": torch.randn(5)}
    conversion = convert_plainmamba(weights)
    assert not conversion.missing and not conversion.unused
    backbone = dict(type="mmvssm.PlainMamba", arch=conversion.arch, img_size=64)
    model = build(
        backbone=dict(backbone, out_indices=(1, 3), pruning=pruning),
        neck=dict(type="mmvssm.TokenPooling"),
        head=dict(type="mmpretrain.LinearClsHead", num_classes=5, in_channels=dim),
    )
    model.load_state_dict(conversion.state_dict)
    x = torch.from_numpy(values["x"])
    with torch.no_grad():
        logits, last = model(x), model.backbone(x)[-1]
    if pruning is None:
        mean = torch.from_numpy(values["feat3"]).mean((2, 3))
    else:
        positions = last.grid[0] * last.grid[1]
        assert last.tokens.shape[1] < positions / 2
        mean = last.tokens.mean(1)
    expected = mean @ weights["head.fc.weight"].T + weights["head.fc.bias"]
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)
