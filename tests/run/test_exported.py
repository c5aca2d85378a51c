"""tools/test.py with an exported file instead of a checkpoint."""

import json

import numpy as np
import pytest
import torch

pytest.importorskip("mmdet")
pytest.importorskip("mmseg")
pytest.importorskip("onnxruntime")
pytest.importorskip("onnx")

import onnx
from mmdet.structures import DetDataSample
from mmdet.structures.bbox import HorizontalBoxes
from mmengine.config import Config
from mmengine.structures import InstanceData
from mmseg.structures import SegDataSample

from mmvssm.errors import UserError
from mmvssm.export.onnx_model import OnnxModel, open_session
from mmvssm.ops import onnxruntime_library
from mmvssm.run.arguments import export_onnx_parser
from mmvssm.run.export_onnx import export_onnx
from mmvssm.run.exported import load_exported
from support import tiny_configs
from support.tool_runs import call, sentence_of_refusal


@pytest.fixture
def tiny(config):
    return config(tiny_configs.SEGMENTER)


def metrics(folder):
    (path,) = folder.rglob("test_results.json")
    return json.loads(path.read_text())["metrics"]


@pytest.mark.slow
def test_exported_file_scores_as_its_checkpoint_does(tiny, trained, in_folder, capsys):
    """Its images are resized on the way in, and its label maps on the way back."""
    pytest.importorskip("onnxscript")
    checkpoint = str(trained / "iter_2.pth")
    export_onnx(export_onnx_parser().parse_args([tiny, checkpoint, "tiny.onnx"]))
    steps = [line for line in capsys.readouterr().out.splitlines() if line.startswith("Export: ")]
    assert [line.split()[1] for line in steps] == ["trace", "translate", "check"]
    call("test.py", tiny, checkpoint, "--work-dir", "eager")
    call("test.py", tiny, "tiny.onnx", "--work-dir", "portable", "--out", "maps")
    expected = metrics(in_folder / "eager")
    assert 0 < expected["mIoU"] < 100
    assert metrics(in_folder / "portable") == pytest.approx(expected, abs=0.1)
    assert list((in_folder / "maps").rglob("*.png"))
    try:
        onnxruntime_library()
    except RuntimeError:
        return
    call("test.py", tiny, "tiny.onnx", "--work-dir", "native", "--native")
    assert metrics(in_folder / "native") == pytest.approx(expected, abs=0.1)


def write_model(path, outputs, metadata):
    """A model that does nothing, with outputs of these names."""
    value = onnx.helper.make_tensor_value_info
    nodes = [onnx.helper.make_node("Identity", ["images"], [name]) for name in outputs]
    images, *results = (value(name, onnx.TensorProto.FLOAT, None) for name in ("images", *outputs))
    graph = onnx.helper.make_graph(nodes, "tiny", [images], results)
    opsets = [onnx.helper.make_opsetid("", 18)]
    model = onnx.helper.make_model(graph, opset_imports=opsets, ir_version=10)
    onnx.helper.set_model_props(model, metadata)
    onnx.save(model, path)


@pytest.mark.parametrize(
    ("scope", "outputs"),
    [("mmpretrain", ["boxes", "scores", "labels"]), ("mmdet", ["scores", "labels"])],
)
def test_a_config_for_another_task(tmp_path, scope, outputs):
    write_model(tmp_path / "m.onnx", outputs, OURS)
    tasks = {True: "classification", False: "detection"}
    of_config, of_file = tasks[scope == "mmpretrain"], tasks[scope == "mmdet"]
    with pytest.raises(
        UserError, match=f"a model for {of_file}, and this config is for {of_config}"
    ):
        load_exported(str(tmp_path / "m.onnx"), Config(dict(default_scope=scope)))


