"""A run that gets SIGTERM saves and stops; resumed, it equals an uninterrupted run."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from mmengine.hooks import Hook
from mmengine.registry import LOOPS
from mmengine.runner import EpochBasedTrainLoop

from mmvssm.errors import Stopped
from mmvssm.run.checkpoints import find_last
from mmvssm.run.hooks.workers import _report_unless_parent_left
from support.toy_training import end_workers, losses, toy_runner
from support.two_processes import in_two_processes

TRAINER = Path(__file__).parents[2] / "support" / "toy_training.py"
REPO = Path(__file__).parents[3]


class Terminate(Hook):
    """Sends SIGTERM to this process in the given iteration, or in the given one of a validation."""

    def __init__(self, iteration=None, val_iteration=None):
        self.iteration, self.val_iteration = iteration, val_iteration

    def before_train_iter(self, runner, batch_idx, data_batch=None):
        if runner.iter == self.iteration:
            os.kill(os.getpid(), signal.SIGTERM)

    def before_val_iter(self, runner, batch_idx, data_batch=None):
        if batch_idx == self.val_iteration:
            os.kill(os.getpid(), signal.SIGTERM)


def same_state(first, second):
    states = [torch.load(file, weights_only=True) for file in (first, second)]
    assert states[0]["meta"]["iter"] == states[1]["meta"]["iter"]
    assert states[0]["meta"]["epoch"] == states[1]["meta"]["epoch"]
    for key, tensor in states[0]["state_dict"].items():
        assert torch.equal(tensor, states[1]["state_dict"][key]), key
    momenta = [state["optimizer"]["state"] for state in states]
    for key, state in momenta[0].items():
        assert torch.equal(state["momentum_buffer"], momenta[1][key]["momentum_buffer"])


ASPECT = {"train_dataloader.batch_sampler": dict(type="mmdet.AspectRatioBatchSampler")}
WORKERS = {"train_dataloader.num_workers": 2, "train_dataloader.persistent_workers": True}
EMA = {"custom_hooks": [dict(type="EMAHook", momentum=0.3, update_buffers=True)]}
# Settings, when the signal comes, after how many iterations the run ends.
MOMENTS = {
    "first iteration": ({}, Terminate(0), 1),
    "middle of an epoch": ({}, Terminate(8), 9),
    "last iteration of an epoch": ({}, Terminate(11), 12),
    "first iteration of an epoch": ({}, Terminate(12), 13),
    "last iteration of all": ({}, Terminate(17), 18),
    "workers": (WORKERS, Terminate(8), 9),
    "batches of like shape": (ASPECT, Terminate(8), 9),
    "a last batch dropped": (
        {"train_dataloader.batch_size": 5, "train_dataloader.drop_last": True},
        Terminate(8),
        9,
    ),
    "averaged weights": (EMA, Terminate(8), 9),
    "gradients being accumulated": ({"optim_wrapper.accumulative_counts": 3}, Terminate(7), 9),
    "validation": ({}, Terminate(val_iteration=2), 6),
    "validation of averaged weights": (EMA, Terminate(val_iteration=2), 6),
    "iterations": (dict(by_epoch=False, amount=18), Terminate(8), 9),
    "iterations, workers": (dict(by_epoch=False, amount=18, **WORKERS), Terminate(8), 9),
    "iterations, like shape": (dict(by_epoch=False, amount=18, **ASPECT), Terminate(8), 9),
    "iterations, after saving": (dict(by_epoch=False, amount=18), Terminate(11), 12),
}


@pytest.mark.parametrize("case", MOMENTS)
def test_resumed_equals_uninterrupted(tmp_path, case):
    settings, terminate, iterations = MOMENTS[case]
    if settings.get("train_dataloader.batch_sampler"):
        pytest.importorskip("mmdet.datasets.samplers")
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    run = toy_runner(whole, **settings)
    run.train()
    end_workers(run)
    run = toy_runner(broken, **settings)
    run.register_hook(terminate, "VERY_LOW")
    default = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Stopped) as caught:
        run.train()
    end_workers(run)
    assert caught.value.exit_code == 143 and signal.getsignal(signal.SIGTERM) is default
    assert str(caught.value) == (
        f"stopped by SIGTERM after iteration {iterations}; --resume with the same --work-dir continues "
        f"from {broken / 'interrupted.pth'}"
    )
    assert find_last(broken)[0].path == str(broken / "interrupted.pth")
    before = losses(broken)
    assert max(before) == iterations

    run = toy_runner(broken, **settings, resume=True, load_from=str(broken / "interrupted.pth"))
    run.train()
    end_workers(run)
    expected = losses(whole)
    assert losses(broken) == expected and {i: expected[i] for i in before} == before
    last = "iter_18.pth" if "by_epoch" in settings else "epoch_3.pth"
    same_state(whole / last, broken / last)


def test_regular_checkpoints_are_neither_replaced_nor_joined_by_many(tmp_path):
    settings = {"default_hooks.checkpoint.max_keep_ckpts": 1, "amount": 4}
    resume = {}
    for iteration in (7, 9, 14):
        run = toy_runner(tmp_path, **settings, **resume)
        run.register_hook(Terminate(iteration))
        with pytest.raises(Stopped):
            run.train()
        resume = dict(resume=True, load_from=str(tmp_path / "interrupted.pth"))
    names = sorted(path.name for path in tmp_path.glob("*.pth"))
    assert names == ["epoch_2.pth", "interrupted.pth"]


def test_an_epoch_of_another_length_is_begun_anew(tmp_path, caplog):
    run = toy_runner(tmp_path)
    run.register_hook(Terminate(8))
    with pytest.raises(Stopped):
        run.train()
    file = str(tmp_path / "interrupted.pth")
    smaller = {"train_dataloader.batch_size": 2}
    run = toy_runner(tmp_path, **smaller, resume=True, load_from=file)
    messages = []
    run.logger.warning = messages.append
    run.train()
    assert any("after 3 of 6 batches of an epoch, which now has 12" in str(m) for m in messages)
    assert run.iter == 9 + 2 * 12


def test_without_a_checkpoint_hook_it_ends_all_the_same(tmp_path):
    run = toy_runner(tmp_path, **{"default_hooks.checkpoint": None})
    run.register_hook(Terminate(3))
    with pytest.raises(Stopped, match="after iteration 4; nothing was saved"):
        run.train()


@LOOPS.register_module()
class AnotherLoop(EpochBasedTrainLoop):
    pass


def test_a_loop_that_cannot_go_on_within_an_epoch(tmp_path):
    run = toy_runner(tmp_path, **{"train_cfg.type": "AnotherLoop"})
    run.register_hook(Terminate(8))
    with pytest.raises(Stopped, match=r"--resume repeats epoch 2 from .*epoch_1\.pth"):
        run.train()


class LostInterrupt(Hook):
    """Ctrl-C in the given iteration, or in the given one of a validation, of which nobody is told."""

    def __init__(self, iteration=None, val_iteration=None):
        self.iteration, self.val_iteration = iteration, val_iteration

    def press(self):
        try:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(5)
        except BaseException:
            pass

    def before_train_iter(self, runner, batch_idx, data_batch=None):
        if runner.iter == self.iteration:
            self.press()

    def before_val_iter(self, runner, batch_idx, data_batch=None):
        if batch_idx == self.val_iteration:
            self.press()


@pytest.mark.parametrize("hook, done", [(LostInterrupt(2), 2), (LostInterrupt(val_iteration=1), 6)])
def test_ctrl_c_that_somebody_made_away_with(tmp_path, hook, done):
    run = toy_runner(tmp_path)
    run.register_hook(hook)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            run.train()
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)
    assert run.iter == done
    assert not (tmp_path / "interrupted.pth").exists()


def test_ctrl_c_that_is_ignored_stays_ignored(tmp_path):
    """Background jobs of a shell and nohup ignore it."""
    default = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        run = toy_runner(tmp_path, amount=1)
        run.train()
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, default)


def start(work_dir, **settings):
    """Start the training as a process that leads a group of processes."""
    environment = settings.pop("environment", {})
    return subprocess.Popen(
        [sys.executable, str(TRAINER), str(work_dir), json.dumps(settings)],
        env={
            **os.environ,
            "PYTHONPATH": f"{REPO}:{REPO / 'tests'}",
            "OMP_NUM_THREADS": "1",
            "CUDA_VISIBLE_DEVICES": "",
            **environment,
        },
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        # What runs in the background of a shell without job control is to ignore Ctrl-C, its children too.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def wait_for(work_dir, iteration, *processes):
    """Until the log shows the iteration."""
    while max(losses(work_dir), default=0) < iteration:
        for process in processes:
            assert process.poll() is None, process.stderr.read()[-3000:]
        time.sleep(0.05)


def ending(process):
    """Its exit code, and the lines of standard error that are no warnings."""
    _, err = process.communicate(timeout=120)
    assert "Traceback" not in err, err[-3000:]
    return process.returncode, [line for line in err.splitlines() if line.startswith("error: ")]


SLOW = {
    "train_dataloader.dataset.slow": 0.02,
    "train_dataloader.num_workers": 2,
    "train_dataloader.persistent_workers": True,
    "amount": 100,  # long enough not to end before it is told to
}


def test_workers_report_all_but_a_parent_that_left(capsys):
    _report_unless_parent_left(ConnectionResetError, ConnectionResetError(), None)
    _report_unless_parent_left(EOFError, EOFError(), None)
    assert not capsys.readouterr().err
    _report_unless_parent_left(ValueError, ValueError("a real mistake"), None)
    assert "a real mistake" in capsys.readouterr().err


@pytest.mark.slow
def test_signals_to_a_whole_group_of_processes(tmp_path):
    """Slurm and terminals also send signals to data workers, which ignore them."""
    work_dir = tmp_path / "run"
    process = start(work_dir, **SLOW)
    wait_for(work_dir, 8, process)
    os.killpg(process.pid, signal.SIGTERM)
    code, (line,) = ending(process)
    done = max(losses(work_dir))
    assert code == 143 and line == (
        f"error: stopped by SIGTERM after iteration {done}; --resume with the same --work-dir continues "
        f"from {work_dir}/interrupted.pth"
    )
    process = start(work_dir, **SLOW, resume=True)
    wait_for(work_dir, done + 1, process)
    os.killpg(process.pid, signal.SIGINT)
    code, (line,) = ending(process)
    assert code == 130 and line.startswith("error: interrupted; --resume with the same --work-dir ")
    assert Path(line.rpartition(" continues from ")[2]).is_file()


@pytest.mark.slow
@pytest.mark.parametrize("signalled", [pytest.param(0, marks=pytest.mark.nightly), 1])
def test_two_processes_of_which_one_gets_the_signal(tmp_path, signalled):
    work_dir = tmp_path / "run"
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    processes = [
        start(
            work_dir,
            **{"train_dataloader.dataset.slow": 0.02, "amount": 40},
            environment=dict(
                LAUNCHER="pytorch",
                RANK=str(rank),
                LOCAL_RANK=str(rank),
                WORLD_SIZE="2",
                MASTER_ADDR="127.0.0.1",
                MASTER_PORT=str(port),
            ),
        )
        for rank in (0, 1)
    ]
    wait_for(work_dir, 4, *processes)
    processes[signalled].send_signal(signal.SIGTERM)
    (code, lines), (other_code, other_lines) = map(ending, processes)
    assert code == other_code == 143 and len(lines) == 1 and other_lines == []
    assert f"after iteration {max(losses(work_dir))}; " in lines[0]
    assert torch.load(work_dir / "interrupted.pth", weights_only=True)["meta"]["iter"] == max(
        losses(work_dir)
    )


# Of five samples the first process gets three, the second two.
UNEQUAL = {
    "val_dataloader.dataset.length": 5,
    "val_dataloader.batch_size": 1,
    "val_dataloader.sampler.round_up": False,
    "model_wrapper_cfg": dict(type="MMDistributedDataParallel", device_ids=None),
    "launcher": "pytorch",
}


@pytest.mark.parametrize(
    ("val_iteration", "ends_after"), [(None, None), (1, 3), (2, 4)], ids=["none", "early", "last"]
)
def test_processes_that_validate_unequal_numbers_of_samples(
    tmp_path, monkeypatch, val_iteration, ends_after
):
    """Also if the signal arrives when one rank has no sample left."""
    monkeypatch.chdir(tmp_path)  # where mmengine collects results

    def train(rank):
        run = toy_runner(tmp_path / "run", amount=2, **UNEQUAL)
        if rank == 0:
            run.register_hook(Terminate(val_iteration=val_iteration), "VERY_LOW")
        run.train()
        return run.message_hub.get_scalar("val/toy/mAP").current()

    found = in_two_processes(train, tmp_path / "meeting", seconds=60)
    if ends_after is None:
        assert found == [2, 2]
    else:
        words = f"Stopped: stopped by SIGTERM after iteration {ends_after}; --resume"
        assert all(error.startswith(words) for error in found), found
