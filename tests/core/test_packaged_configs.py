"""Configs of the package by name, for everything of mmengine that takes such names."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from mmengine.hub import get_config, get_model

import mmvssm  # noqa: F401
from mmvssm import packaged_configs

REPO = Path(__file__).parents[2]


@pytest.fixture
def package(tmp_path, monkeypatch):
    """In place of ours a package whose model-index.yml names weights."""
    folder = tmp_path / "packagewithweights"
    (folder / ".mim" / "configs").mkdir(parents=True)
    (folder / "version.py").touch()
    (folder / "__init__.py").touch()
    (folder / ".mim" / "configs" / "known.py").write_text("answer = 42\n")
    (folder / ".mim" / "configs" / "other.py").write_text("answer = 0\n")
    (folder / ".mim" / "model-index.yml").write_text("Import:\n  - configs/metafile.yml\n")
    (folder / ".mim" / "configs" / "metafile.yml").write_text(
        "Models:\n  - Name: known\n    Config: configs/known.py\n    Weights: https://an.address/of_the_authors.pth\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(packaged_configs, "_MODULE", f"{folder.name}.version")


def test_hub_reads_configs():
    pytest.importorskip("mmdet")
    cfg = get_config("mmvssm::groupmamba_maskrcnn_coco.py")
    assert cfg.model.backbone.type == "mmvssm.GroupMamba"


@pytest.mark.parametrize("method", ["maskrcnn", "upernet"])
def test_hub_builds_models(method):
    pytest.importorskip("mmdet" if method == "maskrcnn" else "mmseg")
    model = get_model(f"mmvssm::groupmamba_{method}_shapes.py")
    assert type(model.backbone).__name__ == "GroupMamba"


def test_hub_names_the_weights_of_the_index(package):
    assert get_config("mmvssm::known.py", pretrained=True).model_path == "mmvssm://known"
    assert "model_path" not in get_config("mmvssm::other.py", pretrained=True)


def test_inferencers_take_the_weights_of_the_index(package):
    """Unless the caller names others; without any they say that the weights are random."""
    for name, weights in (("known", "mmvssm://known"), ("other", None)):
        cfg, found = packaged_configs._load_model_from_metafile(None, f"mmvssm::{name}.py")
        assert found == weights
        assert cfg.answer == {"known": 42, "other": 0}[name]


def test_names_of_other_packages_mean_what_they_did():
    pytest.importorskip("mmdet")
    assert get_config("mmdet::retinanet/retinanet_r18_fpn_1x_coco.py").model.backbone.depth == 18
    from mmdet.apis import DetInferencer

    with pytest.raises(ValueError, match="Cannot find model: no_such_model in mmdet"):
        DetInferencer("no_such_model", device="cpu")


IMAGE = np.random.default_rng(0).integers(0, 255, (64, 80, 3), dtype=np.uint8)


@pytest.mark.slow
def test_mmdet_s_inferencer_takes_a_name():
    pytest.importorskip("mmdet")
    from mmdet.apis import DetInferencer

    inferencer = DetInferencer("mmvssm::groupmamba_maskrcnn_shapes.py", device="cpu")
    (prediction,) = inferencer(IMAGE, no_save_vis=True)["predictions"]
    assert {"labels", "scores", "bboxes", "masks"} <= set(prediction)


@pytest.mark.slow
def test_mmseg_s_inferencer_takes_a_name():
    pytest.importorskip("mmseg")
    from mmseg.apis import MMSegInferencer

    inferencer = MMSegInferencer("mmvssm::groupmamba_upernet_shapes.py", device="cpu")
    assert inferencer(IMAGE)["predictions"].shape == IMAGE.shape[:2]


@pytest.mark.slow
def test_a_name_that_is_no_config_is_an_error():
    with pytest.raises(FileNotFoundError, match=r"no_such_config\.py"):
        get_config("mmvssm::no_such_config.py")


@pytest.mark.slow
def test_the_import_may_come_after_that_of_mmengine():
    pytest.importorskip("mmdet")
    code = (
        "from mmengine.hub import get_config; from mmengine.infer import BaseInferencer; import mmvssm;"
        "print(get_config('mmvssm::groupmamba_maskrcnn_coco.py').model.type)"
    )
    said = subprocess.check_output([sys.executable, "-c", code], cwd=REPO, text=True)
    assert said.split()[-1] == "MaskRCNN"
