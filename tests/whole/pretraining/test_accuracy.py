"""tools/experiments/accuracy.py: its arms, rejected arguments, reports, and a run of it."""

import argparse
import json
from pathlib import Path

import accuracy
import pytest
import torch
from accuracy import ARMS, TEACHERS, Campaign
from mmengine.config import Config
from mmengine.registry import init_default_scope

from mmvssm.analysis.flops import count
from mmvssm.errors import UserError
from mmvssm.registry import MODELS
from support.pretraining import require_mmpretrain, write_class_folders

require_mmpretrain()

CONFIGS = Path(__file__).parents[3] / "configs"


@pytest.fixture
def images(tmp_path):
    return write_class_folders(tmp_path / "data")


def campaign(images, out, **settings):
    settings = {**dict(arms=list(ARMS), seeds=[0, 1], epochs=None), **settings}
    return Campaign(argparse.Namespace(data_root=str(images), out=str(out), **settings))


def test_equal_flops():
    """The convolutional student has as many as the GroupMamba."""
    found = []
    init_default_scope("mmpretrain")
    for name in ("GroupMamba", "ResNet"):
        model = MODELS.build(Config.fromfile(CONFIGS / ARMS[name].config).model).eval()
        found.append(count(model, lambda m=model: m(torch.rand(1, 3, 32, 32)))["total"].flops)
    assert found[1] == pytest.approx(found[0], rel=0.02)


def test_arms_differ_in_what_they_are_called_for(images, tmp_path):
    tasks = campaign(images, tmp_path / "out").tasks
    assert all([seed for arm, seed in tasks if arm == teacher] == [0] for teacher in TEACHERS)
    assert all(
        seeds == [0, 1]
        for seeds in [[s for a, s in tasks if a == arm] for arm in ARMS if arm not in TEACHERS]
    )
    assert (
        len({task.folder for task in tasks.values()})
        == len({task.name for task in tasks.values()})
        == len(tasks)
    )
    command = tasks["pruned, hold", 1].command
    assert "model.backbone.pruning.alignment=hold" in command and "randomness.seed=1" in command
    assert tasks["pruned, hold", 1].after == ("PlainMamba, seed 1",)
    dense = str(tasks["PlainMamba", 1].folder / "epoch_10.pth")
    assert f"load_from={dense}" in command
    untuned = tasks["pruned, hold, not tuned", 1].command
    assert Path(untuned[1]).name == "test.py" and untuned[3] == dense
    assert set(untuned[4:]) < set(command)
    distilled = tasks["ResNet, distilled", 1]
    assert distilled.after == ("teacher, seed 0",)
    assert (
        f"model.teacher_checkpoint={tasks['teacher', 0].folder / 'average.pth'}"
        in distilled.command
    )
    assert "model.teacher.head.num_classes=2" in distilled.command  # as many as there are folders


def test_only_some_arms_and_what_they_start_from(images, tmp_path):
    few = campaign(images, tmp_path, arms=["pruned, none"], seeds=[3], epochs=2)
    assert list(few.tasks) == [("PlainMamba", 3), ("pruned, none", 3)]
    (dense,) = {option for option in few.tasks["pruned, none", 3].command if "load_from" in option}
    assert dense.endswith("PlainMamba/seed3/epoch_2.pth")


def test_seeds_of_each_arm(images, tmp_path):
    """Two at least by default, and what an arm starts from has them all."""
    tasks = campaign(images, tmp_path, seeds=None).tasks
    names = [task.name for task in tasks.values()]
    for index, task in enumerate(tasks.values()):
        assert set(task.after) <= set(names[:index])
    for arm in ARMS.keys() - set(TEACHERS):
        seeds = [seed for name, seed in tasks if name == arm]
        assert seeds == list(ARMS[arm].seeds) and len(seeds) >= 2
    assert ("GroupMamba", 2) in tasks and ("PlainMamba", 2) not in tasks


def test_the_teacher_is_the_mean_of_what_was_trained(images, tmp_path):
    """Made of whatever checkpoints are there, when its turn comes, and evaluated, not trained."""
    few = campaign(images, tmp_path / "out", arms=["teacher"])
    task = few.tasks["teacher", 0]
    assert task.after == ("teacher, CutMix, seed 0", "teacher, CutMix again, seed 0")
    assert Path(task.command[1]).name == "test.py"
    assert task.command[3] == str(task.folder / "average.pth") == str(few.checkpoint("teacher", 0))
    task.folder.mkdir(parents=True)
    for name, value in zip(ARMS["teacher"].average, (1.0, 2.0)):
        path = few.checkpoint(name, 0)
        path.parent.mkdir(parents=True)
        torch.save(dict(state_dict=dict(weight=torch.tensor([value]))), path)
    task.prepare()
    assert torch.load(task.command[3], weights_only=True)["state_dict"]["weight"].tolist() == [1.5]
    assert few.tasks["teacher, CutMix", 0].prepare is None


