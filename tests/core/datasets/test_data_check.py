"""Data sets with one fault each: the message or the warning, and nothing else.

Each row of the tables is a way to spoil a data set of 4 images of 16x16 pixels per split, with words of the error
message or of the warning.
"""

import io
import json
import os

import cv2
import numpy as np
import pytest
from mmcv.transforms import LoadImageFromFile
from mmdet.datasets import BaseDetDataset, CocoDataset
from mmengine.config import Config
from mmengine.dataset import BaseDataset
from mmengine.registry import init_default_scope
from PIL import Image
from pycocotools import mask as coco_masks

from mmvssm.datasets import check, pictures
from mmvssm.datasets import memory as memory_module
from mmvssm.datasets.annotations import _pixels_of, check_annotations, read_coco
from mmvssm.datasets.check import check_data
from mmvssm.datasets.memory import Memory
from mmvssm.datasets.pictures import read_images, read_label_maps
from mmvssm.datasets.root import apply_data_root
from mmvssm.errors import UserError

TRAIN = ("train_dataloader", "val_dataloader")
TEST = ("test_dataloader",)
INF, NAN = float("inf"), float("nan")
SIDE = 16
RNG = np.random.RandomState(0)


@pytest.fixture(autouse=True)
def nothing_remembered():
    yield
    read_coco.cache_clear()


def encoded(array=None, kind="PNG", orientation=None, **options):
    """A picture as a file's bytes."""
    if array is None:
        array = RNG.randint(0, 256, (SIDE, SIDE, 3)).astype(np.uint8)
    picture = array if isinstance(array, Image.Image) else Image.fromarray(array)
    if orientation:
        options["exif"] = Image.Exif()
        options["exif"][274] = orientation
    stream = io.BytesIO()
    picture.save(stream, kind, **options)
    return stream.getvalue()


def labels(*values, size=(SIDE, SIDE)):
    """A label map in which these values occur."""
    return np.resize(np.array(values, dtype=np.uint8), size)


# ------------------------------------------------------------------------------ COCO's instances


class Instances:
    """A data set in COCO's layout, in memory until ``write``: ``train`` and ``val`` are the JSON files' contents."""

    def __init__(self, root):
        self.root = root
        self.train, self.val = self.content(), self.content()
        self.files = {f"{s}2017/{i}.png": encoded() for s in ("train", "val") for i in range(4)}
        self.texts = {}
        self.options = {}

    @staticmethod
    def content():
        return dict(
            images=[
                dict(id=i + 1, file_name=f"{i}.png", width=SIDE, height=SIDE) for i in range(4)
            ],
            annotations=[
                dict(
                    id=i + 1,
                    image_id=i + 1,
                    category_id=i % 2 + 1,
                    bbox=[2, 3, 8, 6],
                    area=48,
                    iscrowd=0,
                    segmentation=[[2, 3, 10, 3, 10, 9, 2, 9]],
                )
                for i in range(4)
            ],
            categories=[dict(id=1, name="cat"), dict(id=2, name="dog")],
        )

    def write(self):
        (self.root / "annotations").mkdir(parents=True)
        for split in ("train", "val"):
            path = self.root / f"annotations/instances_{split}2017.json"
            text = self.texts.get(split, json.dumps(getattr(self, split)))
            path.write_bytes(text if isinstance(text, bytes) else text.encode())
        for name, content in self.files.items():
            (self.root / name).parent.mkdir(parents=True, exist_ok=True)
            (self.root / name).write_bytes(content)


def detector(masks=True, wrapper=None, **leaf):
    load = [
        dict(type="LoadImageFromFile"),
        dict(type="LoadAnnotations", with_bbox=True, with_mask=masks),
    ]
    data = dict(type="CocoDataset", data_root="x", pipeline=load)
    train = {**data, "filter_cfg": dict(filter_empty_gt=True, min_size=8), **leaf}
    metric = dict(type="CocoMetric", metric=["bbox", "segm"] if masks else "bbox")
    head = dict(num_classes=80)
    return Config(
        dict(
            default_scope="mmdet",
            model=dict(roi_head=dict(bbox_head=head, **(dict(mask_head=head) if masks else {}))),
            train_dataloader=dict(dataset=wrapper(train) if wrapper else train),
            val_dataloader=dict(dataset=dict(data, test_mode=True)),
            test_dataloader=dict(dataset=dict(data, test_mode=True)),
            val_evaluator=metric,
            test_evaluator=metric,
        )
    )


def checked(cfg, root, loaders=TRAIN, **options):
    """Return the warnings of the check, or raise its error."""
    init_default_scope(cfg.default_scope)
    apply_data_root(cfg, str(root), loaders, **options)
    return check_data(cfg, loaders)


def ann(split="train", only=1, drop=(), **changes):
    """Changes the first annotations."""

    def spoil(data):
        for annotation in getattr(data, split)["annotations"][:only]:
            annotation.update(changes)
            for key in [drop] if isinstance(drop, str) else drop:
                annotation.pop(key)

    return spoil


def record(kind, index=0, drop=None, split="train", **changes):
    """Changes an image or a category, by default the first."""

    def spoil(data):
        getattr(data, split)[kind][index].update(changes)
        if drop:
            getattr(data, split)[kind][index].pop(drop)

    return spoil


def content(split="train", **changes):
    return lambda data: getattr(data, split).update(changes)


def text(value, split="train"):
    return lambda data: data.texts.update({split: value})


def image(value, name="train2017/0.png", size=None):
    def spoil(data):
        data.files[name] = value
        if size:
            data.train["images"][0].update(width=size[0], height=size[1])

    return spoil


def renamed(value, name):
    """The first image, in a file of another name."""

    def spoil(data):
        data.files[f"train2017/{name}"] = value
        data.train["images"][0]["file_name"] = name

    return spoil


def both(*spoils):
    def spoil(data):
        for one in spoils:
            one(data)

    return spoil


def rle(counts, size=(SIDE, SIDE)):
    return dict(size=list(size), counts=counts)


def category_from_zero(data):
    for annotation in data.train["annotations"]:
        annotation["category_id"] -= 1


def image_ids_as_text(data):
    data.train["images"][0]["id"] = "one"
    data.train["annotations"][0]["image_id"] = "one"


def all_image_ids_as_text(data):
    for picture in data.train["images"]:
        picture["id"] = str(picture["id"])
    for annotation in data.train["annotations"]:
        annotation["image_id"] = str(annotation["image_id"])


WIDE = np.full((SIDE, 2 * SIDE, 3), 90, np.uint8)
JPEG = encoded(RNG.randint(0, 256, (SIDE, SIDE, 3)).astype(np.uint8), "JPEG")
NO_JSON = "instances_train2017.json is not a readable JSON file"
NO_BOX = "a bbox that is not four finite numbers [x, y, width, height]"

