"""NaN and infinity reach neither the weights nor a checkpoint, and stop the run."""

import math

import pytest
import torch
from mmengine.registry import OPTIM_WRAPPERS

from mmvssm.processes import any_process
from mmvssm.run.hooks import BFloat16OptimWrapper, NonFiniteError, NonFiniteGuardHook
from support.toy_training import losses, toy_runner

NAN, INF = math.nan, math.inf
CLIP = {"optim_wrapper.clip_grad": dict(max_norm=1.0)}


def train(work_dir, explode=None, **changes):
    runner = toy_runner(work_dir, **{"model.explode": explode or {}}, **changes)
    runner.train()
    return runner


def exploding(where, factor, iterations):
    return dict.fromkeys(iterations, (where, factor))


# What goes wrong, what the user is told.
STOPS = {
    "NaN in an activation": (
        exploding("forward", NAN, (7, 8, 9)),
        {},
        ["the loss is not finite (loss, loss_fit, loss_penalty)"],
    ),
    "infinite activation, clipped gradients": (
        exploding("forward", INF, (7, 8, 9)),
        CLIP,
        ["(loss, loss_fit, loss_penalty)"],
    ),
    "NaN in a loss alone": (
        exploding("loss", NAN, (7, 8, 9)),
        {},
        ["the loss is not finite (loss, loss_penalty)"],
    ),
    "infinite gradient": (
        exploding("backward", INF, (7, 8, 9)),
        {},
        ["gradients are not finite"],
    ),
    "NaN gradient, clipped": (
        exploding("backward", NAN, (7, 8, 9)),
        CLIP,
        ["gradients are not finite"],
    ),
    "NaN in the images": (
        {},
        {"train_dataloader.dataset": dict(type="ToyData", bad=list(range(24)))},
        ["training stopped at iteration 3"],
    ),
    "bfloat16": (
        exploding("forward", NAN, (7, 8, 9)),
        {"optim_wrapper.type": "mmvssm.BFloat16OptimWrapper"},
        ["train in float32 (without --amp)"],
    ),
}


@pytest.mark.parametrize("case", STOPS)
def test_the_run_stops(tmp_path, case):
    explode, changes, said = STOPS[case]
    with pytest.raises(NonFiniteError) as caught:
        train(tmp_path, explode, **changes)
    sentence = str(caught.value)
    expected = [
        *said,
        "3 times in a row",
        "find_origin(model, batch)",
        "lower the learning rate (optim_wrapper.optimizer.lr, now ",
    ]
    if case != "NaN in the images":
        expected.append("training stopped at iteration 10:")
    for part in expected:
        assert part in sentence
    assert "\n" not in sentence and ("clip gradients" in sentence) == (changes != CLIP)
    for file in tmp_path.glob("*.pth"):
        state = torch.load(file, weights_only=True)["state_dict"]
        assert all(tensor.isfinite().all() for tensor in state.values())


@pytest.mark.parametrize("where", ["forward", "backward", "loss"])
@pytest.mark.parametrize("changes", [{}, CLIP], ids=["plain", "clipped"])
def test_a_step_left_out_is_as_if_it_had_not_been(tmp_path, where, changes):
    """Parameters, the optimizer's momentum and running statistics; those of three steps in six."""
    bad = train(
        tmp_path / "a", exploding(where, NAN, (1, 2, 4)), by_epoch=False, amount=6, **changes
    )
    good = toy_runner(tmp_path / "b", by_epoch=False, amount=6, **changes)
    left_out = {1, 2, 4}
    step = good.model.train_step

    def some(data, optim_wrapper):
        if good.iter in left_out:
            return dict(loss=torch.zeros(()))
        return step(data, optim_wrapper)

    good.model.train_step = some
    good.train()
    for key, tensor in bad.model.state_dict().items():
        assert tensor.isfinite().all(), key
        assert torch.equal(tensor, good.model.state_dict()[key]), key
    momenta = [r.optim_wrapper.optimizer.state_dict()["state"] for r in (bad, good)]
    assert all(
        torch.equal(momenta[0][i]["momentum_buffer"], momenta[1][i]["momentum_buffer"])
        for i in momenta[1]
    )
    assert len(losses(tmp_path / "a")) == 6  # what was not finite is in the log all the same


