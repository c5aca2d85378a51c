"""Exported models in onnxruntime, compared with the libraries' own inference in PyTorch."""

import functools
import hashlib
import json

import numpy as np
import pytest
import torch

pytest.importorskip("mmdet")
pytest.importorskip("mmseg")
pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

import onnx
from mmdet.structures import DetDataSample
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope
from mmseg.structures import SegDataSample
from PIL import Image

from mmvssm.errors import UserError
from mmvssm.export.detector import DetectorGraph
from mmvssm.export.onnx_model import OnnxModel
from mmvssm.export.preparation import UnsupportedModelError
from mmvssm.ops import onnxruntime_library
from mmvssm.run import export_onnx as cli
from mmvssm.run.arguments import export_onnx_parser
from mmvssm.run.export_onnx import export_onnx
from support import tiny_configs
from support.onnx_models import session
from support.shared_folder import shared_folder
from support.tool_runs import files_in, undo_what_tools_set
from support.web_page import coloured, masks_drawn, skip_without_browser, viewer

try:
    LIBRARY, REASON = onnxruntime_library(), ""
except RuntimeError as error:
    LIBRARY, REASON = None, str(error)
needs_library = pytest.mark.skipif(LIBRARY is None, reason=REASON or "loaded")

UNSEEN = [(1, 160, 160), (3, 97, 131), (1, 64, 203)]
"""Images, height and width that the exporter was not given."""

PLAIN = """
model = dict(
    backbone=dict(
        arch=dict(
            _delete_=True,
            embed_dims=16,
            num_layers=4,
            patch_size=8,
            num_convs_patch_embed=1,
            layers_with_dwconv=[0],
            d_state=4,
        ),
        out_indices=(0, 1, 2, 3),
        pruning=dict(layers=(0, 2), keep_ratio=0.5),
    ),
    neck=[
        dict(type="mmvssm.TokenRestoration"),
        dict(
            type="mmseg.Feature2Pyramid",
            embed_dim=16,
            rescales=[2, 1, 0.5, 0.25],
            norm_cfg=dict(type="BN", requires_grad=True),
        ),
    ],
    decode_head=dict(in_channels=[16] * 4, channels=16),
    auxiliary_head=dict(in_channels=16, channels=16),
)
"""
DENSE = """
model["backbone"].update(pruning=None)
model["data_preprocessor"] = dict(test_cfg=dict(size_divisor=32))
"""
PLAIN = tiny_configs.PRUNED_SEGMENTER + PLAIN
SPATIAL = """
arch = dict(_delete_=True, embed_dims=[16] * 4, depths=[1] * 4, mlp_ratio=2)
model["backbone"].update(type="mmvssm.SpatialMamba", arch=arch)
"""
VMAMBA = """
arch = dict(_delete_=True, embed_dims=[16] * 4, depths=[1] * 4, ssm_ratio=1, mlp_ratio=2)
model["backbone"].update(type="mmvssm.VMamba", arch=arch)
"""
VIM = (
    PLAIN
    + """
model["backbone"] = dict(
    _delete_=True,
    type="mmvssm.Vim",
    arch=dict(embed_dims=16, num_layers=4, patch_size=8, stride=8, d_state=4),
    img_size=64,
    out_indices=(0, 1, 2, 3),
    pruning=dict(layers=(0, 2), keep_ratio=0.5),
)
"""
)
SEGMENTERS = dict(
    groupmamba=tiny_configs.SEGMENTER,
    plainmamba=PLAIN + DENSE,
    pruned=PLAIN,
    segformer=f"_base_ = '{tiny_configs.CONFIGS}/groupmamba_segformer_shapes.py'",
    spatialmamba=tiny_configs.SEGMENTER + SPATIAL,
    vim=VIM,
    vmamba=tiny_configs.SEGMENTER + VMAMBA,
)


