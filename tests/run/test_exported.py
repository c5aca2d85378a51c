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

from mmvssm.errors import UserError
from mmvssm.export.onnx_model import OnnxModel
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


def test_detections_beside_the_annotations_of_an_image(tmp_path):
    """Boxes go back to the size of the file; annotated ones become tensors, as those who draw them expect."""
    constants = dict(
        boxes=np.array([[10, 20, 30, 40]], np.float32),
        scores=np.ones(1, np.float32),
        labels=np.zeros(1, np.int64),
    )
    nodes = [
        onnx.helper.make_node("Constant", [], [name], value=onnx.numpy_helper.from_array(array))
        for name, array in constants.items()
    ]
    value = onnx.helper.make_tensor_value_info
    images, *outputs = (
        value(name, onnx.helper.np_dtype_to_tensor_dtype(np.dtype(kind)), None)
        for name, kind in dict(images="f4", boxes="f4", scores="f4", labels="i8").items()
    )
    graph = onnx.helper.make_graph(nodes, "tiny", [images], outputs)
    opsets = [onnx.helper.make_opsetid("", 18)]
    onnx.save(
        onnx.helper.make_model(graph, opset_imports=opsets, ir_version=10), tmp_path / "tiny.onnx"
    )
    annotated = InstanceData(bboxes=HorizontalBoxes([[1.0, 2, 3, 4]]))
    sample = DetDataSample(metainfo=dict(ori_shape=(10, 30), scale_factor=(2.0, 4.0)))
    sample.gt_instances = annotated
    data = dict(inputs=[torch.zeros(3, 40, 60, dtype=torch.uint8)], data_samples=[sample])
    (found,) = OnnxModel(str(tmp_path / "tiny.onnx")).test_step(data)
    assert found.pred_instances.bboxes.tolist() == [[5.0, 5.0, 15.0, 10.0]]
    assert type(found.gt_instances.bboxes) is torch.Tensor


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
