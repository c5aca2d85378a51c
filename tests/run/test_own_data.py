"""A Mask R-CNN on Pascal VOC, whose objects have boxes alone: drawn, trained for two iterations and tested."""

import json
from pathlib import Path

import pytest
import torch

from support import tiny_configs
from support.tool_runs import call

OBJECT = "<object><name>{}</name><bndbox><xmin>{}</xmin><ymin>{}</ymin><xmax>{}</xmax><ymax>{}</ymax></bndbox></object>"


def write_voc(shapes, root):
    """The training images of a data set of shapes as Pascal VOC, without a split for validation."""
    content = json.loads((shapes / "annotations/instances_train2017.json").read_text())
    (root / "Annotations").mkdir(parents=True)
    (root / "JPEGImages").symlink_to(shapes / "train2017")
    for image in content["images"]:
        objects = [
            OBJECT.format(
                "round" if a["category_id"] in (1, 5) else "other", x + 1, y + 1, x + w, y + h
            )
            for a in content["annotations"]
            for x, y, w, h in [a["bbox"]]
            if a["image_id"] == image["id"]
        ]
        text = f"<annotation>{''.join(objects)}</annotation>"
        (root / "Annotations" / image["file_name"]).with_suffix(".xml").write_text(text)


@pytest.mark.slow
def test_pascal_voc_is_drawn_trained_on_and_tested(shapes, config, capsys):
    write_voc(shapes, Path("own"))
    path = config(tiny_configs.DETECTOR)
    data = ("--data-root", "own")
    call("browse_dataset.py", path, *data, "--num", 1, "--out-dir", "pictures")
    assert len(list(Path("pictures").glob("*.jpg"))) == 1
    call("train.py", path, *data, "--work-dir", "run")
    said = capsys.readouterr().out
    assert "Pascal VOC" in said and "2 classes (other, round)" in said
    assert "mask part is left out" in said and "1 of 4 images drawn (seed 0)" in said
    weights = torch.load("run/epoch_1.pth", weights_only=True)["state_dict"]
    assert not any("mask" in name for name in weights)

    # By the original config and the data, and by the copy that names the converted data.
    metrics = []
    for arguments in ((path, *data), ("run/tiny.py",)):
        call("test.py", arguments[0], "run/epoch_1.pth", *arguments[1:], "--work-dir", "run")
        metrics.append(json.loads(Path("run/test/test_results.json").read_text())["metrics"])
    assert metrics[0] == metrics[1] and set(metrics[0]) == {
        *(f"coco/bbox_mAP{part}" for part in ("", "_50", "_75", "_s", "_m", "_l")),
        *("coco/other_precision", "coco/round_precision"),
    }
    assert len(list(Path("run/data").iterdir())) == 1
