"""tools/predict.py: predictions compared with the libraries' own inference, inputs, outputs and messages."""

import errno
import json
import os
import runpy
import signal
import sys
from pathlib import Path
from types import SimpleNamespace

import cv2
import matplotlib
import mmcv
import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("mmdet")
pytest.importorskip("mmseg")

from mmdet.apis import inference_detector, init_detector
from mmdet.structures import DetDataSample
from mmengine.config import Config
from mmengine.registry import init_default_scope
from mmengine.structures import InstanceData, PixelData
from mmseg.apis import inference_model, init_model
from mmseg.structures import SegDataSample
from mmseg.visualization import SegLocalVisualizer
from pycocotools.coco import COCO

from mmvssm.datasets.pictures import Loading
from mmvssm.errors import UserError
from mmvssm.run import predict as predict_module
from mmvssm.run.checkpoints import Checkpoint
from mmvssm.run.predict import in_batches
from mmvssm.run.prediction import outputs as outputs_module
from mmvssm.run.prediction import predictor as predictor_module
from mmvssm.run.prediction.outputs import VideoFile, build_visualizer, draw, place_name
from mmvssm.run.prediction.predictor import Predictor, name_classes
from mmvssm.run.prediction.sources import describe_image, find_sources
from support.tool_runs import call, sentence_of_refusal

REPO = Path(__file__).resolve().parents[2]
RED, BLUE = (255, 0, 0), (0, 0, 255)


@pytest.fixture
def predict(weights, in_folder):
    """Runs the tool in the test's folder with ``--out-dir out``; returns what images.json says of each file."""

    def run(model, *arguments, code=0, out="out"):
        config, checkpoint = (weights / f"{model}{suffix}" for suffix in (".py", ".pth"))
        command = (
            "predict.py",
            config,
            checkpoint,
            *arguments,
            "--out-dir",
            out,
            "--device",
            "cpu",
        )
        if code:
            with pytest.raises(SystemExit) as caught:
                call(*command)
            assert caught.value.code == code
        else:
            call(*command)
        return index(out)

    return run


@pytest.fixture
def scenes(shapes, in_folder):
    """The folder ``in`` with two images of shapes, one of them cropped; returns its path."""
    Path("in").mkdir()
    first, second = sorted((Path(shapes) / "val2017").iterdir())
    mmcv.imwrite(mmcv.imread(str(first)), "in/a.png")
    mmcv.imwrite(mmcv.imread(str(second))[:40], "in/b.png")
    return "in"


def index(out="out"):
    return json.loads(Path(out, "images.json").read_text())


def results(out="out"):
    return json.loads(Path(out, "predictions.json").read_text())


def labels(name, out="out"):
    return np.array(Image.open(Path(out, "labels", name)))


def rgb(path):
    return mmcv.imread(str(path), channel_order="rgb")


DRAWS_IN_PLACE = tuple(map(int, matplotlib.__version__.split(".")[:2])) >= (3, 11)
"""Earlier releases of matplotlib may move an image by a pixel each time that mmengine draws on it."""


def film(path, frames, codec="MJPG", fps=5):
    """Write frames, BGR, as a video."""
    height, width = frames[0].shape[:2]
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*codec), fps, (width, height))
    assert writer.isOpened()
    for frame in frames:
        writer.write(frame)
    writer.release()


# ------------------------------------------------------------------------------- what is predicted


def test_detections_are_those_of_mmdet(predict, weights, scenes):
    described = predict("detector", scenes, "--score-thr", "0.1")
    model = init_detector(str(weights / "detector.py"), str(weights / "detector.pth"), device="cpu")
    found = results()
    assert found
    for record, name in zip(described["images"], ("in/a.png", "in/b.png")):
        assert record["file_name"] == name
        assert (record["height"], record["width"]) == mmcv.imread(name).shape[:2]
        expected = inference_detector(model, name).pred_instances
        expected = expected[expected.scores >= 0.1]
        mine = [d for d in found if d["image_id"] == record["id"]]
        assert len(mine) == len(expected) > 0
        boxes = torch.tensor([d["bbox"] for d in mine])
        boxes[:, 2:] += boxes[:, :2]
        torch.testing.assert_close(boxes, expected.bboxes, atol=1e-3, rtol=0)
        torch.testing.assert_close(
            torch.tensor([d["score"] for d in mine]), expected.scores, atol=1e-5, rtol=0
        )
        assert [d["category_id"] - 1 for d in mine] == expected.labels.tolist()
        assert {d["file_name"] for d in mine} == {name}

    coco = COCO("out/images.json")
    detected = coco.loadRes("out/predictions.json")
    names = ["disk", "square", "triangle", "star", "ring"]
    assert [c["name"] for c in coco.loadCats(coco.getCatIds())] == names
    assert all(d["category_name"] == names[d["category_id"] - 1] for d in found)
    masks = [detected.annToMask(a) for a in detected.loadAnns(detected.getAnnIds(imgIds=[2]))]
    np.testing.assert_array_equal(masks, expected.masks.numpy())


