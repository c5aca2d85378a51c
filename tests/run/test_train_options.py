"""Options of tools/train.py that change how a run starts."""

import json
from pathlib import Path

import pytest
from mmengine.config import Config

pytest.importorskip("mmseg")

from mmvssm.run.pretrained import start_from_scratch
from support.tiny_configs import SEGMENTER
from support.tool_runs import call


def test_rates_are_scaled_from_the_config_s_own_batch_and_persistent_workers_need_workers(
    config, capsys
):
    path = config(SEGMENTER, "\ntrain_dataloader['persistent_workers'] = True\n")
    call("train.py", path, "--work-dir", "run", "--auto-scale-lr")
    said = capsys.readouterr().out
    assert "Learning rates times 0.25: 2 images a step, and the config's rates are for 8" in said
    saved = Config.fromfile("run/tiny.py")
    assert not saved.train_dataloader.persistent_workers
    (log,) = Path("run").glob("*/vis_data/scalars.json")
    first = json.loads(log.read_text().splitlines()[0])
    unscaled = saved.optim_wrapper.optimizer.lr
    assert first["base_lr"] < unscaled / 4 + 1e-12


def test_from_scratch_drops_what_a_config_starts_from(config, capsys):
    start = "\nmodel['backbone']['init_cfg'] = dict(type='Pretrained', checkpoint='absent.pth')\n"
    path = config(SEGMENTER, start)
    with pytest.raises(SystemExit):
        call("train.py", path, "--work-dir", "refused")
    assert "there is no checkpoint file absent.pth" in capsys.readouterr().err
    call("train.py", path, "--work-dir", "run", "--from-scratch")
    assert "starts from random weights; not loaded: absent.pth" in capsys.readouterr().out
    assert Config.fromfile("run/tiny.py").model.backbone.init_cfg is None


def test_every_kind_of_start_is_dropped():
    pretrained = dict(type="Pretrained", checkpoint="a.pth")
    model = dict(
        type="X",
        pretrained="b.pth",
        backbone=dict(init_cfg=dict(pretrained)),
        neck=[
            dict(init_cfg=dict(type="Xavier")),
            dict(init_cfg=dict(pretrained, checkpoint="c.pth")),
        ],
    )
    cfg = Config(dict(model=model, load_from="d.pth"))
    line = start_from_scratch(cfg)
    assert line.endswith("not loaded: b.pth, a.pth, c.pth, d.pth")
    assert cfg.load_from is None and cfg.model.pretrained is None
    assert cfg.model.neck[0].init_cfg.type == "Xavier" and cfg.model.neck[1].init_cfg is None
    assert start_from_scratch(cfg).endswith("its config names no pretrained ones")
