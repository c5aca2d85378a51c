"""tools/train.py --plain: a config run with mmengine alone."""

import os
from pathlib import Path

import pytest
import torch
from mmengine.runner import Runner

from mmvssm.safe_checkpoint import UnsafeCheckpointError
from support import tiny_configs
from support.tool_runs import call, sentence_of_refusal

pytest.importorskip("mmdet")
pytest.importorskip("mmseg")


class Malicious:
    def __reduce__(self):
        return os.system, ("touch harmed",)


@pytest.fixture
def runners(monkeypatch):
    """The runners that the test makes."""
    found = []
    build = Runner.from_cfg.__func__

    def from_cfg(cls, cfg):
        found.append(build(cls, cfg))
        return found[-1]

    monkeypatch.setattr(Runner, "from_cfg", classmethod(from_cfg))
    return found


def names_of_ours(runner):
    """List the hooks, loop and sampler of a runner that come from mmvssm.run."""
    loop = runner.train_loop
    parts = [*runner.hooks, loop, loop.dataloader.sampler, loop.dataloader.batch_sampler]
    return {type(part).__name__ for part in parts if type(part).__module__.startswith("mmvssm.run")}


def test_it_has_nothing_of_ours_and_the_same_checkpoints(config, runners):
    path = config(tiny_configs.DETECTOR, "train_cfg = dict(max_epochs=2)\n")
    for work_dir, options in (("plain", ["--plain"]), ("ours", [])):
        call("train.py", path, *options, "--work-dir", work_dir)
    plain, ours = runners
    assert names_of_ours(plain) == set() and len(names_of_ours(ours)) >= 4
    assert plain.train_loop.dataloader.worker_init_fn.func.__module__.startswith("mmengine")
    saved, expected = (
        torch.load(f"{folder}/epoch_2.pth", weights_only=True) for folder in ("plain", "ours")
    )
    assert saved.keys() == expected.keys()
    assert saved["meta"]["dataset_meta"] == expected["meta"]["dataset_meta"]
    shapes, expected_shapes = (
        {key: value.shape for key, value in content["state_dict"].items()}
        for content in (saved, expected)
    )
    assert shapes == expected_shapes
    assert Path("plain/tiny.py").is_file()

    longer = ("--cfg-options", "train_cfg.max_epochs=3")
    call("train.py", path, "--plain", "--work-dir", "plain", "--resume", *longer)
    assert Path("plain/epoch_3.pth").is_file()
    call("train.py", path, "--work-dir", "plain", "--resume", "--epochs", "4")
    assert Path("plain/epoch_4.pth").is_file()


def test_it_generates_the_data_that_a_config_describes(config, in_folder):
    data = (
        f"prepare_data = dict(type='mmvssm.ShapesGenerator', root='new', **{tiny_configs.SIZE})\n"
    )
    text = tiny_configs.DETECTOR.replace("prepare_data = None", data).replace("ROOT", "new")
    call("train.py", config(text), "--plain")
    assert Path("new/annotations/instances_train2017.json").is_file()
    assert Path("work_dirs/tiny/epoch_1.pth").is_file()


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--epochs", "3"], "no --epochs;"),
        (["--iters", "3", "--tensorboard"], "no --iters, --tensorboard;"),
        (["--data-root", "d", "--classes", "a"], "no --data-root, --classes;"),
        (["--no-reduce-zero-label", "--no-data-check"], "no --reduce-zero-label, --no-data-check;"),
        (["--reduce-zero-label"], "no --reduce-zero-label;"),
        (["--image-size", "64", "--batch-size", "2"], "no --batch-size, --image-size;"),
    ],
    ids=str,
)  # fmt: skip
def test_options_that_mmengine_lacks_are_refused(in_folder, capsys, options, named):
    sentence = sentence_of_refusal(capsys, "train.py", "any.py", "--plain", *options)
    assert f"--plain runs the config with mmengine alone, which has {named}" in sentence


def test_code_in_a_checkpoint_is_refused_and_not_run(config, in_folder):
    torch.save({"state_dict": {}, "meta": Malicious()}, "evil.pth")
    path = config(tiny_configs.DETECTOR)
    with pytest.raises(UnsafeCheckpointError, match=r"evil\.pth was refused"):
        call("train.py", path, "--plain", "--cfg-options", "load_from=evil.pth")
    assert not Path("harmed").exists()