REFUSED_INSTANCES = {
    # the file
    "json empty": (text(""), "instances_train2017.json is empty"),
    "json cut off": (text('{"images": ['), NO_JSON),
    "json in UTF-16": (text(json.dumps(Instances.content()).encode("utf-16")), NO_JSON),
    "json with a byte order mark": (text(b"\xef\xbb\xbf{}"), NO_JSON),
    "json of brackets only": (text("[" * 100_000), NO_JSON),
    "json a list": (text("[]"), "needs lists images, annotations, categories"),
    "json a number": (text("1"), "needs lists images, annotations, categories"),
    "no list of annotations": (content(annotations=None), "needs lists images, annotations"),
    "annotations an object": (content(annotations={}), "needs lists images, annotations"),
    "an annotation a list": (content(annotations=[[1]]), "number 0 of its annotations"),
    "an image a text": (
        content(images=["0.png"]),
        'number 0 of its images (counted from 0) is "0.png"',
    ),
    "no key of annotations": (
        lambda data: data.train.pop("annotations"),
        "has no annotations to train on",
    ),
    "no images": (content(images=[], annotations=[]), "names no images"),
    "no annotations": (content(annotations=[]), "has no annotations to train on"),
    # categories
    "no categories": (content(categories=[]), "has no categories"),
    "a category null": (content(categories=[None]), "number 0 of its categories"),
    "category without a name": (
        record("categories", drop="name"),
        "has no name, which mmdet needs (first: category 1)",
    ),
    "category named by a number": (
        record("categories", name=7),
        "a name that is empty or no text (first: category 1: 7)",
    ),
    "category without an id": (
        record("categories", drop="id"),
        "has no id, which mmdet needs (first: category number 0",
    ),
    "category id a list": (
        record("categories", id=[1]),
        "an id that is no number (first: category [1])",
    ),
    "category ids twice": (record("categories", id=2), "two categories with the id 2"),
    "category names twice": (record("categories", name="dog"), "two categories called 'dog'"),
    "category ids of two kinds": (record("categories", id="one"), "text and numbers; use one kind"),
    "categories in another order for validation": (
        lambda data: data.val["categories"].reverse(),
        "lists its categories in another order",
    ),
    "a category missing for validation": (
        lambda data: data.val["categories"].pop(),
        "has no category 'dog'",
    ),
    # images
    "image without an id": (
        record("images", drop="id"),
        "has no id, which mmdet needs (first: image number 0",
    ),
    "image without a name": (record("images", drop="file_name"), "has no file_name"),
    "image without a width": (record("images", drop="width"), "has no width"),
    "image without a height": (record("images", drop="height"), "has no height"),
    "image width null": (record("images", width=None), "has no width"),
    "image width text": (
        record("images", width="16"),
        'a width that is no number of pixels (first: image 1: "16")',
    ),
    "image width zero": (record("images", width=0), "no number of pixels"),
    "image width negative": (record("images", width=-16), "no number of pixels"),
    "image width NaN": (
        record("images", width=NAN),
        "a width that is no number of pixels (first: image 1: NaN)",
    ),
    "image width a fraction": (record("images", width=16.5), "no number of pixels"),
    "image id a list": (record("images", id=[1]), "an id that is no number (first:"),
    "image id true": (record("images", id=True), "an id that is no number (first: image true)"),
    "image ids twice": (record("images", id=2), "1 of 4 images in"),
    "image ids of two kinds": (image_ids_as_text, "which pycocotools cannot sort"),
    "image file name a number": (
        record("images", file_name=5),
        "a file_name that is empty or no text (first: image 1: 5)",
    ),
    "image file names twice": (record("images", file_name="1.png"), "1.png, as image 1)"),
    "image file missing": (
        record("images", file_name="9.png"),
        "names 1 images (of 4) that are not in",
    ),
    "image file name of a folder": (
        both(record("images", file_name="sub"), image(b"", "train2017/sub/x.txt")),
        "sub is a folder",
    ),
    "image size another than said": (
        record("images", width=32, height=32),
        "0.png has 16x16 pixels, but 32x32",
    ),
    "image width and height swapped": (
        image(encoded(WIDE), size=(16, 32)),
        "width and height swapped",
    ),
    "image size said of several": (
        lambda data: [i.update(width=20) for i in data.train["images"]],
        "(and 3 more of 4 images)",
    ),
    # annotations: fields
    "annotation without an id": (
        ann(drop="id"),
        "has no id, which mmdet needs (first: annotation number 0",
    ),
    "annotation id null": (ann(id=None), "has no id"),
    "annotation ids twice": (ann(id=2), "an id that another annotation has"),
    "annotation id beyond all floats": (ann(id=10**400), "an id that is no number (first:"),
    "image width beyond all floats": (record("images", width=10**400), "no number of pixels"),
    "annotation id a list": (ann(id=[1]), "an id that is no number (first:"),
    "annotation id text, for validation": (
        ann("val", id="a"),
        'an id that is no number (first: annotation "a")',
    ),
    "annotation without an image": (ann(drop="image_id"), "has no image_id"),
    "image_id another type": (ann(image_id="1"), "an image_id of another type than the images'"),
    "annotation without a category": (ann(drop="category_id"), "has no category_id"),
    "category_id another type": (ann(category_id="1"), "a category_id of another type"),
    "category_id a list": (ann(category_id=[1]), "a category_id of another type"),
    "categories numbered from zero": (
        category_from_zero,
        "number their categories from 0, its list of",
    ),
    "all categories unknown": (
        ann(only=4, category_id=9),
        "nothing is left to train on of 4 annotations",
    ),
    "all images unknown": (ann(only=4, image_id=9), "nothing is left to train on of 4 annotations"),
    "area missing": (ann(drop="area"), "1 of 4 annotations in"),
    "area missing for validation": (ann("val", drop="area"), "instances_val2017.json has no area"),
    "area text": (ann(area="48"), "an area that is no finite number"),
    "area NaN": (ann(area=NAN), "an area that is no finite number (first: annotation 1: NaN)"),
    "area infinite": (
        ann(area=INF),
        "an area that is no finite number (first: annotation 1: Infinity)",
    ),
    "area null": (ann(area=None), "has no area"),
    "all areas zero": (ann(only=4, area=0), "nothing is left to train on of 4 annotations"),
    "iscrowd missing for validation": (
        ann("val", drop="iscrowd"),
        "no iscrowd, which the evaluation needs",
    ),
    "iscrowd null for validation": (
        ann("val", iscrowd=None),
        "no iscrowd, which the evaluation needs",
    ),
    "iscrowd text": (
        ann(iscrowd="0"),
        'an iscrowd that is neither 0 nor 1 (first: annotation 1: "0")',
    ),
    "iscrowd two": (ann(iscrowd=2), "an iscrowd that is neither 0 nor 1 (first: annotation 1: 2)"),
    "iscrowd a list": (ann(iscrowd=[0]), "an iscrowd that is neither 0 nor 1 (first"),
    "only crowds": (ann(only=4, iscrowd=1), "nothing is left to train on of 4 annotations"),
    # boxes
    "box missing": (ann(drop="bbox"), "has no bbox"),
    "box null": (ann(bbox=None), "has no bbox"),
    "box of three numbers": (ann(bbox=[2, 3, 8]), NO_BOX),
    "box of texts": (ann(bbox=["2", "3", "8", "6"]), NO_BOX),
    "box an object": (ann(bbox=dict(x=2, y=3)), NO_BOX),
    "box NaN": (ann(bbox=[NAN, 3, 8, 6]), f"{NO_BOX} (first: annotation 1: [NaN, 3, 8, 6])"),
    "box infinite": (ann(bbox=[2, 3, INF, 6]), NO_BOX),
    "box overflowing": (
        lambda data: text(json.dumps(data.train).replace("[2, 3, 8, 6]", "[2, 3, 1e999, 6]"))(data),
        NO_BOX,
    ),
    "boxes as corners": (
        lambda data: (
            [a.update(bbox=[2, 3, 10, 15]) for a in data.train["annotations"]]
            and [
                a.update(segmentation=[[2, 3, 10, 3, 10, 15, 2, 15]])
                for a in data.train["annotations"]
            ]
        ),
        "would not if they were two corners",
    ),
    "boxes elsewhere than polygons": (ann(only=3, bbox=[12, 12, 3, 3]), "3 of 4 boxes in"),
    "boxes as shares of the image": (
        ann(only=4, bbox=[0.1, 0.1, 0.5, 0.5], segmentation=[[0.1, 0.1, 0.6, 0.1, 0.6, 0.6]]),
        "nothing is left to train on of 4 annotations",
    ),
    "polygons as shares of the image": (
        ann(only=4, segmentation=[[0.1, 0.1, 0.6, 0.1, 0.6, 0.6]]),
        "are not where their polygons are",
    ),
    "all boxes empty": (ann(only=4, bbox=[2, 3, 0, 0]), "a box of no width or height"),
    "all boxes negative": (ann(only=4, bbox=[10, 9, -8, -6]), "nothing is left to train on"),
    "all boxes outside": (ann(only=4, bbox=[20, 3, 8, 6]), "nothing is left to train on"),
    "all images small": (
        lambda data: data.options.update(filter_cfg=dict(filter_empty_gt=True, min_size=32)),
        "smaller than filter_cfg.min_size=32 pixels",
    ),
    # masks
    "segmentation missing": (
        ann(drop="segmentation"),
        "no segmentation, which this config's masks need",
    ),
    "segmentation missing for validation": (ann("val", drop="segmentation"), "no segmentation"),
    "segmentation empty": (ann(segmentation=[]), "no segmentation"),
    "segmentation a text": (ann(segmentation="x"), "neither a list of polygons nor RLE"),
    "polygon not in a list": (
        ann(segmentation=[2, 3, 10, 3, 10, 9]),
        "neither a list of polygons nor RLE",
    ),
    "polygon of texts": (
        ann(segmentation=[["2", "3", "10", "3", "10", "9"]]),
        "other values than finite numbers",
    ),
    "polygon NaN": (ann(segmentation=[[NAN, 3, 10, 3, 10, 9]]), "other values than finite numbers"),
    "polygon beyond all floats": (
        ann(segmentation=[[2.5, 3, 10**400, 3, 10, 9]]),
        "other values than finite numbers",
    ),
    "polygon infinite": (
        ann(segmentation=[[INF, 3, 10, 3, 10, 9]]),
        "other values than finite numbers",
    ),
    "polygon far outside": (
        ann(segmentation=[[1e9, 3, 1e9 + 5, 3, 1e9, 9]]),
        "polygons far outside their image",
    ),
    "all polygons of two points": (
        ann(only=4, segmentation=[[2, 3, 10, 9]]),
        "of fewer than three points and no other",
    ),
    "polygon of two points for validation": (
        ann("val", segmentation=[[2, 3, 10, 9]]),
        "which pycocotools fails on or takes for another",
    ),
    "polygon odd for validation": (
        ann("val", segmentation=[[2, 3, 10, 3, 10, 9, 2]]),
        "of an odd number of values, which pycocotools",
    ),
    "polygon empty for validation": (ann("val", segmentation=[[]]), "fewer than three points"),
    "RLE of another size": (
        ann(segmentation=rle([64], (8, 8))),
        "RLE of another size than their image ([8, 8]",
    ),
    "RLE of turned size": (
        both(image(encoded(WIDE), size=(32, 16)), ann(segmentation=rle([512], (32, 16)))),
        "RLE of another size than their image ([32, 16], not [16, 32])",
    ),
    "RLE without a size": (ann(segmentation=dict(counts=[256])), "RLE of another size"),
    "RLE without counts": (
        ann(segmentation=dict(size=[16, 16])),
        "RLE whose counts cannot be read",
    ),
    "RLE too short": (ann(segmentation=rle([34, 8, 20])), "counts do not add up"),
    "RLE too long": (ann(segmentation=rle([34, 8, 2000])), "counts do not add up"),
    "RLE negative": (ann(segmentation=rle([-4, 8, 252])), "RLE whose counts cannot be read"),
    "RLE of no code": (ann(segmentation=rle("äöü")), "RLE whose counts cannot be read"),
    "RLE compressed too short": (ann(segmentation=rle("X18")), "counts do not add up"),
    "RLE compressed and cut off": (
        ann(segmentation=rle("X18d")),
        "RLE whose counts cannot be read",
    ),
    # files of images
    "image empty": (image(b""), "train2017/0.png is empty"),
    "image of text": (
        image(b"<html>not found</html>"),
        "0.png is damaged, or a file that mmcv's cv2 does not read",
    ),
    "image PNG cut off": (image(encoded()[:-30]), "0.png is damaged"),
    "image JPEG cut off": (renamed(JPEG[:-30], "a.jpg"), "a.jpg is damaged"),
    "image BMP cut off": (renamed(encoded(kind="BMP")[:-30], "a.bmp"), "a.bmp is damaged"),
    "image TIFF cut off": (renamed(encoded(kind="TIFF")[:-30], "a.tif"), "a.tif is damaged"),
    "image WebP cut off": (renamed(encoded(kind="WEBP")[:-30], "a.webp"), "a.webp is damaged"),
    "image header only": (image(encoded()[:40]), "0.png is damaged"),
    "image of floats": (
        renamed(encoded(np.zeros((SIDE, SIDE), np.float32), "TIFF"), "a.tif"),
        "a TIFF file that mmcv's cv2 does not read",
    ),
    "image of a kind OpenCV does not know": (
        renamed(encoded(kind="TGA"), "a.tga"),
        "a TGA file that mmcv's cv2 does not read",
    ),
    "image broken for validation": (image(b"", "val2017/2.png"), "val2017/2.png is empty"),
    "several images broken": (
        both(*(image(b"", f"train2017/{i}.png") for i in range(3))),
        "(and 2 more of 4 images)",
    ),
    "image turned by EXIF": (
        both(renamed(encoded(WIDE, "JPEG", 6), "a.jpg"), record("images", width=32)),
        "is turned by its EXIF orientation (6)",
    ),
    "image PNG turned by EXIF": (
        image(encoded(WIDE, "PNG", 8), size=(32, 16)),
        "EXIF orientation (8)",
    ),
    "image TIFF turned by EXIF": (
        both(renamed(encoded(WIDE, "TIFF", 5), "a.tif"), record("images", width=32)),
        "EXIF orientation (5)",
    ),
}

