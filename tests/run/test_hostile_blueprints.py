"""Checkpoints whose blueprints try to run code, open files, or take all memory: each is refused in one sentence.

A canary, a folder that they try to make, shows whether one got its way.
"""

import json
import resource
from pathlib import Path

import pytest
import torch

pytest.importorskip("mmdet")

import mmvssm
from mmvssm.errors import UserError
from mmvssm.models.blueprint import BLUEPRINT

CODE = "__import__('os').mkdir('canary')"
HUGE = 10**12


def deep(depth):
    node = {}
    for _ in range(depth):
        node = {"a": node}
    return node


# Where in a detector's blueprint, the value that is put there, and words of the refusal.
CHANGES = {
    "function by its path": (
        "model.backbone",
        {"type": "os.mkdir", "path": "canary"},
        "os.mkdir, which is not registered",
    ),
    "function of mmengine": (
        "model.neck",
        {"type": "mmengine.utils.mkdir_or_exist", "dir_name": "canary"},
        "is not registered",
    ),
    "module to import": ("model.neck.type", "antigravity.geohash", "is not registered"),
    "scope to import": ("model.neck._scope_", "antigravity", "of the scope antigravity"),
    "name of a module": ("model.neck.type", "nms", "nms, which is not registered"),
    "code that mmcv evaluates": ("model.test_cfg.rcnn.nms.type", CODE, "is not registered"),
    "code that a transform evaluates": (
        "pipeline.0",
        {"type": "LoadImageFromFile", "color_type": CODE},
        "not a plain word",
    ),
    "type that is a list": ("model.neck.type", ["FPN"], "is not registered"),
    "type of another registry": ("model.neck.type", "mmdet.CocoDataset", "is not registered"),
    "runner as a model": ("model.type", "Runner", "is not registered"),
    "model as a transform": ("pipeline.0.type", "MaskRCNN", "is not registered"),
    "transforms of another package": (
        "pipeline.1",
        {"type": "Albu", "transforms": [{"type": "Lambda"}]},
        "is not registered",
    ),
    "weights to fetch": (
        "model.backbone.init_cfg",
        {"type": "Pretrained", "checkpoint": "evil.pth"},
        "it sets model.backbone.init_cfg",
    ),
    "pretrained": ("model.pretrained", "evil.pth", "it sets model.pretrained"),
    "config of a teacher": ("model.teacher_config", "evil.py", "it sets model.teacher_config"),
    "file of class weights": (
        "model.roi_head.bbox_head.loss_cls.class_weight",
        "evil.pkl",
        "not a plain word",
    ),
    "file named like its suffix": (
        "model.roi_head.bbox_head.loss_cls.class_weight",
        "pkl",
        "not a plain word",
    ),
    "model of Hugging Face": (
        "model.backbone",
        {"type": "mmdet.BertModel", "name": "evil"},
        "it sets model.backbone.name",
    ),
    "_base_": ("model._base_", "evil.py", "it sets model._base_"),
    "dunder name": ("model.__class__", "evil", "it sets model.__class__"),
    "dunder word": ("model.neck.add_extra_convs", "__init__", "not a plain word"),
    "another library": ("default_scope", "antigravity", "its default_scope is antigravity"),
    "library that is a list": ("default_scope", ["mmdet"], "its default_scope is"),
    "weights of terabytes": ("model.neck.out_channels", 10**5, "far larger than the file"),
    "a large number": ("model.neck.out_channels", HUGE, "is too large"),
    "many layers": ("model.roi_head.mask_head.num_convs", 10**5, "more than"),
    "many blocks": ("model.backbone.arch.depths", [10**5] * 4, "more than"),
    "blocks without end": ("model.backbone.arch.depths", [10**7] * 4, "is too large"),
    "a float without end": ("model.backbone.drop_path_rate", 1e12, "is too large"),
    "image of terabytes": ("pipeline.1.scale", [10**6, 10**6], "is too large"),
    "padding of terabytes": (
        "model.data_preprocessor.pad_size_divisor",
        10**6,
        "is too large",
    ),
    "smaller model": ("model.neck.out_channels", 8, "or of another shape"),
    "wrong argument": ("model.neck.evil", 1, "cannot be built"),
    "wrong type of argument": ("model.backbone", 5, "cannot be built"),
    "no pipeline": ("pipeline", None, "its pipeline is no list"),
    "words for a pipeline": ("pipeline", ["LoadImageFromFile"], "its pipeline is no list"),
    "no model": ("model", ["MaskRCNN"], "it describes no model"),
    "deep nesting": ("model.neck.evil", deep(60), "nested too deep"),
    "too much": ("model.neck.evil", [0] * 60_000, "nested too deep or holds too much"),
    "pairs that are none": ("model.neck.evil", {"{}": [[1]]}, "pairs that are none"),
    "key of a list": ("model.neck.evil", {"{}": [[["a"], 1]]}, "pairs that are none"),
}
TEXTS = {
    "no text": (5, "no text"),
    "no JSON": ("{", "not readable"),
    "deep JSON": ("[" * 100_000, "not readable"),
    "long": (" " * 2_000_000, "no text of reasonable length"),
    "NaN": ('{"model": {"a": NaN}}', "NaN is no number"),
    "number of many digits": ('{"model": {"a": 1' + "0" * 5000 + "}}", "not readable"),
    "a list": ("[]", "describes no model"),
}


@pytest.fixture
def canary(in_folder):
    for name in ("evil.py", "pkl", "evil.pkl"):
        Path(name).write_text(CODE)
    yield
    assert not Path("canary").exists()


def refusal(content, text):
    content["meta"][BLUEPRINT] = text
    torch.save(content, "tampered.pth")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(UserError) as caught:
        mmvssm.load("tampered.pth", device="cpu")
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < 500_000  # kB
    sentence = str(caught.value)
    assert sentence.startswith("tampered.pth cannot be used without its config: ")
    assert "\n" not in sentence and len(sentence) < 500
    return sentence


@pytest.mark.parametrize("name", CHANGES)
def test_no_blueprint_runs_code_or_takes_the_memory(weights, canary, name):
    place, value, said = CHANGES[name]
    content = torch.load(weights / "detector.pth", weights_only=True)
    blueprint = json.loads(content["meta"][BLUEPRINT])
    *path, last = place.split(".")
    node = blueprint
    for part in path:
        node = node[int(part)] if isinstance(node, list) else node[part]
        node = node.get("()", node) if isinstance(node, dict) else node
    node[int(last) if isinstance(node, list) else last] = value
    sentence = refusal(content, json.dumps(blueprint))
    assert said in sentence


@pytest.mark.parametrize("name", TEXTS)
def test_no_text_breaks_the_reader(weights, canary, name):
    text, said = TEXTS[name]
    content = torch.load(weights / "detector.pth", weights_only=True)
    assert said in refusal(content, text)


def test_the_canary_would_sing(in_folder):
    """mmcv evaluates a type of NMS."""
    from mmcv.ops import batched_nms

    with pytest.raises(TypeError):
        batched_nms(torch.ones(1, 4), torch.ones(1), torch.ones(1), dict(type=CODE))
    assert Path("canary").is_dir()
