"""Checkpoints that try to run code, read memory or remove files, through every way of loading them.

A canary, a folder that they try to make or remove, shows whether one got its way.
"""

import functools
import importlib.util
import io
import operator
import os
import pickle
import struct
import sys
import tarfile
import zipfile
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.logging import HistoryBuffer
from mmengine.model import BaseModule
from mmengine.runner import load_checkpoint
from mmengine.runner.checkpoint import CheckpointLoader
from PIL import Image

from support import tiny_configs
from support.tool_runs import call, sentence_of_refusal

pytest.importorskip("mmdet")
pytest.importorskip("mmseg")

from mmdet.apis import DetInferencer, init_detector
from mmseg.apis import MMSegInferencer, init_model

from mmvssm.errors import HINT, run_tool
from mmvssm.safe_checkpoint import (
    UnsafeCheckpointError,
    guard_checkpoint_loader,
    load_checkpoint_safely,
)

REPO = Path(__file__).resolve().parents[2]
CODE = 'x = __import__("os").system("mkdir canary")\n'


class Pickled:
    """Pickles into a call of ``function``, and then sets the state of what it returned."""

    def __init__(self, function, arguments, state=None):
        self.parts = (function, arguments, state)

    def __reduce__(self):
        return self.parts


class Weights(OrderedDict):
    """A state dict of a class of its own."""


RUN = Pickled(os.system, ("mkdir canary",))


def number_type(*state):
    return Pickled(np.dtype, ("f8", False, True), (3, "<", *state))


def array(dtype, content):
    reconstruct = np.zeros(1).__reduce__()[0]
    state = (1, (1,), dtype, False, content)
    return Pickled(reconstruct, (np.ndarray, (0,), b"b"), state)


POINTER = struct.pack("Q", 0x4141414141414141)
OBJECT = Pickled(np.dtype, ("O8", False, True))
scalar = np.float64(1).__reduce__()[0]


def saved(content, **options):
    file = io.BytesIO()
    torch.save(content, file, **options)
    return file.getvalue()


def with_state(entry, where="meta"):
    return saved(
        {"state_dict": OrderedDict(weight=torch.ones(1, 1), bias=torch.ones(1)), where: entry}
    )


def with_attribute(name, value):
    weights = (("weight", torch.ones(1, 1)), ("bias", torch.ones(1)))
    return saved({"state_dict": Pickled(OrderedDict, (weights,), {name: value})})


def in_archive(name, content, base=None):
    """An archive of PyTorch's with one file more, or replaced."""
    base = with_state({}) if base is None else base
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(base)) as old, zipfile.ZipFile(out, "w") as new:
        for entry in old.namelist():
            if Path(entry).name != name:
                new.writestr(entry, old.read(entry))
        new.writestr(f"archive/{name}", content)
    return out.getvalue()


def tarred():
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        for name in ("sys_info", "pickle", "storages", "tensors"):
            content = pickle.dumps(RUN)
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return out.getvalue()


def scripted():
    out = io.BytesIO()
    torch.jit.save(torch.jit.script(torch.nn.Linear(1, 1)), out)
    return out.getvalue()


