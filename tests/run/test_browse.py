"""Pictures and counts of tools/browse_dataset.py, on data with known annotations."""

import json
import re
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

pytest.importorskip("mmdet")
pytest.importorskip("mmseg")

from mmengine.registry import init_default_scope

from mmvssm.analysis.dataset_view import Anchors, PixelCounts, count_objects, side_by_side
from support import tiny_configs
from support.tool_runs import call, sentence_of_refusal

# Objects of the data set below: image, box (x, y, width, height), category, crowd.
OBJECTS = [
    (1, (8, 16, 32, 32), 1, 0),
    (1, (48, 60, 16, 16), 2, 0),
    (1, (0, 0, 90, 90), 2, 1),
    (2, (10, 10, 4, 4), 2, 0),
]
IMAGES = {1: "one.png", 2: "two.png", 3: "empty.png"}
SIDE = 96
FLIPPED = """
train_dataloader["dataset"]["pipeline"] = [
    dict(type="LoadImageFromFile"),
    dict(type="LoadAnnotations", with_bbox=True, with_mask=True),
    dict(type="RandomFlip", prob=1.0),
    dict(type="PackDetInputs"),
]
"""


@pytest.fixture(scope="module")
def boxes(tmp_path_factory):
    """A data set of black images, in COCO's layout and as label maps."""
    root = tmp_path_factory.mktemp("boxes") / "boxes"
    for split in ("train", "val"):
        for folder in (f"{split}2017", f"semantic_{split}2017", "annotations"):
            (root / folder).mkdir(parents=True, exist_ok=True)
        maps = {image: np.zeros((SIDE, SIDE), np.uint8) for image in IMAGES}
        annotations = []
        for number, (image, (x, y, w, h), category, crowd) in enumerate(OBJECTS, 1):
            if not crowd:
                maps[image][y : y + h, x : x + w] = category
            corners = [x, y, x + w, y, x + w, y + h, x, y + h]
            annotations.append(
                dict(
                    id=number,
                    image_id=image,
                    category_id=category,
                    bbox=[x, y, w, h],
                    area=w * h,
                    iscrowd=crowd,
                    segmentation=dict(size=[SIDE, SIDE], counts=[0, SIDE * SIDE])
                    if crowd
                    else [corners],
                )
            )
        maps[2][:24] = 255
        for image, name in IMAGES.items():
            cv2.imwrite(str(root / f"{split}2017" / name), np.zeros((SIDE, SIDE, 3), np.uint8))
            cv2.imwrite(str(root / f"semantic_{split}2017" / name), maps[image])
        records = [
            dict(id=i, file_name=name, width=SIDE, height=SIDE) for i, name in IMAGES.items()
        ]
        categories = [dict(id=1, name="cat"), dict(id=2, name="dog")]
        content = dict(images=records, annotations=annotations, categories=categories)
        (root / "annotations" / f"instances_{split}2017.json").write_text(json.dumps(content))
    return root


def rows(text):
    """The rows of printed tables, by their first cell."""
    cells = (
        [c.strip() for c in line.strip("|").split("|")] for line in text.splitlines() if "|" in line
    )
    return {first: rest for first, *rest in cells}


def pictures(folder):
    return {path.name: cv2.imread(str(path)) for path in sorted(Path(folder).glob("*.jpg"))}