def write_constants(path, inputs=("images",), **constants):
    """A model that gives these arrays for every image."""
    nodes = [
        onnx.helper.make_node("Constant", [], [name], value=onnx.numpy_helper.from_array(array))
        for name, array in constants.items()
    ]
    value = onnx.helper.make_tensor_value_info
    images = [value(name, onnx.TensorProto.FLOAT, None) for name in inputs]
    outputs = [
        value(name, onnx.helper.np_dtype_to_tensor_dtype(array.dtype), None)
        for name, array in constants.items()
    ]
    graph = onnx.helper.make_graph(nodes, "tiny", images, outputs)
    opsets = [onnx.helper.make_opsetid("", 18)]
    onnx.save(onnx.helper.make_model(graph, opset_imports=opsets, ir_version=10), path)


def detected(**changes):
    """What a detector gives: one object."""
    found = dict(boxes=[[10, 20, 30, 40]], scores=[1], labels=[0])
    kinds = dict(boxes=np.float32, scores=np.float32, labels=np.int64)
    return {name: np.array(changes.get(name, x), kinds[name]) for name, x in found.items()}


def segmented(labels=0, logits=0.0, size=(10, 30)):
    """What a segmenter of five classes gives."""
    return dict(
        logits=np.full((1, 5, *size), logits, np.float32), labels=np.full((1, *size), labels, int)
    )


def image_of(sample, size):
    sample.set_metainfo(dict(ori_shape=(10, 30), scale_factor=(2.0, 4.0)))
    return dict(inputs=[torch.zeros(3, *size, dtype=torch.uint8)], data_samples=[sample])


def test_detections_beside_the_annotations_of_an_image(tmp_path):
    """Boxes go back to the size of the file; annotated ones become tensors, as those who draw them expect."""
    write_constants(tmp_path / "tiny.onnx", **detected())
    sample = DetDataSample(gt_instances=InstanceData(bboxes=HorizontalBoxes([[1.0, 2, 3, 4]])))
    (found,) = OnnxModel(str(tmp_path / "tiny.onnx")).test_step(image_of(sample, (40, 60)))
    assert found.pred_instances.bboxes.tolist() == [[5.0, 5.0, 15.0, 10.0]]
    assert type(found.gt_instances.bboxes) is torch.Tensor