# Name -> (what makes the file, whether it is refused; the others are data that loads).
FILES = {
    "object in meta": (lambda: with_state(RUN), True),
    "object as a weight": (lambda: saved({"state_dict": {"weight": RUN}}), True),
    "object in message_hub": (lambda: with_state({"log_scalars": {"a": RUN}}, "message_hub"), True),
    "object in optimizer": (lambda: with_state({"state": RUN}, "optimizer"), True),
    "object as a key": (lambda: saved({Pickled(tuple, ((RUN,),)): 1}), True),
    "eval": (lambda: with_state(Pickled(eval, ("__import__('os').mkdir('canary')",))), True),
    "getattr of os": (
        lambda: with_state(Pickled(getattr, (HistoryBuffer, "__subclasses__"))),
        True,
    ),
    "attrgetter": (lambda: with_state(operator.attrgetter("a.b")), True),
    "partial": (lambda: with_state(functools.partial(os.mkdir, "canary")), True),
    "class of its own as state dict": (lambda: saved({"state_dict": Weights()}), True),
    "old format with an object": (
        lambda: saved({"state_dict": {}, "meta": RUN}, _use_new_zipfile_serialization=False),
        True,
    ),
    "bare pickle": (lambda: pickle.dumps(RUN), True),
    "bare pickle, protocol 0": (lambda: pickle.dumps({"state_dict": RUN}, protocol=0), True),
    "tar of old PyTorch": (tarred, True),
    "TorchScript": (scripted, True),
    "zip in a zip": (lambda: in_archive("data.pkl", with_state(RUN)), True),
    "pickle replaced in the zip": (lambda: in_archive("data.pkl", pickle.dumps(RUN)), True),
    "second pickle in the zip": (lambda: in_archive("evil.pkl", pickle.dumps(RUN)), False),
    "array of objects": (lambda: with_state(np.array([RUN], dtype=object)), True),
    "array whose dtype was given fields": (
        lambda: with_state(array(number_type(None, ("a",), {"a": (OBJECT, 0)}, 8, 1, 1), POINTER)),
        True,
    ),
    "array whose dtype was given a part": (
        lambda: with_state(array(number_type((OBJECT, (1,)), None, None, 8, 1, 1), POINTER)),
        True,
    ),
    "array whose dtype was given a size": (
        lambda: with_state(array(number_type(None, None, None, 1 << 20, 1, 0), POINTER)),
        True,
    ),
    "array shorter than it says": (
        lambda: with_state(array(number_type(None, None, None, -1, -1, 0), b"1")),
        True,
    ),
    "number that is a pointer": (lambda: with_state(Pickled(scalar, (OBJECT, POINTER))), True),
    "array made directly": (lambda: with_state(Pickled(np.ndarray, ((1 << 40,), "f8"))), True),
    "config text": (lambda: with_state({"cfg": CODE, "config": CODE}), False),
    "config text in message_hub": (
        lambda: with_state({"runtime_info": {"cfg": CODE, "config": CODE}}, "message_hub"),
        False,
    ),
    "state dict that hides its methods": (lambda: with_attribute("items", "canary"), False),
    "state dict with metadata that is none": (lambda: with_attribute("_metadata", 5), False),
    "history that hides its methods": (
        lambda: with_state(
            Pickled(HistoryBuffer, ([1.0], [1]), {"current": "canary", "update": 1}), "message_hub"
        ),
        False,
    ),
}


class Layer(BaseModule):
    """One weight and one bias."""

    def __init__(self, init_cfg=None):
        super().__init__(init_cfg)
        self.weight = torch.nn.Parameter(torch.zeros(1, 1))
        self.bias = torch.nn.Parameter(torch.zeros(1))


def initialize_from(path):
    Layer(init_cfg={"type": "Pretrained", "checkpoint": path}).init_weights()


LOADERS = {
    "load_checkpoint_safely": load_checkpoint_safely,
    "mmengine's load_checkpoint": lambda path: load_checkpoint(Layer(), path),
    "init_cfg": initialize_from,
    "torch.load": lambda path: torch.load(path, weights_only=True),
}