def test_only_steps_in_a_row_count(tmp_path):
    train(tmp_path / "a", exploding("forward", NAN, (1, 2, 4, 5, 7, 8)))
    hook = [dict(type="mmvssm.NonFiniteGuardHook", patience=1)]
    with pytest.raises(NonFiniteError, match=r"at iteration 2: .* 1 times in a row"):
        train(tmp_path / "b", exploding("forward", NAN, (1,)), custom_hooks=hook)
    with pytest.raises(ValueError, match="patience must be at least 1; got 0"):
        NonFiniteGuardHook(patience=0)


def test_accumulated_gradients(tmp_path):
    """One bad batch of the three in a step spoils only that step."""
    run = train(
        tmp_path,
        exploding("backward", NAN, (4,)),
        **{"optim_wrapper.accumulative_counts": 3},
    )
    assert all(tensor.isfinite().all() for tensor in run.model.state_dict().values())


def test_accumulated_gradients_that_are_never_finite(tmp_path):
    """Iterations that only accumulate are no sign that steps succeed again."""
    explode = exploding("backward", NAN, range(18))
    with pytest.raises(NonFiniteError, match=r"at iteration 6: gradients are not .* 3 times in"):
        train(tmp_path / "a", explode, **{"optim_wrapper.accumulative_counts": 2})
    # One spoilt batch in each of two steps is two, not three or four.
    explode = exploding("forward", NAN, (4, 7))
    train(tmp_path / "b", explode, **{"optim_wrapper.accumulative_counts": 3})


@OPTIM_WRAPPERS.register_module()
class Scaler(BFloat16OptimWrapper):
    """Loss scaling as mmengine's AmpOptimWrapper does it, which insists on a GPU."""

    def __init__(self, scale=2.0**16, **kwargs):
        super().__init__(**kwargs)
        self.loss_scaler = torch.amp.GradScaler("cpu", init_scale=scale)

    def optim_context(self, model):
        return super(BFloat16OptimWrapper, self).optim_context(model)

    def backward(self, loss, **kwargs):
        self.loss_scaler.scale(loss).backward(**kwargs)
        self._inner_count += 1

    def step(self, **kwargs):
        self.loss_scaler.step(self.optimizer, **kwargs)
        self.loss_scaler.update()


SCALED = {"optim_wrapper.type": "Scaler"}


def test_loss_scaling_may_leave_out_many_steps(tmp_path):
    train(tmp_path / "a", exploding("backward", INF, range(2, 17)), **SCALED)
    explode = exploding("forward", INF, range(2, 10))
    with pytest.raises(NonFiniteError, match="at iteration 5"):
        train(tmp_path / "b", explode, **SCALED)


@pytest.mark.parametrize(("accumulative_counts", "patience"), [(1, 32), (2, 5)])
def test_loss_scaling_that_leaves_out_every_step_ends(
    tmp_path, monkeypatch, accumulative_counts, patience
):
    if patience != 32:  # which takes a while
        monkeypatch.setattr("mmvssm.run.hooks.non_finite_guard._SCALING_PATIENCE", patience)
    changes = {**SCALED, "optim_wrapper.accumulative_counts": accumulative_counts}
    explode = exploding("backward", INF, range(2, 200))
    with pytest.raises(NonFiniteError) as caught:
        train(tmp_path, explode, by_epoch=False, amount=40, **changes)
    sentence = str(caught.value)
    last = 2 + patience * accumulative_counts
    assert f"at iteration {last}: loss scaling found no finite gradients, {patience} " in sentence


def test_one_process_speaks_for_itself():
    assert any_process(True) is True and any_process(False) is False
