"""Ranks of one run on several machines, each with a network interface and a disk of its own."""

import os
import platform
import subprocess
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from mmengine.evaluator import Evaluator
from mmengine.registry import MODELS

from mmvssm.errors import RunFailure, UserError
from mmvssm.processes import on_each_machine, on_own_machine
from mmvssm.registry import TASK_UTILS
from mmvssm.run import distributed
from mmvssm.run.distributed import choose_interface, collect_over_network, interface_to
from mmvssm.run.failures import run_failures
from mmvssm.run.resuming import choose_start
from mmvssm.run.setup import prepare_data
from support.toy_training import ToyMetric, toy_config, toy_runner
from support.two_processes import in_two_processes

REPO = Path(__file__).parents[2]


def on_two_machines(function, folder):
    """As :func:`in_two_processes`, with each process on a machine, and in a folder, of its own."""

    def run(rank):
        os.environ.update(LOCAL_RANK="0", GROUP_RANK=str(rank))
        place = folder / str(rank)
        place.mkdir(exist_ok=True)
        os.chdir(place)
        return function(rank)

    return in_two_processes(run, folder / "meeting")


# --- networks -----------------------------------------------------------------------------------------

# As Linux writes them on processors that count from the last byte: a slow default route and a fast one, networks
# 10.1.0.0/16 and 10.1.2.0/24, a network that is down, 10.3.0.0/16, and an unreachable one, 10.4.0.0/16.
ROUTES = """Iface Destination Gateway Flags RefCnt Use Metric Mask MTU Window IRTT
slow 00000000 010200C0 0003 0 0 600 00000000 0 0 0
fast 00000000 010200C0 0003 0 0 100 00000000 0 0 0
wide 0000010A 00000000 0001 0 0 0 0000FFFF 0 0 0
near 0002010A 00000000 0001 0 0 9 00FFFFFF 0 0 0
down 0000030A 00000000 0000 0 0 0 0000FFFF 0 0 0
* 0000040A 00000000 0201 0 0 0 0000FFFF 0 0 0
"""


@pytest.mark.parametrize(
    ("address", "interface"),
    [
        ("10.1.2.3", "near"),
        ("10.1.3.2", "wide"),
        ("8.8.8.8", "fast"),
        ("127.0.1.1", "fast"),
        ("10.3.0.1", "fast"),
        ("10.4.0.1", "fast"),
    ],
)
def test_the_interface_of_the_most_specific_route(monkeypatch, address, interface):
    monkeypatch.setattr("sys.byteorder", "little")
    assert interface_to(address, ROUTES) == interface


def test_no_route():
    assert interface_to("10.5.0.1", ROUTES.splitlines()[0]) is None