WARNED_INSTANCES = {
    "iscrowd missing": (ann(drop="iscrowd"), "no iscrowd; each is taken for a single object"),
    "image_id unknown": (ann(image_id=9), "an image_id that none of the images has"),
    "image_id unknown for validation": (
        ann("val", image_id=9),
        "an image_id that none of the images has",
    ),
    "category_id unknown": (ann(category_id=9), "a category_id that none of the categories has"),
    "annotation id zero for validation": (
        ann("val", id=0),
        "the id 0, which pycocotools takes for 'no match'",
    ),
    "box empty": (ann(bbox=[2, 3, 0, 6]), "a box of no width or height"),
    "box negative": (
        ann(bbox=[10, 9, -8, -6]),
        "mmdet skips them in training (first: annotation 1",
    ),
    "box outside": (ann(bbox=[20, 3, 8, 6]), "a box outside its image"),
    "box outside for validation": (ann("val", bbox=[20, 3, 8, 6]), "counts them as missed"),
    "box partly outside": (
        ann(bbox=[10, 3, 20, 6], segmentation=[[10, 3, 30, 3, 30, 9, 10, 9]]),
        "a box that reaches beyond its image; mmdet cuts them off there",
    ),
    "box of less than a pixel": (ann(bbox=[2, 3, 0.5, 6]), "a box of less than a pixel"),
    "box elsewhere than its polygon": (ann(bbox=[12, 12, 3, 3]), "1 of 4 boxes in"),
    "area zero": (ann(area=0), "an area of zero or less"),
    "area negative": (ann(area=-5), "an area of zero or less"),
    "polygon of two points": (
        ann(segmentation=[[2, 3, 10, 9]]),
        "of fewer than three points and no other",
    ),
    "polygon of an odd number": (
        ann(segmentation=[[2, 3, 10, 3, 10, 9, 2]]),
        "of an odd number of values",
    ),
    "polygon of a point beside a good one": (
        ann(segmentation=[[2, 3, 10, 3, 10, 9, 2, 9], [2, 3]]),
        "of fewer than three points, which mmdet skips",
    ),
    "polygon of a point beside a good one, for validation": (
        ann("val", segmentation=[[2, 3, 10, 3, 10, 9, 2, 9], [2, 3]]),
        "of fewer than three points, which mmdet skips",
    ),
    "annotation twice": (
        lambda data: data.train["annotations"].append(dict(data.train["annotations"][0], id=9)),
        "the image, class and box of another one",
    ),
    "a class without objects": (
        ann(only=4, category_id=1),
        "no object to train on of 1 of the 2 classes (dog)",
    ),
    "most images without objects": (
        lambda data: data.train.update(
            annotations=[dict(a, image_id=1) for a in data.train["annotations"][:2]]
        ),
        "3 of 4 images",
    ),
    "a small image": (
        both(
            image(encoded(np.zeros((4, 4, 3), np.uint8)), size=(4, 4)),
            ann(bbox=[0, 0, 4, 4], segmentation=[[0, 0, 4, 0, 4, 4, 0, 4]]),
        ),
        "1 of 4 images",
    ),
    "nothing to validate on": (content("val", annotations=[]), "every metric will be -1"),
    "image of another format than its suffix": (
        image(JPEG),
        "1 of 4 images have another format than their suffix",
    ),
    "image of 12 bits in 16": (
        image(encoded(np.arange(0, 4096, 16, dtype=np.uint16).reshape(16, 16))),
        "have 16 bits a channel, of which the upper 8 are read; the values 0 to 4080 of the first 1 become 0 to 15 of "
        "255, nearly black: stretch",
    ),
    "colour image of 16 bits": (
        image(cv2.imencode(".png", np.full((16, 16, 3), 65535, np.uint16))[1].tobytes()),
        "the values 65535 to 65535 of the first 1 become 255 to 255 of 255 (first",
    ),
    "square image turned by EXIF": (
        renamed(encoded(kind="JPEG", orientation=6), "a.jpg"),
        "we cannot know whether the annotations are for the turned",
    ),
    "image upside down by EXIF": (
        both(renamed(encoded(WIDE, "JPEG", 3), "a.jpg"), record("images", width=32)),
        "are turned or mirrored by their EXIF orientation",
    ),
}