class Exported:
    """A model and the file that was made of it."""

    def __init__(self, folder, text):
        self.config = folder / "tiny.py"
        self.config.write_text(text)
        cfg = Config.fromfile(self.config)
        init_default_scope(cfg.default_scope)
        torch.manual_seed(0)
        self.model = MODELS.build(cfg.model).eval()
        for module in self.model.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.running_mean.normal_(std=0.1)
                module.running_var.uniform_(0.5, 2)
        if hasattr(self.model, "decode_head"):
            _balance(self.model)
        self.checkpoint, self.path = folder / "tiny.pth", folder / "tiny.onnx"
        if self.path.exists():
            weights = torch.load(self.checkpoint, weights_only=True)
            self.model.load_state_dict(weights["state_dict"])
        else:
            meta = dict(dataset_meta=dict(classes=("a", "b"), palette=[(0, 1, 2), (3, 4, 5)]))
            torch.save(dict(state_dict=self.model.state_dict(), meta=meta), self.checkpoint)
            arguments = (self.config, self.checkpoint, self.path)
            export_onnx(export_onnx_parser().parse_args(list(map(str, arguments))))
        self.session = session(str(self.path))

    def run(self, images, session=None):
        """From RGB images, uint8 ``(B, 3, H, W)``."""
        session = session or self.session
        names = [output.name for output in session.get_outputs()]
        found = session.run(None, {"images": images.float().numpy()})
        return dict(zip(names, map(torch.from_numpy, found)))

    def eager(self, images, size=None):
        """Run the library on the same images read from files, perhaps resized from another size."""
        return self.answer(self.model, images, size)

    def answer(self, model, images, size=None):
        sample = SegDataSample if self.model.__module__.startswith("mmseg") else DetDataSample
        here = tuple(images.shape[2:])
        size = size or here
        meta = dict(ori_shape=size, img_shape=here, img_id=0)
        meta["scale_factor"] = (here[1] / size[1], here[0] / size[0])
        data = dict(
            inputs=list(images.flip(1)),
            data_samples=[sample(metainfo=dict(meta)) for _ in images],
        )
        with torch.no_grad():
            return model.test_step(data)


def _balance(model):
    """Let every class win somewhere."""
    classifier = model.decode_head.conv_seg
    with torch.no_grad():
        classifier.weight.normal_()
        logits = model(random_images((1, 64, 64)).float() / 50 - 2)
        classifier.bias -= logits.mean((0, 2, 3))


def random_images(size):
    """Noise on a few coarse shapes, so that images differ from place to place."""
    batch, height, width = size
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(batch, 3, 5, 5, generator=generator) * 200
    smooth = torch.nn.functional.interpolate(coarse, size=(height, width), mode="bilinear")
    noise = torch.rand(batch, 3, height, width, generator=generator) * 55
    return (smooth + noise).to(torch.uint8)


@pytest.fixture(scope="module")
def export(tmp_path_factory):
    """Exports a model, which takes long, once for all processes that share out the tests."""
    with pytest.MonkeyPatch.context() as patch:
        undo_what_tools_set(patch)

        def export(text):
            name = f"export-{hashlib.sha256(text.encode()).hexdigest()[:8]}"
            with shared_folder(tmp_path_factory, name) as folder:
                patch.chdir(folder)
                return Exported(folder, text)

        yield export


@pytest.fixture(scope="module")
def segmenters(export):
    """Makes each of the segmenters once."""
    return functools.cache(lambda name: export(SEGMENTERS[name]))


IN_EVERY_RUN = {"pruned"}


@pytest.fixture(
    params=[
        name if name in IN_EVERY_RUN else pytest.param(name, marks=pytest.mark.nightly)
        for name in SEGMENTERS
    ]
)
def segmenter(request, segmenters):
    return segmenters(request.param)


