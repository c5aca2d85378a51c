"""Data sets in every layout that --data-root knows, and what is wrong with some."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
from core.datasets.test_data_check import detector, refusal, segmenter
from mmengine.config import Config
from mmengine.registry import init_default_scope
from PIL import Image

from mmvssm.datasets.annotations import read_coco
from mmvssm.datasets.check import check_data
from mmvssm.datasets.formats import made_from
from mmvssm.datasets.root import apply_data_root
from mmvssm.errors import UserError
from support.tiny_configs import CONFIGS

TRAIN = ("train_dataloader", "val_dataloader")
WIDTH, HEIGHT = 20, 10
RNG = np.random.RandomState(0)


@pytest.fixture(autouse=True)
def nothing_remembered():
    yield
    read_coco.cache_clear()


@pytest.fixture
def root(tmp_path):
    return tmp_path / "data"


def write(path, content):
    """Write a text, an object as JSON, or an array as a picture."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, np.ndarray):
        Image.fromarray(content.astype(np.uint8)).save(path)
    else:
        path.write_text(content if isinstance(content, str) else json.dumps(content))


def write_images(folder, *stems, suffix=".png"):
    for stem in stems:
        write(folder / f"{stem}{suffix}", RNG.randint(0, 256, (HEIGHT, WIDTH, 3)))


def applied(cfg, root, loaders=TRAIN, **options):
    """Apply and check --data-root; return the line that describes it."""
    init_default_scope(cfg.default_scope)
    cfg.work_dir = str(root.parent / "run")
    line = apply_data_root(cfg, str(root), loaders, **options)
    assert check_data(cfg, loaders) == []
    return line


def content_of(cfg, loader):
    leaf = cfg[loader].dataset
    return json.loads(Path(leaf.data_root, leaf.ann_file).read_text())


def names_in(cfg, loader):
    """The images of a data set as the library reads them."""
    if cfg.default_scope == "mmdet":
        return [image["file_name"] for image in content_of(cfg, loader)["images"]]
    from mmseg.datasets import BaseSegDataset

    leaf = {**cfg[loader].dataset, "pipeline": []}
    leaf.pop("type")
    return [
        Path(r["img_path"]).stem for r in BaseSegDataset(**leaf, lazy_init=True).load_data_list()
    ]


# --------------------------------------------------------------------------------------------- COCO


def coco(*names, segmentation=((2, 3, 10, 3, 10, 9, 2, 9),), **changes):
    annotation = dict(category_id=1, bbox=[2, 3, 8, 6], area=48, iscrowd=0)
    if segmentation:
        annotation["segmentation"] = segmentation
    return dict(
        images=[
            dict(id=i, file_name=n, width=WIDTH, height=HEIGHT) for i, n in enumerate(names, 1)
        ],
        annotations=[
            dict(annotation, id=i, image_id=i, **changes) for i in range(1, len(names) + 1)
        ],
        categories=[dict(id=1, name="cat")],
    )


@pytest.mark.parametrize(
    ("labels", "images"),
    [
        ("annotations/instances_{}2017.json", "{}2017"),
        ("annotations/instances_{}.json", "{}"),
        ("annotations/{}.json", "images/{}"),
        ("instances_{}.json", "{}"),
        ("annotations/{}.json", "images"),
    ],
)
def test_coco_in_its_usual_folders(root, labels, images):
    for split, name in (("train", "a"), ("val", "b")):
        write(root / labels.format(split), coco(f"{name}.png"))
        write_images(root / images.format(split), name)
    cfg = detector()
    line = applied(cfg, root)
    assert labels.format("val") in line and "1 class (cat)" in line
    assert names_in(cfg, TRAIN[0]) == ["a.png"] and names_in(cfg, TRAIN[1]) == ["b.png"]
    assert not (root.parent / "run").exists()