SILENT_INSTANCES = {
    "as it is": lambda data: None,
    "crowd as a truth value": ann(iscrowd=False),
    "a crowd in RLE": ann(only=1, iscrowd=1, segmentation=rle([34, 8, 214])),
    "a mask in RLE": ann(segmentation=rle([34, 8, 214])),
    "to be ignored": lambda data: data.train["annotations"].append(
        dict(data.train["annotations"][0], id=9, ignore=1)
    ),
    "fields that nobody reads": ann(score=NAN, keypoints="none", attributes=None),
    "ids from elsewhere": lambda data: [
        a.update(id=a["id"] * 10**12) for a in data.train["annotations"]
    ],
    "ids of images as text": all_image_ids_as_text,
    "width as a whole float": record("images", width=16.0),
    "image in a folder": lambda data: renamed(encoded(), "more/a.png")(data) or data,
    "JPEG with bytes behind": renamed(JPEG + b"trailer of a phone", "a.jpg"),
    "several pictures in a JPEG": renamed(encoded(kind="MPO"), "a.jpg"),
    "grey": image(encoded(np.zeros((SIDE, SIDE), np.uint8))),
    "with a palette": image(encoded(Image.fromarray(labels(1, 2)).convert("P"))),
    "with transparency": image(encoded(np.zeros((SIDE, SIDE, 4), np.uint8))),
    "TIFF": renamed(encoded(kind="TIFF"), "a.tif"),
    "WebP": renamed(encoded(kind="WEBP"), "a.webp"),
    "BMP": renamed(encoded(kind="BMP"), "a.bmp"),
    "for print": renamed(encoded(Image.new("CMYK", (SIDE, SIDE)), "JPEG"), "a.jpg"),
    "turned by EXIF, and annotated as seen": both(
        renamed(encoded(WIDE, "JPEG", 6), "a.jpg"), record("images", height=32)
    ),
    "an image without objects": lambda data: (
        data.train["images"].append(dict(id=5, file_name="5.png", width=SIDE, height=SIDE))
        or data.files.update({"train2017/5.png": encoded()})
    ),
}


def rows(table):
    return [pytest.param(*(v if isinstance(v, tuple) else (v,)), id=k) for k, v in table.items()]


def refusal(function, *args, **kwargs):
    with pytest.raises(UserError) as caught:
        function(*args, **kwargs)
    sentence = str(caught.value)
    assert sentence and "\n" not in sentence
    return sentence


def instances(tmp_path, spoil):
    data = Instances(tmp_path / "data")
    spoil(data)
    data.write()
    return data


@pytest.mark.parametrize(("spoil", "words"), rows(REFUSED_INSTANCES))
def test_instances_that_are_refused(tmp_path, spoil, words):
    data = instances(tmp_path, spoil)
    sentence = refusal(checked, detector(**data.options), data.root)
    assert words in sentence and str(data.root) in sentence


@pytest.mark.parametrize(("spoil", "words"), rows(WARNED_INSTANCES))
def test_instances_that_are_warned_of(tmp_path, spoil, words):
    data = instances(tmp_path, spoil)
    warnings = checked(detector(), data.root)
    assert any(words in warning for warning in warnings), warnings
    assert all("\n" not in warning and str(data.root) in warning for warning in warnings)


@pytest.mark.parametrize("spoil", rows(SILENT_INSTANCES))
def test_instances_that_are_fine(tmp_path, spoil, capfd):
    data = instances(tmp_path, spoil)
    assert checked(detector(), data.root) == []
    assert capfd.readouterr() == ("", "")


def test_boxes_alone_need_no_masks(tmp_path):
    data = instances(tmp_path, both(ann(drop="segmentation"), ann("val", segmentation=[[NAN]])))
    assert checked(detector(masks=False), data.root) == []


def test_only_the_split_of_the_run_is_looked_at(tmp_path):
    data = instances(tmp_path, both(ann(drop="area"), image(b"", "train2017/1.png")))
    assert checked(detector(), data.root, TEST) == []
    assert "has no area" in refusal(checked, detector(), data.root)


@pytest.mark.parametrize(
    "wrapper",
    [
        lambda leaf: dict(type="RepeatDataset", times=2, dataset=leaf),
        lambda leaf: dict(type="ConcatDataset", datasets=[leaf, leaf]),
        lambda leaf: dict(type="ClassBalancedDataset", oversample_thr=0.1, dataset=leaf),
        lambda leaf: dict(type="MultiImageMixDataset", pipeline=[], dataset=leaf),
        lambda leaf: dict(
            type="RepeatDataset", times=2, dataset=dict(type="ConcatDataset", datasets=[leaf])
        ),
    ],
    ids=["repeated", "concatenated", "balanced", "mixed", "nested"],
)
def test_wrapped_instances(tmp_path, wrapper):
    data = instances(tmp_path, ann(area=None))
    assert "has no area" in refusal(checked, detector(wrapper=wrapper), data.root)


def test_a_configs_own_paths_are_checked_alike(tmp_path):
    data = instances(tmp_path, ann(bbox=[2, 3, 0, 6]))
    cfg = detector()
    for loader in TRAIN:
        split = loader.split("_")[0]
        cfg[loader].dataset.update(
            data_root=str(data.root),
            ann_file=f"annotations/instances_{split}2017.json",
            data_prefix=dict(img=f"{split}2017/"),
            metainfo=dict(classes=("cat", "dog")),
        )
    (warning,) = check_data(cfg, TRAIN)
    assert "1 of 4 annotations" in warning and "no width or height" in warning
    cfg.train_dataloader.dataset.backend_args = dict(backend="local")
    assert check_data(cfg, TRAIN) == [warning]
    cfg.train_dataloader.dataset.type = CocoDataset
    assert check_data(cfg, TRAIN) == [warning]
    cfg.train_dataloader.dataset.backend_args = dict(backend="petrel")  # on another machine
    assert check_data(cfg, TRAIN) == []