@pytest.mark.slow
@pytest.mark.parametrize("size", UNSEEN, ids=str)
def test_segmenter_equals_eager(segmenter, size):
    images = random_images(size)
    found = segmenter.run(images)
    expected = segmenter.eager(images)
    logits = torch.stack([sample.seg_logits.data for sample in expected])
    labels = torch.cat([sample.pred_sem_seg.data for sample in expected])
    assert len(labels.unique()) > 1
    torch.testing.assert_close(found["logits"], logits, atol=1e-3, rtol=0)
    assert found["labels"].dtype == torch.int64 and found["labels"].shape == labels.shape
    assert (found["labels"] == labels).double().mean() > 0.999


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    skip_without_browser()
    with viewer(tmp_path_factory.mktemp("page")) as opened:
        yield opened


def show(page, model, images, folder):
    """Open a model and a picture in the web page, whose size stays."""
    Image.fromarray(images[0].permute(1, 2, 0).numpy()).save(folder / "picture.png")
    page.open_model(model.path)
    page.give_picture(folder / "picture.png")
    with page.settling():
        page.set("size", "original", "change")
    assert page.error == ""


@pytest.mark.slow
def test_segmenter_in_a_browser(segmenter, page, tmp_path):
    """The web page runs the same file in onnxruntime-web, which has nothing but the functions in it."""
    images = random_images((1, 97, 131))
    found = {name: x[0].numpy() for name, x in segmenter.run(images).items()}
    show(page, segmenter, images, tmp_path)
    colours = page.colours([[0, 1, 2], [3, 4, 5]], len(found["logits"]))
    same = (page.drawn("map") == coloured(found["labels"], colours)).all(-1)
    assert len(np.unique(found["labels"])) > 1 and same.mean() > 0.999
    if "kept" in found:
        assert np.array_equal(page.drawn("tokens")[..., 3] == 0, found["kept"])


@pytest.mark.slow
def test_one_node_a_scan(segmenter):
    model = onnx.load(segmenter.path)
    scans = {  # the two branches of a Vim's mixer share one
        name.partition(".branches")[0]
        for name, module in segmenter.model.named_modules()
        if hasattr(module, "A_log")
    }
    assert [n.op_type for n in model.graph.node].count("SelectiveScan") == len(scans) > 0
    names = {(f.domain, f.name) for f in model.functions}
    assert names <= {("mmvssm", "SelectiveScan"), ("mmvssm", "SparseDepthwiseConv")}


@pytest.mark.slow
def test_what_a_file_says_of_itself(segmenter):
    model = onnx.load(segmenter.path)
    said = {entry.key: entry.value for entry in model.metadata_props}
    assert json.loads(said["classes"]) == ["a", "b"]
    assert json.loads(said["palette"]) == [[0, 1, 2], [3, 4, 5]]
    assert "Apache-2.0" in said["license"] and said["mmvssm_version"]
    assert json.loads(said["resize"]) == {"scale": [160, 160], "keep_ratio": True}
    pruned = "kept" in {output.name for output in model.graph.output}
    assert said.get("token_size") == ("8" if pruned else None)
    dims = [d.dim_param or d.dim_value for d in model.graph.input[0].type.tensor_type.shape.dim]
    assert dims == ["batch", 3, "height", "width"]


@pytest.mark.slow
def test_kept_tokens_are_those_of_the_backbone(segmenters):
    pruned = segmenters("pruned")
    images = random_images((2, 80, 120))
    kept = pruned.run(images)["kept"]
    with torch.no_grad():
        x = pruned.model.data_preprocessor(dict(inputs=list(images.flip(1))))["inputs"]
        last = pruned.model.backbone(x)[-1]
    assert kept.shape == (2, *last.grid) and kept.sum() == last.positions.numel()
    expected = torch.zeros(2, kept[0].numel(), dtype=torch.bool).scatter(1, last.positions, True)
    assert torch.equal(kept.flatten(1), expected)