def test_coco_without_validation(root):
    write(root / "annotations/instances_train2017.json", coco("a.png", "b.png", "c.png"))
    write_images(root / "train2017", *"abc")
    cfg = detector()
    assert "1 of 3 images drawn" in applied(cfg, root)
    contents = [content_of(cfg, loader) for loader in TRAIN]
    for content in contents:
        ids = [image["id"] for image in content["images"]]
        assert [annotation["image_id"] for annotation in content["annotations"]] == ids
    train, val = (names_in(cfg, loader) for loader in TRAIN)
    assert len(val) == 1 and sorted(train + val) == ["a.png", "b.png", "c.png"]


def test_roboflows_coco(root):
    for word in ("train", "valid"):
        content = coco("a.png", "b.png", segmentation=None)
        content["categories"] = [dict(id=0, name="pets", supercategory="none")]
        content["categories"] += [dict(id=1, name="cat", supercategory="pets")]
        for annotation in content["annotations"]:
            annotation.update(id=annotation["id"] - 1, segmentation=[])
        write(root / word / "_annotations.coco.json", content)
        write_images(root / word, "a", "b")
    cfg = detector()
    assert "1 class (cat)" in applied(cfg, root)
    content = content_of(cfg, "val_dataloader")
    assert [a["id"] for a in content["annotations"]] == [1, 2]  # pycocotools takes 0 for "none"
    assert [c["name"] for c in content["categories"]] == ["cat"]


def test_a_refused_conversion_removes_no_folder_that_was_there(tmp_path):
    def fail(folder):
        raise UserError("no")

    (tmp_path / "empty/run").mkdir(parents=True)
    for work_dir in ("empty/run", "new"):
        with pytest.raises(UserError, match="no"):
            made_from(str(tmp_path), str(tmp_path / work_dir), [], fail)
    assert [path.name for path in sorted(tmp_path.rglob("*"))] == ["empty", "run"]


def test_boxes_alone_leave_the_mask_part_out(root):
    for split in ("train", "val"):
        write(root / f"annotations/{split}.json", coco("a.png", segmentation=None))
        write_images(root / split, "a")
    cfg = detector()
    cfg.model.roi_head.mask_roi_extractor = dict(type="SingleRoIExtractor")
    cfg.default_hooks = dict(checkpoint=dict(save_best="coco/segm_mAP"))
    assert "the model's mask part is left out" in applied(cfg, root)
    assert set(cfg.model.roi_head) == {"bbox_head"}
    assert cfg.val_evaluator.metric == cfg.test_evaluator.metric == "bbox"
    assert not any(step.get("with_mask") for step in cfg.train_dataloader.dataset.pipeline)
    assert cfg.default_hooks.checkpoint.save_best == "coco/bbox_mAP"
    boxes = detector(masks=False)
    assert "mask" not in applied(boxes, root)


# --------------------------------------------------------------------------------------- Pascal VOC


def voc(*boxes, size=(WIDTH, HEIGHT), more=""):
    objects = [
        f"<object><name>{name}</name><bndbox><xmin>{x}</xmin><ymin>{y}</ymin><xmax>{r}</xmax><ymax>{b}</ymax>"
        f"</bndbox>{more}</object>"
        for name, x, y, r, b in boxes
    ]
    width, height = size
    return (
        f"<annotation><size><width>{width}</width><height>{height}</height></size>"
        f"{''.join(objects)}</annotation>"
    )


def write_voc(root, stems="abcd", lists=True, **options):
    for stem in stems:
        write(root / f"Annotations/{stem}.xml", voc(("dog", 1, 2, 10, 10), ("cat", 3, 3, 20, 6)))
        write_images(root / "JPEGImages", stem)
    if lists:
        write(root / "ImageSets/Main/train.txt", "\n".join(stems[:-1]) + "\n")
        write(root / "ImageSets/Main/val.txt", stems[-1])
        write(root / "ImageSets/Main/cat_train.txt", "a 1")


def test_voc_counts_pixels_from_one(root):
    write_voc(root)
    cfg = detector()
    assert "2 classes (cat, dog)" in applied(cfg, root)
    train = content_of(cfg, "train_dataloader")
    assert names_in(cfg, "train_dataloader") == [f"JPEGImages/{n}.png" for n in "abc"]
    assert names_in(cfg, "val_dataloader") == ["JPEGImages/d.png"]
    # From the edge before the first pixel to that behind the last one.
    assert [(a["category_id"], a["bbox"]) for a in train["annotations"][:2]] == [
        (2, [0, 1, 10, 9]),
        (1, [2, 2, 18, 4]),
    ]
    assert cfg.model.roi_head.get("mask_head") is None


