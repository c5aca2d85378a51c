"""tools/train.py and tools/test.py with mmpretrain: ImageNet's layout, transfer of weights, and rejected inputs."""

import json
import shutil
from pathlib import Path

import mmcv
import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.registry import init_default_scope
from mmengine.runner import load_checkpoint

import mmvssm
from mmvssm.datasets.root import apply_data_root
from mmvssm.models.blueprint import BLUEPRINT, write_blueprint
from mmvssm.models.published import convert_groupmamba
from mmvssm.registry import MODELS
from mmvssm.run.arguments import export_onnx_parser
from mmvssm.run.export_onnx import export_onnx
from mmvssm.run.setup import build_model
from support.pretraining import CLASSIFIER, DISTILLED, require_mmpretrain, write_class_folders
from support.published_groupmamba import published_weights
from support.tool_runs import call, sentence_of_refusal, undo_what_tools_set

require_mmpretrain()

CONFIGS = Path(__file__).parents[3] / "configs"


@pytest.fixture
def project(tmp_path, monkeypatch):
    """Runs the test in a folder with a data set and configs, and undoes what the tools set for a process."""
    write_class_folders(tmp_path / "data")
    for name, text in (("plain", CLASSIFIER), ("distilled", DISTILLED)):
        (tmp_path / f"{name}.py").write_text(text.replace("CONFIGS", str(CONFIGS)))
    monkeypatch.chdir(tmp_path)
    undo_what_tools_set(monkeypatch)
    return tmp_path


def results(folder):
    return json.loads(Path(folder, "test_results.json").read_text())["metrics"]


def test_training_and_testing(project, capsys):
    call("train.py", "plain.py", "--data-root", "data", "--work-dir", "run")
    assert "ImageNet's layout, 2 classes (cat, dog)" in capsys.readouterr().out
    checkpoint = torch.load("run/epoch_2.pth", weights_only=True)
    assert checkpoint["meta"]["dataset_meta"]["classes"] == ("cat", "dog")
    assert checkpoint["state_dict"]["head.fc.weight"].shape == (2, 16)
    shutil.rmtree("data/train")  # a test needs no training set
    options = ["--data-root", "data", "--work-dir", "tested", "--show-dir", "pictures"]
    call("test.py", "plain.py", "run/epoch_2.pth", *options, "--out", "tested/results.pkl")
    output = capsys.readouterr().out
    assert "warning: the 4 images have only 2 different file names" in output
    assert results("tested").keys() == {"accuracy/top1"}
    assert len(list(Path("pictures").iterdir())) == 2 and Path("tested/results.pkl").exists()


def test_published_weights_are_evaluated(project):
    """Weights of a distilled model, with the published GroupMamba's names, evaluate without a teacher."""
    arch = Config.fromfile("distilled.py").model.backbone.arch
    converted = convert_groupmamba(published_weights(*arch.values(), num_classes=2))
    torch.save({"state_dict": converted.state_dict, "meta": {}}, "converted.pth")
    call("test.py", "distilled.py", "converted.pth", "--data-root", "data", "--work-dir", "tested")
    assert results("tested").keys() == {"accuracy/top1"}


def test_classes_are_counted_everywhere():
    cfg = Config.fromfile(CONFIGS / "groupmamba_distilled_cifar10.py")
    loaders = ("train_dataloader", "val_dataloader", "test_dataloader")
    folder = CONFIGS.parent / "tests"  # replaced below
    assert folder.is_dir()
    cfg.val_evaluator = [dict(type="Accuracy", topk=(1, 5))]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mmvssm.datasets.root.class_folders", lambda _: ["a", "b", "c"])
        patch.setattr("os.path.isdir", lambda _: True)
        apply_data_root(cfg, str(folder), loaders)
    assert cfg.model.head.num_classes == cfg.data_preprocessor.num_classes == 3
    assert cfg.model.teacher.head.num_classes == 10  # what it was trained on
    assert cfg.val_evaluator[0].topk == (1,)
    prefixes = [cfg[loader].dataset.data_prefix for loader in loaders]
    assert prefixes == ["train", "val", "val"]


def remove_images(folder):
    for path in Path(folder).iterdir():
        path.unlink()


@pytest.mark.parametrize(
    "damage, config, words",
    [
        (lambda: remove_images("data/train/dog"), "plain", "no images in data/train/dog, the folder of one class"),
        (lambda: remove_images("data/val/cat"), "plain", "no images in data/val/cat"),
        (lambda: shutil.rmtree("data/train"), "plain", "data lacks train/; classification expects ImageNet's layout"),
        (lambda: shutil.rmtree("data"), "plain", "there is no folder data"),
        (lambda: [shutil.rmtree(f"data/train/{c}") for c in ("cat", "dog")], "plain", "no folders in data/train"),
        (lambda: Path("data/val/dog").rename("data/val/cow"), "plain", "data/val has cow, other classes than the 2"),
        (lambda: shutil.rmtree("data/val/dog"), "plain", "data/val lacks dog, other classes than the 2"),
        (lambda: Path("data/val/dog/0.png").write_text("no image"), "plain", "0.png"),
        (lambda: None, "distilled", "teacher.pth"),
    ],
)  # fmt: skip
def test_what_is_refused_before_anything_is_written(project, capsys, damage, config, words):
    damage()
    arguments = [f"{config}.py", "--data-root", "data", "--work-dir", "run"]
    assert words in sentence_of_refusal(capsys, "train.py", *arguments)