@pytest.mark.parametrize(
    "elsewhere",
    [
        lambda leaf: leaf.pipeline[0].update(backend_args=dict(backend="lmdb", db_path="x")),
        lambda leaf: leaf.update(data_root=None, ann_file="s3://bucket/a.json"),
        lambda leaf: leaf.update(data_prefix=dict(img="https://example.org/train2017/")),
    ],
)
def test_files_that_are_not_on_a_disk_are_not_looked_for(tmp_path, elsewhere):
    cfg, _ = own_instances(tmp_path, image(b""))
    assert "0.png is empty" in refusal(check_data, cfg, TRAIN)
    elsewhere(cfg.train_dataloader.dataset)
    assert check_data(cfg, TRAIN) == []


def own_instances(tmp_path, spoil=lambda data: None, **leaf):
    """A config with paths and classes of its own for the data set, and the data set."""
    data = instances(tmp_path, spoil)
    cfg = detector()
    for loader, split in zip((*TRAIN, *TEST), ("train", "val", "val")):
        cfg[loader].dataset.update(
            data_root=str(data.root),
            ann_file=f"annotations/instances_{split}2017.json",
            data_prefix=dict(img=f"{split}2017/"),
            metainfo=dict(classes=("cat", "dog")),
        )
        cfg[loader].dataset.update(leaf)
    return cfg, data


def test_images_to_predict_on_need_no_annotations(tmp_path):
    """COCO's test-dev has only images and categories."""
    cfg, data = own_instances(tmp_path, lambda data: data.val.pop("annotations"))
    path = str(data.root / "annotations/instances_val2017.json")
    cfg.test_evaluator = dict(type="CocoMetric", metric=["bbox", "segm"], ann_file=path)
    (warning,) = check_data(cfg, TEST)
    assert "every metric will be -1" in warning
    cfg.test_evaluator.format_only = True
    assert check_data(cfg, TEST) == []
    leaf = {**cfg.test_dataloader.dataset, "pipeline": []}
    leaf.pop("type")
    assert len(CocoDataset(**leaf)) == 4  # so mmdet can do with it


def test_files_of_evaluators_are_those_of_the_run(tmp_path):
    cfg, _ = own_instances(tmp_path)
    cfg.test_evaluator = [dict(type="CocoMetric", ann_file="test.json")]
    assert check_data(cfg, TRAIN) == []
    assert "test_evaluator needs test.json" in refusal(check_data, cfg, TEST)
    cfg.test_evaluator[0].backend_args = dict(backend="petrel", path_mapping={"./": "s3://"})
    assert check_data(cfg, TEST) == []
    cfg.val_evaluator = dict(type="CocoMetric", ann_file="val.json")
    assert check_data(cfg, TEST) == []
    assert "val_evaluator needs val.json" in refusal(check_data, cfg, TRAIN)


def test_absolute_file_names_need_no_folder(tmp_path):
    cfg, data = own_instances(tmp_path, data_root=None, data_prefix=dict(img=""))
    for loader, split in zip(TRAIN, ("train", "val")):
        path = data.root / f"annotations/instances_{split}2017.json"
        content = json.loads(path.read_text())
        for picture in content["images"]:
            picture["file_name"] = str(data.root / f"{split}2017" / picture["file_name"])
        path.write_text(json.dumps(content))
        cfg[loader].dataset.ann_file = str(path)
    assert check_data(cfg, TRAIN) == []
    (data.root / "val2017/0.png").write_bytes(b"")
    assert "0.png is empty" in refusal(check_data, cfg, TRAIN)


@pytest.mark.parametrize("base", ["BaseDataset", "BaseDetDataset", "CocoDataset"])
def test_instances_in_a_format_of_their_own(tmp_path, base):
    bases = {
        "BaseDataset": BaseDataset,
        "BaseDetDataset": BaseDetDataset,
        "CocoDataset": CocoDataset,
    }

    class MyCocoDataset(bases[base]):
        def load_data_list(self):
            return []

    cfg, data = own_instances(tmp_path, text("a format of its own"), type=MyCocoDataset)
    assert check_data(cfg, TRAIN) == []
    cfg.train_dataloader.dataset.pop("ann_file")
    assert check_data(cfg, TRAIN) == []
    cfg.train_dataloader.dataset.ann_file = "none.txt"
    assert "needs" in refusal(check_data, cfg, TRAIN)
    cfg.train_dataloader.dataset.data_root = str(data.root / "none")
    assert "the folder" in refusal(check_data, cfg, TRAIN)


@pytest.mark.parametrize("kind", ["LoadMultiChannelImageFromFiles", "NumpyLoader"])
def test_images_that_another_loader_reads_stay_closed(tmp_path, kind):
    cfg, _ = own_instances(tmp_path, both(image(b"an array"), image(b"", "val2017/1.png")))
    for loader in TRAIN:
        cfg[loader].dataset.pipeline[0].type = kind
    assert check_data(cfg, TRAIN) == []
    cfg.val_dataloader.dataset.pipeline[0].type = LoadImageFromFile
    sentence = refusal(check_data, cfg, TRAIN)
    assert "1.png is empty" in sentence and "--no-data-check" in sentence


def test_classes_that_a_file_lists(tmp_path):
    cfg, _ = own_instances(tmp_path)
    names = tmp_path / "classes.txt"
    names.write_text("cat\ndog\n")
    for loader in TRAIN:
        cfg[loader].dataset.metainfo = dict(classes=str(names))
    assert check_data(cfg, TRAIN) == []
    names.write_text("cat\ncow\n")
    assert "has no category 'cow'" in refusal(check_data, cfg, TRAIN)


@pytest.mark.parametrize(
    "settings",
    [
        dict(color_type="color_ignore_orientation"),
        dict(color_type="unchanged"),
        dict(imdecode_backend="tifffile"),
    ],
)
def test_orientation_matters_as_the_pipeline_reads(tmp_path, settings):
    turned = encoded(WIDE, "TIFF", 6)
    data = instances(tmp_path, both(renamed(turned, "a.tif"), record("images", width=32)))
    if "imdecode_backend" in settings:
        pytest.importorskip("tifffile")
    cfg = detector()
    cfg.train_dataloader.dataset.pipeline[0].update(settings)
    if settings.get("color_type") == "unchanged":
        pytest.importorskip("cv2")
    assert checked(cfg, data.root) == []
    assert "EXIF" in refusal(checked, detector(), data.root)


@pytest.mark.slow
def test_the_good_instances_are_those_that_mmdet_reads(tmp_path):
    """And its samples have whole boxes and masks."""
    from mmdet.datasets import CocoDataset

    for name, spoil in SILENT_INSTANCES.items():
        data = instances(tmp_path / name.replace(" ", "_"), spoil)
        cfg = detector()
        checked(cfg, data.root)
        leaf = dict(cfg.train_dataloader.dataset)
        leaf.pop("type")
        dataset = CocoDataset(**leaf)
        for index in range(len(dataset)):
            sample = dataset[index]
            assert sample["ori_shape"] == (sample["height"], sample["width"]), name
            inside = sample["gt_bboxes"].is_inside(sample["ori_shape"])
            assert len(sample["gt_bboxes"]) and inside.all(), name
            assert all(mask.any() for mask in sample["gt_masks"].masks), name


# ------------------------------------------------------------------------------------ label maps


class LabelMaps:
    """A data set in ADE20K's layout, in memory until ``write``; labels 0, 1 and 2."""

    def __init__(self, root):
        self.root = root
        self.maps, self.images = {}, {}
        for split in ("training", "validation"):
            for index in range(4):
                self.maps[f"{split}/{index}.png"] = encoded(labels(0, 1, 2, 255))
                self.images[f"{split}/{index}.png"] = encoded()

    def write(self):
        for folder, files in (("images", self.images), ("annotations", self.maps)):
            for name, content in files.items():
                (self.root / folder / name).parent.mkdir(parents=True, exist_ok=True)
                (self.root / folder / name).write_bytes(content)


