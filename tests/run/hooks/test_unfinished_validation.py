"""A validation that did not end is made up for when its run goes on."""

import json
import os
import signal

import pytest
from mmengine.evaluator import BaseMetric
from mmengine.hooks import Hook
from mmengine.registry import METRICS

from mmvssm.errors import Stopped
from mmvssm.run.checkpoints import find_last
from support.toy_training import losses, toy_runner

UNFINISHED = "unfinished_validation"
EMA = {"custom_hooks": [dict(type="EMAHook", momentum=0.3, update_buffers=True)]}


@METRICS.register_module(force=True)
class MeanScore(BaseMetric):
    """By which weights can be told."""

    def process(self, data_batch, data_samples):
        self.results += [sample["score"] for sample in data_samples]

    def compute_metrics(self, results):
        return dict(score=sum(results) / len(results))


def told_to_end():
    os.kill(os.getpid(), signal.SIGTERM)


def at_once():
    raise KeyboardInterrupt


class Breaking(Hook):
    """Ends the run in the nth validation or before an iteration of training."""

    def __init__(self, validation=None, iteration=None, by=at_once):
        self.validation, self.iteration, self.by, self.begun = validation, iteration, by, 0

    def before_val_epoch(self, runner):
        self.begun += 1

    def before_val_iter(self, runner, batch_idx, data_batch=None):
        if self.begun == self.validation and batch_idx == 2:
            self.by()

    def before_train_iter(self, runner, batch_idx, data_batch=None):
        if runner.iter == self.iteration:
            self.by()


def runner(work_dir, resume=False, **settings):
    settings = {"val_evaluator": dict(type="MeanScore"), **settings}
    if resume:
        settings.update(resume=True, load_from=find_last(work_dir)[0].path)
    return toy_runner(work_dir, **settings)


def validations(work_dir):
    """What was logged of them: (step, score)."""
    files = sorted(work_dir.glob("*/vis_data/scalars.json"))
    records = [json.loads(line) for file in files for line in file.read_text().splitlines()]
    return [(record["step"], record["score"]) for record in records if "score" in record]


@pytest.mark.parametrize("iterations", [False, True], ids=["epochs", "iterations"])
@pytest.mark.parametrize("averaged", [False, True], ids=["", "averaged weights"])
@pytest.mark.parametrize(
    "which, by", [(1, told_to_end), (1, at_once), (3, told_to_end), (3, at_once)]
)
def test_it_is_made_up_for(tmp_path, which, by, averaged, iterations):
    settings = dict(by_epoch=False, amount=18) if iterations else {}
    settings.update(EMA if averaged else {})
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    runner(whole, **settings).train()
    run = runner(broken, **settings)
    run.register_hook(Breaking(which, by=by))
    with pytest.raises((Stopped, KeyboardInterrupt)):
        run.train()
    assert (broken / UNFINISHED).exists()
    runner(broken, resume=True, **settings).train()
    assert validations(broken) == validations(whole) and len(validations(whole)) == 3
    assert not list(tmp_path.glob(f"*/{UNFINISHED}"))


def test_a_schedule_that_follows_a_metric_does_its_step(tmp_path):
    plateau = dict(type="ReduceOnPlateauLR", monitor="score", rule="greater", patience=0)
    settings = dict(param_scheduler=[dict(plateau, threshold=10.0, factor=0.5)])
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    runner(whole, **settings).train()
    run = runner(broken, **settings)
    run.register_hook(Breaking(2))
    with pytest.raises(KeyboardInterrupt):
        run.train()
    runner(broken, resume=True, **settings).train()
    rates = [{step: logged["lr"] for step, logged in losses(d).items()} for d in (whole, broken)]
    assert rates[0] == rates[1] and rates[0][18] < rates[0][12]


def test_the_best_of_all_is_not_lost(tmp_path):
    best = dict(save_best="score", rule="greater")
    settings = {f"default_hooks.checkpoint.{key}": value for key, value in best.items()}
    run = runner(tmp_path, **settings)
    run.register_hook(Breaking(1))
    with pytest.raises(KeyboardInterrupt):
        run.train()
    assert not list(tmp_path.glob("best_*"))
    runner(tmp_path, resume=True, **settings, amount=1).train()
    assert [path.name for path in tmp_path.glob("best_*")] == ["best_score_epoch_1.pth"]


def test_one_that_ended_is_not_repeated(tmp_path):
    run = runner(tmp_path)
    run.register_hook(Breaking(iteration=8))
    with pytest.raises(KeyboardInterrupt):
        run.train()
    runner(tmp_path, resume=True).train()
    assert [step for step, _ in validations(tmp_path)] == [1, 2, 3]


def test_nor_that_of_a_later_moment(tmp_path):
    run = runner(tmp_path)
    run.register_hook(Breaking(2))
    with pytest.raises(KeyboardInterrupt):
        run.train()
    (tmp_path / "epoch_2.pth").unlink()
    (tmp_path / "last_checkpoint").unlink()
    runner(tmp_path, resume=True).train()  # from epoch 1
    assert [step for step, _ in validations(tmp_path)] == [1, 2, 3]


@pytest.mark.parametrize("content", ["", "soon", "6.0"])
def test_a_damaged_note_says_nothing(tmp_path, content):
    runner(tmp_path, amount=1).train()
    (tmp_path / UNFINISHED).write_text(content)
    runner(tmp_path, resume=True, amount=2).train()
    assert [step for step, _ in validations(tmp_path)] == [1, 2]


def test_evaluation_alone_leaves_no_note(tmp_path):
    run = runner(tmp_path)
    run.register_hook(Breaking(1))
    with pytest.raises(KeyboardInterrupt):
        run.val()
    assert not (tmp_path / UNFINISHED).exists()
