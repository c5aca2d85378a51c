"""The settings that --data-root changes, and the data sets that it rejects."""

import json

import numpy as np
import pytest
from mmengine.config import Config, ConfigDict
from mmengine.registry import init_default_scope
from PIL import Image

from mmvssm.datasets.check import check_data
from mmvssm.datasets.root import apply_data_root, make_palette, set_num_classes
from mmvssm.errors import UserError

LOADERS = ("train_dataloader", "val_dataloader", "test_dataloader")


def write_picture(path, array):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.asarray(array, dtype=np.uint8)).save(path)


def write_coco(root, names=("cat", "dog"), segmentation=True, maps=True):
    for split in ("train", "val"):
        image = dict(id=1, file_name="a.png", width=8, height=8)
        annotation = dict(id=1, image_id=1, category_id=1, bbox=[0, 0, 4, 4], area=16, iscrowd=0)
        if segmentation:
            annotation["segmentation"] = [[0, 0, 4, 0, 4, 4]]
        content = dict(
            images=[image],
            annotations=[annotation],
            categories=[dict(id=i + 1, name=name) for i, name in enumerate(names)],
        )
        (root / "annotations").mkdir(parents=True, exist_ok=True)
        (root / f"annotations/instances_{split}2017.json").write_text(json.dumps(content))
        write_picture(root / f"{split}2017/a.png", np.zeros((8, 8, 3)))
        if maps:
            write_picture(root / f"semantic_{split}2017/a.png", np.arange(64).reshape(8, 8) % 3)
    return root


def write_ade(root, largest):
    for split in ("training", "validation"):
        write_picture(root / f"images/{split}/a.jpg", np.zeros((8, 8, 3)))
        labels = np.arange(64).reshape(8, 8) % (largest + 1)
        labels[0, 0] = 255
        write_picture(root / f"annotations/{split}/a.png", labels)
    return root


def detector():
    leaf = dict(
        type="CocoDataset", data_root="data/coco", ann_file="x.json", data_prefix=dict(img="i/")
    )
    wrapped = dict(
        type="RepeatDataset", times=2, dataset=dict(type="ConcatDataset", datasets=[leaf, leaf])
    )
    metric = dict(type="CocoMetric", ann_file="data/coco/x.json", metric=["bbox", "segm"])
    return Config(
        dict(
            default_scope="mmdet",
            prepare_data=dict(type="x"),
            model=dict(
                backbone=dict(type="R", num_classes=1000),
                rpn_head=dict(num_classes=1),
                roi_head=dict(
                    bbox_head=[dict(num_classes=80), dict(num_classes=80)],
                    mask_head=dict(num_classes=80),
                ),
            ),
            train_dataloader=dict(dataset=wrapped),
            val_dataloader=dict(dataset=dict(leaf, test_mode=True)),
            test_dataloader=dict(dataset=dict(leaf, test_mode=True)),
            val_evaluator=metric,
            test_evaluator=[metric, dict(type="DumpDetResults")],
        )
    )


def segmenter(**leaf):
    def loader(part):
        load = dict(type="LoadAnnotations", reduce_zero_label=True)
        prefix = dict(img_path=f"images/{part}", seg_map_path=f"annotations/{part}")
        data = dict(type="ADE20KDataset", data_root="data/ade", data_prefix=prefix, pipeline=[load])
        return dict(dataset=dict(data, **leaf))

    head = dict(num_classes=150, loss_decode=dict(type="CE", class_weight=[1.0] * 150))
    return Config(
        dict(
            default_scope="mmseg",
            model=dict(backbone=dict(), decode_head=head, auxiliary_head=[dict(num_classes=150)]),
            train_dataloader=loader("training"),
            val_dataloader=loader("validation"),
            test_dataloader=loader("validation"),
            tta_pipeline=[dict(type="TestTimeAug", transforms=[[dict(type="LoadAnnotations")]])],
        )
    )


def test_detection_follows_through_wrappers(tmp_path):
    cfg = detector()
    root = str(write_coco(tmp_path))
    assert "2 classes (cat, dog)" in apply_data_root(cfg, root, LOADERS)
    leaf = cfg.train_dataloader.dataset.dataset.datasets
    assert len(leaf) == 1 and leaf[0].ann_file == "annotations/instances_train2017.json"
    assert cfg.train_dataloader.dataset.times == 2
    assert leaf[0].metainfo.classes == ("cat", "dog") and len(leaf[0].metainfo.palette) == 2
    assert cfg.val_dataloader.dataset.data_prefix == dict(img="val2017/")
    assert cfg.val_dataloader.dataset.test_mode
    val = f"{root}/annotations/instances_val2017.json"
    assert cfg.val_evaluator.ann_file == cfg.test_evaluator[0].ann_file == val
    heads = cfg.model.roi_head
    assert [h.num_classes for h in [*heads.bbox_head, heads.mask_head]] == [2, 2, 2]
    assert cfg.model.backbone.num_classes == 1000 and cfg.model.rpn_head.num_classes == 1
    assert "prepare_data" not in cfg
    check_data(cfg, LOADERS)


def test_segmentation_from_coco_names_background_first(tmp_path):
    cfg = segmenter(reduce_zero_label=True)
    line = apply_data_root(cfg, str(write_coco(tmp_path)), LOADERS)
    assert "3 classes (background, cat, dog), 0 is 'background'" in line
    leaf = cfg.train_dataloader.dataset
    assert leaf.type == "mmseg.BaseSegDataset" and leaf.reduce_zero_label is False
    assert (leaf.img_suffix, leaf.seg_map_suffix) == (".png", ".png")
    assert "reduce_zero_label" not in leaf.pipeline[0]
    assert cfg.model.decode_head.num_classes == cfg.model.auxiliary_head[0].num_classes == 3
    assert cfg.model.decode_head.loss_decode.class_weight == [1.0] * 3
    check_data(cfg, LOADERS)


