"""The generated data set: same bytes everywhere, valid annotations, nothing foreign overwritten."""

import hashlib
import json
import math
import multiprocessing
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from mmvssm.datasets import ShapesGenerator, shapes
from mmvssm.registry import TASK_UTILS

SMALL = dict(num_train=6, num_val=3, image_size=96, seed=7)
# Of every file of SMALL. Another value means that users' data sets change: raise FORMAT_VERSION.
SMALL_SHA256 = "2d1a207b26d4bf68bd1e1ff5dab5874e7c8fe59785e73367f4e24c3178996e4b"
MAKE_SHAPES = Path(__file__).parents[3] / "tools" / "make_shapes.py"


def digest(root):
    total = hashlib.sha256()
    for path in sorted(p for p in root.rglob("*") if p.is_file()):
        total.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes())
    return total.hexdigest()


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return ShapesGenerator(tmp_path_factory.mktemp("data") / "shapes", **SMALL).ensure()


class TestBytes:
    def test_same_settings_give_these_bytes(self, small):
        assert digest(small) == SMALL_SHA256

    def test_two_calls_give_the_same_bytes(self, small, tmp_path):
        assert digest(ShapesGenerator(tmp_path / "again", **SMALL).ensure()) == digest(small)

    def test_another_seed_gives_other_scenes(self):
        first, second = (ShapesGenerator("unused", seed=seed).scene("train", 0) for seed in (0, 1))
        assert (first.image != second.image).any()

    def test_splits_do_not_share_scenes(self):
        generator = ShapesGenerator("unused", image_size=64)
        train = {generator.scene("train", i).image.tobytes() for i in range(20)}
        val = {generator.scene("val", i).image.tobytes() for i in range(20)}
        assert len(train) == len(val) == 20
        assert not train & val

    @pytest.mark.parametrize("shape", [(5, 7), (5, 7, 3), (300, 400, 3)])
    def test_png_reads_back(self, shape):
        cv2 = pytest.importorskip("cv2")
        pixels = np.random.RandomState(0).randint(0, 256, shape).astype(np.uint8)
        decoded = cv2.imdecode(
            np.frombuffer(shapes.encode_png(pixels), np.uint8), cv2.IMREAD_UNCHANGED
        )
        np.testing.assert_array_equal(decoded if len(shape) == 2 else decoded[..., ::-1], pixels)


class TestDrawing:
    @pytest.mark.parametrize(
        ("kind", "unit_area"),
        [
            ("disk", math.pi),
            ("square", 2.0),
            ("triangle", 3 * math.sqrt(3) / 4),
            ("star", 10 * 0.5 * 27 / 64 * math.sin(math.pi / 5)),
            ("ring", math.pi * (1 - (36 / 64) ** 2)),
        ],
    )
    @pytest.mark.parametrize("angle", [0, 17, 90, 301])
    def test_area(self, kind, unit_area, angle):
        radius = 40 * shapes.UNIT
        coverage = shapes.rasterise(kind, (400, 404), radius, angle, 100)
        assert coverage.sum() / shapes.SAMPLES**2 == pytest.approx(unit_area * 40**2, rel=0.005)

    @pytest.mark.parametrize("kind", shapes.CLASSES)
    def test_the_border_only_cuts(self, kind):
        whole = shapes.rasterise(kind, (90 * 8, 90 * 8), 30 * 8, 33, 100)
        shifted = shapes.rasterise(kind, (10 * 8, 20 * 8), 30 * 8, 33, 100)
        np.testing.assert_array_equal(shifted[:30, :20], whole[70:, 80:])

    def test_what_is_almost_hidden_leaves_the_scene(self):
        def square(side):
            coverage = np.zeros((64, 64), dtype=np.int64)
            coverage[:side, :side] = shapes.SAMPLES**2
            return shapes.Shape(1, coverage)

        hidden, cover, small = square(33), square(32), square(10)
        assert shapes._drop_hidden([hidden, cover, small]) == [cover, small]
        assert shapes._drop_hidden([small, cover]) == [cover]


