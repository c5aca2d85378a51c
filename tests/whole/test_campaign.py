"""Sets of runs as processes: order, failures, skipping of finished runs, and interruption."""

import os
import re
import shutil
import signal
import sys
import threading
import time
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
from campaign import Task, last_metric, run_tasks, settle, with_requirements

from mmvssm.errors import UserError

SCRIPT = """
import signal, sys, time
from pathlib import Path

def save(*_):
    Path(folder, "last_checkpoint").write_text("some iteration")
    sys.exit(128 + signal.SIGTERM)

kind, *_ = sys.argv[1:]
folder = Path(sys.argv[sys.argv.index("--work-dir") + 1])
signal.signal(signal.SIGTERM, save)
with open(folder.parent / "log.txt", "a") as log:
    log.write(folder.name + " --resume" * ("--resume" in sys.argv) + "\\n")
print("some output")
if kind == "waits" and "--resume" not in sys.argv:
    time.sleep(60)
if kind == "fails" and not (folder / "repaired").exists():
    sys.exit("it is broken")
"""


@pytest.fixture
def task(tmp_path):
    """Makes tasks, whose processes add a line to a log."""
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)

    def make(name, *after, kind="works", **settings):
        command = (sys.executable, "-S", str(script), kind)
        return Task(
            name,
            tmp_path / name,
            command,
            lambda folder: dict(top1=len(folder.name)),
            after,
            settings,
        )

    return make


def log(tmp_path):
    return (tmp_path / "log.txt").read_text().splitlines()


@pytest.mark.parametrize("jobs", [1, 3])
def test_each_waits_for_what_it_needs_and_is_done_once(tmp_path, task, capsys, jobs):
    tasks = [task("last", "middle", "other"), task("middle", "first"), task("first"), task("other")]
    run_tasks(tasks, jobs)
    ran = log(tmp_path)
    assert sorted(ran) == ["first", "last", "middle", "other"]
    assert ran.index("first") < ran.index("middle") < ran.index("last") == 3
    assert tasks[2].result["top1"] == 5 and 0 < tasks[2].result["seconds"] < 30
    assert "[4 of 4] last: top1 4.00, 0.0 min" in capsys.readouterr().out
    run_tasks([*tasks, task("more", "last")], jobs)
    assert log(tmp_path) == [*ran, "more"]
    assert "4 of 5 runs were done before" in capsys.readouterr().out


def test_prepared_when_its_turn_comes_and_once(tmp_path, task):
    """After what it waits for, before its own process, and with its folder there."""
    ran = []
    last = replace(
        task("last", "first"), prepare=lambda: ran.append((log(tmp_path), *tmp_path.glob("last")))
    )
    for _ in range(2):
        run_tasks([last, task("first")], 2)
    assert ran == [(["first"], last.folder)] and log(tmp_path) == ["first", "last"]


def test_a_failure_leaves_out_what_needs_it_and_nothing_else(tmp_path, task):
    tasks = [task("bad", kind="fails"), task("needs bad", "bad"), task("good")]
    with pytest.raises(
        UserError, match="of 3 runs bad failed and 1 that wait for them were skipped"
    ) as caught:
        run_tasks(tasks)
    assert str(tmp_path / "bad/output.txt") in str(caught.value)
    assert "it is broken" in (tmp_path / "bad/output.txt").read_text()
    assert log(tmp_path) == ["bad", "good"]
    (tmp_path / "bad/repaired").touch()
    run_tasks(tasks)
    assert log(tmp_path) == ["bad", "good", "bad", "needs bad"]


def test_told_to_end_it_ends_the_others_and_goes_on_later(tmp_path, task):
    handler = signal.getsignal(signal.SIGTERM)
    tasks = [task("long", kind="waits"), task("next", "long")]

    def tell():
        while not (tmp_path / "log.txt").exists() or not log(tmp_path):
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=tell, daemon=True)
    thread.start()
    with pytest.raises(SystemExit) as caught:
        run_tasks(tasks)
    thread.join()
    assert caught.value.code == 128 + signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) is handler
    assert (tmp_path / "long/last_checkpoint").exists()  # it was told, and waited for
    assert tasks[0].result is None
    run_tasks(tasks)
    assert log(tmp_path) == ["long", "long --resume", "next"]
    parts = (tmp_path / "long/seconds.txt").read_text().split()
    assert len(parts) == 2 and tasks[0].result["seconds"] == pytest.approx(sum(map(float, parts)))