def test_mean_of_weights():
    states = [
        dict(weight=torch.tensor([1.0, 2.0]), steps=torch.tensor(7)),
        dict(weight=torch.tensor([2.0, -4.0]), steps=torch.tensor(9)),
    ]
    found = accuracy.mean(states)
    assert found["weight"].tolist() == [1.5, -1.0] and found["steps"] == 7


def test_one_teacher_whatever_the_seeds_of_students(images, tmp_path):
    few = campaign(images, tmp_path, arms=["ResNet, distilled"], seeds=[3, 1])
    students = [("ResNet, distilled", 3), ("ResNet, distilled", 1)]
    assert list(few.tasks) == [*((name, 0) for name in TEACHERS), *students]
    assert all(few.tasks[student].after == ("teacher, seed 0",) for student in students)


def test_settings_of_an_arm_and_of_its_config_are_known(images, tmp_path):
    """By which runs of others are found."""
    of_hold = json.loads(json.dumps(campaign(images, tmp_path).tasks["pruned, hold", 1].settings))
    assert "model.backbone.pruning.alignment=hold" in of_hold["options"]
    assert of_hold["config"]["train_cfg"]["max_epochs"] == 3


@pytest.mark.parametrize(
    "arguments, words",
    [
        (
            ["--arms", "hold"],
            f"unknown arms 'hold'; known are {', '.join(map(repr, ARMS))}",
        ),
        (["--jobs", "0"], "--jobs must be at least 1"),
        (["--epochs", "0"], "--epochs must be at least 1"),
        (["--seeds", "1", "1"], "--seeds 1 1: each seed once"),
        (["--data-root", "nowhere"], "there is no folder nowhere/train"),
    ],
)
def test_what_is_refused(images, monkeypatch, arguments, words):
    monkeypatch.setattr("sys.argv", ["accuracy.py", "--data-root", str(images), *arguments])
    with pytest.raises(UserError, match=words):
        accuracy.parse_args()


def test_table():
    results = {
        "pruned, hold": dict(top1=[80.0, 81.0], flops=27.43, parameters=0.1, milliseconds=0.5),
        "pruned, hold, not tuned": dict(top1=[40.0, 50.0]),
        "pruned, none, not tuned": dict(top1=[30.0]),
    }
    lines = accuracy.table_of(results).splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]
    assert cells == [
        ["pruned, hold", "0.10", "27.43", "0.500", "80.50 ± 0.71", "80.00, 81.00", "45.00 ± 7.07"],
        ["pruned, none, not tuned", "", "", "", "30.00", "30.00", ""],
    ]


@pytest.mark.slow
def test_a_whole_campaign(images, tmp_path, monkeypatch, capsys):
    """A teacher, a student, and no training the second time."""
    arguments = [
        "--data-root",
        str(images),
        "--out",
        str(tmp_path / "out"),
        "--arms",
        "GroupMamba, distilled",
    ]
    monkeypatch.setattr(
        "sys.argv", ["accuracy.py", *arguments, "--epochs", "1", "--seeds", "0", "--jobs", "2"]
    )
    monkeypatch.setattr(accuracy, "BATCH", 2)
    monkeypatch.setattr(
        accuracy, "time_side_by_side", lambda runs, *_: {name: [1e-3] for name in runs}
    )
    accuracy.main()
    output = capsys.readouterr().out
    runs = len(TEACHERS) + 1
    assert f"[{runs} of {runs}] GroupMamba, distilled, seed 0: top1" in output
    results = json.loads((tmp_path / "out/results.json").read_text())
    assert set(results["arms"]) == {*TEACHERS, "GroupMamba, distilled"}
    student = results["arms"]["GroupMamba, distilled"]
    assert student["milliseconds"] == 0.5 and 4 < student["flops"] < 5 and len(student["top1"]) == 1
    assert (tmp_path / "out/accuracy.png").stat().st_size > 10_000
    assert (tmp_path / "out/table.md").read_text() in output
    accuracy.main()
    assert f"{runs} of {runs} runs were done before" in capsys.readouterr().out
