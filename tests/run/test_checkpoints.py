"""Judging checkpoints that were loaded."""

import os

import pytest
import torch
from torch import nn

from mmvssm.errors import UserError
from mmvssm.run.checkpoints import check_fits, check_resumable, find_resumable, weights_of


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
    assert find_resumable(str(tmp_path)).path.endswith("iter_10.pth")  # by number, not by name
    (tmp_path / "last_checkpoint").write_text(str(tmp_path / "iter_9.pth"))
    assert find_resumable(str(tmp_path)).path.endswith("iter_9.pth")
    (tmp_path / "iter_9.pth").write_bytes(b"torn")
    assert find_resumable(str(tmp_path)).path.endswith("iter_10.pth")
    assert find_resumable(str(tmp_path)).skipped == [str(tmp_path / "iter_9.pth")]
    (tmp_path / "last_checkpoint").write_text("")  # killed between opening and writing it
    assert find_resumable(str(tmp_path)).path.endswith("iter_10.pth")
    (tmp_path / "last_checkpoint").write_bytes(b"\xff\xfe\x00")  # damaged
    assert find_resumable(str(tmp_path)).path.endswith("iter_10.pth")
    (tmp_path / "last_checkpoint").write_text("/elsewhere/iter_2.pth")  # the work dir was moved
    assert find_resumable(str(tmp_path)).path.endswith("iter_2.pth")


def test_an_interrupted_run_whose_marker_is_lost(tmp_path):
    file = tmp_path / "interrupted.pth"
    torch.save(training_state(), file)
    assert find_resumable(str(tmp_path)).path == str(file)
    for step, age in ((1, 20), (2, 10), (3, 5)):
        torch.save(training_state(), tmp_path / f"epoch_{step}.pth")
        os.utime(tmp_path / f"epoch_{step}.pth", (10**9 - age, 10**9 - age))
    os.utime(file, (10**9, 10**9))
    assert find_resumable(str(tmp_path)).path == str(file)
    os.utime(file, (10**9 - 7, 10**9 - 7))  # the one resumed from it has saved more
    assert find_resumable(str(tmp_path)).path.endswith("epoch_3.pth")
    (tmp_path / "epoch_3.pth").write_bytes(b"torn")
    assert find_resumable(str(tmp_path)).path == str(file)


def test_a_checkpoint_that_was_found_is_not_read_again(tmp_path):
    torch.save(training_state(weight=torch.ones(1)), tmp_path / "epoch_1.pth")
    found = find_resumable(str(tmp_path))
    assert found.content["state_dict"]["weight"] == 1


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