@needs_library
@pytest.mark.slow
def test_native_operator_in_whole_models(segmenter, tmp_path):
    """The same file with all scans in the compiled operator."""
    before = session(str(segmenter.path), optimized=tmp_path / "portable.onnx")
    native = session(str(segmenter.path), LIBRARY, tmp_path / "native.onnx")
    left = [_count_scans(tmp_path / f"{name}.onnx") for name in ("portable", "native")]
    assert left == [0, _count_scans(segmenter.path)]
    images = random_images((2, 97, 131))
    found, expected = (segmenter.run(images, one) for one in (native, before))
    torch.testing.assert_close(found["logits"], expected["logits"], atol=1e-4, rtol=0)
    assert (found["labels"] == expected["labels"]).double().mean() > 0.999
    if "kept" in expected:
        assert torch.equal(found["kept"], expected["kept"])


def _count_scans(path):
    return [node.op_type for node in onnx.load(path).graph.node].count("SelectiveScan")


@pytest.mark.slow
def test_segmenter_at_an_image_s_own_size(segmenters):
    """Logits have the size of the image before resizing, as in tools/test.py."""
    segmenter = segmenters("pruned")
    images, size = random_images((1, 97, 131)), (60, 150)
    (found,) = segmenter.answer(OnnxModel(str(segmenter.path)), images, size)
    (expected,) = segmenter.eager(images, size)
    assert found.pred_sem_seg.data.shape == expected.pred_sem_seg.data.shape == (1, *size)
    assert (found.pred_sem_seg.data == expected.pred_sem_seg.data).double().mean() > 0.999
    torch.testing.assert_close(found.seg_logits.data, expected.seg_logits.data, atol=1e-3, rtol=0)


@pytest.fixture(scope="module")
def detector(export):
    return export(tiny_configs.DETECTOR)


@pytest.mark.slow
@pytest.mark.parametrize("size", [(1, *size[1:]) for size in UNSEEN], ids=str)
def test_detector_equals_eager(detector, size):
    images = random_images(size)
    expected = detector.eager(images)[0].pred_instances
    found = _in_order(detector.run(images), expected)
    assert len(expected) > 20
    torch.testing.assert_close(found["boxes"], expected.bboxes, atol=0.1, rtol=0)
    torch.testing.assert_close(found["scores"], expected.scores, atol=1e-3, rtol=0)
    assert torch.equal(found["labels"], expected.labels)
    assert found["masks"].dtype == torch.bool
    _check_masks(found["masks"], expected.masks)


@pytest.mark.nightly
@pytest.mark.parametrize("name", ["groupmamba_fasterrcnn", "plainmamba_fasterrcnn"])
def test_detector_of_boxes_alone_equals_eager(export, name):
    detector = export(f"_base_ = '{tiny_configs.CONFIGS}/{name}_shapes.py'")
    images = random_images((1, 97, 131))
    expected = detector.eager(images)[0].pred_instances
    found = _in_order(detector.run(images), expected)
    assert set(found) == {"boxes", "scores", "labels"} and len(expected) > 20
    torch.testing.assert_close(found["boxes"], expected.bboxes, atol=0.1, rtol=0)
    torch.testing.assert_close(found["scores"], expected.scores, atol=1e-3, rtol=0)
    assert torch.equal(found["labels"], expected.labels)


def _in_order(found, expected):
    """The same detections, of which those whose scores are equal but for rounding have the order of ``expected``."""
    assert len(found["boxes"]) == len(expected)
    distances = (found["boxes"][None] - expected.bboxes[:, None]).abs().amax(-1)
    distances += 1e6 * (found["labels"][None] != expected.labels[:, None])
    order = distances.argmin(1)
    assert len(order.unique()) == len(order)
    torch.testing.assert_close(found["scores"][order], found["scores"], atol=1e-6, rtol=0)
    return {key: values[order] for key, values in found.items()}


def _check_masks(found, expected):
    both, either = (f(found, expected).sum((1, 2)) for f in (torch.logical_and, torch.logical_or))
    # Of a small mask one pixel, whose probability is the threshold but for rounding, is more than a hundredth.
    assert either.sum() > 100 and (either - both <= (0.01 * either).clamp(min=1)).all()


