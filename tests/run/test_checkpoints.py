"""Checks of loaded checkpoints."""

import os

import pytest
import torch
from torch import nn

from mmvssm.errors import UserError
from mmvssm.run.checkpoints import Checkpoint, find_last
from mmvssm.run.train import explain_resuming
from mmvssm.safe_checkpoint import load_checkpoint_safely
from support.toy_training import toy_runner


def training_state(**weights):
    return {
        "meta": {"epoch": 1, "iter": 1},
        "optimizer": {},
        "message_hub": {},
        "state_dict": weights,
    }


def newest(folder):
    return find_last(str(folder))[0].path


def test_resumes_from_the_newest_that_loads(tmp_path):
    assert find_last(str(tmp_path)) == (None, [])
    for step in (2, 9, 10):
        torch.save(training_state(), tmp_path / f"iter_{step}.pth")
    assert newest(tmp_path).endswith("iter_10.pth")  # by number, not by name
    (tmp_path / "last_checkpoint").write_text(str(tmp_path / "iter_9.pth"))
    assert newest(tmp_path).endswith("iter_9.pth")
    (tmp_path / "iter_9.pth").write_bytes(b"torn")
    assert newest(tmp_path).endswith("iter_10.pth")
    assert find_last(str(tmp_path))[1] == [str(tmp_path / "iter_9.pth")]
    (tmp_path / "last_checkpoint").write_text("")  # killed between opening and writing it
    assert newest(tmp_path).endswith("iter_10.pth")
    for damage in (b"\xff\xfe\x00", b"x" * 300, b"iter_2.pth" + b"x" * 9000):
        (tmp_path / "last_checkpoint").write_bytes(damage)
        assert newest(tmp_path).endswith("iter_10.pth")
    (tmp_path / "last_checkpoint").unlink()
    os.mkfifo(tmp_path / "last_checkpoint")
    assert newest(tmp_path).endswith("iter_10.pth")
    (tmp_path / "last_checkpoint").unlink()
    (tmp_path / "last_checkpoint").write_text("/elsewhere/iter_2.pth")  # the work dir was moved
    assert newest(tmp_path).endswith("iter_2.pth")


def test_an_interrupted_run_whose_marker_is_lost(tmp_path):
    file = tmp_path / "interrupted.pth"
    torch.save(training_state(), file)
    assert newest(tmp_path) == str(file)
    for step, age in ((1, 20), (2, 10), (3, 5)):
        torch.save(training_state(), tmp_path / f"epoch_{step}.pth")
        os.utime(tmp_path / f"epoch_{step}.pth", (10**9 - age, 10**9 - age))
    os.utime(file, (10**9, 10**9))
    assert newest(tmp_path) == str(file)
    os.utime(file, (10**9 - 7, 10**9 - 7))  # the one resumed from it has saved more
    assert newest(tmp_path).endswith("epoch_3.pth")
    (tmp_path / "epoch_3.pth").write_bytes(b"torn")
    assert newest(tmp_path) == str(file)


def test_a_checkpoint_that_was_found_is_not_read_again(tmp_path):
    torch.save(training_state(weight=torch.ones(1)), tmp_path / "epoch_1.pth")
    assert find_last(str(tmp_path))[0].weights()["weight"] == 1


def test_only_torn_checkpoints_is_a_mistake(tmp_path):
    (tmp_path / "epoch_1.pth").write_bytes(b"torn")
    with pytest.raises(UserError, match="none of the 1 checkpoints"):
        find_last(str(tmp_path))


def test_weights_alone_cannot_be_resumed():
    with pytest.raises(
        UserError, match=r"x.pth cannot be resumed from .*optimizer.*load_from=x.pth"
    ):
        Checkpoint("x.pth", {"state_dict": {}, "meta": {}}).check_resumable()


def test_checkpoint_must_fit_exactly():
    model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    weights = {f"module.{k}": v.clone() for k, v in model.state_dict().items()}
    weights.pop("module.1.num_batches_tracked")  # checkpoints of old PyTorch lack it
    Checkpoint("a.pth", {"state_dict": weights}).check_fits(model)
    weights["module.0.weight"] = torch.ones(3, 5)
    weights["module.0.bia"] = weights.pop("module.0.bias")
    with pytest.raises(UserError) as caught:
        Checkpoint("a.pth", {"state_dict": weights}).check_fits(model)
    sentence = str(caught.value)
    assert "1 missing from it (0.bias)" in sentence
    assert "1 unknown to the model (0.bia)" in sentence
    assert "0.weight is (3, 5) there and (3, 2) here" in sentence
    assert set(Checkpoint("a.pth", {"module.a": 1}).weights()) == {"a"}


def last_of(groups):
    groups[0]["params"].pop()


ODD_OPTIMIZERS = {
    "no groups": lambda o: o.update(param_groups=[]),
    "groups that are none": lambda o: o.update(param_groups=3),
    "fewer parameters": lambda o: last_of(o["param_groups"]),
    "no rate": lambda o: o["param_groups"][0].pop("lr"),
    "a word for a rate": lambda o: o["param_groups"][0].update(momentum="x"),
    "state of another shape": lambda o: o["state"][0].update(momentum_buffer=torch.ones(7)),
    "state that is none": lambda o: o["state"].update({0: 3}),
    "a word for a tensor": lambda o: o["state"][0].update(momentum_buffer="x"),
}


@pytest.fixture(scope="module")
def toy_checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("toy") / "run"
    toy_runner(folder, amount=1).train()
    return folder / "epoch_1.pth"


@pytest.mark.parametrize("case", [*ODD_OPTIMIZERS, None])
def test_optimizer_states_that_do_not_fit(tmp_path, toy_checkpoint, case):
    content, path = load_checkpoint_safely(toy_checkpoint), str(tmp_path / "odd.pth")
    if case:
        ODD_OPTIMIZERS[case](content["optimizer"])
    torch.save(content, path)

    def resume():
        Checkpoint.load(path).check_resumable()
        runner = toy_runner(tmp_path / "run", amount=2, resume=True, load_from=path)
        runner.optim_wrapper = runner.build_optim_wrapper(runner.optim_wrapper)
        explain_resuming(runner, path)
        runner.train()

    if case is None:
        resume()
        return
    with pytest.raises(
        UserError, match=r"odd\.pth cannot be resumed from(:| because) its optimizer"
    ):
        resume()


class TestWeightsThatAreNotFinite:
    def model(self, **values):
        model = nn.BatchNorm1d(2)
        model.register_buffer("mask", torch.tensor([0, -float("inf")]))
        for name, value in values.items():
            getattr(model, name).data[1] = value
        return model

    @pytest.mark.parametrize("name", ["weight", "running_var"])
    def test_nan_is_refused(self, name):
        checkpoint = Checkpoint(
            "a.pth", {"state_dict": self.model(**{name: torch.nan}).state_dict()}
        )
        with pytest.raises(
            UserError, match=rf"a.pth holds NaN or infinity in 1 weights \({name}\)"
        ):
            checkpoint.check_fits(self.model())

    def test_an_infinite_parameter_is_refused(self):
        checkpoint = Checkpoint("a.pth", {"state_dict": self.model(bias=torch.inf).state_dict()})
        with pytest.raises(UserError, match=r"\(bias\)"):
            checkpoint.check_fits(self.model())

    def test_an_infinite_buffer_is_not(self):
        Checkpoint("a.pth", {"state_dict": self.model().state_dict()}).check_fits(self.model())
