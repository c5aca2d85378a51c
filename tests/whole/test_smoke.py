"""Smoke test of an OpenMMLab family: configs are read, a detector and a segmenter train and resume.

CI runs it with the forks as well, in an environment of their own; everything else runs with one family.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("mmdet")
pytest.importorskip("mmseg")

from mmengine.config import Config
from mmengine.registry import MODELS

import mmvssm  # noqa: F401
from mmvssm.datasets.shapes import ShapesGenerator
from mmvssm.safe_checkpoint import load_checkpoint_safely
from support.tiny_configs import CONFIGS, DETECTOR, SEGMENTER, SIZE
from support.tool_runs import run_here, undo_what_tools_set

REPOSITORY = CONFIGS.parent
FIVE_ITERATIONS = """
_base_ = ["./tiny.py"]
train_cfg = dict(_delete_=True, type="IterBasedTrainLoop", max_iters=5, val_interval=5)
train_dataloader = dict(sampler=dict(_delete_=True, type="InfiniteSampler", shuffle=True))
param_scheduler = [dict(type="LinearLR", start_factor=0.1, by_epoch=False, begin=0, end=5)]
default_hooks = dict(
    logger=dict(interval=1), checkpoint=dict(by_epoch=False, interval=3, save_last=True, max_keep_ckpts=2)
)
log_processor = dict(by_epoch=False)
"""


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    root = tmp_path_factory.mktemp("shapes") / "data"
    ShapesGenerator(root=str(root), **SIZE).ensure()
    return root


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "model"),
    [
        ("groupmamba_maskrcnn_coco", "mmdet.MaskRCNN"),
        ("groupmamba_upernet_ade20k", "mmseg.EncoderDecoder"),
        ("plainmamba_pruned_maskrcnn_shapes", "mmdet.MaskRCNN"),
        ("plainmamba_pruned_upernet_shapes", "mmseg.EncoderDecoder"),
    ],
)
def test_configs_are_read(name, model):
    cfg = Config.fromfile(CONFIGS / f"{name}.py")
    assert f"{cfg.default_scope}.{cfg.model.type}" == model
    assert MODELS.get(cfg.model.backbone.type).__module__.startswith("mmvssm.")


TOOL = REPOSITORY / "tools/train.py"


def train(*arguments):
    """Run the tool in a process of its own."""
    environment = {**os.environ, "PYTHONPATH": f"{REPOSITORY}:{os.environ.get('PYTHONPATH', '')}"}
    done = subprocess.run(
        [sys.executable, TOOL, *arguments],
        env={**environment, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-4000:]


@pytest.fixture
def one_thread():
    """As the process has, whose sums are to be repeated bit for bit."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def losses_of(work_dir):
    """``{iteration: {name: value}}`` of every loss that a run logged."""
    (file,) = Path(work_dir).glob("*/vis_data/scalars.json")
    records = [json.loads(line) for line in file.read_text().splitlines()]
    return {
        record["step"]: {name: value for name, value in record.items() if "loss" in name}
        for record in records
        if "loss" in record
    }


@pytest.mark.nightly
@pytest.mark.parametrize("text", [DETECTOR, SEGMENTER], ids=["detector", "segmenter"])
def test_five_iterations_and_a_resumed_run_agree(text, shapes, tmp_path, monkeypatch, one_thread):
    undo_what_tools_set(monkeypatch)
    (tmp_path / "tiny.py").write_text(text.replace("ROOT", str(shapes)))
    config = tmp_path / "smoke.py"
    config.write_text(FIVE_ITERATIONS)
    train(config, "--work-dir", tmp_path / "whole")
    whole = losses_of(tmp_path / "whole")
    assert list(whole) == [1, 2, 3, 4, 5]

    resumed = tmp_path / "resumed"
    resumed.mkdir()
    shutil.copy(tmp_path / "whole/iter_3.pth", resumed)
    (resumed / "last_checkpoint").write_text(str(resumed / "iter_3.pth"))
    done = run_here(TOOL, config, "--work-dir", resumed, "--resume")
    assert done.returncode == 0, done.stderr[-4000:]
    assert losses_of(resumed) == {step: whole[step] for step in (4, 5)}
    weights = [
        load_checkpoint_safely(folder / "iter_5.pth")["state_dict"]
        for folder in (tmp_path / "whole", resumed)
    ]
    for name, value in weights[0].items():
        assert torch.equal(value, weights[1][name]), name