@pytest.mark.slow
@pytest.mark.parametrize("size", [(60, 150), (97, 131), (301, 260)], ids=str)
def test_detector_at_an_image_s_own_size(detector, size):
    """Boxes and masks refer to the image before resizing, as in tools/test.py."""
    images = random_images((1, 97, 131))
    (found,) = detector.answer(OnnxModel(str(detector.path)), images, size)
    (expected,) = detector.eager(images, size)
    found, expected = found.pred_instances, expected.pred_instances
    assert len(expected) > 20 and expected.masks.shape[1:] == size
    torch.testing.assert_close(found.bboxes, expected.bboxes, atol=0.1, rtol=0)
    torch.testing.assert_close(found.scores, expected.scores, atol=1e-3, rtol=0)
    assert torch.equal(found.labels, expected.labels)
    _check_masks(found.masks, expected.masks)


@needs_library
@pytest.mark.slow
def test_native_operator_in_a_detector(detector):
    images = random_images((1, 97, 131))
    found = detector.run(images, session(str(detector.path), LIBRARY))
    expected = detector.run(images)
    assert len(expected["boxes"]) > 20
    for name in ("boxes", "scores"):
        torch.testing.assert_close(found[name], expected[name], atol=1e-3, rtol=0)
    assert torch.equal(found["labels"], expected["labels"])
    _check_masks(found["masks"], expected["masks"])


@pytest.mark.slow
def test_no_detection_at_all(detector):
    """With a threshold that no score reaches."""
    model = onnx.load(detector.path)
    last_nms = [node for node in model.graph.node if node.op_type == "NonMaxSuppression"][-1]
    last_nms.input[4] = "unreachable"
    model.graph.initializer.append(
        onnx.numpy_helper.from_array(np.array([2.0], np.float32), "unreachable")
    )
    found = session(model).run(None, {"images": np.zeros((1, 3, 70, 90), np.float32)})
    assert [x.shape for x in found] == [(0, 4), (0,), (0,), (0, 70, 90)]


@pytest.mark.slow
def test_detector_in_a_browser(detector, page, tmp_path):
    images = random_images((1, 97, 131))
    found = {name: x.numpy() for name, x in detector.run(images).items()}
    show(page, detector, images, tmp_path)
    page.set("threshold", "0")
    texts, boxes = page.boxes()
    assert len(texts) == len(found["boxes"]) > 20
    # Scores that are equal but for rounding may change places.
    names = np.array([text.rpartition(" ")[0] for text in texts])
    scores = np.array([float(text.rpartition(" ")[2]) for text in texts])
    alike = 0
    for box, label, score in zip(found["boxes"], found["labels"], found["scores"]):
        name = "ab"[label] if label < 2 else f"class {label}"
        apart = np.abs(boxes * [131, 97, 131, 97] - box).max(1)
        nearest = np.where(names == name, apart, np.inf).argmin()
        alike += apart[nearest] < 0.1 and abs(scores[nearest] - score) < 1e-3 + 0.005
    # Of boxes that overlap, those of random weights may have scores that only rounding tells apart, and one wins.
    assert alike >= 0.95 * len(boxes)
    colours = page.colours([[0, 1, 2], [3, 4, 5]], 1 + found["labels"].max())
    drawn = masks_drawn(found["masks"], found["labels"], found["scores"], colours)
    assert drawn.any() and (page.drawn("map") == drawn).all(-1).mean() > 0.95


REFUSED = [
    ("PRUNED_SEGMENTER", ["--cfg-options", "model.backbone.pruning.alignment=none"], "'decay' or"),
    ("SEGMENTER", ["--opset", "17"], "opset 17 is not supported; choose one from 18 to 26"),
    ("DETECTOR", ["--opset", "22"], "opset 22 is not supported; choose one from 18 to 21"),
    ("SEGMENTER", ["--cfg-options", "model.test_cfg.mode=slide"], "model.test_cfg.mode is 'slide'"),
    (
        "DETECTOR",
        ["--cfg-options", "model.test_cfg.rcnn.nms.type=soft_nms"],
        "only dict(type='nms'",
    ),
    (
        "DETECTOR",
        ["--cfg-options", "model.roi_head.bbox_roi_extractor.roi_layer.pool_mode=max"],
        "only RoIAlign with pool_mode='avg' can",
    ),
]


