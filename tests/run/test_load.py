"""mmvssm.load: models from checkpoints alone, in Python and with the tools."""

import json
import shutil
from pathlib import Path

import mmcv
import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("mmdet")
pytest.importorskip("mmseg")

import mmvssm
from mmvssm.errors import UserError
from mmvssm.models.blueprint import BLUEPRINT
from mmvssm.run import arguments
from support.tool_runs import call, sentence_of_refusal


@pytest.fixture(scope="module")
def photo(shapes):
    return str(min((Path(shapes) / "val2017").iterdir()))


@pytest.mark.parametrize("name", ["detector", "segmenter", "pruned"])
def test_predicts_as_with_the_config(weights, photo, in_folder, name):
    alone = mmvssm.load(weights / f"{name}.pth", device="cpu")
    shutil.copy(weights / f"{name}.py", "x.py")
    described = mmvssm.load(str(weights / f"{name}.pth"), config="x.py", device="cpu")
    assert alone.classes == described.classes and "disk" in alone.classes
    pixels = mmcv.imread(photo)
    kinds = [photo, Path(photo), pixels, Image.open(photo)]
    expected = described(photo)
    for found in alone(kinds):
        assert found.image.shape == pixels.shape
        for part in ("boxes", "scores", "labels", "masks", "class_map"):
            np.testing.assert_array_equal(getattr(found, part), getattr(expected, part))
    height, width = pixels.shape[:2]
    if name == "detector":
        count = len(found.boxes)
        assert count and found.masks.shape == (count, height, width) and found.class_map is None
    else:
        assert found.class_map.shape == (height, width) and found.boxes is None
        assert len(np.unique(found.class_map)) > 1
    found.save("out/a.png", score_thr=0.1)
    assert np.abs(mmcv.imread("out/a.png").astype(int) - pixels).max() > 20


def test_grey_arrays_are_read_as_grey_files(weights, photo, in_folder):
    grey = np.asarray(Image.open(photo).convert("L"))
    Image.fromarray(grey).save("grey.png")
    model = mmvssm.load(weights / "segmenter.pth", device="cpu")
    of_array, of_file = model([grey, "grey.png"])
    np.testing.assert_array_equal(of_array.class_map, of_file.class_map)


@pytest.mark.parametrize(
    ("picture", "said"),
    [
        ("none.png", "there is no file none.png"),
        ("broken.png", "broken.png cannot be decoded"),
        (np.zeros((4, 4, 3)), "got float64 (4, 4, 3)"),
        (np.zeros((4, 4, 4), np.uint8), "in the order BGR"),
        (None, "got <class 'NoneType'>"),
    ],
    ids=lambda part: str(part)[:20],
)
def test_pictures_that_are_none(weights, in_folder, picture, said):
    Path("broken.png").write_bytes(b"\x89PNG")
    model = mmvssm.load(weights / "segmenter.pth", device="cpu")
    with pytest.raises(UserError) as caught:
        model(picture)
    assert said in str(caught.value)


def test_old_checkpoints_need_a_config(weights, in_folder):
    content = torch.load(weights / "segmenter.pth", weights_only=True)
    del content["meta"][BLUEPRINT]
    torch.save(content, "old.pth")
    with pytest.raises(UserError, match="does not say how to build its model; give its config"):
        mmvssm.load("old.pth")
    assert mmvssm.load("old.pth", config=weights / "segmenter.py").classes[1] == "disk"


# ----------------------------------------------------------------------------------------- tools


@pytest.mark.parametrize(
    ("parser", "line", "config", "rest"),
    [
        (arguments.predict_parser, "best.pth in --out-dir o", "best.pth", ["in"]),
        (arguments.predict_parser, "--out-dir o best.pth in more", "best.pth", ["in", "more"]),
        (
            arguments.predict_parser,
            "--out-dir o --cfg-options a=b.pth -- best.pth in",
            "best.pth",
            ["in"],
        ),
        (arguments.predict_parser, "best.pth best.pth in --out-dir o", "best.pth", ["in"]),
        (arguments.predict_parser, "x.py best.pth --out-dir o in", "x.py", ["in"]),
        (arguments.test_parser, "best.pth --data-root d", "best.pth", None),
        (arguments.test_parser, "x.py best.pth", "x.py", None),
        (arguments.export_onnx_parser, "best.pth m.onnx", "best.pth", None),
        (arguments.export_onnx_parser, "x.py best.pth m.onnx", "x.py", None),
    ],
)
def test_a_checkpoint_stands_for_its_config(parser, line, config, rest):
    args = parser().parse_args(line.split())
    assert (args.config, args.checkpoint) == (config, "best.pth")
    assert getattr(args, "inputs", None) == rest


@pytest.mark.slow
def test_tools_take_what_training_wrote(trained, shapes, photo, in_folder):
    """With their config too, they do the same."""
    best = trained / "iter_2.pth"
    options = ("--device", "cpu", "--out-dir")
    call("predict.py", best, photo, *options, "alone")
    call("predict.py", trained / "tiny.py", best, photo, *options, "described")
    name = json.loads(Path("alone/images.json").read_text())["images"][0]["label_map"]
    assert Path("alone", name).read_bytes() == Path("described", name).read_bytes()
    here = ("--data-root", shapes, "--cfg-options", "test_dataloader.num_workers=0", "--work-dir")
    call("test.py", best, *here, "alone")
    call("test.py", trained / "tiny.py", best, *here, "described")
    alone, described = (
        json.loads(Path(folder, "test_results.json").read_text())["metrics"]
        for folder in ("alone", "described")
    )
    assert alone == described and alone["mIoU"] > 0


def test_a_test_needs_data(trained, in_folder, capsys):
    said = sentence_of_refusal(capsys, "test.py", trained / "iter_2.pth")
    assert "names no data to test on; add --data-root" in said