def segmenter(backend=None, **leaf):
    load = dict(type="LoadAnnotations", **(dict(imdecode_backend=backend) if backend else {}))
    data = dict(
        type="ADE20KDataset", data_root="x", pipeline=[dict(type="LoadImageFromFile"), load], **leaf
    )
    head = dict(num_classes=150)
    return Config(
        dict(
            default_scope="mmseg",
            model=dict(decode_head=head),
            train_dataloader=dict(dataset=data),
            val_dataloader=dict(dataset=dict(data, test_mode=True)),
            test_dataloader=dict(dataset=dict(data, test_mode=True)),
        )
    )


def label_map(value, name="training/0.png"):
    return lambda data: data.maps.update({name: value})


def every_map(value):
    return lambda data: data.maps.update(dict.fromkeys(data.maps, value))


def picture(value, name="training/0.png"):
    return lambda data: data.images.update({name: value})


def as_jpeg(value, **last):
    """All images as JPEG, the first of them this one."""

    def spoil(data):
        data.images = {name.replace("png", "jpg"): JPEG for name in data.images}
        data.images["training/0.jpg"] = value
        data.maps.update(last)

    return spoil


TALL = labels(0, 1, 2, size=(2 * SIDE, SIDE))
DEEP = np.resize(np.array([0, 1, 2, 300], np.uint16), (SIDE, SIDE))

REFUSED_MAPS = {
    "map of another size": (
        label_map(encoded(labels(0, 1, 2, size=(8, 8)))),
        "0.png has 8x8 pixels and its image 16x16",
    ),
    "several of another size": (every_map(encoded(TALL)), "(and 3 more of 4 label maps)"),
    "label beyond the classes": (
        label_map(encoded(labels(0, 3))),
        "0.png holds label 3, but 3 classes end at 2",
    ),
    "label beyond the classes in the last map": (
        label_map(encoded(labels(0, 1, 2, 77)), "validation/3.png"),
        "validation/3.png holds label 77",
    ),
    "label 254": (label_map(encoded(labels(0, 254))), "holds label 254"),
    "labels beyond the classes in several": (
        every_map(encoded(labels(0, 1, 2, 9))),
        "(and 3 more of 4 label maps)",
    ),
    "nothing but ignored": (every_map(encoded(labels(255))), "nothing is left to train on"),
    "binary maps of 0 and 255": (
        every_map(encoded(labels(0, 255))),
        "have 2 classes (background, foreground), and 3 are expected (a, b, c)",
    ),
    "map in colour": (
        label_map(encoded(np.zeros((SIDE, SIDE, 3), np.uint8))),
        "0.png is a RGB picture",
    ),
    "map with transparency": (
        label_map(encoded(np.zeros((SIDE, SIDE, 4), np.uint8))),
        "0.png is a RGBA picture",
    ),
    "map of 16 bits": (label_map(encoded(DEEP)), "save one channel of 8 bits"),
    "map of 32 bits": (label_map(encoded(DEEP.astype(np.int32), "TIFF")), "0.png is a I picture"),
    "map of floats": (label_map(encoded(DEEP.astype(np.float32), "TIFF")), "0.png is a F picture"),
    "all maps in colour": (
        every_map(encoded(np.zeros((SIDE, SIDE, 3), np.uint8))),
        "have 1 classes (background), and 3 are expected (a, b, c)",
    ),
    "map empty": (label_map(b""), "annotations/training/0.png is empty"),
    "map of text": (label_map(b"<svg/>"), "is no picture, or damaged"),
    "map cut off": (label_map(encoded(labels(0, 1, 2))[:45]), "is no picture, or damaged"),
    "map missing": (lambda data: data.maps.pop("training/1.png"), "1 of 4 images in"),
    "image empty": (picture(b""), "images/training/0.png is empty"),
    "image cut off": (picture(encoded()[:-30]), "images/training/0.png is damaged"),
    "image of another size": (picture(encoded(WIDE)), "0.png has 16x16 pixels and its image 32x16"),
    "image turned by EXIF": (
        as_jpeg(
            encoded(WIDE, "JPEG", 6), **{"training/0.png": encoded(labels(0, 1, 2, size=(16, 32)))}
        ),
        "EXIF orientation applied; give each label map its image's size",
    ),
    "images of two suffixes": (picture(encoded(), "training/0.jpg"), "end in .jpg and .png"),
}

WARNED_MAPS = {
    "one map ignored": (
        label_map(encoded(labels(255))),
        "1 of 4 label maps hold nothing but pixels to ignore",
    ),
    "a class in no map": (
        lambda data: data.maps.update(
            {f"training/{i}.png": encoded(labels(0, 2)) for i in range(4)}
        ),
        "1 of 3 classes occur in none of the 4 label maps to train on (b",
    ),
    "image of another format": (picture(JPEG), "have another format than their suffix"),
    "image of 16 bits": (picture(encoded(DEEP)), "have 16 bits a channel"),
    "square image turned by EXIF": (
        as_jpeg(encoded(kind="JPEG", orientation=6)),
        "are turned or mirrored",
    ),
}

SILENT_MAPS = {
    "as it is": lambda data: None,
    "with a palette": label_map(encoded(Image.fromarray(labels(0, 1, 2)).convert("P"))),
    "of one bit": label_map(encoded(Image.fromarray(labels(0, 255)).convert("1"))),
    "turned by EXIF, map as seen": as_jpeg(
        encoded(WIDE, "JPEG", 6), **{"training/0.png": encoded(TALL)}
    ),
    "a map without an image": label_map(encoded(labels(0, 99)), "training/9.png"),
    "in folders": lambda data: [
        picture(encoded(), "training/a/9.png")(data),
        label_map(encoded(labels(1)), "training/a/9.png")(data),
    ],
}


def maps(tmp_path, spoil):
    data = LabelMaps(tmp_path / "data")
    spoil(data)
    data.write()
    return data


ABC = dict(classes=["a", "b", "c"], reduce_zero_label=False)


@pytest.mark.parametrize(("spoil", "words"), rows(REFUSED_MAPS))
def test_label_maps_that_are_refused(tmp_path, spoil, words):
    data = maps(tmp_path, spoil)
    sentence = refusal(checked, segmenter(), data.root, **ABC)
    assert words in sentence and str(data.root) in sentence


@pytest.mark.parametrize(("spoil", "words"), rows(WARNED_MAPS))
def test_label_maps_that_are_warned_of(tmp_path, spoil, words):
    data = maps(tmp_path, spoil)
    (warning,) = checked(segmenter(), data.root, **ABC)
    assert words in warning and str(data.root) in warning and "\n" not in warning


@pytest.mark.parametrize("spoil", rows(SILENT_MAPS))
def test_label_maps_that_are_fine(tmp_path, spoil, capfd):
    data = maps(tmp_path, spoil)
    assert checked(segmenter(), data.root, **ABC) == []
    assert capfd.readouterr() == ("", "")


def test_the_good_label_maps_are_those_that_mmseg_reads(tmp_path):
    from mmseg.datasets import BaseSegDataset

    for name, spoil in SILENT_MAPS.items():
        data = maps(tmp_path / name.replace(" ", "_"), spoil)
        cfg = segmenter()
        checked(cfg, data.root, **ABC)
        leaf = dict(cfg.train_dataloader.dataset)
        leaf.pop("type")
        for sample in BaseSegDataset(**leaf):
            assert sample["gt_seg_map"].shape == sample["ori_shape"], name
            assert set(np.unique(sample["gt_seg_map"])) <= {0, 1, 2, 255}, name


def test_palettes_need_pillow(tmp_path):
    data = maps(tmp_path, every_map(encoded(Image.fromarray(labels(0, 1, 2)).convert("P"))))
    assert "imdecode_backend='cv2'" in refusal(checked, segmenter("cv2"), data.root, **ABC)
    assert checked(segmenter("pillow"), data.root, **ABC) == []


