"""Reading and drawing mmengine's logs."""

import json
import logging
import os
import time

import cv2
import pytest
from mmengine.config import Config
from mmengine.runner import Runner

from mmvssm.analysis.training_log import Curve, default_keys, draw_runs, read_run
from mmvssm.errors import UserError
from mmvssm.run.options import use_logger
from support.tool_runs import call, sentence_of_refusal
from support.toy_training import losses, toy_config


@pytest.fixture(autouse=True)
def surroundings(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(logging, "raiseExceptions", False)
    monkeypatch.delenv("MMVSSM_TRACEBACK", raising=False)


def log(folder, *records):
    """Write a log as mmengine does."""
    file = folder / "vis_data" / "scalars.json"
    file.parent.mkdir(parents=True)
    file.write_text("".join(f"{json.dumps(r) if isinstance(r, dict) else r}\n" for r in records))


def training(step, loss, **more):
    return dict(lr=0.1, loss=loss, time=1.0, iter=step, step=step, **more)


@pytest.mark.parametrize("by_epoch", [True, False])
def test_reads_what_mmengine_writes(by_epoch, tmp_path):
    """A run that was resumed reads as one that was not."""
    amount = 3 if by_epoch else 18

    def train(name, **changes):
        cfg = toy_config(tmp_path / name, by_epoch, amount, **changes)
        cfg.default_hooks.logger.log_metric_by_epoch = by_epoch
        Runner.from_cfg(cfg).train()

    train("whole")
    train("parts")
    checkpoint = "epoch_2.pth" if by_epoch else "iter_12.pth"
    time.sleep(1.1)  # mmengine names a part by the second in which it began
    train("parts", resume=True, load_from=str(tmp_path / "parts" / checkpoint))
    whole, parts = read_run("whole"), read_run("parts")
    assert (whole.parts, parts.parts) == (1, 2)
    assert whole.training["loss"].steps == list(range(1, 19))
    assert whole.training["loss"].values == [losses("whole")[step]["loss"] for step in range(1, 19)]
    for key in ("loss", "lr", "loss_fit"):
        assert parts.training[key] == whole.training[key]
    assert whole.by_epoch is by_epoch
    assert whole.metrics["toy/mAP"].steps == ([1, 2, 3] if by_epoch else [6, 12, 18])
    assert parts.metrics["toy/mAP"].steps == whole.metrics["toy/mAP"].steps
    assert default_keys([whole]) == ["loss", "loss_fit", "loss_penalty", "lr", "toy/mAP"]


def test_what_a_resumed_part_does_again_replaces_the_old(tmp_path):
    first = [training(step, 1.0, epoch=1 + (step > 20)) for step in (10, 20, 30, 40)]
    log(
        tmp_path / "run" / "20250101_000000",
        *first[:2],
        dict(mAP=0.1, step=1),
        *first[2:],
        dict(mAP=0.2, step=2),
    )
    log(tmp_path / "run" / "20250102_000000", training(30, 2.0, epoch=2))
    run = read_run("run")
    assert (run.training["loss"].steps, run.training["loss"].values) == ([10, 20, 30], [1, 1, 2])
    assert (run.metrics["mAP"].steps, run.metrics["mAP"].values) == ([1], [0.1])


def test_a_part_resumed_after_the_clock_went_back_still_comes_last(tmp_path):
    log(
        tmp_path / "run" / "20250601_000000",
        *(training(step, 1.0, epoch=1) for step in range(1, 101)),
        dict(mAP=0.1, step=1),
    )
    log(
        tmp_path / "run" / "20250101_000000",
        *(training(step, 2.0, epoch=2) for step in range(91, 241)),
        dict(mAP=0.2, step=2),
    )
    run = read_run("run")
    assert run.training["loss"].steps == list(range(1, 241))
    assert run.training["loss"].values == [1.0] * 90 + [2.0] * 150
    assert run.metrics["mAP"].values == [0.1, 0.2]


def test_reading_takes_time_linear_in_the_number_of_lines(tmp_path):
    """Without a clock: a list that counts how many of its elements are visited."""
    visited = 0

    class Steps(list):
        def __iter__(self):
            nonlocal visited
            visited += len(self)
            return super().__iter__()

    curve = Curve(Steps(), [])
    for step in range(1000):
        curve.add(step, 0.0)
    assert visited <= 2000 and curve.steps == list(range(1000))
    curve.add(500, 1.0)
    assert len(curve.values) == 501 and curve.values[-1] == 1.0


def test_more_curves_than_a_picture_holds(tmp_path, capsys):
    """With time linear in their number; the panels themselves would take minutes."""
    many = {f"loss_{i}": 1.0 for i in range(2000)}
    log(tmp_path / "run" / "20250101_000000", *(training(step, 2.0, **many) for step in (1, 2)))
    said = sentence_of_refusal(capsys, "plot_log.py", "run", "--out", "a.png")
    assert "there are 2002 curves, of which one picture holds 150; choose some with --keys" in said
    call("plot_log.py", "run", "--keys", "loss_1999", "--out", "a.png")


def test_damaged_lines_are_counted(tmp_path, capsys):
    broken = [
        '{"loss": 1.0, "st',
        "[1]",
        '{"loss": 1}',
        '{"lr": 1, "step": 3, "epoch": "x"}',
        "",
        '{"step": "3"}',
    ]
    log(tmp_path / "run" / "20250101_000000", training(1, 3.0), *broken, training(2, float("nan")))
    call("plot_log.py", "run", "--out", "a.png")
    assert "run: 2 iterations; 5 damaged lines were skipped" in capsys.readouterr().out
    assert read_run("run").training["loss"].steps == [1, 2]


def test_draws_a_panel_for_each_curve_with_a_line_for_each_run(tmp_path):
    both = [training(step, 1 / step) for step in (1, 2, 3)]
    log(tmp_path / "a" / "20250101_000000", *both, dict(mIoU=50.0, time=1.0, data_time=1.0, step=3))
    log(tmp_path / "b" / "20250101_000000", *both[:2], dict(aAcc=50.0, step=2))
    runs = [read_run("a"), read_run("b")]
    keys = default_keys(runs)
    assert keys == ["loss", "lr", "mIoU", "aAcc"]
    figure = draw_runs(runs, keys)
    panels = [panel for panel in figure.axes if panel.axison]
    assert [panel.get_title() for panel in panels] == keys
    lines = [
        [list(line.get_xdata()) for line in panel.lines if len(line.get_xdata())]
        for panel in panels
    ]
    assert lines == [[[1, 2, 3], [1, 2]], [[1, 2, 3], [1, 2]], [[3]], [[2]]]
    assert {panel.get_xlabel() for panel in panels} == {"iteration"}
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["a", "b"]


def test_writes_a_picture(tmp_path, capsys):
    for place in ("x/run", "y/run"):
        log(tmp_path / place / "20250101_000000", training(1, 2.0, epoch=1), dict(mAP=0.5, step=1))
    call("plot_log.py", "x/run", "y/run", "--keys", "loss", "mAP", "--out", "curves.png")
    assert "Picture: curves.png" in capsys.readouterr().out
    height, width, _ = cv2.imread("curves.png").shape
    assert width > 900 and height > 300
    call("plot_log.py", "x/run/20250101_000000", "--out", "curves.svg")
    assert "<svg" in (tmp_path / "curves.svg").read_text()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["absent", "--out", "a.png"], "there is no work dir or log absent"),
        (["bare", "--out", "a.png"], "bare has no log of a training"),
        (["begun", "--out", "a.png"], "the log of begun holds no losses or metrics yet"),
        (["run", "--out", "a.txt"], "--out a.txt: the name must end in .png"),
        (["run", "--out", "nowhere/a.png"], "the folder nowhere for the picture does not exist"),
        (
            ["run", "--out", "a.png", "--keys", "los"],
            "no run logged 'los'; there are lr, loss, time",
        ),
    ],
)
def test_refuses(arguments, words, tmp_path, capsys):
    log(tmp_path / "run" / "20250101_000000", training(1, 2.0))
    log(tmp_path / "begun" / "20250101_000000")
    (tmp_path / "bare").mkdir()
    assert words in sentence_of_refusal(capsys, "plot_log.py", *arguments)