def test_label_maps_are_those_of_mmseg(predict, weights, scenes):
    described = predict("segmenter", scenes)
    model = init_model(str(weights / "segmenter.py"), str(weights / "segmenter.pth"), device="cpu")
    for record in described["images"]:
        expected = inference_model(model, record["file_name"]).pred_sem_seg.data[0].numpy()
        found = np.array(Image.open(Path("out", record["label_map"])))
        np.testing.assert_array_equal(found, expected)
        assert found.dtype == np.uint8 and len(np.unique(found)) > 1
    assert not Path("out/predictions.json").exists()
    names = {c["id"]: c["name"] for c in described["categories"]}
    assert names == dict(enumerate(["background", "disk", "square", "triangle", "star", "ring"]))
    assert described["categories"][1]["color"] == [230, 60, 60]


def test_images_predicted_together_are_predicted_as_alone(predict, shapes, in_folder):
    pixels = mmcv.imread(str(min((Path(shapes) / "val2017").iterdir())))
    for name, part in (
        ("a", pixels),
        ("b", pixels[::-1]),
        ("c", pixels[:40]),
        ("d", pixels[:, ::-1]),
    ):
        mmcv.imwrite(part.copy(), f"in/{name}.png")
    predict("segmenter", "in", out="alone")
    predict("segmenter", "in", "--batch-size", "4", out="together")
    for name in "abcd":
        agree = labels(f"{name}.png", "alone") == labels(f"{name}.png", "together")
        assert agree.mean() > 0.999  # of pixels: sums of another order may tip one
    predict("detector", "in", out="alone-boxes")
    predict("detector", "in", "--batch-size", "4", out="boxes")
    one, other = results("alone-boxes"), results("boxes")
    assert len(one) == len(other) > 0
    for a, b in zip(one, other):
        assert a["image_id"] == b["image_id"] and a["category_id"] == b["category_id"]
        np.testing.assert_allclose(a["bbox"], b["bbox"], atol=1e-2)


def test_only_images_of_one_size_are_together():
    items = [
        SimpleNamespace(image=SimpleNamespace(input_shape=(3, size, 8)))
        for size in (4, 4, 4, 8, 4, 4)
    ]
    assert [len(batch) for batch in in_batches(items, 2)] == [2, 1, 1, 2]
    assert [len(batch) for batch in in_batches(items, 1)] == [1] * 6
    assert [item for batch in in_batches(items, 9) for item in batch] == items


