"""Loading without running code, and judging what was loaded."""

import os
import subprocess
import sys
from collections import OrderedDict
from functools import partial

import numpy as np
import pytest
import torch
from mmengine.logging import HistoryBuffer
from torch import nn

from mmvssm.engine import UnsafeCheckpointError, UserError, load_checkpoint_safely
from mmvssm.engine.checkpoints import check_fits, check_resumable, find_resumable, weights_of


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
    ],
    ids=["system", "eval", "getattr", "dunder", "method", "subprocess", "partial", "module"],
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


def test_importing_mmvssm_is_enough(tmp_path):
    """Inference code that only imports mmvssm reads training checkpoints too."""
    torch.save({"h": HistoryBuffer([1.0], [1])}, tmp_path / "a.pth")
    code = "import mmvssm, torch, sys; torch.load(sys.argv[1], weights_only=True); " \
           "assert not {'mmdet', 'mmseg'} & set(sys.modules)"  # fmt: skip
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "a.pth")], check=True)


def training_state(**weights):
    return {
        "meta": {"epoch": 1, "iter": 1},
        "optimizer": {},
        "message_hub": {},
        "state_dict": weights,
    }


def test_resumes_from_the_newest_that_loads(tmp_path):
    assert find_resumable(str(tmp_path)) is None
    for step in (2, 9, 10):
        torch.save(training_state(), tmp_path / f"iter_{step}.pth")
    assert find_resumable(str(tmp_path)).endswith("iter_10.pth")  # by number, not by name
    (tmp_path / "last_checkpoint").write_text(str(tmp_path / "iter_9.pth"))
    assert find_resumable(str(tmp_path)).endswith("iter_9.pth")
    (tmp_path / "iter_9.pth").write_bytes(b"torn")
    assert find_resumable(str(tmp_path)).endswith("iter_10.pth")
    (tmp_path / "last_checkpoint").write_text("")  # killed between opening and writing it
    assert find_resumable(str(tmp_path)).endswith("iter_10.pth")
    (tmp_path / "last_checkpoint").write_text("/elsewhere/iter_2.pth")  # the work dir was moved
    assert find_resumable(str(tmp_path)).endswith("iter_2.pth")


def test_only_torn_checkpoints_is_a_mistake(tmp_path):
    (tmp_path / "epoch_1.pth").write_bytes(b"torn")
    with pytest.raises(UserError, match="none of the 1 checkpoints"):
        find_resumable(str(tmp_path))


def test_weights_alone_cannot_be_resumed():
    with pytest.raises(
        UserError, match=r"x.pth cannot be resumed from .*optimizer.*load_from=x.pth"
    ):
        check_resumable({"state_dict": {}, "meta": {}}, "x.pth")


def test_checkpoint_must_fit_exactly():
    model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    weights = {f"module.{k}": v.clone() for k, v in model.state_dict().items()}
    weights.pop("module.1.num_batches_tracked")  # checkpoints of old PyTorch lack it
    check_fits(model, {"state_dict": weights}, "a.pth")
    weights["module.0.weight"] = torch.ones(3, 5)
    weights["module.0.bia"] = weights.pop("module.0.bias")
    with pytest.raises(UserError) as caught:
        check_fits(model, {"state_dict": weights}, "a.pth")
    sentence = str(caught.value)
    assert "1 missing from it (0.bias)" in sentence
    assert "1 unknown to the model (0.bia)" in sentence
    assert "0.weight is (3, 5) there and (3, 2) here" in sentence
    assert set(weights_of({"module.a": 1})) == {"a"}