@pytest.fixture(autouse=True)
def canary(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("TORCH_FORCE_WEIGHTS_ONLY_LOAD", raising=False)
    yield tmp_path / "canary"
    assert not (tmp_path / "canary").exists()


@pytest.mark.parametrize("loader", LOADERS)
@pytest.mark.parametrize("name", FILES)
def test_nothing_in_a_file_is_run(monkeypatch, name, loader):
    """Also with PyTorch's variable that forces full unpickling, as some libraries do."""
    make, refused = FILES[name]
    Path("a.pth").write_bytes(make())
    if loader != "torch.load":
        monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    if not refused:
        LOADERS[loader]("a.pth")
        return
    expected = Exception if loader == "torch.load" else UnsafeCheckpointError
    with pytest.raises(expected) as caught:
        LOADERS[loader]("a.pth")
    if expected is UnsafeCheckpointError:
        sentence = str(caught.value)
        assert sentence.startswith("a.pth ") and "\n" not in sentence
        assert (
            "refused because it carries code or objects" in sentence or "not a readable" in sentence
        )


def test_canary_sings():
    """Full unpickling would run the code in the files."""
    Path("a.pth").write_bytes(FILES["object in meta"][0]())
    torch.load("a.pth", weights_only=False)
    assert Path("canary").is_dir()
    Path("canary").rmdir()


def test_downloads_are_read_as_local_files_are(monkeypatch):
    """Also for OpenMMLab's packages that fall back on full unpickling."""
    Path("evil.pth").write_bytes(FILES["object in meta"][0]())
    Path("text.pth").write_bytes(FILES["config text"][0]())
    schemes = dict(CheckpointLoader._schemes)

    def download(filename, map_location=None):
        return torch.load(filename.removeprefix("far://"), map_location, weights_only=False)

    try:
        CheckpointLoader.register_scheme("far://", download)
        guard_checkpoint_loader()
        with pytest.raises(pickle.UnpicklingError):
            load_checkpoint(Layer(), "far://evil.pth")
        assert load_checkpoint(Layer(), "far://text.pth")["meta"] == {}
        assert "TORCH_FORCE_WEIGHTS_ONLY_LOAD" not in os.environ  # only while it loaded
    finally:
        CheckpointLoader._schemes = schemes


def test_arrays_of_numbers_load_as_they_were_saved():
    content = {
        "palette": np.arange(6, dtype=np.uint8).reshape(2, 3),
        "big-endian": np.array([1.5, -2], dtype=">f4"),
        "number": np.float32(0.25),
        "yes": np.bool_(True),
        "history": HistoryBuffer([1.0, 3.0], [1, 2]),
    }
    torch.save(content, "a.pth")
    first = load_checkpoint_safely("a.pth")
    torch.save(first, "b.pth")
    for loaded in (first, load_checkpoint_safely("b.pth"), torch.load("b.pth", weights_only=False)):
        for name in ("palette", "big-endian"):
            assert loaded[name].dtype.newbyteorder("=") == content[name].dtype.newbyteorder("=")
            np.testing.assert_array_equal(loaded[name], content[name])
        assert loaded["number"] == 0.25 and type(loaded["number"]) is np.float32
        assert loaded["yes"] == np.True_
        assert loaded["history"].mean() == content["history"].mean()
    # What was read is saved without a trace of how.
    assert b"mmvssm" not in zipfile.ZipFile("b.pth").read("b/data.pkl")


def everywhere(checkpoint):
    """A checkpoint of a training run with code in every text that mmengine reads as a config."""
    text = CODE + "model = dict(backbone=dict(type=__import__('os').mkdir('canary'), depth=3))\n"
    checkpoint["meta"].update(cfg=text, config=text, experiment_name="a\x1b[2J\nerror: b" * 9)
    checkpoint["message_hub"]["runtime_info"].update(cfg=text, config=text)
    return checkpoint


def of_another_model(checkpoint):
    checkpoint = everywhere(checkpoint)
    checkpoint["state_dict"].popitem()
    checkpoint["state_dict"]["unknown\x1b\nname"] = torch.ones(1)
    return checkpoint


def with_an_object(checkpoint):
    checkpoint["meta"]["cfg"] = RUN
    return checkpoint


def with_words_for_weights(checkpoint):
    checkpoint["state_dict"] = dict.fromkeys(checkpoint["state_dict"], "words")
    return checkpoint


def without_weights(checkpoint):
    checkpoint["state_dict"] = ["words"]
    return checkpoint


def with_broken_history(checkpoint):
    checkpoint["message_hub"]["log_scalars"]["train/loss"] = Pickled(
        HistoryBuffer, ([1.0], [1]), {"_log_history": "words"}
    )
    return checkpoint


OBJECT_SAID = "tampered.pth was refused because it carries code"
MISFIT_SAID = "tampered.pth does not fit this config's model"
NO_WEIGHTS_SAID = "tampered.pth holds no weights"
LOAD_FROM = ("train.py", "tiny.py", "--cfg-options", "load_from=tampered.pth")
RESUME = ("train.py", "tiny.py", "--resume", "tampered.pth")
TEST = ("test.py", "tiny.py", "tampered.pth")
INIT_CFG = (
    *("train.py", "tiny.py", "--cfg-options", "model.backbone.init_cfg.type=Pretrained"),
    *(
        "model.backbone.init_cfg.checkpoint=tampered.pth",
        "model.backbone.init_cfg.prefix=backbone.",
    ),
)
REFUSED = [
    (with_an_object, TEST, OBJECT_SAID),
    (with_an_object, RESUME, OBJECT_SAID),
    (with_an_object, LOAD_FROM, OBJECT_SAID),
    (with_an_object, INIT_CFG, OBJECT_SAID),
    (of_another_model, TEST, MISFIT_SAID),
    (of_another_model, RESUME, MISFIT_SAID),
    (with_words_for_weights, TEST, "is a str there"),
    (with_words_for_weights, RESUME, "is a str there"),
    (with_words_for_weights, LOAD_FROM, "none of the weights in tampered.pth"),
    (with_words_for_weights, INIT_CFG, "tampered.pth"),
    (without_weights, TEST, NO_WEIGHTS_SAID),
    (without_weights, RESUME, NO_WEIGHTS_SAID),
    (without_weights, LOAD_FROM, NO_WEIGHTS_SAID),
    (without_weights, INIT_CFG, NO_WEIGHTS_SAID),
    (
        with_broken_history,
        RESUME,
        "its message_hub['log_scalars'] is malformed",
    ),
]


@pytest.fixture
def tampered(trained, config):
    """Writes a changed copy of a training checkpoint, and the config it belongs to."""

    def write(change):
        config(tiny_configs.SEGMENTER, "train_cfg = dict(max_iters=3, val_interval=9)\n")
        torch.save(change(torch.load(trained / "iter_2.pth", weights_only=True)), "tampered.pth")

    return write


@pytest.mark.parametrize(
    ("change", "arguments", "said"), REFUSED, ids=lambda part: getattr(part, "__name__", None)
)
def test_tools_refuse_it_in_one_sentence(tampered, capsys, change, arguments, said):
    tampered(change)
    sentence = sentence_of_refusal(capsys, *arguments)
    assert said in sentence and sentence.isprintable() and len(sentence) < 800


@pytest.mark.parametrize(
    "arguments",
    [TEST, RESUME, LOAD_FROM, INIT_CFG],
    ids=["test", "resume", "load_from", "init_cfg"],
)
def test_tools_take_text_as_data(tampered, arguments):
    tampered(everywhere)
    call(*arguments)
    if arguments[0] == "train.py":
        saved = torch.load("work_dirs/tiny/iter_3.pth", weights_only=True)
        texts = saved["meta"]["cfg"], saved["message_hub"]["runtime_info"]["cfg"]
        assert all("GroupMamba" in text and "canary" not in text for text in texts)


def test_resumed_run_removes_no_files_but_its_own(tampered, in_folder):
    """mmengine removes what a checkpoint calls the best so far, folders too."""
    for name in ("precious", "elsewhere"):
        (in_folder / name).mkdir()
    (in_folder / "precious/work.txt").write_text("years of it")
    other_best = in_folder / "elsewhere/best_mIoU_iter_1.pth"
    other_best.write_text("another run's")

    for named in (in_folder / "precious", other_best):

        def change(checkpoint, named=named):
            info = checkpoint["message_hub"]["runtime_info"]
            info.update(
                best_ckpt=str(named), best_score=-1.0, keep_ckpt_ids=["/../../precious/work"]
            )
            return checkpoint

        tampered(change)
        options = (
            "default_hooks.checkpoint.save_best=mIoU",
            "default_hooks.checkpoint.max_keep_ckpts=1",
        )
        work_dir = f"run of {named.name}"
        call(*RESUME, "--work-dir", work_dir, "--cfg-options", *options, "train_cfg.val_interval=1")
        assert list(Path(work_dir).glob("best_mIoU_iter_*.pth"))
    assert (in_folder / "precious/work.txt").exists() and other_best.exists()


@pytest.fixture
def argv_tool(monkeypatch):
    """Runs another tool in this process as its own main function."""

    def run(name, *arguments):
        spec = importlib.util.spec_from_file_location(name, REPO / "tools" / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        with pytest.raises(SystemExit) as caught:
            run_tool(module.main)
        assert caught.value.code == 1

    return run


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (with_an_object, OBJECT_SAID),
        (of_another_model, MISFIT_SAID),
        (without_weights, NO_WEIGHTS_SAID),
    ],
)
def test_visualize_pruning_refuses_it(tampered, argv_tool, capsys, change, said):
    tampered(change)
    Image.fromarray(np.zeros((16, 16, 3), np.uint8)).save("image.png")
    pruned = REPO / "configs/plainmamba_pruned_upernet_shapes.py"
    argv_tool("visualize_pruning", pruned, "tampered.pth", "image.png", "--out", "out.png")
    sentence, hint = capsys.readouterr().err.splitlines()[-2:]
    assert said in sentence and sentence.isprintable() and hint == HINT


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (with_an_object, OBJECT_SAID),
        (everywhere, "weights of a published GroupMamba"),
        (without_weights, "holds no weights"),
    ],
)
def test_conversion_refuses_it(tampered, argv_tool, capsys, change, said):
    tampered(change)
    argv_tool("convert_checkpoint", "groupmamba", "tampered.pth", "out.pth")
    sentence, hint = capsys.readouterr().err.splitlines()[-2:]
    assert said in sentence and sentence.isprintable() and hint == HINT
    assert not Path("out.pth").exists()


def infer_segmenter():
    return init_model("tiny.py", "tampered.pth", device="cpu")


def infer_detector():
    return init_detector("detector.py", "tampered.pth", device="cpu")


def det_inferencer(model="detector.py"):
    return DetInferencer(model, "tampered.pth", device="cpu", show_progress=False).model


def seg_inferencer():
    return MMSegInferencer("tiny.py", "tampered.pth", device="cpu").model


@pytest.mark.parametrize("door", [infer_segmenter, infer_detector, det_inferencer, seg_inferencer])
def test_openmmlabs_own_inference(tampered, config, door):
    """Importing mmvssm is enough: text is data, objects are refused."""
    tampered(everywhere)
    config(tiny_configs.DETECTOR, name="detector.py")
    assert isinstance(door(), torch.nn.Module)
    tampered(with_an_object)
    with pytest.raises(UnsafeCheckpointError, match=OBJECT_SAID):
        door()


def test_inference_from_weights_alone_needs_a_config(tampered):
    """mmengine would run the text in the checkpoint as the config."""
    tampered(everywhere)
    with pytest.raises(ValueError, match="Cannot find the config in the checkpoint"):
        det_inferencer(model=None)
