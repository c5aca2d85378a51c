"""A classifier's checkpoint gives its backbone to detectors and segmenters, by init_cfg alone."""

import re
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from mmengine.registry import MODELS, DefaultScope
from torch import nn

from mmvssm.models import GroupMambaClassifier, PlainMamba
from mmvssm.run.pretrained import check_pretrained

CONFIGS = Path(__file__).parents[3] / "configs"
ARCHS = {
    "groupmamba": dict(
        stem_hidden_dim=8, embed_dims=(16, 16, 16, 16), depths=(1, 1, 1, 1), mlp_ratios=(2, 2, 2, 2)
    ),
    "plainmamba": dict(
        embed_dims=16,
        num_layers=24,
        patch_size=16,
        num_convs_patch_embed=0,
        layers_with_dwconv=(0,),
        d_state=2,
    ),
}


def classifier(backbone):
    """Parts and names as in configs/*_imagenet.py, which tests/whole/pretraining compares."""
    if backbone == "groupmamba":
        return GroupMambaClassifier(ARCHS[backbone], 7)
    return nn.ModuleDict(
        {
            "backbone": PlainMamba(ARCHS[backbone]),
            "head": nn.ModuleDict({"fc": nn.Linear(16, 7)}),
        }
    )


@pytest.mark.parametrize(
    "method, library", [("maskrcnn_coco", "mmdet"), ("upernet_ade20k", "mmseg")]
)
@pytest.mark.parametrize("kind", ["groupmamba", "plainmamba", "plainmamba_pruned"])
def test_no_key_is_missing_or_left_over(kind, method, library, tmp_path):
    pytest.importorskip(library)
    name = kind.partition("_")[0]
    trained = classifier(name)
    for parameter in trained.parameters():
        nn.init.normal_(parameter)
    checkpoint = tmp_path / "classifier.pth"
    torch.save({"state_dict": trained.state_dict(), "meta": {}}, checkpoint)
    cfg = Config.fromfile(CONFIGS / f"{kind}_{method}.py").model.backbone
    cfg = dict(deepcopy(cfg), arch=ARCHS[name])
    cfg["init_cfg"] = dict(type="Pretrained", checkpoint=str(checkpoint), prefix="backbone.")
    with DefaultScope.overwrite_default_scope(library):
        backbone = MODELS.build(cfg)
    lines = list(check_pretrained(backbone))
    backbone.init_weights()
    here, there = backbone.state_dict(), trained.state_dict()
    there = {k.removeprefix("backbone."): v for k, v in there.items() if k.startswith("backbone.")}
    missing = here.keys() - there.keys()
    assert not there.keys() - here.keys()
    # A classifier has no norms of intermediate maps, which start as new ones, and the tools say so.
    assert all(re.fullmatch(r"norms\.(5|11|17)\.(weight|bias)", key) for key in missing)
    assert len(missing) == len(lines) * 6 == (0 if name == "groupmamba" else 6)
    assert all(torch.equal(here[key], there[key]) for key in there)
