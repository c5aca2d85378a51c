"""Loading of checkpoints without running code from them."""

import os
import pickle
import subprocess
import sys
from collections import OrderedDict
from functools import partial

import numpy as np
import pytest
import torch
from mmengine.logging import HistoryBuffer
from mmengine.runner.checkpoint import CheckpointLoader
from torch import nn

from mmvssm.private_names import checkpoint_loaders
from mmvssm.safe_checkpoint import (
    UnsafeCheckpointError,
    guard_checkpoint_loader,
    load_checkpoint_safely,
)


class Calls:
    """Pickles into a call of any function."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def test_training_state_of_mmengine_is_read(tmp_path):
    history = HistoryBuffer([1.0, 2.0, 4.0], [1, 1, 1])
    state = {
        "message_hub": {"log_scalars": {"train/loss": history}},
        "meta": {
            "score": np.float64(0.5),
            "step": np.int64(3),
            "palette": np.eye(2, dtype=np.uint8),
        },
        "state_dict": {"w": torch.ones(2)},
    }
    torch.save(state, tmp_path / "a.pth")
    loaded = load_checkpoint_safely(tmp_path / "a.pth")
    restored = loaded["message_hub"]["log_scalars"]["train/loss"]
    assert restored.mean() == history.mean()
    assert restored.statistics("current") == 4.0
    assert loaded["meta"]["score"] == 0.5 and loaded["meta"]["step"] == 3
    assert np.array_equal(loaded["meta"]["palette"], np.eye(2))


@pytest.mark.parametrize(
    "thing",
    [
        Calls(os.system, "touch harmed"),
        Calls(eval, "__import__('os').system('touch harmed')"),
        Calls(getattr, OrderedDict, "fromkeys"),
        Calls(getattr, HistoryBuffer, "__subclasses__"),
        Calls(getattr, HistoryBuffer, "register_statistics"),
        Calls(subprocess.check_call, ["touch", "harmed"]),
        partial(print, "hello"),
        nn.Linear(1, 1),
        Calls(np.zeros(1).__reduce__()[0], HistoryBuffer, (0,), b"b"),
    ],
    ids=[
        "system",
        "eval",
        "getattr",
        "dunder",
        "method",
        "subprocess",
        "partial",
        "module",
        "no array",
    ],
)
def test_code_and_objects_are_refused(tmp_path, monkeypatch, thing):
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": {}, "extra": thing}, "evil.pth")
    with pytest.raises(
        UnsafeCheckpointError, match=r"evil.pth was refused because it carries code"
    ):
        load_checkpoint_safely("evil.pth")
    assert not (tmp_path / "harmed").exists()


def test_refused_file_is_named_with_what_it_carries(tmp_path):
    torch.save({"x": Calls(os.system, "true")}, tmp_path / "evil.pth")
    with pytest.raises(UnsafeCheckpointError, match=r"\((posix|nt)\.system\)"):
        load_checkpoint_safely(tmp_path / "evil.pth")


def test_absent_damaged_and_foreign_files(tmp_path):
    with pytest.raises(UnsafeCheckpointError, match="no checkpoint file"):
        load_checkpoint_safely(tmp_path / "none.pth")
    torch.save({"w": torch.ones(1000)}, tmp_path / "whole.pth")
    content = (tmp_path / "whole.pth").read_bytes()
    (tmp_path / "half.pth").write_bytes(content[: len(content) // 2])
    (tmp_path / "text.pth").write_text("not a checkpoint")
    (tmp_path / "empty.pth").touch()
    for name in ("half", "text", "empty"):
        with pytest.raises(UnsafeCheckpointError, match=f"{name}.pth is not a readable"):
            load_checkpoint_safely(tmp_path / f"{name}.pth")
    torch.save([torch.ones(1)], tmp_path / "list.pth")
    with pytest.raises(UnsafeCheckpointError, match="holds a list"):
        load_checkpoint_safely(tmp_path / "list.pth")


@pytest.mark.parametrize("thing, refused", [(Calls(os.mkdir, "harmed"), True), (1, False)])
@pytest.mark.parametrize(
    "force, forbid", [(None, "1"), ("0", None)], ids=["full loading forced", "nothing forced"]
)
def test_a_loader_that_loads_all_cannot(tmp_path, monkeypatch, force, forbid, thing, refused):
    """Whatever the environment says, which is then as before."""
    monkeypatch.chdir(tmp_path)
    before = dict(TORCH_FORCE_WEIGHTS_ONLY_LOAD=force, TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD=forbid)
    for name, value in before.items():
        if value is None:
            monkeypatch.delenv(name, raising=False)
        else:
            monkeypatch.setenv(name, value)
    monkeypatch.setitem(
        checkpoint_loaders(),
        "full://",
        lambda address, map_location=None: torch.load(address[7:], weights_only=False),
    )
    guard_checkpoint_loader()
    torch.save({"x": thing}, "a.pth")
    if refused:
        with pytest.raises(pickle.UnpicklingError, match="weights_only"):
            CheckpointLoader.load_checkpoint("full://a.pth")
    else:
        assert CheckpointLoader.load_checkpoint("full://a.pth") == {"x": thing}
    assert not (tmp_path / "harmed").exists()
    assert {name: os.environ.get(name) for name in before} == before


@pytest.mark.slow
def test_importing_mmvssm_run_is_enough(tmp_path):
    """Inference code that imports it reads training checkpoints too."""
    torch.save({"h": HistoryBuffer([1.0], [1])}, tmp_path / "a.pth")
    code = "import mmvssm.run, torch, sys; torch.load(sys.argv[1], weights_only=True); " \
           "assert not {'mmdet', 'mmseg'} & set(sys.modules)"  # fmt: skip
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "a.pth")], check=True)