WRONG = {
    "NaN boxes": (detected(boxes=[[np.nan] * 4]), "its boxes are not finite"),
    "another number of scores": (detected(scores=[1, 1]), ""),
    "boxes of five": (detected(boxes=[[0] * 5]), ""),
    "a label of no class": (detected(labels=[10**9]), "its labels are no whole numbers below 5"),
    "a negative label": (detected(labels=[-1]), "its labels are no whole numbers below 5"),
    "labels that are not whole": (
        {**detected(), "labels": np.zeros(1, np.float32)},
        "its labels are no whole numbers below 5",
    ),
    "masks of another size": (
        {**detected(), "masks": np.zeros((1, 5, 5), bool)},
        r"its masks have the shape \(1, 5, 5\), not \(1, 10, 30\)",
    ),
    "a word for a mask": ({**detected(), "masks": np.array(["x"])}, ""),
    "NaN logits": (segmented(logits=np.nan), "its logits are not finite"),
    "a map of no class": (segmented(labels=10**9), "its labels are no whole numbers below 5"),
    "a map of another size": (segmented(size=(9, 30)), ""),
    "no labels": ({"logits": segmented()["logits"]}, ""),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_no_prediction_is_one_sentence(tmp_path, case):
    """Evaluators would score it, or end in a traceback."""
    outputs, said = WRONG[case]
    write_constants(tmp_path / "tiny.onnx", **outputs)
    model = OnnxModel(str(tmp_path / "tiny.onnx"), num_classes=5)
    sample = SegDataSample() if "logits" in outputs else DetDataSample()
    with pytest.raises(UserError, match=f"tiny.onnx cannot predict on an image of 30x10: .*{said}"):
        model.test_step(image_of(sample, (10, 30)))


@pytest.mark.parametrize("outputs", [detected(), segmented(labels=4)], ids=["boxes", "maps"])
def test_what_is_a_prediction_passes(tmp_path, outputs):
    write_constants(tmp_path / "tiny.onnx", **outputs)
    model = OnnxModel(str(tmp_path / "tiny.onnx"), num_classes=5)
    sample = SegDataSample() if "logits" in outputs else DetDataSample()
    model.test_step(image_of(sample, (10, 30)))


@pytest.mark.parametrize("inputs", [(), ("pixels",), ("images", "mask")], ids=str)
def test_a_model_of_other_inputs(tmp_path, inputs):
    write_constants(tmp_path / "tiny.onnx", inputs, **segmented())
    with pytest.raises(ValueError, match=r"its inputs are .*, not images alone"):
        OnnxModel(str(tmp_path / "tiny.onnx"))


def doubling(depth, own=False):
    """A model of a function that calls another twice, and so on; the last, perhaps, calls itself."""
    opsets = [onnx.helper.make_opsetid("", 18), onnx.helper.make_opsetid("f", 1)]
    functions = []
    for i in range(depth):
        name = f"f{i if own and i == depth - 1 else i + 1}"
        calls = [
            onnx.helper.make_node(name, [a], [b], domain="f")
            if i < depth - 1 or own
            else onnx.helper.make_node("Identity", [a], [b])
            for a, b in ("xy", "yz")
        ]
        functions.append(onnx.helper.make_function("f", f"f{i}", ["x"], ["z"], calls, opsets))
    value = onnx.helper.make_tensor_value_info
    ends = (value(name, onnx.TensorProto.FLOAT, None) for name in ("images", "y"))
    call = onnx.helper.make_node("f0", ["images"], ["y"], domain="f")
    graph = onnx.helper.make_graph([call], "tiny", *([end] for end in ends))
    return onnx.helper.make_model(graph, functions=functions, opset_imports=opsets, ir_version=10)


@pytest.mark.parametrize("model", [doubling(30), doubling(3, own=True)], ids=["30", "itself"])
def test_functions_that_stand_for_too_much(model):
    """onnxruntime would put two to the thirty nodes in their place, and never end."""
    assert len(model.SerializeToString()) < 5000
    with pytest.raises(ValueError, match="its functions stand for more than 1000000 nodes"):
        open_session(model)
    open_session(doubling(8))


OURS = dict(mmvssm_version="0.1.0")


@pytest.mark.parametrize(
    ("outputs", "metadata", "said"),
    [
        (["logits", "labels"], {}, "was not written by tools/export_onnx.py"),
        (["y"], OURS, "was not written by tools/export_onnx.py"),
        (
            ["boxes", "scores", "labels"],
            OURS,
            "model.onnx is a model for detection, and this config is for semantic segmentation",
        ),
        (
            ["logits", "labels"],
            dict(OURS, classes='["a", "b"]'),
            "model.onnx was trained on other classes: 2 (a, b); this data set has 6",
        ),
        (["logits", "labels"], dict(OURS, classes="a, b"), "cannot be read as an ONNX model"),
    ],
    ids=str,
)
def test_files_of_other_models(tiny, capsys, outputs, metadata, said):
    write_model("model.onnx", outputs, metadata)
    assert said in sentence_of_refusal(capsys, "test.py", tiny, "model.onnx")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nowhere.onnx"], "there is no file nowhere.onnx"),
        (["damaged.onnx"], "damaged.onnx cannot be read as an ONNX model"),
        (["damaged.onnx", "--tta"], "--tta needs a checkpoint"),
        (
            ["damaged.onnx", "--launcher", "pytorch"],
            "is tested by one process: leave out --launcher",
        ),
        (
            ["damaged.onnx", "--cfg-options", "model.test_cfg.mode=whole"],
            "--cfg-options model.test_cfg.mode has no effect on damaged.onnx",
        ),
        (["some.pth", "--native"], "--native is for exported models, and some.pth is not an .onnx"),
    ],
    ids=str,
)
def test_what_exported_files_cannot_do(tiny, in_folder, capsys, arguments, said):
    (in_folder / "damaged.onnx").write_bytes(b"not a model")
    assert said in sentence_of_refusal(capsys, "test.py", tiny, *arguments)