@pytest.mark.parametrize(
    ("variables", "interface"),
    [
        (dict(MASTER_ADDR="10.1.2.3", WORLD_SIZE="4", LOCAL_WORLD_SIZE="2"), "near"),
        (dict(MASTER_ADDR="10.1.2.3", WORLD_SIZE="4"), "near"),  # Slurm's
        (dict(MASTER_ADDR="10.1.2.3", WORLD_SIZE="4", LOCAL_WORLD_SIZE="4"), None),  # one machine
        (dict(MASTER_ADDR="127.0.0.1", WORLD_SIZE="4"), None),
        (dict(MASTER_ADDR="itself", WORLD_SIZE="4", LOCAL_WORLD_SIZE="2"), "fast"),
        (dict(MASTER_ADDR="nowhere", WORLD_SIZE="4", LOCAL_WORLD_SIZE="2"), None),
        (dict(MASTER_ADDR="10.1.2.3", WORLD_SIZE="4", GLOO_SOCKET_IFNAME="mine"), "mine"),
        ({}, None),
    ],
)
def test_gloo_takes_the_interface_unless_the_user_names_one(
    monkeypatch, tmp_path, variables, interface
):
    for name in ("MASTER_ADDR", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GLOO_SOCKET_IFNAME"):
        monkeypatch.setenv(name, variables.get(name, ""))  # restored after the test
        if name not in variables:
            monkeypatch.delenv(name)
    (tmp_path / "route").write_text(ROUTES)

    def resolve(name):
        if name == "nowhere":
            raise OSError
        return "127.0.1.1" if name == "itself" else name  # as in /etc/hosts of many machines

    monkeypatch.setattr("socket.gethostbyname", resolve)
    monkeypatch.setattr(distributed, "_ROUTES", tmp_path / "route")
    choose_interface()
    assert os.environ.get("GLOO_SOCKET_IFNAME") == interface


def test_a_rank_whose_peer_is_gone_says_so(tmp_path):
    def step(rank):
        if rank == 1:
            torch.distributed.destroy_process_group()
            return "gone"
        with pytest.raises(RunFailure, match="connection to another rank"), run_failures():
            torch.distributed.all_reduce(torch.ones(1))
        return "said"

    assert in_two_processes(step, tmp_path) == ["said", "gone"]


@pytest.mark.parametrize("tool", ["train", "test"])
@pytest.mark.parametrize(
    ("variables", "total", "each"),
    [
        ({}, 8, 8),
        (dict(GPUS="2"), 2, 2),
        (dict(GPUS="16"), 16, 8),
        (dict(GPUS="16", GPUS_PER_NODE="4"), 16, 4),
    ],
)
def test_slurm_is_asked_for_no_more_gpus_than_used(tmp_path, tool, variables, total, each):
    srun = tmp_path / "srun"
    srun.write_text('#!/bin/sh\necho "$@"\n')
    srun.chmod(0o755)
    environment = {k: v for k, v in os.environ.items() if not k.startswith("GPUS")}
    environment.update(variables, PATH=f"{tmp_path}:{os.environ['PATH']}")
    command = [REPO / f"tools/slurm_{tool}.sh", "part", "job", "config.py", "checkpoint.pth"]
    told = subprocess.run(command, env=environment, capture_output=True, text=True).stdout.split()
    expected = {f"--gres=gpu:{each}", f"--ntasks={total}", f"--ntasks-per-node={each}"}
    assert expected <= set(told)


# --- disks --------------------------------------------------------------------------------------------


def fail(error):
    raise error


def test_what_each_machine_does_all_learn(tmp_path):
    def call(rank):
        assert on_each_machine(lambda: rank) == [0, 1]
        on_each_machine(lambda: rank and fail(UserError("no room")))

    told = f"UserError: on {platform.node()} (rank 1): no room"
    assert on_two_machines(call, tmp_path) == [told, "UserError: no room"]


def test_each_machine_uses_what_it_converted_itself(tmp_path):
    found = on_two_machines(lambda rank: on_own_machine(os.getcwd), tmp_path)
    assert found == [str(tmp_path / "0"), str(tmp_path / "1")]


@TASK_UTILS.register_module()
class GeneratorOfAFile:
    def ensure(self):
        Path("generated").touch()


def test_each_machine_generates_and_checks_its_data(tmp_path, monkeypatch, capsys):
    def warn(*_):
        return [f"{Path.cwd().name} has a fault", "a common fault"]

    def prepare(rank):
        capsys.readouterr()
        prepare_data(cfg, args, (), None)
        return os.listdir(), capsys.readouterr().out.splitlines()

    monkeypatch.setattr("mmvssm.run.setup.check_data", warn)
    cfg = Config(dict(prepare_data=dict(type="mmvssm.GeneratorOfAFile"), default_scope="mmdet"))
    args = Namespace(no_data_check=False, data_root=None)
    args.classes = args.reduce_zero_label = args.data_format = None
    (files, lines), (other_files, other_lines) = on_two_machines(prepare, tmp_path)
    assert files == other_files == ["generated"]
    warnings = ["0 has a fault", "a common fault", "1 has a fault"]
    assert lines == [f"warning: {text}" for text in warnings] and other_lines == []


class SumOfResults(ToyMetric):
    def process(self, data_batch, data_samples):
        self.results += data_samples

    def compute_metrics(self, results):
        return dict(sum=sum(results))


def test_results_are_collected_without_a_common_disk(tmp_path):
    def evaluate(rank):
        runner = Namespace(build_evaluator=Evaluator)
        collect_over_network(runner)
        evaluator = runner.build_evaluator(SumOfResults())
        evaluator.process([rank + 1])
        return evaluator.evaluate(2), os.listdir()

    assert on_two_machines(evaluate, tmp_path) == [({"toy/sum": 3}, [])] * 2


@pytest.mark.parametrize("collect_dir", [None, "common"])
def test_evaluators_use_files_on_one_machine_and_where_the_config_says_so(tmp_path, collect_dir):
    def look(rank):
        runner = Namespace(build_evaluator=Evaluator)
        collect_over_network(runner)
        metric = SumOfResults()
        metric.collect_dir = collect_dir
        return runner.build_evaluator(metric).metrics[0].collect_device

    run = on_two_machines if collect_dir else in_two_processes
    assert run(look, tmp_path) == ["cpu"] * 2


@pytest.mark.parametrize(
    ("resume", "other_has"), [("auto", None), ("run/epoch_1.pth", b"of an earlier run")]
)
def test_rank_0_sends_the_checkpoint_to_resume_from(tmp_path, resume, other_has):
    toy_runner(tmp_path / "0/run", amount=1).train()
    saved = torch.load(tmp_path / "0/run/epoch_1.pth", weights_only=True)["state_dict"]
    foreign = tmp_path / "1/run/epoch_1.pth"
    if other_has:
        foreign.parent.mkdir(parents=True)
        foreign.write_bytes(other_has)

    def start(rank):
        cfg = toy_config("run", amount=2)
        model = MODELS.build(cfg.model)
        choose_start(cfg, model, resume, new_schedule=False)
        same = all(torch.equal(value, saved[name]) for name, value in model.state_dict().items())
        return cfg.load_from, same

    assert on_two_machines(start, tmp_path) == [
        ("run/epoch_1.pth", True),
        ("run/received.pth", True),
    ]
    assert not other_has or foreign.read_bytes() == other_has


def test_a_checkpoint_on_a_common_disk_is_not_sent(tmp_path):
    toy_runner(tmp_path / "run", amount=1).train()

    def start(rank):
        cfg = toy_config(tmp_path / "run", amount=2)
        choose_start(cfg, MODELS.build(cfg.model), "auto", new_schedule=False)
        return cfg.load_from

    assert on_two_machines(start, tmp_path) == [str(tmp_path / "run/epoch_1.pth")] * 2
    assert not (tmp_path / "run/received.pth").exists()


def test_rank_0s_work_dir_decides(tmp_path):
    """Checkpoints there are refused on all ranks; those that another machine has are of no use to the run."""
    (tmp_path / "0/run").mkdir(parents=True)
    (tmp_path / "0/run/epoch_1.pth").touch()

    def start(rank):
        cfg = toy_config("run")
        choose_start(cfg, MODELS.build(cfg.model), None, new_schedule=False)
        return "started"

    found = on_two_machines(start, tmp_path)
    assert all(
        text.startswith("UserError: run holds the checkpoints of an earlier") for text in found
    )
    (tmp_path / "0").rename(tmp_path / "old")
    (tmp_path / "1/run").mkdir()
    (tmp_path / "1/run/epoch_1.pth").touch()
    (tmp_path / "meeting").rename(tmp_path / "met")
    assert on_two_machines(start, tmp_path) == ["started"] * 2