def test_a_cascade_keeps_its_three_box_heads(root):
    write_voc(root)
    cfg = Config.fromfile(CONFIGS / "groupmamba_cascade_maskrcnn_shapes.py")
    cfg.train_dataloader.dataset.filter_cfg = None  # of small images
    assert "it has boxes alone, so the model's mask part is left out" in applied(cfg, root)
    roi_head = cfg.model.roi_head
    assert not {"mask_head", "mask_roi_extractor"} & set(roi_head)
    assert [head.num_classes for head in roi_head.bbox_head] == [2] * 3
    assert (cfg.val_evaluator.metric, cfg.train_pipeline[1].with_mask) == ("bbox", False)


def test_voc_whose_pixels_count_from_zero(root):
    write_voc(root)
    write(root / "Annotations/d.xml", voc(("dog", 0, 2, 10, 10)))
    cfg = detector()
    applied(cfg, root, classes=None, loaders=("train_dataloader",))
    assert content_of(cfg, "train_dataloader")["annotations"][0]["bbox"] == [1, 2, 9, 8]


def test_voc_of_difficult_objects_and_without_sizes(root):
    write_voc(root)
    boxes = voc(("dog", 1, 2, 10, 10), size=(0, 0), more="<difficult>1</difficult>")
    write(root / "Annotations/a.xml", boxes)
    cfg = detector()
    applied(cfg, root, loaders=("train_dataloader",))
    content = content_of(cfg, "train_dataloader")
    assert [a["iscrowd"] for a in content["annotations"][:2]] == [1, 0]
    assert (content["images"][0]["width"], content["images"][0]["height"]) == (WIDTH, HEIGHT)


def test_validation_is_drawn_once_and_written_down(root):
    stems = [f"{i:02}" for i in range(12)]
    write_voc(root, stems, lists=False)
    before = set(root.rglob("*"))
    cfg, again = detector(), detector()
    line = applied(cfg, root)
    assert "2 of 12 images drawn (seed 0)" in line
    train, val = (names_in(cfg, loader) for loader in TRAIN)
    assert len(val) == 2 and sorted(train + val) == [f"JPEGImages/{s}.png" for s in stems]
    assert set(root.rglob("*")) == before

    file = Path(cfg.train_dataloader.dataset.ann_file)
    written = file.stat().st_mtime_ns
    assert applied(again, root, loaders=("val_dataloader",)) == line
    assert names_in(again, "val_dataloader") == val and file.stat().st_mtime_ns == written

    write(root / "Annotations/00.xml", voc(("cow", 1, 2, 10, 10), ("cat", 3, 3, 20, 6)))
    applied(again, root, loaders=("train_dataloader",))
    assert again.train_dataloader.dataset.metainfo.classes == ("cat", "cow", "dog")
    assert file.exists()  # the earlier run's config names it


# --------------------------------------------------------------------------------------------- YOLO

BOX = "1 0.5 0.5 0.4 0.6\n"
POLYGON = "0 0.1 0.2 0.6 0.2 0.6 0.8\n\n"


def write_yolo(
    root, order="images/{}", line=BOX, names="names: [cat, dog]", words=("train", "val")
):
    write(root / "data.yaml", f"path: ../elsewhere\ntrain: ../train/images\nnc: 2\n{names}\n")
    for word in words:
        images = root / order.format(word)
        write_images(images, "a", "b", "seq/c")
        labels = root / order.replace("images", "labels").format(word)
        write(labels / "a.txt", line)
        write(labels / "seq/c.txt", line)


