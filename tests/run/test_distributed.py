"""Several processes of one run: what the first does for all, and who says what went wrong."""

import os
import time
from argparse import Namespace
from datetime import timedelta

import pytest
from mmengine.config import Config
from run.test_data_root import detector, segmenter, write_coco

from mmvssm.datasets.annotations import read_coco
from mmvssm.datasets.root import SPLIT_OF_LOADER, apply_data_root
from mmvssm.errors import RunFailure, UserError, run_tool
from mmvssm.processes import on_first_process
from mmvssm.registry import TASK_UTILS
from mmvssm.run import distributed
from mmvssm.run.distributed import init_processes
from mmvssm.run.setup import open_config, prepare_data
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
        (ValueError("a bug"), "ValueError: a bug", "the first process ended with ValueError (a bug)"),
        (KeyboardInterrupt(), "KeyboardInterrupt: ", "the first process ended with KeyboardInterrupt"),
    ],
    ids=["mistake", "bug", "Ctrl-C"],
)  # fmt: skip
def test_whatever_one_process_meets_ends_all(tmp_path, error, first, other):
    found = in_two_processes(lambda rank: on_first_process(fail, error), tmp_path)
    assert found[0] == first
    assert found[1].startswith(f"FirstProcessFailed: {other}")


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
    args = Namespace(no_data_check=False, data_root=None, classes=None, reduce_zero_label=None)
    found = in_two_processes(lambda rank: prepare_data(cfg, args, (), None), tmp_path)
    said = "cannot prepare the data set: no room"
    assert found == [f"UserError: {said}", f"FirstProcessFailed: {said}"]


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
    monkeypatch.setattr("mmvssm.run.work_dir._MOMENT", 0.0)

    def train(rank):
        with lock_work_dir(str(tmp_path / "run")):
            return sorted(os.listdir(tmp_path / "run"))

    found = in_two_processes(train, tmp_path / "first")
    assert found[0] == ["training.lock"] and os.listdir(tmp_path / "run") == []
    with lock_work_dir(str(tmp_path / "run")):
        found = in_two_processes(train, tmp_path / "second")
    assert found[0].startswith(f"UserError: process {os.getpid()} on ")
    assert found[1].startswith(f"FirstProcessFailed: process {os.getpid()} on ")


def said(function, capsys):
    """The sentences of one process."""
    capsys.readouterr()
    with pytest.raises(SystemExit):
        run_tool(function)
    return [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]


@pytest.fixture
def no_launcher(monkeypatch):
    for name in ("RANK", "LOCAL_RANK", "SLURM_PROCID", "SLURM_LOCALID", "MMVSSM_TRACEBACK"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize(
    ("launcher", "variables", "speaks"),
    [
        ("none", {"SLURM_PROCID": "2", "SLURM_LOCALID": "2"}, True),  # srun of independent runs
        ("none", {"RANK": "1", "LOCAL_RANK": "1"}, True),
        ("slurm", {"SLURM_PROCID": "2", "SLURM_LOCALID": "2"}, False),
        ("slurm", {"SLURM_PROCID": "8", "SLURM_LOCALID": "0"}, True),  # first on its machine
        ("pytorch", {"RANK": "1", "LOCAL_RANK": "1"}, False),
        ("pytorch", {"RANK": "8", "LOCAL_RANK": "0"}, True),
        ("pytorch", {"RANK": "1", "LOCAL_RANK": "1", "SLURM_LOCALID": "0"}, False),
    ],
)
def test_who_speaks_before_processes_meet(
    tmp_path, monkeypatch, capsys, no_launcher, launcher, variables, speaks
):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("TORCH_FORCE_WEIGHTS_ONLY_LOAD", "0")
    args = Namespace(config=str(tmp_path / "absent.py"), launcher=launcher, local_rank=0)
    monkeypatch.setenv("LOCAL_RANK", os.environ.get("LOCAL_RANK", "0"))
    assert bool(said(lambda: open_config(args, ()), capsys)) is speaks


def test_who_speaks_in_a_group(tmp_path, capsys, no_launcher, monkeypatch):
    def run(rank):
        alike = said(lambda: fail(UserError("met by all")), capsys)
        one = said(lambda: on_first_process(fail, UserError("met by the first")), capsys)
        alone = said(lambda: fail(RunFailure("perhaps met by one")), capsys)
        os.environ["LOCAL_RANK"] = "0"  # as on another machine
        machine = said(lambda: fail(UserError("perhaps met by a machine")), capsys)
        return [len(lines) for lines in (alike, one, alone, machine)]

    assert in_two_processes(run, tmp_path) == [[1, 1, 1, 1], [0, 0, 1, 1]]


def test_a_process_without_a_gpu_says_so(monkeypatch, capsys):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.setattr(distributed, "set_multi_processing", lambda **_: None)
    monkeypatch.setenv("RANK", "2")
    monkeypatch.setenv("LOCAL_RANK", "2")
    monkeypatch.delenv("MMVSSM_TRACEBACK", raising=False)
    (line,) = said(lambda: init_processes(Config(dict(launcher="pytorch"))), capsys)
    assert "more processes than GPUs were started: this machine has 2" in line