@pytest.mark.parametrize("kind", ["works", "fails"])
def test_a_run_with_other_settings_is_refused(tmp_path, task, kind):
    """Its result is not this one's, and there is no going on with it."""

    def run(rate):
        run_tasks([task("one", kind=kind, options=(), model=dict(layers=[dict(rate=rate)]))])

    for _ in range(2):  # the same settings once more are not refused
        with pytest.raises(UserError, match="one failed") if kind == "fails" else nullcontext():
            run(0.5)
    with pytest.raises(UserError, match="Move that folder away") as caught:
        run(0.25)
    assert str(caught.value).startswith(
        f"{tmp_path / 'one'} has a run with model.layers.0.rate 0.5, not 0.25."
    )


def test_what_came_from_another_run_is_refused(tmp_path, task):
    tasks = [task("start"), task("from it", "start")]
    run_tasks(tasks)
    shutil.rmtree(tmp_path / "start")
    with pytest.raises(UserError, match="from it has a run that came from another run of start"):
        run_tasks(tasks)
    assert log(tmp_path) == ["start", "from it"]


def test_weights_that_are_gone_are_trained_again_for_what_starts_from_them(tmp_path, task, capsys):
    """As for results that came from another machine; they stay, and what came from them is not refused."""
    first, second = (replace(task(n, *a), weights=tmp_path / n / "last.pth") for n, *a in CHAIN)
    for each in (first, second):
        each.folder.mkdir()
        each.weights.touch()
    old = task("old", "second")
    run_tasks([first, second, old])
    results = [each.result for each in (first, second, old)]
    for each in (first, second):
        each.weights.unlink()
    run_tasks([first, second, old])  # nothing needs them
    assert log(tmp_path) == ["first", "second", "old"]
    new = task("new", "second")
    run_tasks([new, first, second, old])
    assert log(tmp_path) == ["first", "second", "old", "first", "second", "new"]
    assert [each.result for each in (first, second, old)] == results
    assert (first.folder / "result_again.json").exists()
    assert "second runs again for those that start from its weights, which are gone" in (
        capsys.readouterr().out
    )


CHAIN = (("first",), ("second", "first"))


def test_requirements_of_requirements():
    requires = dict(a=["b"], b=["c", "d"], c=[], d=["c"], e=["a"])
    assert with_requirements(["a"], requires.get) == {"a", "b", "c", "d"}


def test_runs_of_other_settings_do_not_mix(tmp_path):
    for _ in range(2):
        settle(tmp_path / "out", dict(epochs=1, data_root="here"))
    with pytest.raises(UserError, match="have data-root here, not there; name another --out"):
        settle(tmp_path / "out", dict(epochs=1, data_root="there"))
    (tmp_path / "out/campaign.json").write_text("{")
    with pytest.raises(UserError, match=r"campaign\.json is damaged"):
        settle(tmp_path / "out", dict(epochs=1, data_root="here"))


@pytest.mark.parametrize("text", ["", "{", "[]", "3", "{}", '{"seconds": "x"}', "\xff", "FIFO"])
@pytest.mark.parametrize("name", ["result.json", "origin.json", "seconds.txt"])
def test_a_damaged_file_is_one_sentence(tmp_path, task, name, text):
    folder = tmp_path / "one"
    folder.mkdir()
    path = folder / name
    os.mkfifo(path) if text == "FIFO" else path.write_text(text)
    tasks = [task("one")]
    if name == "seconds.txt" and text in ("", "3"):  # of an earlier part
        run_tasks(tasks)
        return
    remedy = f"{path} is damaged; restore it, or move the folder {folder} away: "
    with pytest.raises(UserError, match=re.escape(remedy)):
        run_tasks(tasks)
    assert not (tmp_path / "log.txt").exists()


def test_last_metric(tmp_path):
    folder = tmp_path / "20260101_000000/vis_data"
    folder.mkdir(parents=True)
    lines = [
        '{"lr": 1.0, "loss": 2.0, "epoch": 1, "step": 5}',
        '{"top1": 10.0, "step": 1}',
        '{"top1": 20.5, "step": 2}',
    ]
    Path(folder, "scalars.json").write_text("\n".join(lines))
    assert last_metric(tmp_path, "top1") == 20.5
    with pytest.raises(UserError, match=r"logged top5; metrics that are there: top1$"):
        last_metric(tmp_path, "top5")
