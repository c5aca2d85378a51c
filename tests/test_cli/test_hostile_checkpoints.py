"""Checkpoints that try to run code, read memory or remove files, at every door they can come in by.

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

from mmvssm.engine import UnsafeCheckpointError, guard_checkpoint_loader, load_checkpoint_safely

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
    return saved({"state_dict": OrderedDict(weight=torch.ones(1, 1), bias=torch.ones(1)), where: entry})


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
    "getattr of os": (lambda: with_state(Pickled(getattr, (HistoryBuffer, "__subclasses__"))), True),
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
    """Also where a library falls back on full unpickling, which this variable of PyTorch's is like."""
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
        assert "refused because it carries code or objects" in sentence or "not a readable" in sentence


def test_canary_sings():
    """What the files carry would run where it is unpickled in full."""
    Path("a.pth").write_bytes(FILES["object in meta"][0]())
    torch.load("a.pth", weights_only=False)
    assert Path("canary").is_dir()
    Path("canary").rmdir()


def test_downloads_are_read_as_local_files_are(monkeypatch):
    """As an OpenMMLab package loads that falls back on full unpickling."""
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
