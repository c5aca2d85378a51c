import argparse
import os
import subprocess
import sys
import types
from collections import OrderedDict
from pathlib import Path

import pytest
import torch

from support.published_groupmamba import published_weights

REPO = Path(__file__).parents[2]
ARCH = dict(
    stem_hidden_dim=8, embed_dims=(16, 32, 48, 64), depths=(1, 1, 1, 1), mlp_ratios=(2, 2, 2, 2)
)


def convert(*arguments):
    return subprocess.run(
        [sys.executable, REPO / "tools/convert_checkpoint.py", "groupmamba", *map(str, arguments)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(REPO)},
    )


@pytest.fixture
def weights():
    return published_weights(*ARCH.values(), num_classes=10)


class RunsCode:
    def __reduce__(self):
        return os.mkdir, ("code-was-run",)


def test_round_trip(weights, tmp_path, monkeypatch):
    """As the published training script saves: averaged weights and yacs settings beside the plain ones."""
    for name in ("yacs", "yacs.config"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    Settings = type("CfgNode", (dict,), dict(__module__="yacs.config"))
    sys.modules["yacs.config"].CfgNode = Settings
    settings = Settings(MODEL=Settings(TYPE="groupmamba"))
    settings.frozen = True
    torch.save(
        {
            "model": {"module.other": torch.zeros(1)},
            "model_ema": OrderedDict((f"module.{k}", v) for k, v in weights.items()),
            "config": settings,
            "args": argparse.Namespace(lr=0.1),
        },
        tmp_path / "src.pth",
    )
    done = convert(tmp_path / "src.pth", tmp_path / "dst.pth")
    assert done.returncode == 0, done.stderr
    assert "0 names of the source used nowhere, 0 of ours not found" in done.stdout
    converted = torch.load(tmp_path / "dst.pth", weights_only=True)
    assert converted["meta"]["arch"] == ARCH
    proj = converted["state_dict"]["backbone.stages.0.blocks.0.mixer.proj.weight"]
    assert torch.equal(proj, weights["block1.0.attn.proj.weight"])


def refused(done):
    """The one sentence with which the tool refused."""
    assert done.returncode != 0
    assert "Traceback" not in done.stderr
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    return line


def test_file_with_code_is_refused_and_not_run(weights, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"model": weights, "hook": RunsCode()}, "src.pth")
    assert "refused" in refused(convert(tmp_path / "src.pth", tmp_path / "dst.pth"))
    assert not Path("code-was-run").exists() and not Path("dst.pth").exists()


def test_nothing_is_overwritten(weights, tmp_path):
    torch.save(weights, tmp_path / "src.pth")
    (tmp_path / "dst.pth").write_text("precious")
    assert "exists already" in refused(convert(tmp_path / "src.pth", tmp_path / "dst.pth"))
    assert (tmp_path / "dst.pth").read_text() == "precious"
    assert convert(tmp_path / "src.pth", tmp_path / "dst.pth", "--force").returncode == 0


def test_incomplete_and_foreign_weights(weights, tmp_path):
    torch.save({"layer.weight": torch.zeros(1)}, tmp_path / "foreign.pth")
    sentence = refused(convert(tmp_path / "foreign.pth", tmp_path / "dst.pth"))
    assert "not the weights of a published GroupMamba" in sentence
    del weights["norm2.bias"]
    torch.save(weights, tmp_path / "incomplete.pth")
    done = convert(tmp_path / "incomplete.pth", tmp_path / "dst.pth")
    assert "lacks 1 of the backbone's weights" in refused(done)
    assert "backbone.stages.1.norm.bias" in done.stdout
    assert "no checkpoint file" in refused(convert(tmp_path / "absent.pth", tmp_path / "dst.pth"))
    assert not (tmp_path / "dst.pth").exists()