@pytest.fixture
def tool(tmp_path, monkeypatch):
    """Calls the tool for a config and a checkpoint of random weights in an empty folder."""
    undo_what_tools_set(monkeypatch)
    monkeypatch.chdir(tmp_path)

    def call(text, *options, out="out.onnx"):
        (tmp_path / "tiny.py").write_text(text)
        cfg = Config.fromfile("tiny.py")
        init_default_scope(cfg.default_scope)
        torch.save(dict(state_dict=MODELS.build(cfg.model).state_dict()), "tiny.pth")
        before = files_in(".")
        try:
            export_onnx(export_onnx_parser().parse_args(["tiny.py", "tiny.pth", out, *options]))
        except UserError:
            assert files_in(".") == before
            raise

    return call


@pytest.mark.parametrize(("text", "options", "words"), REFUSED, ids=str)
def test_what_cannot_be_exported(tool, text, options, words):
    with pytest.raises(UserError) as caught:
        tool(getattr(tiny_configs, text), *options)
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("groupmamba_retinanet", "it has no RPNHead; of detectors, only Faster and Mask R-CNN of"),
        ("groupmamba_rtmdet", "it has no RPNHead; of detectors, only Faster and Mask R-CNN of"),
        ("groupmamba_cascade_maskrcnn", "it has CascadeRoIHead for StandardRoIHead; of detectors"),
        ("groupmamba_mask2former", "with Mask2FormerHead cannot be exported: of segmenters, only"),
    ],
)
def test_heads_that_cannot_be_exported(tool, name, words):
    with pytest.raises(UserError) as caught:
        tool(f"_base_ = '{tiny_configs.CONFIGS}/{name}_shapes.py'")
    assert words in str(caught.value)


@pytest.mark.parametrize(
    "attribute, value, words",
    [
        ("rpn_head.use_sigmoid_cls", False, "rpn_head with use_sigmoid=False"),
        ("roi_head.bbox_head.loss_cls.custom_activation", True, "whose scores are no softmax"),
    ],
)
def test_scores_of_other_kinds(tmp_path, attribute, value, words):
    (tmp_path / "tiny.py").write_text(tiny_configs.DETECTOR)
    cfg = Config.fromfile(tmp_path / "tiny.py")
    init_default_scope(cfg.default_scope)
    model = MODELS.build(cfg.model)
    DetectorGraph(model, cfg.model)
    owner, _, name = attribute.rpartition(".")
    setattr(model.get_submodule(owner), name, value)
    with pytest.raises(UnsupportedModelError, match=words):
        DetectorGraph(model, cfg.model)


@pytest.mark.parametrize(
    ("out", "words"),
    [
        ("out.pt", "must end in .onnx"),
        ("nowhere/out.onnx", "folder nowhere for the exported model does not exist"),
    ],
)
def test_names_that_will_not_do(tool, out, words):
    with pytest.raises(UserError, match=words):
        tool(tiny_configs.SEGMENTER, out=out)


def test_missing_packages(tool, monkeypatch):
    find = cli.importlib.util.find_spec
    monkeypatch.setattr(
        cli.importlib.util, "find_spec", lambda name: None if name == "onnxscript" else find(name)
    )
    with pytest.raises(UserError, match="run: pip install onnx onnxscript onnxruntime"):
        tool(tiny_configs.SEGMENTER)


def test_a_head_that_cannot_be_exported_leaves_nothing(tool, monkeypatch):
    """The head branches on values, which an exported program cannot do."""

    def forward(self, inputs):
        return inputs[0] if inputs[0].sum() > 0 else inputs[1]

    monkeypatch.setattr("mmseg.models.UPerHead.forward", forward)
    with pytest.raises(UserError, match="exporter cannot follow what the model does: "):
        tool(tiny_configs.SEGMENTER)
