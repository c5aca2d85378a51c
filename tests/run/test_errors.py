"""Mistakes are told in one sentence."""

import os
import subprocess
import sys
from argparse import Namespace

import pytest
from mmengine.config import Config

from mmvssm.errors import HINT, UserError, one_sentence, run_tool, user_mistakes
from mmvssm.run.distributed import adapt_to_machine, init_processes
from mmvssm.run.setup import open_config


def test_one_sentence():
    wrapped = (
        "class `MaskRCNN` in mmdet/models/x.py: class `GroupMamba` in mmvssm.y: no arch\n 'huge'"
    )
    assert one_sentence(ValueError(wrapped)) == "no arch 'huge'"
    assert one_sentence(KeyError("X is not in the registry")) == "X is not in the registry"
    assert one_sentence(KeyError("model")) == "the config lacks the key 'model'"
    assert one_sentence(AssertionError()) == "AssertionError"


def fail():
    with user_mistakes("cannot build the model"):
        raise ValueError("no such arch")


def test_tool_ends_with_the_sentence(capsys, monkeypatch):
    monkeypatch.delenv("MMVSSM_TRACEBACK", raising=False)
    with pytest.raises(SystemExit) as caught:
        run_tool(fail)
    assert caught.value.code == 1
    assert capsys.readouterr().err == f"error: cannot build the model: no such arch\n{HINT}\n"
    assert "--traceback" in HINT
    monkeypatch.setenv("MMVSSM_TRACEBACK", "1")
    with pytest.raises(UserError):
        run_tool(fail)


def test_bugs_keep_their_traceback():
    with pytest.raises(ZeroDivisionError):
        run_tool(lambda: 1 / 0)


def test_launcher_without_its_environment(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "SLURM_NODELIST"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    for launcher in ("pytorch", "slurm", "mpi"):
        with pytest.raises(UserError, match=f"--launcher {launcher} needs the environment"):
            init_processes(Config(dict(launcher=launcher, env_cfg={})))


def test_slurm_and_mpi_tell_the_number_on_the_machine(monkeypatch):
    """Which nothing has set before, as it would for torchrun."""
    told = dict(SLURM_NODELIST="here", SLURM_PROCID="3", SLURM_NTASKS="4", SLURM_LOCALID="1")
    told |= dict(OMPI_COMM_WORLD_RANK="3", OMPI_COMM_WORLD_SIZE="4")
    for name, value in (told | dict(OMPI_COMM_WORLD_LOCAL_RANK="1", MASTER_ADDR="here")).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("torch.distributed.init_process_group", lambda **_: None)
    monkeypatch.setattr("mmvssm.run.distributed.set_multi_processing", lambda **_: None)
    for name in ("RANK", "WORLD_SIZE", "MASTER_PORT", "LOCAL_RANK"):
        monkeypatch.setenv(name, "")
    for launcher in ("slurm", "mpi"):
        monkeypatch.delenv("LOCAL_RANK")
        args = Namespace(config="absent.py", launcher=launcher, local_rank=0)
        with pytest.raises(UserError, match=r"no config file absent\.py"):
            open_config(args, ())
        init_processes(Config(dict(launcher=launcher, env_cfg={})))
        assert os.environ["LOCAL_RANK"] == "1" and os.environ["RANK"] == "3"


def test_machine_without_gpu_gets_plain_norms(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    norm = dict(type="SyncBN", requires_grad=True)
    heads = [norm, dict(type="MMSyncBN")]
    cfg = Config(dict(launcher="pytorch", model=dict(backbone=dict(norm_cfg=norm), heads=heads)))
    adapt_to_machine(cfg)
    assert cfg.model.heads[1].type == "BN"
    assert cfg.model.backbone.norm_cfg.type == cfg.model.heads[0].type == "BN"
    assert [hook.type for hook in cfg.custom_hooks] == ["SyncBuffersHook"]


@pytest.mark.parametrize("tool", ["train.py", "test.py"])
def test_help_names_every_argument(tool, request):
    path = request.config.rootpath / "tools" / tool
    done = subprocess.run([sys.executable, path, "--help"], capture_output=True, text=True)
    assert done.returncode == 0
    for argument in ("--work-dir", "--data-root", "--classes", "--cfg-options", "--launcher"):
        assert argument in done.stdout