@pytest.mark.parametrize("order", ["images/{}", "{}/images", "images/{}2017"])
@pytest.mark.parametrize("names", ["names: [cat, dog]", "names: {1: dog, 0: cat}"])
def test_yolo_in_both_orders_of_folders(root, order, names):
    write_yolo(root, order, names=names, words=("train", "val" if "2017" in order else "valid"))
    cfg = detector()
    assert "2 classes (cat, dog)" in apply(cfg, root)
    content = content_of(cfg, "train_dataloader")
    assert [i["file_name"].rpartition("/")[2] for i in content["images"]] == [
        "a.png",
        "b.png",
        "c.png",
    ]
    assert [(a["image_id"], a["category_id"], a["bbox"]) for a in content["annotations"]] == [
        (1, 2, [6, 2, 8, 6]),
        (3, 2, [6, 2, 8, 6]),
    ]
    assert cfg.model.roi_head.get("mask_head") is None


def apply(cfg, root, **options):
    """As ``applied``, for data that lack objects of a class."""
    init_default_scope(cfg.default_scope)
    cfg.work_dir = str(root.parent / "run")
    line = apply_data_root(cfg, str(root), TRAIN, **options)
    assert all("no object to train on" in warning for warning in check_data(cfg, TRAIN))
    return line


def test_polygons_of_yolo_keep_the_masks(root):
    write_yolo(root, "images", POLYGON, words=("",))  # no split: one is drawn
    cfg = detector()
    assert "1 of 3 images drawn" in apply(cfg, root)
    (annotation, *_) = content_of(cfg, "train_dataloader")["annotations"]
    assert annotation["segmentation"] == [[2, 2, 12, 2, 12, 8]]
    assert annotation["bbox"] == [2, 2, 10, 6] and annotation["area"] == 30
    assert cfg.model.roi_head.mask_head and cfg.val_evaluator.metric == ["bbox", "segm"]


# ------------------------------------------------------------------------------------- what is wrong