def test_score_threshold_holds_for_json_and_picture(predict, scenes):
    predict("detector", f"{scenes}/a.png", "--score-thr", "0.1", out="many")
    scores = sorted(d["score"] for d in results("many"))
    middle = scores[len(scores) // 2]
    predict("detector", f"{scenes}/a.png", "--score-thr", str(middle), out="some")
    assert sorted(d["score"] for d in results("some")) == [s for s in scores if s >= middle]
    predict("detector", f"{scenes}/a.png", "--score-thr", "1", out="none")
    assert results("none") == []
    image = rgb("none/pictures/a.jpg")
    if DRAWS_IN_PLACE:
        mmcv.imwrite(mmcv.imread("in/a.png"), "in/a.jpg")
        np.testing.assert_array_equal(rgb("in/a.jpg"), image)
    some, many = (rgb(f"{out}/pictures/a.jpg").astype(float) - image for out in ("some", "many"))
    assert 0 < np.abs(some).mean() < np.abs(many).mean()


# ------------------------------------------------------------------------------- what is read


def test_kinds_of_pixels_are_read_as_mmcv_does(predict, in_folder, capsys):
    rng = np.random.default_rng(0)
    coarse = rng.integers(0, 256, (6, 8, 3), dtype=np.uint8)
    color = coarse.repeat(8, 0).repeat(8, 1)
    grey = np.asarray(Image.fromarray(color).convert("L"))
    palette = Image.fromarray(color).quantize(16)
    bits = Image.fromarray(color).convert("1")
    deep = grey.astype(np.uint16) * 256 + 37  # the lower 8 bits are not used
    alpha = np.dstack([color, np.arange(64, dtype=np.uint8)[None].repeat(48, 0)])
    exif = Image.Exif()
    exif[274] = 6  # to be turned by 90 degrees clockwise
    Path("in").mkdir()
    three = np.dstack([grey] * 3)
    expected = {
        "color": color, "grey": three, "deep": three, "deeptiff": three, "greyalpha": three,
        "palette": np.asarray(palette.convert("RGB")), "bits": np.asarray(bits.convert("RGB")),
        "alpha": color, "deepcolor": color,
    }  # fmt: skip
    for name, array in (("color", color), ("grey", grey), ("deep", deep), ("alpha", alpha)):
        Image.fromarray(array).save(f"in/{name}.png")
    Image.fromarray(deep).save("in/deeptiff.tif")
    Image.fromarray(color).convert("L").convert("LA").save("in/greyalpha.png")
    palette.save("in/palette.png")
    bits.save("in/bits.png")
    mmcv.imwrite(color[..., ::-1].astype(np.uint16) * 256 + 37, "in/deepcolor.png")
    Image.fromarray(color).save("in/turned.jpg", quality=95, exif=exif)
    Image.fromarray(color).save("in/upright.jpg", quality=95)
    expected["turned"] = np.rot90(rgb("in/upright.jpg"), -1)
    for name, array in expected.items():
        mmcv.imwrite(array[..., ::-1].copy(), f"plain/{name}.png")
    Image.fromarray(color).save(
        "in/pages.tif", save_all=True, append_images=[palette.convert("RGB")]
    )

    described = predict("segmenter", "in")
    said = capsys.readouterr().out
    predict("segmenter", "plain", out="out-plain")
    for name in expected:
        found = labels(f"{name}.png")
        np.testing.assert_array_equal(found, labels(f"{name}.png", "out-plain"), err_msg=name)
        assert len(np.unique(found)) > 1
    assert "note: 3 images with 16 bits a channel, of which the upper 8 are used" in said
    assert "note: 2 images with transparency, which is ignored" in said
    assert "note: 1 image with several pages or frames, of which the first is used" in said

    (turned,) = [r for r in described["images"] if r["file_name"] == "in/turned.jpg"]
    assert (turned["width"], turned["height"]) == (48, 64)
    # The drawn picture: halfway between the turned image and the colours of its labels.
    colors = np.array([c["color"] for c in described["categories"]])[labels("turned.png")]
    blend = 0.5 * expected["turned"] + 0.5 * colors
    off = np.abs(rgb("out/pictures/turned.jpg") - blend).mean()
    assert off < (12 if DRAWS_IN_PLACE else 20)


def test_what_is_not_used_depends_on_the_reader(in_folder):
    Image.fromarray(np.zeros((8, 8), np.uint16)).save("deep.png")
    Image.fromarray(np.zeros((8, 8, 4), np.uint8)).save("alpha.png")
    for reader in (Loading(), Loading(color_type="grayscale")):
        assert (
            len(describe_image("deep.png", reader)) == len(describe_image("alpha.png", reader)) == 1
        )
    for reader in (Loading(color_type="unchanged"), Loading(backend="pillow")):
        assert describe_image("deep.png", reader) == describe_image("alpha.png", reader) == []


def test_giant_images_are_ones_own(in_folder, monkeypatch):
    Image.new("RGB", (16, 16)).save("big.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 50)
    assert describe_image("big.png", Loading()) == []


def test_boxes_of_a_turned_image_are_those_of_the_picture(predict, scenes):
    exif = Image.Exif()
    exif[274] = 6
    Image.open(f"{scenes}/b.png").save("turned.jpg", exif=exif)
    described = predict("detector", "turned.jpg", "--score-thr", "0.1")
    assert (described["images"][0]["width"], described["images"][0]["height"]) == (40, 64)
    assert rgb("out/pictures/turned.jpg").shape == (64, 40, 3)
    for detection in results():
        left, top, width, height = detection["bbox"]
        assert left + width <= 40 and top + height <= 64
        assert detection["segmentation"]["size"] == [64, 40]
    assert max(d["bbox"][1] + d["bbox"][3] for d in results()) > 40


def test_broken_files_are_left_out_and_said(predict, scenes, capsys):
    data = Path(scenes, "a.png").read_bytes()
    Path(scenes, "cut.png").write_bytes(data[: len(data) // 2])
    Image.open(f"{scenes}/a.png").save("whole.jpg")
    Path(scenes, "cut.jpg").write_bytes(Path("whole.jpg").read_bytes()[:-300])
    Path(scenes, "empty.jpg").touch()
    Path(scenes, "words.png").write_text("not an image")
    Path(scenes, "film.mp4").write_bytes(b"no film" * 99)
    Path(scenes, "notes.txt").write_text("left out")
    Path(scenes, ".hidden.png").write_text("not looked at")
    described = predict("segmenter", scenes, code=3)
    assert [r["file_name"] for r in described["images"]] == ["in/a.png", "in/b.png"]
    said = capsys.readouterr()
    for name in ("cut.png", "cut.jpg", "empty.jpg", "words.png", "film.mp4"):
        assert f"warning: in/{name} " in said.out
    assert "in/empty.jpg is empty; we skip it" in said.out
    assert (
        "in: we skip 1 files that are no images or videos, or whose names are no UTF-8 (.txt)"
        in said.out
    )
    (sentence, _) = said.err.splitlines()
    assert (
        "5 of 7 files could not be predicted (in/cut.jpg, in/cut.png, in/empty.jpg, ...)"
        in sentence
    )
    assert "2 images in" in said.out and "images per second" in said.out


def test_nothing_readable(predict, in_folder, capsys):
    Path("words.png").write_text("not an image")
    assert predict("detector", "words.png", code=3)["images"] == []
    assert results() == []
    assert "nothing was predicted" in capsys.readouterr().err


def test_image_of_which_nothing_is_left_when_resized(predict, scenes, capsys):
    mmcv.imwrite(np.zeros((1, 900, 3), np.uint8), "in/line.png")
    described = predict("segmenter", scenes, code=3)
    assert len(described["images"]) == 2
    assert (
        "in/line.png has 900x1 pixels, which the config's test pipeline" in capsys.readouterr().out
    )


@pytest.mark.parametrize("model", ["detector", "segmenter"])
def test_images_of_one_pixel(predict, scenes, model):
    """They are predicted, or skipped, and end nothing."""
    for height, width in ((1, 1), (1, 3), (2, 1)):
        mmcv.imwrite(np.zeros((height, width, 3), np.uint8), f"in/c{height}{width}.png")
    described = predict(model, scenes)
    assert [(r["height"], r["width"]) for r in described["images"][2:]] == [(1, 1), (1, 3), (2, 1)]


def test_what_one_image_does_to_a_model_is_about_that_image(predict, scenes, monkeypatch, capsys):
    add = outputs_module.Outputs.add

    def fail(self, item, *others):
        if item.source.path.endswith(wrong):
            raise IndexError("too small")
        add(self, item, *others)

    monkeypatch.setattr(outputs_module.Outputs, "add", fail)
    wrong = "a.png"
    described = predict("segmenter", scenes, code=3)
    assert [r["file_name"] for r in described["images"]] == ["in/b.png"]
    said = capsys.readouterr()
    assert "warning: in/a.png cannot be predicted (IndexError('too small')); we skip it" in said.out
    assert "1 of 2 files could not be predicted (in/a.png); the others were predicted" in said.err
    wrong = "png"
    with pytest.raises(IndexError):  # nor is it about any
        predict("segmenter", scenes, out="other")


def test_two_runs_into_one_folder(predict, scenes, monkeypatch, capsys):
    """Both found it empty."""
    monkeypatch.setattr(predict_module, "_check_arguments", lambda _: None)
    described = predict("segmenter", f"{scenes}/a.png")
    assert predict("segmenter", f"{scenes}/b.png", code=1) == described
    assert "another run writes to --out-dir out; name another folder" in capsys.readouterr().err
    assert os.listdir("out/pictures") == ["a.jpg"]


def test_names_that_are_no_utf_8(predict, clip, scenes, capsys):
    """OpenCV's video reader ends the process on them."""
    for name in (b"in/\xff.png", b"in/\xff.avi"):
        os.link(os.fsencode(clip if name.endswith(b"i") else f"{scenes}/a.png"), name)
    described = predict("segmenter", scenes)
    assert [r["file_name"] for r in described["images"]] == ["in/a.png", "in/b.png"]
    words = "we skip 2 files that are no images or videos, or whose names are no UTF-8 (.avi, .png)"
    assert words in capsys.readouterr().out
    with pytest.raises(UserError, match=r"is not an image .* names must be UTF-8"):
        find_sources([os.fsdecode(b"in/\xff.png")])


def test_names_as_long_as_a_file_system_takes(predict, scenes):
    name = "n" * 251
    for suffix in (".png", ".bmp"):
        mmcv.imwrite(mmcv.imread(f"{scenes}/a.png"), f"in/{name}{suffix}")
    assert len(predict("segmenter", scenes)["images"]) == 4


# ------------------------------------------------------------------------------- videos


@pytest.fixture
def clip(scenes):
    """A video of three frames; returns its path."""
    pixels = mmcv.imread(f"{scenes}/a.png")
    film("clip.avi", [pixels, pixels[::-1].copy(), pixels[:, ::-1].copy()])
    return "clip.avi"


def test_frames_of_a_video(predict, clip, capsys):
    frames = list(mmcv.VideoReader(clip))
    for number, frame in enumerate(frames):
        mmcv.imwrite(frame, f"frames/{number:06d}.png")
    described = predict("segmenter", clip, "--batch-size", "2")
    assert "3 images in" in capsys.readouterr().out
    predict("segmenter", "frames", out="out-frames")
    assert [(r["file_name"], r["frame"], r["picture"]) for r in described["images"]] == [
        ("clip.avi", number, "pictures/clip.mp4") for number in range(3)
    ]
    for record in described["images"]:
        name = f"{record['frame']:06d}.png"
        assert record["label_map"] == f"labels/clip/{name}"
        assert (labels(f"clip/{name}") == labels(name, "out-frames")).mean() > 0.999
    video = mmcv.VideoReader("out/pictures/clip.mp4")
    assert (video.frame_cnt, video.resolution, video.fps) == (3, (64, 64), 5)
    for drawn, name in zip(video, sorted(os.listdir("out-frames/pictures"))):
        still = mmcv.imread(f"out-frames/pictures/{name}")
        assert np.abs(drawn.astype(float) - still).mean() < 15  # two lossy codecs


def test_detections_in_a_video_name_file_and_frame(predict, clip, scenes):
    described = predict("detector", clip, f"{scenes}/a.png", "--score-thr", "0.1")
    ids = {r["id"]: (r["file_name"], r.get("frame")) for r in described["images"]}
    expected = [("clip.avi", 0), ("clip.avi", 1), ("clip.avi", 2), ("in/a.png", None)]
    assert list(ids.values()) == expected
    assert {(d["file_name"], d.get("frame")) for d in results()} == set(expected)
    assert all(ids[d["image_id"]] == (d["file_name"], d.get("frame")) for d in results())


def test_two_videos_are_not_mixed(predict, clip):
    film("other.avi", [np.zeros((64, 64, 3), np.uint8)] * 2)
    predict("segmenter", clip, "other.avi", "--batch-size", "4")
    counts = [mmcv.VideoReader(f"out/pictures/{name}.mp4").frame_cnt for name in ("clip", "other")]
    assert counts == [3, 2]


def test_video_that_ends_early_is_said(predict, clip, capsys):
    film("long.avi", list(mmcv.VideoReader(clip)) * 4)
    data = Path("long.avi").read_bytes()
    Path("cut.avi").write_bytes(data[: int(len(data) * 0.7)])
    described = predict("segmenter", "cut.avi")
    assert 0 < len(described["images"]) < 12
    assert "warning: cut.avi announces 12 frames, but only" in capsys.readouterr().out


def test_video_that_was_not_written_whole_is_an_error(in_folder):
    video = VideoFile("film.mp4", 5, (48, 64, 3))
    video.add(np.zeros((48, 64, 3), np.uint8))
    video.add(np.zeros((99, 64, 3), np.uint8))  # which OpenCV leaves out in silence
    with pytest.raises(UserError, match="it has 1 of 2 frames"):
        video.close()


# ------------------------------------------------------------------------------- drawing


def visualizer_of(name, weights, classes):
    cfg = Config.fromfile(weights / f"{name}.py")
    init_default_scope(cfg.default_scope)
    palette = [RED, BLUE][: len(classes)]
    return build_visualizer(
        cfg,
        SimpleNamespace(
            is_detector=name == "detector", is_classifier=False, classes=classes, palette=palette
        ),
    )


def test_a_box_is_drawn_where_it_is(weights, in_folder):
    image = np.full((47, 63, 3), 128, np.uint8)
    box = torch.tensor([[30.0, 20.0, 50.0, 40.0]])
    mask = torch.zeros(1, 47, 63, dtype=torch.bool)
    mask[:, 20:40, 30:50] = True
    instances = InstanceData(
        bboxes=box, labels=torch.tensor([1]), scores=torch.tensor([0.0]), masks=mask
    )
    drawn = draw(
        visualizer_of("detector", weights, ["a", "b"]),
        image,
        DetDataSample(pred_instances=instances),
    )
    assert drawn.shape == image.shape
    red, _, blue = drawn[33:38, 33:47].reshape(-1, 3).mean(0)
    assert blue > red + 50
    np.testing.assert_array_equal(drawn[:15], image[:15])
    np.testing.assert_array_equal(drawn[:, :25], image[:, :25])


def test_nothing_found_leaves_the_image_as_it_is(weights, in_folder):
    image = np.random.default_rng(0).integers(0, 256, (30, 41, 3), dtype=np.uint8)
    nothing = InstanceData(
        bboxes=torch.zeros(0, 4),
        labels=torch.zeros(0, dtype=torch.long),
        scores=torch.zeros(0),
        masks=torch.zeros(0, 30, 41, dtype=torch.bool),
    )
    drawn = draw(
        visualizer_of("detector", weights, ["a", "b"]), image, DetDataSample(pred_instances=nothing)
    )
    if DRAWS_IN_PLACE:
        np.testing.assert_array_equal(drawn, image)
    assert drawn.shape == image.shape


def test_label_maps_are_drawn_over_the_image(weights, in_folder):
    image = np.full((100, 140, 3), 100, np.uint8)
    label_map = torch.zeros(1, 100, 140, dtype=torch.long)
    label_map[:, :, 70:] = 1
    sample = SegDataSample(pred_sem_seg=PixelData(data=label_map))
    drawn = draw(visualizer_of("segmenter", weights, ["a", "b"]), image, sample)
    assert drawn.shape == image.shape
    np.testing.assert_array_equal(drawn[-1, 0], [177, 50, 50])
    np.testing.assert_array_equal(drawn[-1, -1], [50, 50, 177])


@pytest.mark.parametrize("share", [0.02, 0.5, 1.0])
def test_names_are_where_mmseg_puts_them(share):
    visualizer = SegLocalVisualizer(name=f"names-{share}")
    for seed in range(10):
        mask = (np.random.default_rng(seed).random((23, 31)) < share).astype(np.uint8)
        np.testing.assert_array_equal(place_name(mask), visualizer._get_center_loc(mask))


def test_tokens_of_a_pruned_model(predict, scenes):
    described = predict("pruned", f"{scenes}/a.png", "--show-tokens")
    assert described["images"][0]["tokens"] == "tokens/a.png"
    picture = rgb("out/tokens/a.png")
    for row in np.array_split(picture, 2, axis=0):
        for panel in np.array_split(row, 3, axis=1):
            assert len(np.unique(panel @ (1, 256, 65536))) > 20 and panel.std() > 20


def test_a_pruned_model_that_keeps_everything_has_no_tokens_to_show(predict, scenes, capsys):
    described = predict(
        *("pruned", f"{scenes}/a.png", "--show-tokens"),
        *("--cfg-options", "model.backbone.pruning.keep_ratio=1.0"),
    )
    assert "tokens" not in described["images"][0]
    assert "note: 1 image kept all tokens; no token picture was drawn" in capsys.readouterr().out


# ------------------------------------------------------------------------------- which files


def touch(*names):
    for name in names:
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).touch()


def test_folders_patterns_and_files(in_folder):
    touch("p/b.png", "p/a.JPG", "p/x.txt", "p/deep/c.tif", "p/film.mp4", "q/a.jpg", "odd[1].png")
    sources, warnings = find_sources(["p"])
    assert [(s.path, s.name, s.is_video) for s in sources] == [
        ("p/a.JPG", "a", False),
        ("p/b.png", "b", False),
        ("p/film.mp4", "film", True),
    ]
    assert warnings == [
        "p: we skip 1 files that are no images or videos, or whose names are no UTF-8 (.txt)"
    ]
    sources, _ = find_sources(["p/**/*", "p/a.JPG", "q/*.jpg", "odd[1].png"])
    named = {s.path: s.name for s in sources}
    assert named == {
        "p/a.JPG": "p/a",
        "p/b.png": "p/b",
        "p/deep/c.tif": "p/deep/c",
        "p/film.mp4": "p/film",
        "q/a.jpg": "q/a",
        "odd[1].png": "odd[1]",
    }
    names = [s.name for s in find_sources(["p/**/*"])[0]]
    assert names == ["a", "b", "deep/c", "film"]
    names = [s.name for s in find_sources(["p/b.png", "*/a.*", os.path.abspath("p/deep")])[0]]
    assert names == ["b", "p/a", "q/a", "deep/c"]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir("q")
        Path("r").mkdir()
        assert [s.name for s in find_sources(["*/../../p/*.png"])[0]] == ["p/b"]


def test_outputs_stay_in_their_folder(in_folder):
    touch("...mp4", "p/....png")
    assert [s.name for s in find_sources(["...mp4", "p/....png"])[0]] == ["unnamed", "unnamed-2"]


def test_outputs_never_share_a_name(in_folder):
    touch(
        "p/a.png", "p/a.jpg", "p/A.tif", "p/a.mp4", "p/a-2.png", "p/clip.mp4", "p/clip/000000.png"
    )
    names = [s.name for s in find_sources(["p/**/*"])[0]]
    assert len({name.lower() for name in names}) == 7
    (clip,) = [s for s in find_sources(["p/**/*"])[0] if s.path == "p/clip.mp4"]
    assert clip.name == "clip-2"


# ------------------------------------------------------------------------------- what is refused


REFUSED = {
    "missing": (["none.png"], "there is no file or folder none.png"),
    "empty folder": (["void"], "the folder void holds no images or videos"),
    "no images": (["texts"], "the folder texts holds no images or videos"),
    "images deeper": (["deep"], "for those in its folders, give 'deep/**/*'"),
    "suffix": (["texts/notes.txt"], "notes.txt is not an image or video that we can read"),
    "pattern": (["*.bmp"], "*.bmp matches no image or video"),
    "pattern of others": (["texts/*"], "texts/* matches no image or video"),
    "used folder": (["in", "--out-dir", "texts"], "--out-dir texts is not empty"),
    "file": (["in", "--out-dir", "texts/notes.txt"], "--out-dir texts/notes.txt is a file"),
    "batch size": (["in", "--batch-size", "0"], "--batch-size 0: must be at least 1"),
    "score": (["in", "--score-thr", "2"], "scores are between 0 and 1"),
    "score of a segmenter": (["in", "--score-thr", "0.5"], "--score-thr is for detectors"),
    "device": (["in", "--device", "abacus"], "cannot use --device abacus"),
    "tokens of a dense model": (["in", "--show-tokens"], "GroupMamba, prunes nothing"),
    "option": (["in", "--cfg-options", "model.bacbone.arch=1"], "unknown setting"),
    "loader": (
        ["in", "--cfg-options", "test_dataloader.dataset.pipeline.0.type=LoadAnnotations"],
        "does not begin with LoadImageFromFile",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_in_one_sentence(weights, scenes, capsys, name):
    touch("texts/notes.txt", "deep/down/a.png")
    Path("void").mkdir()
    arguments, words = REFUSED[name]
    given = (weights / "segmenter.py", weights / "segmenter.pth", "--out-dir", "out", *arguments)
    # The inputs come before options that take several values.
    config, checkpoint, option, out, *rest = given
    command = (config, checkpoint, rest[0], option, out, "--device", "cpu", *rest[1:])
    assert words in sentence_of_refusal(capsys, "predict.py", *command)


@pytest.mark.parametrize(
    ("checkpoint", "words"),
    [
        ("detector.pth", "does not fit this config's model"),
        ("none.pth", "there is no checkpoint file"),
        ("cut.pth", "is not a readable PyTorch checkpoint"),
        ("code.pth", "was refused because it carries code"),
    ],
)
def test_checkpoint_that_will_not_do(weights, scenes, capsys, checkpoint, words):
    Path("cut.pth").write_bytes((weights / "segmenter.pth").read_bytes()[:5000])
    torch.save({"state_dict": {}, "meta": print}, "code.pth")
    path = weights / checkpoint if checkpoint.startswith("det") else checkpoint
    command = (weights / "segmenter.py", path, scenes, "--out-dir", "out", "--device", "cpu")
    assert words in sentence_of_refusal(capsys, "predict.py", *command)


# ------------------------------------------------------------------------------- what else happens


def stopped_at_second_image(monkeypatch, stop):
    answer = Predictor.__call__
    calls = []

    def once(self, batch):
        calls.append(0)
        if len(calls) > 1:
            stop()
        return answer(self, batch)

    monkeypatch.setattr(Predictor, "__call__", once)


def interrupt():
    raise KeyboardInterrupt


def terminate():
    os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.parametrize(("stop", "code"), [(interrupt, 130), (terminate, 143)])
def test_stopped_run_leaves_whole_files(predict, scenes, monkeypatch, stop, code):
    stopped_at_second_image(monkeypatch, stop)
    before = signal.signal(signal.SIGTERM, lambda *_: pytest.fail("SIGTERM is not handled"))
    try:
        described = predict("detector", scenes, "--score-thr", "0.1", code=code)
        assert signal.getsignal(signal.SIGTERM).__name__ == "<lambda>"
    finally:
        signal.signal(signal.SIGTERM, before)
    assert [r["file_name"] for r in described["images"]] == ["in/a.png"]
    assert {d["file_name"] for d in results()} == {"in/a.png"}


def test_killed_run_keeps_what_was_saved_before(predict, scenes, monkeypatch):
    """JSON files are whole at any moment, and saved again and again."""
    seen = []
    stopped_at_second_image(monkeypatch, lambda: seen.append((index(), results())))
    monkeypatch.setattr(outputs_module, "_SAVE_SECONDS", 0)
    predict("detector", scenes, "--score-thr", "0.1")
    ((described, found),) = seen
    assert [r["file_name"] for r in described["images"]] == ["in/a.png"]
    assert {d["file_name"] for d in found} == {"in/a.png"}


def test_detections_of_an_image_that_was_not_drawn_are_not_listed(predict, scenes, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "out/pictures/a.jpg")

    monkeypatch.setattr(mmcv, "imwrite", full)
    assert predict("detector", scenes, "--score-thr", "0.1", code=1)["images"] == []
    assert results() == [] and os.listdir("out/pictures") == []


def test_out_of_memory_is_one_sentence(predict, scenes, monkeypatch, capsys):
    def fail(*_):
        raise MemoryError

    monkeypatch.setattr("mmengine.model.BaseModel.test_step", fail)
    predict("segmenter", scenes, code=1)
    assert "out of memory with a batch of 1 x 160 x 160 pixels" in capsys.readouterr().err


def test_full_disk_is_one_sentence(predict, scenes, monkeypatch, capsys):
    def full(image, path):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), path)

    monkeypatch.setattr(Image.Image, "save", full)
    assert predict("segmenter", scenes, code=1)["images"] == []
    assert "the disk is full: out/labels/a.png could not be written" in capsys.readouterr().err


def test_classes_are_the_checkpoints_then_the_configs(weights, in_folder):
    cfg = Config.fromfile(weights / "detector.py")
    init_default_scope(cfg.default_scope)
    own = {"classes": list("vwxyz"), "palette": [[9, 9, n] for n in range(5)]}
    classes, palette = name_classes(cfg, Checkpoint("", {"meta": {"dataset_meta": own}}))
    assert classes == list("vwxyz") and palette[3] == (9, 9, 3)
    for wrong in ("red", [[1, 2, 3]], [[1, 2, 300]] * 5, [["x"] * 3] * 5, None):
        meta = {"dataset_meta": {**own, "palette": wrong}}
        _, palette = name_classes(cfg, Checkpoint("", {"meta": meta}))
        assert len(set(palette)) == 5
    for silent in ({}, {"meta": None}, {"meta": {"dataset_meta": {"classes": ["one"]}}}):
        classes, palette = name_classes(cfg, Checkpoint("", silent))
        assert classes[0] == "disk" and tuple(palette[0]) == (230, 60, 60)
    cfg.test_dataloader.dataset.metainfo = {"classes": ("a", "b")}
    assert name_classes(cfg, Checkpoint("", {}))[0] == [f"class {n}" for n in range(5)]


def test_grey_and_floating_point_pixels_are_shown_as_pictures():
    grey = np.arange(6, dtype=np.float32).reshape(2, 3) * 100
    shown = predictor_module._rgb(grey)
    assert (
        shown.shape == (2, 3, 3) and shown.dtype == np.uint8 and shown[1, 2].tolist() == [255] * 3
    )
    assert predictor_module._rgb(np.array([[BLUE]], np.uint8)).tolist() == [[list(RED)]]


def test_the_tool_itself(weights, scenes, monkeypatch):
    command = [weights / "segmenter.py", weights / "segmenter.pth", scenes, "--out-dir", "out"]
    monkeypatch.setattr(sys, "argv", ["predict.py", *map(str, command)])
    runpy.run_path(str(REPO / "tools" / "predict.py"), run_name="__main__")
    assert sorted(os.listdir("out")) == ["images.json", "labels", "pictures"]
    assert sorted(os.listdir("out/pictures")) == ["a.jpg", "b.jpg"]