@pytest.mark.parametrize(
    ("values", "classes", "numbering"),
    [
        ((0, 1, 2, 3), "abc", True),
        ((1, 2, 3), "abc", True),
        ((0, 1, 2), "abc", False),
        ((0, 2, 255), "abc", False),
        ((1, 2), "abc", "1 to 2, which does not show"),
        ((0, 1), "abc", "0 to 1, which does not show"),
        ((255,), "abc", "nothing but 255, which does not show"),
        ((0, 1), "a", "0 to 1, which does not show"),
        ((0, 1, 4), "abc", "go up to 4, which 3 classes"),
    ],
)
def test_what_zero_means_is_read_from_all_maps_or_asked_for(tmp_path, values, classes, numbering):
    # One value a map: none of them alone tells.
    spread = {f"training/{i}.png": encoded(labels(v)) for i, v in enumerate(values)}
    data = maps(tmp_path, every_map(encoded(labels(values[0]))))
    for name, content in spread.items():
        (data.root / "annotations" / name).write_bytes(content)
    cfg = segmenter()
    if isinstance(numbering, str):
        sentence = refusal(apply_data_root, cfg, str(data.root), TRAIN, list(classes))
        assert numbering in sentence and ("--classes" in sentence or "--reduce-zero" in sentence)
    else:
        apply_data_root(cfg, str(data.root), TRAIN, list(classes))
        assert cfg.train_dataloader.dataset.reduce_zero_label is numbering


@pytest.mark.parametrize("reduce_zero_label", [True, False])
def test_what_zero_means_can_be_said(tmp_path, reduce_zero_label):
    data = maps(tmp_path, every_map(encoded(labels(1, 2))))
    cfg = segmenter()
    apply_data_root(cfg, str(data.root), TRAIN, ["a", "b", "c"], reduce_zero_label)
    assert cfg.train_dataloader.dataset.reduce_zero_label is reduce_zero_label


def test_unlabelled_zero_alone_is_nothing_to_train_on(tmp_path):
    data = maps(tmp_path, every_map(encoded(labels(0))))
    sentence = refusal(checked, segmenter(), data.root, classes=["a", "b"], reduce_zero_label=True)
    assert "nothing is left to train on" in sentence and "reduce_zero_label" in sentence


def test_ade20k_with_some_of_its_classes(tmp_path):
    data = maps(tmp_path, every_map(encoded(labels(0, 1, 150))))
    cfg = segmenter(metainfo=dict(classes=("wall", "flag")), img_suffix=".png")
    for loader, split in zip(TRAIN, ("training", "validation")):
        prefix = dict(img_path=f"images/{split}", seg_map_path=f"annotations/{split}")
        cfg[loader].dataset.update(data_root=str(data.root), data_prefix=prefix)
    init_default_scope("mmseg")
    assert check_data(cfg, TRAIN) == []
    label_map(encoded(labels(0, 151)))(data)
    data.write()
    assert "holds label 151, but 2 classes end at 150" in refusal(check_data, cfg, TRAIN)


def test_images_without_maps_to_predict_on(tmp_path):
    data = maps(tmp_path, lambda data: None)
    cfg = segmenter()
    apply_data_root(cfg, str(data.root), TEST, **ABC)
    cfg.test_dataloader.dataset.data_prefix = dict(img_path="images/validation")
    init_default_scope("mmseg")
    assert check_data(cfg, TEST) == []
    (data.root / "images/validation/1.png").write_bytes(b"")
    assert "1.png is empty" in refusal(check_data, cfg, TEST)


def own_maps(tmp_path, spoil=lambda data: None):
    """A config for the data set, and the data set."""
    data = maps(tmp_path, spoil)
    cfg = segmenter()
    apply_data_root(cfg, str(data.root), (*TRAIN, *TEST), **ABC)
    init_default_scope("mmseg")
    return cfg, data


def test_blank_maps_of_images_to_predict_on(tmp_path):
    """Cityscapes' test set has them."""
    blank = {f"validation/{i}.png": encoded(labels(255)) for i in range(4)}
    cfg, _ = own_maps(tmp_path, lambda data: data.maps.update(blank))
    for test_mode in (True, False):
        cfg.test_dataloader.dataset.test_mode = test_mode
        (warning,) = check_data(cfg, TEST)
        assert "4 of 4 label maps hold nothing but pixels to ignore" in warning
    cfg.train_dataloader.dataset.data_prefix = cfg.test_dataloader.dataset.data_prefix
    assert "nothing is left to train on" in refusal(check_data, cfg, TRAIN)


def test_maps_that_no_pipeline_reads_are_not_asked_for(tmp_path):
    cfg, data = own_maps(tmp_path, label_map(b"", "validation/1.png"))
    assert "1.png is empty" in refusal(check_data, cfg, TEST)
    cfg.test_dataloader.dataset.pipeline.pop()
    assert check_data(cfg, TEST) == []
    for path in (data.root / "annotations/validation").iterdir():
        path.unlink()
    assert check_data(cfg, TEST) == []
    (data.root / "annotations/validation").rmdir()
    assert check_data(cfg, TEST) == []


def test_maps_are_read_where_images_are_in_no_picture_format(tmp_path):
    cfg, data = own_maps(tmp_path, picture(b"an array", "validation/1.png"))
    assert "is damaged, or a file that mmcv's cv2 does not read" in refusal(check_data, cfg, TEST)
    cfg.test_dataloader.dataset.pipeline[0].type = "LoadSingleRSImageFromFile"
    assert check_data(cfg, TEST) == []
    (data.root / "annotations/validation/1.png").write_bytes(encoded(labels(9)))
    assert "holds label 9" in refusal(check_data, cfg, TEST)


@pytest.mark.parametrize("wrapped", [True, False])
def test_wrapped_label_maps(tmp_path, wrapped):
    data = maps(tmp_path, label_map(encoded(labels(0, 9))))
    cfg = segmenter()
    if wrapped:
        leaf = cfg.train_dataloader.dataset
        inner = dict(type="ConcatDataset", datasets=[leaf, leaf])
        cfg.train_dataloader.dataset = dict(type="RepeatDataset", times=3, dataset=inner)
    assert "holds label 9" in refusal(checked, cfg, data.root, **ABC)


def test_names_in_a_file(tmp_path):
    data = maps(tmp_path, label_map(encoded(labels(7)), "training/3.png"))
    cfg = segmenter()
    apply_data_root(cfg, str(data.root), TRAIN, **ABC)
    (data.root / "names.txt").write_text("0\n1\n")
    cfg.train_dataloader.dataset.ann_file = "names.txt"
    init_default_scope("mmseg")
    assert check_data(cfg, TRAIN) == []
    (data.root / "names.txt").write_text("0\n3\n")
    assert "3.png holds label 7" in refusal(check_data, cfg, TRAIN)
    (data.root / "names.txt").write_text("0\n30\n")
    assert "1 of 2 images" in refusal(check_data, cfg, TRAIN)


# ------------------------------------------------------------------------ memory, and the switch


@pytest.fixture
def remembered(monkeypatch):
    """Even a data set of a few images is remembered."""
    monkeypatch.setattr(memory_module, "_WORTHWHILE", 0.1)


class Reads:
    """Counts the files that are opened."""

    def __init__(self, monkeypatch):
        self.paths = []
        for name in ("_read_image", "_read_label_map"):
            monkeypatch.setattr(pictures, name, self.counted(getattr(pictures, name)))

    def counted(self, function):
        def read(path, *args, **kwargs):
            self.paths.append(os.path.relpath(path, os.path.dirname(os.path.dirname(path))))
            return function(path, *args, **kwargs)

        return read

    def take(self):
        taken, self.paths = self.paths, []
        return taken