@pytest.mark.parametrize("make", [os.mkdir, os.mkfifo])
def test_an_unreadable_log_is_one_sentence(tmp_path, make):
    folder = tmp_path / "run" / "20250101_000000" / "vis_data"
    folder.mkdir(parents=True)
    make(folder / "scalars.json")
    with pytest.raises(UserError, match=r"cannot read run/.*: (Is a directory|it is no regular)"):
        read_run("run")


class TestTensorBoard:
    def test_a_missing_package_is_one_sentence(self, monkeypatch):
        monkeypatch.setattr("mmvssm.run.options.find_spec", lambda name: None)
        with pytest.raises(
            UserError, match=r"^--logger tensorboard needs a package .* pip install tensorboard$"
        ):
            use_logger(Config(), "tensorboard")

    def test_runs_write_what_they_log(self, tmp_path):
        pytest.importorskip("tensorboard")
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        cfg = toy_config(tmp_path / "run", amount=1)
        use_logger(cfg, "tensorboard")
        Runner.from_cfg(cfg).train()
        (folder,) = (tmp_path / "run").glob("*/vis_data")
        events = EventAccumulator(str(folder))
        events.Reload()
        logged = {event.step: event.value for event in events.Scalars("loss")}
        wanted = {step: record["loss"] for step, record in losses(tmp_path / "run").items()}
        assert logged == pytest.approx(wanted) and len(wanted) == 6

    def test_what_the_config_has_stays(self, monkeypatch):
        monkeypatch.setattr("mmvssm.run.options.find_spec", lambda name: name)
        backends = [dict(type="LocalVisBackend", save_dir="x")]
        cfg = Config(dict(visualizer=dict(type="DetLocalVisualizer", vis_backends=backends)))
        for _ in range(2):
            use_logger(cfg, "tensorboard")
            assert cfg.visualizer.type == "DetLocalVisualizer"
            assert cfg.visualizer.vis_backends == [*backends, dict(type="TensorboardVisBackend")]