BOMB = '<!DOCTYPE a [<!ENTITY b "c"><!ENTITY d "&b;&b;">]><annotation>&d;</annotation>'
WRONG = {
    "xml bomb": (write_voc, "Annotations/a.xml", BOMB, "a.xml declares XML entities"),
    "xml cut off": (write_voc, "Annotations/a.xml", "<annotation>", "a.xml is not a readable XML"),
    "box of words": (
        write_voc,
        "Annotations/a.xml",
        voc(("cat", 1, 2, 3, 4), ("cat", 1, "nan", 3, "x")),
        "a.xml, object 2: it lacks a name, or four numbers",
    ),
    "no image": (write_voc, "Annotations/e.xml", voc(), "e.xml has no image of that name"),
    "other size": (
        write_voc,
        "Annotations/a.xml",
        voc(("cat", 1, 2, 3, 4), size=(99, 99)),
        "a.png has 20x10 pixels, but 99x99 in the annotation file",
    ),
    "unknown in a list": (
        write_voc,
        "ImageSets/Main/val.txt",
        "d\n\n../x\n",
        "val.txt, line 3: there is no Annotations/../x.xml",
    ),
    "class beyond": (
        write_yolo,
        "labels/val/a.txt",
        f"{BOX}2 0.5 0.5 0.1 0.1",
        "a.txt, line 2: there is no class 2; the 2 names count from 0",
    ),
    "class between": (write_yolo, "labels/val/a.txt", "0.5 .5 .5 .1 .1", "no class 0.5"),
    "pixels": (write_yolo, "labels/val/a.txt", "1 9 5 4 4", "line 1: 1 9 5 4 4 is outside the"),
    "word": (write_yolo, "labels/val/a.txt", "1 0.5 x 0.1 0.1", "line 1: 1 0.5 x 0.1 0.1 is not"),
    "odd": (write_yolo, "labels/val/a.txt", "1 .1 .1 .2 .1 .3", "is not a class with the numbers"),
    "class alone": (write_yolo, "labels/val/a.txt", "1", "line 1: 1 is not a class with"),
    "image empty": (write_yolo, "images/train/b.png", "", "b.png is empty; restore it"),
    "two yaml files": (write_yolo, "more.yml", "names: [cat]", "one YAML file with names, and has 2"),
    "code in yaml": (
        write_yolo,
        "data.yaml",
        "names: !!python/object/apply:os.system ['touch harmed']",
        "data.yaml is not a readable YAML file",
    ),
    "names in yaml": (write_yolo, "data.yaml", "names: {1: a, 2: b}", "names that are a list of"),
    "one name twice": (write_yolo, "data.yaml", "names: [a, a]", "a list of different words"),
    "truth in yaml": (write_yolo, "data.yaml", "names: [yes, no]", "a list of different words"),
    "keypoints": (
        write_yolo,
        "data.yaml",
        "names: [a, b]\nkpt_shape: [5, 2]",
        "describes keypoints",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("make", "file", "content", "words"), WRONG.values(), ids=list(WRONG))
def test_wrong_labels_are_named_with_their_place(root, make, file, content, words):
    make(root)
    write(root / file, content)
    sentence = refusal(applied, detector(), root)
    assert words in sentence and "\n" not in sentence
    assert "99x99" in words or not (root.parent / "run").exists()


def test_two_layouts_are_asked_about_and_none_is_explained(root):
    write_voc(root)
    write_yolo(root, line=POLYGON)
    sentence = refusal(applied, detector(), root)
    assert "Pascal VOC (" in sentence and "YOLO (" in sentence
    assert sentence.endswith("--data-format voc or yolo")
    cfg = detector()
    assert apply(cfg, root, data_format="yolo").startswith(f"{root}: YOLO (images/train/")
    for known in ("train2017", "_annotations.coco.json", "JPEGImages/", "labels/ beside images/"):
        assert known in refusal(applied, detector(), root, data_format="coco")
    (root.parent / "empty").mkdir()
    assert "has no files, which is no known" in refusal(applied, segmenter(), root.parent / "empty")


# --------------------------------------------------------------------------------------- label maps

LABELS = np.resize([0, 1, 2], (HEIGHT, WIDTH))
COLOURS = np.array([(0, 0, 0), (200, 0, 10), (5, 6, 7)])
ABC = dict(classes=["a", "b", "c"])


@pytest.mark.parametrize(
    ("images", "maps", "tail"),
    [
        ("images/{}", "labels/{}", ""),
        ("{}/images", "{}/masks", ""),
        ("{}", "{}_labels", "_L"),
        ("{}", "{}annot", ""),
        ("maps/{}", "photos/{}", ""),  # names of folders do not matter
    ],
)
def test_label_maps_beside_images(root, images, maps, tail):
    for word, stem in (("train", "x"), ("val", "y"), ("test", "z")):
        write_images(root / images.format(word), stem, stem * 2, suffix=".jpg")
        for name in (stem, stem * 2):
            write(root / maps.format(word) / f"{name}{tail}.png", LABELS)
    cfg = segmenter()
    assert "label maps beside images" in applied(cfg, root, **ABC)
    assert names_in(cfg, TRAIN[0]) == ["x", "xx"] and names_in(cfg, TRAIN[1]) == ["y", "yy"]
    leaf = cfg.train_dataloader.dataset
    assert leaf.reduce_zero_label is False and leaf.data_prefix.seg_map_path == maps.format("train")


def test_label_maps_without_a_split(root):
    stems = [str(i) for i in range(7)]
    write_images(root / "photos", *stems)
    for stem in stems:
        write(root / "classes" / f"{stem}.png", LABELS)
    cfg = segmenter()
    assert "1 of 7 images drawn (seed 0)" in applied(cfg, root, **ABC)
    train, val = (names_in(cfg, loader) for loader in TRAIN)
    assert len(val) == 1 and sorted(train + val) == stems


def write_maps(root, pixels, suffix=".png"):
    for word in ("train", "val"):
        write_images(root / "images" / word, "x")
        write(root / "masks" / word / f"x{suffix}", pixels)


def written_map(cfg):
    leaf = cfg.train_dataloader.dataset
    return np.array(Image.open(Path(leaf.data_prefix.seg_map_path, "x.png")))


@pytest.mark.parametrize(
    ("table", "text"),
    [
        ("class_dict.csv", 'name,r,g,b\nsky,5,6,7\n"road 2",200,0,10\nbuilding,0,0,0\nsea,1,1,1\n'),
        ("label_colors.txt", "5 6 7\tsky\n200 0 10\troad 2\n0 0 0\tbuilding\n1 1 1 sea\n"),
        (
            "labelmap.txt",
            "# label:color_rgb:parts:actions\nsky:5,6,7::\nroad 2:200,0,10::\nbuilding:0,0,0::\nsea:1,1,1::\n",
        ),
    ],
)
def test_colours_are_numbered_by_their_table(root, table, text):
    write_maps(root, COLOURS[LABELS])
    write(root / table, text)
    cfg = segmenter()
    init_default_scope("mmseg")
    cfg.work_dir = str(root.parent / "run")
    line = apply_data_root(cfg, str(root), TRAIN)
    assert "4 classes (sky, road 2, building, ...)" in line and "colours became class" in line
    assert all("(sea;" in warning for warning in check_data(cfg, TRAIN))
    assert (written_map(cfg) == np.array([2, 1, 0])[LABELS]).all()


@pytest.mark.parametrize("name", ["Void", "unlabelled"])
def test_what_a_table_calls_void_is_ignored(root, name):
    write_maps(root, COLOURS[LABELS])
    write(root / "class_dict.csv", f"name,r,g,b\nsky,5,6,7\n{name},200,0,10\nbuilding,0,0,0\n")
    cfg = segmenter()
    line = applied(cfg, root)
    assert (
        "2 classes (sky, building), 0 is 'sky'" in line and f"pixels of {name} are ignored" in line
    )
    assert cfg.model.decode_head.num_classes == 2
    assert (written_map(cfg) == np.array([1, 255, 0])[LABELS]).all()


def test_colours_are_counted_without_a_table(root):
    write_maps(root, COLOURS[LABELS])
    cfg = segmenter()
    line = applied(cfg, root)
    assert "3 classes (background, #050607, #c8000a), 0 is 'background'" in line
    assert (written_map(cfg) == np.array([0, 2, 1])[LABELS]).all()
    named = segmenter()
    named.work_dir = str(root / "runs")  # what we write is no other way to read the data
    apply_data_root(named, str(root), TRAIN)
    assert "3 classes (a, b, c)" in applied(named, root, **ABC)
    found = list(cfg.train_dataloader.dataset.metainfo.classes)
    applied(segmenter(), root, classes=found)  # those of a checkpoint
    other = [*found[:2], "#ffffff"]
    assert "3 classes (background, #050607, #c8000a)" in refusal(
        applied, segmenter(), root, classes=other
    )


@pytest.mark.parametrize("channels", [1, 3])
def test_masks_of_0_and_255(root, channels):
    mask = np.resize([0, 255], (HEIGHT, WIDTH))
    write_maps(root, mask if channels == 1 else np.dstack([mask] * 3))
    cfg = segmenter()
    assert "2 classes (background, foreground), 0 is" in applied(cfg, root)
    assert (written_map(cfg) == mask / 255).all()
    line = applied(segmenter(), root, classes=["rest", "crack"])
    assert "2 classes (rest, crack)" in line
    sentence = refusal(applied, segmenter(), root, reduce_zero_label=True)
    assert "--reduce-zero-label" in sentence


def test_masks_of_coco_are_named_by_its_category(root):
    """Unless there are several, whose colours it does not tell."""
    for split in ("train", "val"):
        write(root / f"annotations/instances_{split}2017.json", coco("x.png"))
        write_images(root / f"{split}2017", "x")
        write(root / f"semantic_{split}2017/x.png", np.resize([0, 255], (HEIGHT, WIDTH)))
    assert "2 classes (background, cat), 0 is" in applied(segmenter(), root)
    for split in ("train", "val"):
        write(root / f"semantic_{split}2017/x.png", COLOURS[LABELS])
    assert "3 classes (background, #050607, #c8000a)" in applied(segmenter(), root)


def test_masks_saved_as_jpeg(root):
    mask = np.zeros((64, 64))
    mask[10:50, 20:45] = 255
    for word in ("train", "val"):
        write(root / f"images/{word}/x.jpg", RNG.randint(0, 256, (64, 64, 3)))
        write(root / f"masks/{word}/x.jpg", mask)
    cfg = segmenter()
    assert "2 classes (background, foreground)" in applied(cfg, root)
    assert (written_map(cfg) == mask / 255).all()
    write(root / "masks/train/x.jpg", np.indices((64, 64)).sum(axis=0) * 2)
    assert "x.jpg cannot be made a map" in refusal(applied, segmenter(), root)


def test_0_and_255_in_a_configs_own_data(root):
    write_maps(root, np.resize([0, 255], (HEIGHT, WIDTH)))
    cfg = segmenter()
    for loader, word in zip(TRAIN, ("train", "val")):
        prefix = dict(img_path=f"images/{word}", seg_map_path=f"masks/{word}")
        cfg[loader].dataset.update(data_root=str(root), data_prefix=prefix, img_suffix=".png")
        cfg[loader].dataset.update(type="BaseSegDataset", metainfo=dict(classes=["a", "b"]))
    init_default_scope("mmseg")
    assert "255 means pixels to ignore, not" in refusal(check_data, cfg, TRAIN)


WRONG_MAPS = {
    "colour without a name": (
        "class_dict.csv",
        "a,0,0,0\nb,5,6,7\n",
        "colour 0xc8000a, of no class",
    ),
    "row without numbers": ("class_dict.csv", "a,0,0,0\nb,5,6\n", "class_dict.csv, line 2: b,5,6"),
    "number beyond 255": ("class_dict.csv", "a,0,0,0\nb,5,6,256\n", "class_dict.csv, line 2"),
    "one colour twice": ("labelmap.txt", "a:0,0,0::\nb:0,0,0::", "labelmap.txt, line 2"),
    "first map of words": ("masks/val/x.png", "x", "x.png is no picture, or damaged"),
    "map of words": ("masks/train/y.png", "x", "y.png cannot be made a map of class numbers"),
}


@pytest.mark.parametrize(("file", "text", "words"), WRONG_MAPS.values(), ids=list(WRONG_MAPS))
def test_wrong_colours_are_named(root, file, text, words):
    write_maps(root, COLOURS[LABELS])
    write_images(root / "images/train", "y")
    write(root / "masks/train/y.png", COLOURS[LABELS])
    write(root / file, text)
    sentence = refusal(applied, segmenter(), root)
    assert words in sentence and not (root.parent / "run").exists()


def test_smoothed_colours_are_no_classes(root):
    write_maps(root, np.resize(np.arange(300), (HEIGHT, WIDTH, 3)), suffix=".png")
    assert "too many to be classes" in refusal(applied, segmenter(), root)


def test_several_folders_of_label_maps_are_asked_about(root):
    write_maps(root, LABELS)
    write(root / "coloured/train/x.png", COLOURS[LABELS])
    assert "several folders of label maps" in refusal(applied, segmenter(), root, **ABC)


# ------------------------------------------------------------------------------------ class folders


def test_class_folders_without_validation(root):
    for name in ("cat", "dog"):
        write_images(root / "train" / name, *map(str, range(5)))
    leaf = dict(type="ImageNet", split="train", pipeline=[])
    cfg = Config(
        dict(
            default_scope="mmpretrain",
            model=dict(head=dict(num_classes=1000)),
            work_dir=str(root.parent / "run"),
            train_dataloader=dict(dataset=leaf),
            val_dataloader=dict(dataset=leaf),
        )
    )
    assert "2 of 10 images drawn (seed 0)" in apply_data_root(cfg, str(root), TRAIN)
    lines = [Path(cfg[name].dataset.ann_file).read_text().splitlines() for name in TRAIN]
    assert [len(part) for part in lines] == [8, 2]
    expected = {f"{n}{os.sep}{i}.png {k}" for k, n in enumerate(("cat", "dog")) for i in range(5)}
    assert {*lines[0], *lines[1]} == expected
    assert {cfg[name].dataset.data_prefix for name in TRAIN} == {"train"}