class TestAnnotations:
    @pytest.mark.parametrize("split", ["train", "val"])
    def test_coco_agrees_with_the_semantic_maps(self, small, split):
        cv2 = pytest.importorskip("cv2")
        coco = pytest.importorskip("pycocotools.coco").COCO(
            str(small / f"annotations/instances_{split}2017.json")
        )
        assert len(coco.imgs) == SMALL[f"num_{split}"]
        assert [c["name"] for c in coco.loadCats(coco.getCatIds())] == list(shapes.CLASSES)
        for image in coco.imgs.values():
            picture = cv2.imread(str(small / f"{split}2017" / image["file_name"]))
            assert picture.shape == (image["height"], image["width"], 3)
            rebuilt = np.zeros(picture.shape[:2], dtype=int)
            for annotation in coco.imgToAnns[image["id"]]:
                mask = coco.annToMask(annotation)
                assert not rebuilt[mask > 0].any(), "visible masks overlap"
                rebuilt += mask * annotation["category_id"]
                assert mask.sum() == annotation["area"] >= shapes.MIN_VISIBLE_PIXELS
                x, y, w, h = annotation["bbox"]
                assert mask[y : y + h, x : x + w].sum() == mask.sum()
                assert mask[y].any() and mask[y + h - 1].any()
                assert mask[:, x].any() and mask[:, x + w - 1].any()
            semantic = cv2.imread(
                str(small / f"semantic_{split}2017" / image["file_name"]), cv2.IMREAD_UNCHANGED
            )
            np.testing.assert_array_equal(semantic, rebuilt)

    @pytest.mark.parametrize("corner", [False, True])
    def test_rle_begins_with_zeros(self, corner):
        mask_utils = pytest.importorskip("pycocotools.mask")
        mask = np.random.RandomState(1).rand(9, 6) < 0.5
        mask[0, 0] = corner
        rle = shapes.encode_rle(mask)
        decoded = mask_utils.decode(mask_utils.frPyObjects(rle, *rle["size"]))
        np.testing.assert_array_equal(decoded, mask)

    def test_every_class_and_size_occurs(self):
        generator = ShapesGenerator("unused")
        scenes = [generator.scene("train", i) for i in range(60)]
        assert {label for scene in scenes for label in scene.labels} == set(range(5))
        areas = np.array([mask.sum() for scene in scenes for mask in scene.masks])
        assert (areas < 16**2).mean() > 0.1
        assert (areas > 48**2).mean() > 0.1

    def test_detection_pipeline_reads_holes(self, small):
        """Rings, whose masks have holes, survive mmdet's loading as bitmaps."""
        pytest.importorskip("mmdet")
        from mmdet.datasets import CocoDataset
        from mmdet.utils import register_all_modules

        register_all_modules(init_default_scope=True)
        dataset = CocoDataset(
            data_root=str(small),
            ann_file="annotations/instances_train2017.json",
            data_prefix=dict(img="train2017/"),
            metainfo=dict(classes=shapes.CLASSES),
            pipeline=[
                dict(type="LoadImageFromFile"),
                dict(type="LoadAnnotations", with_bbox=True, with_mask=True),
                dict(type="PackDetInputs"),
            ],
        )
        generator = ShapesGenerator("unused", **SMALL)
        for index in range(len(dataset)):
            instances = dataset[index]["data_samples"].gt_instances
            scene = generator.scene("train", index)
            assert instances.labels.tolist() == scene.labels
            np.testing.assert_array_equal(instances.masks.masks, scene.masks)


