"""One-line errors for users' mistakes."""

import os
import subprocess
import sys

import pytest
from mmengine.config import Config

from mmvssm.errors import HINT, UserError, one_line, run_tool, user_mistakes
from mmvssm.run.distributed import adapt_to_machine, init_processes
from mmvssm.run.setup import print_once


def test_one_sentence():
    wrapped = (
        "class `MaskRCNN` in mmdet/models/x.py: class `GroupMamba` in mmvssm.y: no arch\n 'huge'"
    )
    assert one_line(ValueError(wrapped)) == "no arch 'huge'"
    assert one_line(KeyError("X is not in the registry")) == "X is not in the registry"
    assert one_line(KeyError("model")) == "the config lacks the key 'model'"
    assert one_line(AssertionError()) == "AssertionError"


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


@pytest.mark.parametrize("full", [False, True])
def test_an_output_that_is_closed_or_full_ends_the_tool_silently(full, monkeypatch, capsys):
    reader, writer = os.pipe()
    os.close(reader)
    with open("/dev/full" if full else writer, "w") as lost:
        monkeypatch.setattr(sys, "stdout", lost)
        with pytest.raises(SystemExit) as caught:
            run_tool(lambda: print_once("some text"))
    assert caught.value.code == 141 and capsys.readouterr().err == ""


def test_names_do_not_control_the_terminal(capsys, monkeypatch):
    monkeypatch.delenv("MMVSSM_TRACEBACK", raising=False)
    name = "cat\x1b[2J\udcff\x9b1m"
    print_once(f"{name}\n{name}")
    with pytest.raises(SystemExit):
        run_tool(lambda: fail_with(name))
    out, err = capsys.readouterr()
    assert out == "cat [2J  1m\ncat [2J  1m\n"
    assert err.startswith("error: cat [2J  1m")


def fail_with(name):
    raise UserError(name)


def test_launchers_that_cannot_start_without_a_gpu(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    for launcher in ("pytorch", "slurm", "mpi"):
        with pytest.raises(UserError, match=f"--launcher {launcher} cannot start here.*dist_train"):
            init_processes(Config(dict(launcher=launcher, env_cfg={})))


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
