"""Several ranks of one run: work that rank 0 does for all, and the rank that reports an error."""

import os
import time
from argparse import Namespace
from datetime import timedelta

import pytest
from core.datasets.test_data_root import detector, segmenter, write_coco
from mmengine.config import Config

from mmvssm.datasets.annotations import read_coco
from mmvssm.datasets.root import SPLIT_OF_LOADER, apply_data_root
from mmvssm.errors import RunFailure, UserError, run_tool
from mmvssm.processes import on_first_process
from mmvssm.registry import TASK_UTILS
from mmvssm.run import distributed
from mmvssm.run.distributed import init_processes
from mmvssm.run.setup import prepare_data
from mmvssm.run.work_dir import lock_work_dir
from support.two_processes import in_two_processes


def fail(error):
    raise error


def test_what_one_process_does_all_learn(tmp_path):
    def look(rank):
        return on_first_process(lambda: {rank, os.getpid()}), os.getpid()

    (found, first), (told, second) = in_two_processes(look, tmp_path)
    assert found == told == {0, first} and first != second


@pytest.mark.parametrize(
    ("error", "first", "other"),
    [
        (UserError("no such folder"), "UserError: no such folder", "no such folder"),
        (ValueError("a bug"), "ValueError: a bug", "rank 0 ended with ValueError (a bug)"),
        (KeyboardInterrupt(), "KeyboardInterrupt: ", "rank 0 ended with KeyboardInterrupt"),
    ],
    ids=["mistake", "bug", "Ctrl-C"],
)  # fmt: skip
def test_whatever_one_process_meets_ends_all(tmp_path, error, first, other):
    found = in_two_processes(lambda rank: on_first_process(fail, error), tmp_path)
    assert found[0] == first
    assert found[1].startswith(f"UserError: {other}")


def test_the_others_wait_longer_than_a_collective(tmp_path):
    found = in_two_processes(
        lambda rank: on_first_process(lambda: time.sleep(3) or 7),
        tmp_path,
        timeout=timedelta(seconds=1),
    )
    assert found == [7, 7]


@TASK_UTILS.register_module()
class GeneratorThatFails:
    def ensure(self):
        raise ValueError("no room")


def test_data_that_cannot_be_generated_ends_all(tmp_path):
    cfg = Config(dict(prepare_data=dict(type="mmvssm.GeneratorThatFails"), default_scope="mmdet"))
    args = Namespace(
        no_data_check=False, data_root=None, data_format=None, classes=None, reduce_zero_label=None
    )
    found = in_two_processes(lambda rank: prepare_data(cfg, args, (), None), tmp_path)
    said = "cannot prepare the data set: no room"
    assert found == [f"UserError: {said}", f"UserError: {said}"]


@pytest.mark.parametrize("config", [detector, segmenter])
def test_one_process_reads_the_classes(tmp_path, config):
    """A large annotation file takes gigabytes of each process that parses it."""
    root = write_coco(tmp_path / "data")

    def look(rank):
        cfg = config()
        apply_data_root(cfg, str(root), list(SPLIT_OF_LOADER))
        return read_coco.cache_info().misses, cfg.train_dataloader

    (first, cfg), (other, same) = in_two_processes(look, tmp_path / "meeting")
    assert (first, other) == (1, 0) and cfg == same


def test_lock_that_the_first_cannot_get_ends_all(tmp_path, monkeypatch):
    monkeypatch.setattr("mmvssm.run.work_dir._PATIENCE", 0.0)

    def train(rank):
        with lock_work_dir(str(tmp_path / "run")):
            return os.listdir(tmp_path / "run")

    assert in_two_processes(train, tmp_path / "first")[0] == ["training.lock"]
    with lock_work_dir(str(tmp_path / "run")):
        found = in_two_processes(train, tmp_path / "second")
    assert all(text.startswith("UserError: another run is training into") for text in found)


def said(function, capsys):
    """The sentences of one process."""
    capsys.readouterr()
    with pytest.raises(SystemExit):
        run_tool(function)
    return [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]


@pytest.mark.parametrize(
    ("variables", "speaks"),
    [
        ({}, True),
        ({"SLURM_PROCID": "2"}, True),  # srun of independent runs
        ({"RANK": "1"}, True),
        ({"RANK": "1", "TORCHELASTIC_RUN_ID": "none"}, False),
        ({"RANK": "0", "TORCHELASTIC_RUN_ID": "none"}, True),
        ({"RANK": "2", "LOCAL_RANK": "0", "TORCHELASTIC_RUN_ID": "none"}, True),
    ],
)
def test_one_of_a_machine_reports_before_processes_meet(monkeypatch, capsys, variables, speaks):
    names = ("RANK", "LOCAL_RANK", "SLURM_PROCID", "TORCHELASTIC_RUN_ID", "MMVSSM_TRACEBACK")
    for name in names:
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert bool(said(lambda: fail(UserError("no such file")), capsys)) is speaks
    assert said(lambda: fail(RunFailure("out of memory")), capsys)


def test_rank_0_reports_in_a_group(tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("MMVSSM_TRACEBACK", raising=False)

    def run(rank):
        alike = said(lambda: fail(UserError("met by all")), capsys)
        first = said(lambda: on_first_process(fail, UserError("met by the first")), capsys)
        alone = said(lambda: fail(RunFailure("perhaps met by one")), capsys)
        return [len(lines) for lines in (alike, first, alone)]

    assert in_two_processes(run, tmp_path) == [[1, 1, 1], [0, 0, 1]]


def test_a_process_without_a_gpu_says_so(monkeypatch, capsys):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.setattr(distributed, "set_multi_processing", lambda **_: None)
    monkeypatch.setenv("RANK", "2")
    monkeypatch.setenv("LOCAL_RANK", "2")
    monkeypatch.delenv("MMVSSM_TRACEBACK", raising=False)
    (line,) = said(lambda: init_processes(Config(dict(launcher="pytorch"))), capsys)
    assert "more processes than GPUs were started: this machine has 2" in line