@pytest.mark.parametrize(("largest", "reduced"), [(3, True), (2, False)])
def test_ade20k_layout_counts_from_one_if_the_maps_do(tmp_path, largest, reduced):
    cfg = segmenter()
    apply_data_root(cfg, str(write_ade(tmp_path, largest)), LOADERS, classes=["a", "b", "c"])
    leaf = cfg.train_dataloader.dataset
    assert leaf.reduce_zero_label is reduced
    assert leaf.img_suffix == ".jpg" and leaf.data_prefix.img_path == "images/training"
    assert cfg.model.decode_head.num_classes == 3
    check_data(cfg, LOADERS)


def test_ade20k_itself_elsewhere_keeps_its_classes(tmp_path):
    cfg = segmenter()
    apply_data_root(cfg, str(write_ade(tmp_path, 150)), LOADERS)
    assert cfg.train_dataloader.dataset.type == "ADE20KDataset"
    assert cfg.model.decode_head.num_classes == 150


def refusal(function, *args, **kwargs):
    with pytest.raises(UserError) as caught:
        function(*args, **kwargs)
    sentence = str(caught.value)
    assert "\n" not in sentence
    return sentence


def test_missing_and_contradictory_pieces_are_named(tmp_path):
    assert "no folder" in refusal(apply_data_root, detector(), str(tmp_path / "x"), LOADERS)
    empty = tmp_path / "empty"
    empty.mkdir()
    sentence = refusal(apply_data_root, detector(), str(empty), LOADERS)
    assert "annotations/instances_train2017.json" in sentence and "train2017" in sentence
    sentence = refusal(apply_data_root, segmenter(), str(empty), LOADERS)
    assert "semantic_train2017" in sentence and "images/training" in sentence

    ade = str(write_ade(tmp_path / "ade", 5))
    sentence = refusal(apply_data_root, segmenter(), ade, LOADERS, classes=["a", "b"])
    assert "go up to 5, which 2 classes" in sentence
    sentence = refusal(apply_data_root, segmenter(type="CityscapesDataset"), ade, LOADERS)
    assert "--classes" in sentence
    write_picture(tmp_path / "ade/images/training/b.png", np.zeros((8, 8, 3)))
    sentence = refusal(apply_data_root, segmenter(), ade, LOADERS, classes=list("abcdef"))
    assert ".jpg and .png" in sentence
    (tmp_path / "ade/images/training/b.png").unlink()
    write_picture(tmp_path / "ade/annotations/training/a.png", np.zeros((8, 8, 3)))
    sentence = refusal(apply_data_root, segmenter(), ade, LOADERS, classes=list("abcdef"))
    assert "not a map of labels" in sentence

    twice = str(write_coco(tmp_path / "twice", names=("cat", "cat")))
    assert "two categories called 'cat'" in refusal(apply_data_root, detector(), twice, LOADERS)


def checked(make, root, **kwargs):
    cfg = make()
    apply_data_root(cfg, str(root), LOADERS, **kwargs)
    return refusal(check_data, cfg, LOADERS)


def test_inconsistent_data_is_named(tmp_path):
    root = write_coco(tmp_path / "boxes")
    path = root / "annotations/instances_val2017.json"
    path.write_text(path.read_text().replace("segmentation", "outline"))
    assert "1 of 1 annotations" in checked(detector, root)

    root = write_coco(tmp_path / "order")
    path = root / "annotations/instances_val2017.json"
    content = json.loads(path.read_text())
    content["categories"].reverse()
    path.write_text(json.dumps(content))
    assert "another order" in checked(detector, root)

    root = write_coco(tmp_path / "classes")
    assert "no category 'cow'" in checked(detector, root, classes=["cat", "cow"])

    root = write_coco(tmp_path / "images")
    write_picture(root / "train2017/b.png", np.zeros((8, 8, 3)))
    assert "1 of 2 images" in checked(segmenter, root)
    (root / "train2017/a.png").unlink()
    assert "names 1 images (of 1)" in checked(detector, root)

    root = write_coco(tmp_path / "json")
    (root / "annotations/instances_val2017.json").write_text("{")
    assert "not a readable JSON" in checked(detector, root)


def test_configs_own_data_root_says_where_to_get_it():
    init_default_scope("mmdet")
    sentence = refusal(check_data, detector(), LOADERS)
    assert "the folder data/coco" in sentence and "https://cocodataset.org" in sentence
    sentence = refusal(check_data, segmenter(), LOADERS)
    assert "ADEChallengeData2016.zip" in sentence


def test_unequal_class_weights_cannot_be_resized():
    model = ConfigDict(head=dict(num_classes=2, loss=dict(class_weight=[1.0, 2.0])))
    assert "class_weight" in refusal(set_num_classes, model, 3)
    model = ConfigDict(head=dict(num_classes=2, loss=dict(class_weight=[1.0, 1.0, 0.1])))
    set_num_classes(model, 3)  # as DETR's, whose last is "no object"
    assert model.head.loss.class_weight == [1.0, 1.0, 1.0, 0.1]


def test_colours_are_distinct():
    palette = make_palette(["background", *map(str, range(40))])
    assert len(set(palette)) == 41
    assert all(0 <= c <= 255 for colour in palette for c in colour)