class TestObjects:
    @pytest.fixture
    def said(self, boxes, config, capsys):
        path = config(tiny_configs.DETECTOR, FLIPPED)
        call("browse_dataset.py", path, "--data-root", boxes, "--out-dir", "seen")
        return capsys.readouterr().out

    def test_counts(self, said):
        assert "3 images, 1 of them without an object" in said
        assert "(filter_cfg drops 1 images); 3 objects" in said
        found = rows(said)
        assert found["cat"] == ["1", "33.3 %", "1", "0"]
        assert found["dog"] == ["2", "66.7 %", "2", "1"]
        assert found["objects, square root of area"] == ["4.0", "5.2", "16.0", "30.4", "32.0"]
        assert said.strip() in Path("seen/statistics.txt").read_text() + said

    def test_compares_with_the_anchors(self, said):
        """The demo's are squares of 16, 32 ... 256 pixels and others of the same areas."""
        found = rows(said)
        assert found["smaller than the smallest anchor (16 pixels)"] == ["1", "33.3 %"]
        assert found["larger than the largest anchor (256 pixels)"] == ["0", "0.0 %"]
        # Mirrored, the box of 32 is where an anchor is (centres are multiples of 8); so is that of 16.
        assert found["matched: an anchor overlaps them by 0.7 or more"] == ["2", "66.7 %"]
        assert found["not matched by any anchor"] == ["1", "33.3 %"]

    def test_draws_boxes_where_they_are_before_and_after(self, said):
        drawn = pictures("seen")
        assert [name[7:] for name in drawn] == [
            "one.jpg",
            "two.jpg",
        ]  # of the empty one nothing is trained on
        picture = drawn["000000_one.jpg"]
        before, after = np.split(picture[28:], [picture.shape[1] // 2], axis=1)
        after = after[:, -576:]  # 96 pixels six times as large
        before = before[:, :576]
        for panel, left in ((before, 8), (after, SIDE - 8 - 32)):
            inside = panel[6 * 20 : 6 * 44, 6 * (left + 2) : 6 * (left + 30)]
            assert inside.max(2).mean() > 30
            outside = panel[6 * 84 : 6 * 94]
            assert outside.max(2).mean() < 5

    def test_of_a_split_that_evaluates_boxes_follow_the_image(self, boxes, config, capsys):
        """Its pipeline loads them after resizing, here from 96 to 160 pixels."""
        path = config(tiny_configs.DETECTOR)
        arguments = ("--split", "val", "--num", 1, "--out-dir", "seen")
        call("browse_dataset.py", path, "--data-root", boxes, *arguments)
        found = rows(capsys.readouterr().out)
        *_, largest = found["objects, square root of area"]
        assert float(largest) == pytest.approx(32 * 160 / 96, abs=0.1)
        assert len(pictures("seen")) == 1

    def test_goes_through_wrappers(self, boxes, config, capsys):
        wrapped = f"""
train_dataloader = dict(dataset=dict(_delete_=True, type="MultiImageMixDataset", dataset=dict(
        type="CocoDataset", data_root="{boxes}", ann_file="annotations/instances_train2017.json",
        data_prefix=dict(img="train2017/"), metainfo=dict(classes=("cat", "dog")),
        pipeline=[dict(type="LoadImageFromFile"), dict(type="LoadAnnotations", with_bbox=True)]),
    pipeline=[dict(type="Mosaic", img_scale=(300, 300), pad_val=0.0), dict(type="PackDetInputs")]))
"""
        path = config(tiny_configs.DETECTOR, wrapped)
        call("browse_dataset.py", path, "--out-dir", "seen")
        assert "3 images, 1 of them without an object" in capsys.readouterr().out
        assert all(picture.shape[0] == 28 + 600 for picture in pictures("seen").values())

    def test_the_seed_decides(self, shapes, config):
        path = config(tiny_configs.DETECTOR)
        for name, seed in (("a", 1), ("b", 1), ("c", 2)):
            call("browse_dataset.py", path, "--num", 2, "--seed", seed, "--out-dir", name)
        a, b, c = (pictures(name) for name in "abc")
        assert len(a) == 2 and a.keys() == b.keys()
        assert all((a[name] == b[name]).all() for name in a)
        assert a.keys() != c.keys() or any((a[name] != c[name]).any() for name in a)


class TestPixels:
    def test_counts_and_draws(self, boxes, config, capsys):
        path = config(tiny_configs.SEGMENTER)
        call("browse_dataset.py", path, "--data-root", boxes, "--out-dir", "seen")
        said = capsys.readouterr().out
        found, total = rows(said), 3 * SIDE * SIDE
        # The upper quarter of the second image is ignored, and what lies in it.
        ignored, cats, dogs = 24 * SIDE, 32 * 32, 16 * 16
        assert found["cat"] == [f"{cats:,}", f"{100 * cats / total:.1f} %", "1"]
        assert found["dog"] == [f"{dogs:,}", f"{100 * dogs / total:.1f} %", "1"]
        assert found["background"][0] == f"{total - ignored - cats - dogs:,}"
        assert found["ignored"] == [f"{ignored:,}", f"{100 * ignored / total:.1f} %", ""]
        assert "all 3 images: 0 of 3 without any labelled pixel, 2 with one class only" in said
        picture = pictures("seen")["000001_one.jpg"]
        cat = picture[28 + 6 * 40, 6 * 30].astype(int)
        dog = picture[28 + 6 * 73, 6 * 60].astype(int)
        background = picture[28 + 6 * 90, 6 * 90].astype(int)
        assert np.abs(cat - dog).max() > 30 and np.abs(cat - background).max() > 30

    def test_pixel_counts(self):
        counts = PixelCounts.of(["a", "b"])
        counts.add(np.array([[0, 0, 1], [255, 7, 1]]))
        counts.add(np.full((2, 2), 255))
        counts.add(np.ones((1, 2), int))
        assert counts.pixels.tolist() == [2, 4] and counts.ignored == 2 + 4
        assert counts.images_with.tolist() == [1, 2]
        assert (counts.images, counts.empty, counts.uniform) == (3, 1, 1)


class TestAnchors:
    HEAD = dict(
        anchor_generator=dict(type="AnchorGenerator", scales=[4], ratios=[1.0], strides=[4, 8])
    )
    ASSIGNER = dict(type="MaxIoUAssigner", pos_iou_thr=0.7, min_pos_iou=0.3, neg_iou_thr=0.3)

    @pytest.fixture
    def anchors(self):
        init_default_scope("mmdet")
        return Anchors(self.HEAD, self.ASSIGNER, divisor=32)

    def test_best_overlaps(self, anchors):
        assert (anchors.smallest, anchors.largest) == (16, 32)
        boxes = torch.tensor(
            [
                [0.0, 0.0, 16.0, 16.0],  # centred at (8, 8), as an anchor of 16 pixels is
                [8.0, 8.0, 40.0, 40.0],  # and one of 32 pixels
                [30.0, 30.0, 34.0, 34.0],  # inside one of 16
                [46.0, 46.0, 62.0, 62.0],  # in the padding: 50 becomes 64
            ]
        )
        found = anchors.best_overlaps(boxes, (50, 50))
        # The last one is off by 2 pixels each way: 14 x 14 shared of 2 x 256.
        expected = [1, 1, 16 / 256, 196 / (512 - 196)]
        assert found.tolist() == pytest.approx(expected)
        assert anchors.best_overlaps(torch.zeros(0, 4), (50, 50)).shape == (0,)

    def test_agrees_with_what_mmdet_assigns(self, anchors):
        from mmdet.registry import TASK_UTILS
        from mmengine.structures import InstanceData

        generator = TASK_UTILS.build(self.HEAD["anchor_generator"])
        priors = torch.cat(generator.grid_priors([(32, 32), (16, 16)], device="cpu"))
        # One object in each field of 32 x 32 pixels, so that none takes another's anchor.
        corners = torch.cartesian_prod(torch.arange(0, 128, 32), torch.arange(0, 128, 32)).float()
        torch.manual_seed(0)
        offsets, sizes = torch.rand(16, 2) * 6, 4 + torch.rand(16, 2) * 22
        boxes = torch.cat([corners + offsets, corners + offsets + sizes], 1)
        truth = InstanceData(bboxes=boxes, labels=torch.zeros(16, dtype=torch.long))
        assigned = TASK_UTILS.build(self.ASSIGNER).assign(InstanceData(priors=priors), truth)
        matched = set(assigned.gt_inds.unique().tolist()) - {0, -1}
        overlaps = anchors.best_overlaps(boxes, (128, 128))
        found = set((torch.nonzero(overlaps >= anchors.least).flatten() + 1).tolist())
        assert matched == found and 0 < len(found) < 16
        strict = dict(self.ASSIGNER, match_low_quality=False)
        assigned = TASK_UTILS.build(strict).assign(InstanceData(priors=priors), truth)
        matched = set(assigned.gt_inds.unique().tolist()) - {0, -1}
        found = set((torch.nonzero(overlaps >= anchors.positive).flatten() + 1).tolist())
        assert matched == found

    def test_rules_of_matching(self, anchors):
        assert (anchors.positive, anchors.least) == (0.7, 0.3)
        init_default_scope("mmdet")
        strict = Anchors(self.HEAD, dict(self.ASSIGNER, match_low_quality=False))
        assert (strict.positive, strict.least) == (0.7, 0.7)
        assert Anchors(self.HEAD, dict(type="ATSSAssigner", topk=9)).positive == 0.5


def test_count_objects_of_images_without_any():
    counts = count_objects([dict(instances=[]), dict()], ["a"])
    assert (counts.images, counts.empty, counts.objects.tolist()) == (2, 2, [0])


def test_side_by_side():
    panels = [("a", np.zeros((10, 40, 3), np.uint8)), ("b", np.ones((20, 30, 3), np.uint8))]
    picture = side_by_side(panels)
    assert picture.shape == (48, 78, 3)
    assert (picture[28:38, :40] == 0).all() and (picture[28:48, 48:] == 1).all()


@pytest.mark.parametrize(
    ("text", "extra", "arguments", "words"),
    [
        ("DETECTOR", "", ["--num", -1], "--num must not be negative"),
        ("DETECTOR", "", ["--data-root", "nowhere"], "there is no folder nowhere"),
        ("SEGMENTER", "val_dataloader = val_evaluator = val_cfg = None", ["--split", "val"], "has no val_dataloader"),
        ("DETECTOR", "", ["--out-dir", "tiny.py"], "--out-dir tiny.py is a file"),
        (
            "SEGMENTER",
            "train_dataloader['dataset']['pipeline'] = [dict(type='LoadImageFromFile')]",
            [],
            "the pipeline of train_dataloader loads no annotations",
        ),
        (
            "SEGMENTER",
            "train_dataloader['dataset']['pipeline'] = [dict(type='LoadImageFromFile'), "
            "dict(type='LoadAnnotations'), dict(type='Resize', scale=(0, 0))]",
            [],
            "the pipeline of train_dataloader fails on",
        ),
    ],
    ids=["number", "folder", "split", "out", "annotations", "pipeline"],
)  # fmt: skip
def test_refuses(text, extra, arguments, words, config, capsys):
    path = config(getattr(tiny_configs, text), f"\n{extra}\n")
    sentence = sentence_of_refusal(capsys, "browse_dataset.py", path, *arguments)
    assert re.search(re.escape(words), sentence)