def test_a_teacher_of_other_classes_is_refused(project, capsys):
    cfg = Config.fromfile("distilled.py")
    init_default_scope("mmpretrain")
    cfg.model.teacher.head.num_classes = 5
    torch.save(MODELS.build(cfg.model.teacher).state_dict(), "teacher.pth")
    arguments = ["distilled.py", "--data-root", "data", "--work-dir", "run"]
    options = ["--cfg-options", "model.teacher.head.num_classes=5"]
    sentence = sentence_of_refusal(capsys, "train.py", *arguments, *options)
    assert "the teacher has 5 classes and the student 2" in sentence


def test_data_that_is_not_there_is_one_sentence(project, capsys):
    sentence = sentence_of_refusal(capsys, "train.py", CONFIGS / "groupmamba_imagenet.py")
    assert "data/imagenet" in sentence and "train/<class>/" in sentence


def test_a_tool_for_dense_prediction_says_so(project, capsys):
    sentence = sentence_of_refusal(capsys, "browse_dataset.py", "plain.py")
    assert "is not a config for mmdet or mmseg" in sentence


def test_a_checkpoint_alone_predicts_and_is_tested(project):
    call("train.py", "plain.py", "--data-root", "data", "--work-dir", "run")
    best = "run/epoch_2.pth"
    call("predict.py", best, "data/val/cat", "--out-dir", "out", "--device", "cpu")
    found = json.loads(Path("out/predictions.json").read_text())
    described = json.loads(Path("out/images.json").read_text())["images"]
    assert [image["picture"] for image in described] == ["pictures/0.jpg", "pictures/1.jpg"]
    cfg = Config.fromfile("run/plain.py")
    classifier = build_model(cfg).eval()
    load_checkpoint(classifier, best)
    model = mmvssm.load(best, device="cpu")
    for prediction, path in zip(found, sorted(Path("data/val/cat").iterdir())):
        pixels = mmcv.imread(str(path))  # of the size that the pipeline gives them
        image = torch.from_numpy(pixels.transpose(2, 0, 1).copy())
        with torch.no_grad():
            (expected,) = classifier.test_step(dict(inputs=[image]))
        result = model(path)
        np.testing.assert_allclose(result.scores, expected.pred_score, atol=1e-6)
        assert prediction["category_id"] == result.label == expected.pred_label.item()
        assert prediction["category_name"] == model.classes[result.label]
        assert prediction["file_name"] == str(path)
        assert prediction["score"] == pytest.approx(result.score, abs=1e-6)
        ranks = [entry["category_id"] for entry in prediction["ranking"]]
        assert ranks == result.scores.argsort()[::-1].tolist()
        result.save("one.png")
        assert (mmcv.imread("one.png") != pixels).any()
    call("test.py", best, "--data-root", "data", "--work-dir", "alone")
    call("test.py", "run/plain.py", best, "--data-root", "data", "--work-dir", "described")
    assert results("alone")["accuracy/top1"] == results("described")["accuracy/top1"]


def test_a_distilled_classifier_needs_neither_config_nor_teacher(project):
    cfg = Config.fromfile("distilled.py")
    model = build_model(cfg)
    meta = {
        BLUEPRINT: write_blueprint(cfg),
        "dataset_meta": {"classes": [str(i) for i in range(10)]},
    }
    torch.save({"state_dict": model.state_dict(), "meta": meta}, "distilled.pth")
    assert mmvssm.load("distilled.pth", device="cpu")("data/val/cat/0.png").scores.shape == (10,)


@pytest.mark.slow
def test_an_exported_classifier_answers_as_in_pytorch(project):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    from mmpretrain.structures import DataSample

    from mmvssm.export.onnx_model import OnnxModel

    cfg = Config.fromfile("plain.py")
    torch.manual_seed(0)
    init_default_scope("mmpretrain")
    model = build_model(cfg).eval()
    torch.nn.init.normal_(model.head.fc.weight)
    meta = {BLUEPRINT: write_blueprint(cfg)}
    torch.save({"state_dict": model.state_dict(), "meta": meta}, "x.pth")
    export_onnx(export_onnx_parser().parse_args(["x.pth", "x.onnx"]))
    session = onnxruntime.InferenceSession("x.onnx")
    images = torch.randint(256, (3, 3, 40, 56), dtype=torch.uint8)
    scores, labels = session.run(None, {"images": images.float().numpy()})
    with torch.no_grad():
        samples = model.test_step(dict(inputs=images.flip(1)))
    expected = torch.stack([sample.pred_score for sample in samples]).numpy()
    np.testing.assert_allclose(scores, expected, atol=1e-5)
    assert labels.tolist() == expected.argmax(1).tolist()
    said = session.get_modelmeta().custom_metadata_map
    assert said["task"] == "classification" and json.loads(said["crop"]) == 32
    exported = OnnxModel("x.onnx")
    (sample,) = exported.test_step(dict(inputs=images.flip(1)[:1], data_samples=[DataSample()]))
    np.testing.assert_allclose(sample.pred_score, expected[0], atol=1e-5)
    assert sample.pred_label.tolist() == [expected[0].argmax()]
