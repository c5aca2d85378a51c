"""Heads other than Mask R-CNN's and UperNet's: trained for two iterations, tested, loaded from the checkpoint alone."""

import json
from pathlib import Path

import pytest
from mmengine.config import Config

pytest.importorskip("mmdet")
pytest.importorskip("mmseg")

import mmvssm
from support.tiny_configs import CONFIGS, OTHER_HEADS
from support.tool_runs import call

IN_EVERY_RUN = ("rtmdet", "mask2former")
HERE = [f"{part}_dataloader.num_workers=0" for part in ("train", "val", "test")]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("backbone", "head"),
    [
        pytest.param(*pair, marks=[pytest.mark.nightly] * (pair[1] not in IN_EVERY_RUN))
        for pair in OTHER_HEADS
    ],
)
def test_a_head_trains_and_is_tested(shapes, in_folder, backbone, head):
    path = CONFIGS / f"{backbone}_{head}_shapes.py"
    segments = head in ("mask2former", "segformer")
    length = ("--iters", 2) if segments else ("--epochs", 1)
    options = ("--data-root", shapes, "--image-size", 64, "--batch-size", 2, *length)
    # After two iterations no score of RetinaNet's reaches 0.05.
    settings = [*HERE, *["model.test_cfg.score_thr=0.0"] * (head == "retinanet")]
    call("train.py", path, *options, "--work-dir", "run", "--cfg-options", *settings)
    saved = Config.fromfile(f"run/{path.name}")
    assert saved.test_dataloader.dataset.pipeline[1].scale == (64, 64)
    (log,) = Path("run").glob("*/vis_data/scalars.json")
    metrics = [json.loads(line) for line in log.read_text().splitlines()][-1]
    metric = "mIoU" if segments else "coco/bbox_mAP"
    assert metrics[metric] >= 0

    checkpoint = Path("run/last_checkpoint").read_text()
    here = ("--cfg-options", HERE[-1], "--work-dir", "tested")
    call("test.py", checkpoint, "--data-root", shapes, *here)
    tested = json.loads(Path("tested/test_results.json").read_text())["metrics"]
    assert tested[metric] == metrics[metric]

    photo = str(min((Path(shapes) / "val2017").iterdir()))
    result = mmvssm.load(checkpoint, device="cpu")(photo)
    if segments:
        assert result.class_map.shape == result.image.shape[:2]
    else:
        assert len(result.boxes) == len(result.scores) == len(result.labels)
        assert (result.masks is not None) == ("mask" in head)
    call("predict.py", checkpoint, photo, "--device", "cpu", "--out-dir", "seen")
    assert len(list(Path("seen/pictures").iterdir())) == 1