class TestEnsure:
    def test_is_built_from_a_config(self, tmp_path):
        cfg = dict(type="mmvssm.ShapesGenerator", root=str(tmp_path / "shapes"), **SMALL)
        assert isinstance(TASK_UTILS.build(cfg), ShapesGenerator)

    def test_writes_once(self, small, capsys):
        before = (small / "shapes.json").stat().st_mtime_ns
        ShapesGenerator(small, **SMALL).ensure()
        assert (small / "shapes.json").stat().st_mtime_ns == before
        assert capsys.readouterr().out == ""

    def test_other_settings_write_anew(self, tmp_path):
        root = tmp_path / "shapes"
        ShapesGenerator(root, **SMALL).ensure()
        ShapesGenerator(root, **{**SMALL, "num_train": 2}).ensure()
        assert len(list((root / "train2017").iterdir())) == 2
        assert {p.name for p in tmp_path.iterdir()} <= {"shapes", ".shapes.lock"}

    @pytest.mark.parametrize(
        "contents", [["photo.jpg"], [], ["shapes.json"], ["shapes.json", "notes.txt"]]
    )
    def test_foreign_folder_is_left_alone(self, tmp_path, contents):
        root = tmp_path / "mine"
        root.mkdir()
        for name in contents:
            (root / name).write_text("{}")
        with pytest.raises(FileExistsError, match="nothing was changed"):
            ShapesGenerator(root, **SMALL).ensure()
        assert sorted(p.name for p in root.iterdir()) == sorted(contents)

    def test_files_among_the_generated_ones_are_left_alone(self, tmp_path):
        root = ShapesGenerator(tmp_path / "shapes", **SMALL).ensure()
        photo = root / "train2017" / "photo.jpg"
        photo.touch()
        with pytest.raises(FileExistsError, match="nothing was changed"):
            ShapesGenerator(root, **{**SMALL, "num_train": 2}).ensure()
        assert photo.exists() and len(list(photo.parent.iterdir())) == SMALL["num_train"] + 1

    def test_file_in_the_way_is_left_alone(self, tmp_path):
        root = tmp_path / "mine"
        root.write_text("precious")
        with pytest.raises(FileExistsError, match="nothing was changed"):
            ShapesGenerator(root, **SMALL).ensure()
        assert root.read_text() == "precious"

    def test_interrupted_writing_leaves_no_half_data_set(self, tmp_path, monkeypatch):
        root = tmp_path / "shapes"
        ShapesGenerator(root, **SMALL).ensure()
        before = digest(root)
        other = ShapesGenerator(root, **{**SMALL, "seed": 8})
        with monkeypatch.context() as patch:
            patch.setattr(shapes, "_write_json", lambda *_: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                other.ensure()
        assert digest(root) == before
        other.ensure()
        assert json.loads((root / "shapes.json").read_text())["seed"] == 8
        assert {p.name for p in tmp_path.iterdir()} <= {"shapes", ".shapes.lock"}

    def test_several_processes_at_once(self, tmp_path, small):
        root = tmp_path / "shapes"
        context = multiprocessing.get_context("fork")
        processes = [
            context.Process(target=ShapesGenerator(root, **SMALL).ensure) for _ in range(4)
        ]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
        assert [process.exitcode for process in processes] == [0] * 4
        assert digest(root) == digest(small)

    @pytest.mark.parametrize(
        "wrong",
        [dict(num_train=0), dict(num_val=-1), dict(image_size=32), dict(seed=-1)],
    )
    def test_bad_settings_are_named(self, wrong):
        (name,) = wrong
        with pytest.raises(ValueError, match=name):
            ShapesGenerator("unused", **wrong)


class TestCommandLine:
    def run(self, *args):
        command = [sys.executable, str(MAKE_SHAPES), *map(str, args)]
        environment = {"PYTHONPATH": str(MAKE_SHAPES.parents[1])}
        return subprocess.run(command, capture_output=True, text=True, env=environment)

    @pytest.mark.slow
    def test_writes_the_data_set(self, tmp_path, small):
        args = [f"--{k.replace('_', '-')}={v}" for k, v in SMALL.items()]
        result = self.run("--root", tmp_path / "shapes", *args)
        assert result.returncode == 0, result.stderr
        assert digest(tmp_path / "shapes") == digest(small)

    @pytest.mark.slow
    def test_refuses_in_one_sentence(self, tmp_path):
        (tmp_path / "photo.jpg").touch()
        result = self.run("--root", tmp_path)
        assert result.returncode != 0
        assert "nothing was changed" in result.stderr
        assert result.stderr.count("\n") == 2
