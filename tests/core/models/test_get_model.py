"""Published models by name: every name's file under the published names, and what ``get_model`` builds of it."""

import runpy
from pathlib import Path

import pytest
import torch

import mmvssm
from mmvssm.errors import UserError
from mmvssm.models import weights as module
from mmvssm.models.get_model import _build_whole
from mmvssm.models.published import convert_whole
from mmvssm.models.weights_table import PUBLISHED
from support.published_files import as_published, published_file

REPO = Path(__file__).parents[3]
ARCH = dict(embed_dims=[8, 8, 16, 768], depths=[1, 1, 1, 1], ssm_ratio=1, mlp_ratio=1)
LIBRARIES = {"classification": "mmpretrain", "detection": "mmdet", "segmentation": "mmseg"}


@pytest.mark.slow
@pytest.mark.parametrize("name", PUBLISHED)
def test_every_weight_of_every_published_model_has_its_place(name):
    pytest.importorskip(LIBRARIES[PUBLISHED[name].task])
    with torch.device("meta"):
        model = _build_whole(PUBLISHED[name], {})
    own = {key: x for key, x in model.state_dict().items() if not key.startswith("teacher.")}
    family, classifier = name.partition("_")[0], PUBLISHED[name].task == "classification"
    conversion = convert_whole(as_published(family, own, classifier))
    assert not conversion.unused and not conversion.missing
    assert {key: x.shape for key, x in conversion.state_dict.items()} == {
        key: x.shape for key, x in own.items()
    }
    assert conversion.arch == PUBLISHED[name].arch


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv(module.VARIABLE, str(tmp_path))
    return tmp_path


@pytest.fixture
def vmamba(folder, monkeypatch):
    """A published classifier, smaller than it is, in a folder of weights."""
    small = PUBLISHED["vmamba_tiny"]._replace(arch=ARCH)
    monkeypatch.setitem(PUBLISHED, "vmamba_tiny", small)
    source = mmvssm.get_model("vmamba_tiny", pretrained=False, out_indices=(3,))
    weights = {f"backbone.{key}": x for key, x in source.state_dict().items()}
    weights |= {"head.fc.weight": torch.zeros(1000, 768), "head.fc.bias": torch.zeros(1000)}
    torch.save(published_file("vmamba_tiny", weights), folder / "vmamba_tiny.pth")
    return source


def test_a_backbone(vmamba, capsys):
    model = mmvssm.get_model("vmamba_tiny", out_indices=(1, 3), drop_path_rate=0.1)
    assert [tuple(x.shape) for x in model(torch.zeros(1, 3, 64, 64))] == [
        (1, 8, 8, 8),
        (1, 768, 2, 2),
    ]
    own = model.state_dict()
    assert all(torch.equal(own[key], x) for key, x in vmamba.state_dict().items())
    misfit = "vmamba_tiny does not fit the model that these settings make; "
    with pytest.raises(UserError, match=rf"{misfit}missing from it: stages\.0\.blocks\.1"):
        mmvssm.get_model("vmamba_tiny", arch={**ARCH, "depths": [2, 1, 1, 1]})
    with pytest.raises(UserError, match=rf"{misfit}of another shape: stages\.0\.embed\.conv1"):
        mmvssm.get_model("vmamba_tiny", arch={**ARCH, "embed_dims": [16, 16, 16, 768]})


def test_a_whole_model(vmamba):
    pytest.importorskip("mmpretrain")
    model = mmvssm.get_model("vmamba_tiny", whole=True, arch=ARCH)
    assert type(model).__name__ == "ImageClassifier" and model.training
    assert torch.equal(model.backbone.norms["3"].weight, vmamba.norms["3"].weight)
    assert (model.head.fc.weight == 0).all()


def test_settings_of_a_backbone():
    model = mmvssm.get_model("plainmamba_l1", pretrained=False, pruning="L1", out_indices=(11, 23))
    assert model.out_indices == (11, 23) and model.pruning is not None
    with pytest.raises(UserError, match="no published weights called 'resnet50'; known are "):
        mmvssm.get_model("resnet50")


def test_what_is_made_from_the_table_is_up_to_date():
    """``configs/metafile.yml`` and docs/models.md; their command renews them."""
    tables = runpy.run_path(str(REPO / "tools/analysis_tools/published_tables.py"))
    assert tables["METAFILE"].read_text() == tables["metafile"]()
    text = tables["PAGE"].read_text()
    assert text == tables["page"](text)
    for model in PUBLISHED.values():
        assert f"[`{model.name}`]({model.address})" in text
        assert (REPO / f"configs/{model.config}.py").exists()
