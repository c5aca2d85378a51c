"""Predictions that tools/benchmark/onnx_models.py counts as the same."""

import functools
import json
import sys

import cv2
import numpy as np
import pytest
import torch

pytest.importorskip("mmdet")
pytest.importorskip("mmseg")
pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

import onnx_models
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope

from support import tiny_configs
from support.tool_runs import undo_what_tools_set

BOXES = torch.tensor([[0.0, 0, 10, 10], [1, 1, 11, 11], [30, 30, 50, 60]])


def detections(boxes=BOXES, labels=(0, 0, 1), scores=(0.9, 0.9, 0.5)):
    masks = torch.zeros(len(boxes), 64, 64, dtype=torch.bool)
    for mask, (left, top, right, bottom) in zip(masks, boxes.long().tolist()):
        mask[top:bottom, left:right] = True
    return dict(boxes=boxes, labels=torch.tensor(labels), scores=torch.tensor(scores), masks=masks)


def test_detections_in_another_order_are_the_same():
    """Two of one score, as rounding may exchange."""
    order = torch.tensor([1, 0, 2])
    found = {name: values[order] for name, values in detections().items()}
    result = onnx_models.compare(found, detections())
    assert onnx_models.is_same(result) and result["paired"] == 3 and result["boxes"] == 0


@pytest.mark.parametrize(
    "found",
    [
        detections(BOXES[:2], (0, 0), (0.9, 0.9)),
        detections(labels=(0, 1, 1)),
        detections(BOXES + 0.2),
        detections(scores=(0.9, 0.9, 0.502)),
        detections() | dict(masks=detections(BOXES + torch.tensor([0.0, 0, 0, 1]))["masks"]),
        detections(BOXES[[0, 0, 1, 2]], (0, 0, 0, 1), (0.9, 0.9, 0.9, 0.5)),
    ],
    ids=["one is missing", "label", "boxes", "scores", "masks", "one twice"],
)
def test_detections_that_differ(found):
    assert not onnx_models.is_same(onnx_models.compare(found, detections()))


def test_nothing_found_is_the_same_as_nothing():
    nothing = detections(BOXES[:0], (), ())
    assert onnx_models.is_same(onnx_models.compare(nothing, nothing))
    assert not onnx_models.is_same(onnx_models.compare(nothing, detections()))


def maps(logits, kept):
    return dict(logits=logits, labels=logits.argmax(1), kept=kept)


def test_label_maps_and_kept_tokens():
    logits = torch.zeros(1, 2, 50, 50)
    logits[:, 1, 20:] = 8.0
    kept = torch.tensor([[[True, False], [True, True]]])
    result = onnx_models.compare(maps(logits + 5e-4, kept.flip(1)), maps(logits, kept))
    assert onnx_models.is_same(result)
    assert result["tokens"] == 3 and result["other_tokens"] == 1 and result["scale"] == 8.0
    assert not onnx_models.is_same(
        onnx_models.compare(maps(logits + 2e-3, kept), maps(logits, kept))
    )
    other = logits.clone()
    other[0, 1, 0, :3] = 9e-4
    assert not onnx_models.is_same(onnx_models.compare(maps(other, kept), maps(logits, kept)))


@pytest.fixture
def tool(tmp_path, monkeypatch):
    """Calls the tool and returns the records that it wrote."""
    undo_what_tools_set(monkeypatch)
    monkeypatch.chdir(tmp_path)
    threads = torch.get_num_threads()

    def call(text, *arguments):
        (tmp_path / "tiny.py").write_text(text)
        arguments = ["onnx_models.py", *arguments, "--model", "tiny.py", "--out", "out.json"]
        monkeypatch.setattr(sys, "argv", arguments)
        onnx_models.main()
        return json.loads((tmp_path / "out.json").read_text())["records"]

    yield call
    torch.set_num_threads(threads)


def test_random_weights_find_as_many_objects_as_they_may(tmp_path):
    (tmp_path / "tiny.py").write_text(tiny_configs.DETECTOR)
    cfg = Config.fromfile(tmp_path / "tiny.py")
    init_default_scope("mmdet")
    torch.manual_seed(0)
    model = onnx_models.Model("tiny", cfg, MODELS.build(cfg.model).eval(), trained=False)
    images = [onnx_models.noise(size) for size in ((64, 96), (100, 80))]
    onnx_models.let_it_find(model, images)
    assert [len(onnx_models.in_pytorch(model, image)["boxes"]) for image in images] == [100, 100]


SHORT = """
model = dict(
    backbone=dict(
        arch=dict(num_layers=4), out_indices=(0, 1, 2, 3), pruning=dict(layers=(1,), keep_ratio=0.5)
    )
)
"""


@pytest.mark.nightly
def test_pruned_segmenter(tool, tmp_path, monkeypatch):
    """Its answers, and its speed."""
    (tmp_path / "photos").mkdir()
    for i in range(2):
        pixels = np.random.default_rng(i).integers(0, 255, (50, 60, 3), np.uint8)
        cv2.imwrite(str(tmp_path / "photos" / f"{i}.png"), pixels)
    once = functools.cache(lambda name, opset: export(*models))
    export, models = onnx_models.export, []

    def export_once(model, opset):
        models[:] = model, opset
        return once(model.name, opset)

    monkeypatch.setattr(onnx_models, "export", export_once)
    text = tiny_configs.PRUNED_SEGMENTER + SHORT
    arguments = ("--size", "72", "104", "--portable-only")
    (parity,) = tool(text, "parity", "--images", "photos", *arguments)
    first, second = parity["images"]
    assert first["tokens"] == second["tokens"] > 0 and first != second
    assert all(result["labels"] > 0.9 for result in parity["images"])
    assert parity["file"]["scans"] == parity["file"]["scan_nodes"] == 4
    (speed,) = tool(text, "speed", "--runs", "2", *arguments)
    assert {name: len(seconds) for name, seconds in speed["seconds"].items()} == dict(
        PyTorch=2, portable=2
    )