def test_what_was_read_is_remembered_beside_the_work_dir(tmp_path, monkeypatch, remembered):
    reads = Reads(monkeypatch)
    data = instances(tmp_path, lambda data: None)

    def run(name):
        cfg = detector()
        cfg.work_dir = str(tmp_path / "work_dirs" / name)
        return checked(cfg, data.root)

    assert run("a") == []
    assert len(reads.take()) == 8
    assert os.listdir(tmp_path / "work_dirs") == [".data_check.json"]
    assert run("b") == [] and reads.take() == []

    assert run("a/test") == [] and reads.take() == []  # in the work dir of a training

    later = os.stat(data.root / "val2017/1.png").st_mtime + 5
    os.utime(data.root / "val2017/1.png", (later, later))
    assert run("a") == [] and reads.take() == ["val2017/1.png"]
    (data.root / "train2017/2.png").write_bytes(b"")
    assert "2.png is empty" in refusal(run, "a") and reads.take() == ["train2017/2.png"]
    # What is broken is remembered too, and other annotations are compared with what is known.
    assert "2.png is empty" in refusal(run, "a") and reads.take() == []


def test_annotations_are_checked_once_for_each_use(tmp_path, monkeypatch, remembered):
    uses = []

    def counted(ann_file, use):
        uses.append((os.path.basename(ann_file), use.with_masks))
        return check_annotations(ann_file, use)

    monkeypatch.setattr(check, "check_annotations", counted)
    data = instances(tmp_path, ann(bbox=[2, 3, 0, 6]))
    memory = tmp_path / ".data_check.json"

    def run(masks=True):
        cfg = detector(masks)
        cfg.work_dir = str(tmp_path / "a")
        (warning,) = checked(cfg, data.root)
        assert "no width or height" in warning
        before = uses[:]
        uses.clear()
        return before

    train, val = "instances_train2017.json", "instances_val2017.json"
    assert run() == [(train, True), (val, True)]
    assert run() == []
    assert run(masks=False) == [(train, False), (val, False)]
    content = json.loads(memory.read_text())
    noted = content["folders"][f"annotations:{data.root}/annotations"]
    for wrong in (
        [],
        [1, 2, 3],
        [noted[train][2], ["x", 1], []],
        [noted[train][2], [], [["a", 1]]],
    ):
        noted[train][2:] = wrong
        memory.write_text(json.dumps(content))
        assert run(masks=False) == [(train, False)]
    path = data.root / "annotations" / train
    path.write_text(path.read_text().replace('"cat"', '"cow"'))
    data.val["categories"][0]["name"] = "cow"
    (data.root / "annotations" / val).write_text(json.dumps(data.val))
    later = os.stat(path).st_mtime + 5
    os.utime(path, (later, later))
    assert run() == [(train, True), (val, True)]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "[" * 100_000,
        '{"version": 2}',
        '{"version": 2, "folders": 3}',
        '{"version": 2, "folders": {"image-cv2:FOLDER": 3}}',
        '{"version": 2, "folders": {"FOLDER": {"0.png": [1, 2]}}}',
        '{"version": 2, "folders": {"image-cv2:FOLDER": {"0.png": 3}}}',
        '{"version": 2, "folders": {"image-cv2:FOLDER": {"0.png": [SIZE, TIME]}}}',
        '{"version": 2, "folders": {"image-cv2:FOLDER": {"0.png": [SIZE, TIME, "PNG", "16", 16, "L", 1, "", []]}}}',
        '{"version": 2, "folders": {"image-cv2:FOLDER": {"0.png": [SIZE, TIME, "PNG", 16, 16, "L", 1, "", 5]}}}',
        '{"version": 2, "folders": {"image-cv2:FOLDER": {"0.png": [SIZE, TIME, "PNG", 16, 16, "L", 1, "", [], 1]}}}',
        '{"version": 0, "folders": {"image-cv2:FOLDER": {"0.png": [SIZE, TIME, "PNG", 9, 9, "L", 1, "", []]}}}',
    ],
)
def test_a_damaged_memory_is_forgotten(tmp_path, text, remembered):
    (tmp_path / "0.png").write_bytes(encoded())
    status = os.stat(tmp_path / "0.png")
    for word, value in (
        ("FOLDER", tmp_path),
        ("SIZE", status.st_size),
        ("TIME", status.st_mtime_ns),
    ):
        text = text.replace(word, str(value))
    path = tmp_path / "memory.json"
    path.write_text(text)
    memory = Memory(path)
    (found,) = read_images([str(tmp_path / "0.png")], "cv2", memory)
    assert (found.width, found.height, found.mode, found.problem) == (SIDE, SIDE, "RGB", "")
    assert memory.save()
    assert Memory(path).recall("image-cv2", str(tmp_path / "0.png")) is not None


def test_fifos_are_no_files(tmp_path, remembered):
    """At once, instead of waiting for their other ends."""
    data = instances(tmp_path, lambda data: None)
    cfg = detector()
    cfg.work_dir = str(tmp_path / "work_dirs" / "a")
    (tmp_path / "work_dirs").mkdir()
    os.mkfifo(tmp_path / "work_dirs" / ".data_check.json")
    assert checked(cfg, data.root) == []
    fifo = tmp_path / "fifo.png"
    os.mkfifo(fifo)
    for found in (
        read_images([str(fifo)], "cv2", Memory()),
        read_label_maps([str(fifo)], Memory()),
    ):
        assert "it is no regular file" in found[0].problem


def test_a_folder_without_write_permission_gives_a_warning(tmp_path, remembered):
    data = instances(tmp_path, lambda data: None)
    cfg = detector()
    (tmp_path / "file").write_text("")
    cfg.work_dir = str(tmp_path / "file" / "a")
    (warning,) = checked(cfg, data.root)
    assert "we cannot save the findings about the data in" in warning


def test_many_are_read_by_several_processes_with_progress(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(pictures, "_FEW", 3)
    monkeypatch.setattr(pictures, "_CHUNK", 2)
    spoil = both(image(b"", "train2017/3.png"), image(encoded(kind="BMP"), "train2017/1.png"))
    data = instances(tmp_path, spoil)
    paths = [str(data.root / f"train2017/{i}.png") for i in range(4)]
    found = read_images(paths, "cv2", Memory())
    assert [p.format for p in found] == ["PNG", "BMP", "PNG", ""]
    assert [p.problem for p in found] == ["", "", "", "is empty"]
    assert "Reading images" in capfd.readouterr().out


def _dies(path):
    os._exit(1)


def test_a_small_data_set_leaves_nothing_behind(tmp_path):
    data = instances(tmp_path, lambda data: None)
    cfg = detector()
    cfg.work_dir = str(tmp_path / "work_dirs" / "a")
    assert checked(cfg, data.root) == [] and os.listdir(tmp_path) == ["data"]


def test_a_process_that_dies_is_reported(tmp_path, monkeypatch):
    monkeypatch.setattr(pictures, "_FEW", 1)
    paths = [str(tmp_path / str(i)) for i in range(4)]
    sentence = refusal(list, pictures.map_files(_dies, paths, "images"))
    assert "--no-data-check" in sentence


def test_without_reading_what_zero_means_is_asked_for(tmp_path, monkeypatch):
    reads = Reads(monkeypatch)
    data = maps(tmp_path, lambda data: None)
    cfg = segmenter()
    cfg.check_data = False
    sentence = refusal(apply_data_root, cfg, str(data.root), TRAIN, ["a", "b", "c"])
    assert "--no-reduce-zero-label if it is 'a'" in sentence
    (warning,) = checked(cfg, data.root, **ABC)
    # The first ones show whether they are coloured.
    assert "not checked" in warning and set(reads.take()) == {"training/0.png", "validation/0.png"}


def test_run_length_codes_add_up_as_pycocotools_writes_them():
    rng = np.random.RandomState(1)
    for side in (1, 7, 300):
        for share in (0.0, 0.02, 0.5, 1.0):
            mask = np.asfortranarray((rng.rand(side, side + 1) < share).astype(np.uint8))
            counts = coco_masks.encode(mask)["counts"].decode()
            assert _pixels_of(counts) == mask.size
