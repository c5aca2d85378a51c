"""tools/test.py: its work dir, and test-time augmentation."""

import shutil

import pytest
from mmengine.config import Config

pytest.importorskip("mmdet")
pytest.importorskip("mmseg")

from mmvssm.errors import UserError
from mmvssm.run.test import _use_tta
from support.tool_runs import call, files_in


def test_it_leaves_what_the_training_wrote_as_it_is(trained, in_folder, capsys):
    """mmengine writes the config into the work dir, and that of a test differs from the training's."""
    work = in_folder / "out"
    shutil.copytree(trained, work)
    before = files_in(work)
    for config in (work / "tiny.py", trained.parent / "tiny.py"):
        call("test.py", config, work / "iter_2.pth", "--work-dir", work, "--tta")
        assert f"Results: {work}/test/test_results.json" in capsys.readouterr().out
        assert before.items() <= files_in(work).items()
        shutil.rmtree(work / "test")


def test_a_training_that_saved_no_checkpoint_keeps_its_config(trained, in_folder):
    work = in_folder / "out"
    work.mkdir()
    shutil.copy(trained / "tiny.py", work)
    before = files_in(work)
    call("test.py", work / "tiny.py", trained / "iter_2.pth", "--work-dir", work)
    assert before.items() <= files_in(work).items()


def test_results_are_in_a_work_dir_of_its_own(trained, in_folder):
    for _ in range(2):
        call("test.py", trained / "tiny.py", trained / "iter_2.pth", "--work-dir", "tested")
        assert (in_folder / "tested/test_results.json").is_file()
    assert not (in_folder / "tested/test").exists()


@pytest.mark.parametrize("mask_head", [None, dict(type="FCNMaskHead")], ids=["boxes", "masks"])
def test_augmentation_is_refused_for_masks_alone(mask_head):
    model = dict(type="MaskRCNN", roi_head=dict(mask_roi_extractor=None, mask_head=mask_head))
    cfg = Config(
        dict(
            default_scope="mmdet",
            model=model,
            tta_model=dict(type="DetTTAModel"),
            tta_pipeline=["views"],
            test_dataloader=dict(dataset=dict(type="CocoDataset")),
        )
    )
    if mask_head:
        with pytest.raises(UserError, match="this model predicts masks"):
            _use_tta(cfg)
    else:
        _use_tta(cfg)
        assert cfg.model.type == "DetTTAModel" and cfg.model.module == model
        assert cfg.test_dataloader.dataset.pipeline == ["views"]
