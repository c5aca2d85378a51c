import argparse
import errno
import os
import runpy
import subprocess
import sys
import types
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch

from mmvssm.errors import run_tool
from mmvssm.models import PlainMamba
from mmvssm.models.published import convert_plainmamba
from support.published_groupmamba import published_weights
from support.tool_runs import run_here

REPO = Path(__file__).parents[2]
ARCH = dict(
    stem_hidden_dim=8, embed_dims=(16, 32, 48, 64), depths=(1, 1, 1, 1), mlp_ratios=(2, 2, 2, 2)
)


TOOL = REPO / "tools/convert_checkpoint.py"


def convert(*arguments, model="groupmamba"):
    return run_here(TOOL, model, *arguments)


@pytest.fixture
def weights():
    return published_weights(*ARCH.values(), num_classes=10)


class RunsCode:
    def __reduce__(self):
        return os.mkdir, ("code-was-run",)


def test_round_trip(weights, tmp_path, monkeypatch):
    """The published training script saves averaged weights and yacs settings besides the plain weights."""
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
    # In a process of its own, which has no yacs.
    done = subprocess.run(
        [sys.executable, TOOL, "groupmamba", tmp_path / "src.pth", tmp_path / "dst.pth"],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(REPO)},
    )
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


def test_a_full_disk_leaves_what_was_there(weights, tmp_path, monkeypatch, capsys):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    torch.save(weights, tmp_path / "src.pth")
    (tmp_path / "dst.pth").write_text("precious")
    arguments = ["groupmamba", str(tmp_path / "src.pth"), str(tmp_path / "dst.pth"), "--force"]
    monkeypatch.setattr(sys, "argv", ["convert_checkpoint.py", *arguments])
    monkeypatch.setattr(os, "fsync", full)
    tool = runpy.run_path(str(REPO / "tools/convert_checkpoint.py"))
    with pytest.raises(SystemExit):
        run_tool(tool["main"])
    sentence = capsys.readouterr().err.splitlines()[0]
    assert "dst.pth was not written: " in sentence and "No space left" in sentence
    assert (tmp_path / "dst.pth").read_text() == "precious"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["dst.pth", "src.pth"]


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


def test_plainmamba_gives_the_published_maps(tmp_path):
    """From the published names, as a detector's checkpoint has them, to a backbone's init_cfg."""
    golden = np.load(REPO / "tests/golden/plainmamba_small.npz")
    weights = {
        f"backbone.{k[2:]}": torch.from_numpy(golden[k]) for k in golden.files if k[:2] == "w/"
    }
    torch.save({"state_dict": weights, "meta": {}}, tmp_path / "src.pth")
    done = convert(tmp_path / "src.pth", tmp_path / "dst.pth", model="plainmamba")
    assert done.returncode == 0, done.stderr
    assert "0 names of the source used nowhere, 0 of ours not found" in done.stdout
    arch = torch.load(tmp_path / "dst.pth", weights_only=True)["meta"]["arch"]
    init_cfg = dict(type="Pretrained", checkpoint=str(tmp_path / "dst.pth"), prefix="backbone.")
    model = PlainMamba(arch, img_size=64, out_indices=(1, 3), init_cfg=init_cfg).eval()
    model.init_weights()
    with torch.no_grad():
        maps = model(torch.from_numpy(golden["x"]))
    for i, feature_map in zip((1, 3), maps):
        torch.testing.assert_close(
            feature_map, torch.from_numpy(golden[f"feat{i}"]), atol=1e-4, rtol=0
        )


def test_plainmamba_named_arch_is_recognised():
    model = PlainMamba("L1")
    published = {"patch_embed.projection.weight": model.patch_embed.patches.projection.weight}
    published |= {
        "pos_embed": model.pos_embed,
        "patch_embed.convs.0.weight": torch.zeros(64, 64, 3, 3),
    }
    for i in range(24):
        published[f"layers.{i}.mamba.A_log"] = model.layers[i].mixer.A_log
    published["layers.0.dw.0.weight"] = model.layers[0].dwconv.weight
    assert convert_plainmamba(published).arch == "L1"


def test_not_a_plainmamba(weights, tmp_path):
    torch.save(weights, tmp_path / "src.pth")
    done = convert(tmp_path / "src.pth", tmp_path / "dst.pth", model="plainmamba")
    assert done.returncode == 1
    assert "not the weights of a published PlainMamba" in done.stderr
    assert done.stderr.count("\n") == 2 and not (tmp_path / "dst.pth").exists()
