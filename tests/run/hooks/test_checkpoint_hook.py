"""A process killed during the write of a checkpoint leaves a good one to resume from."""

import errno
import os
from pathlib import Path

import pytest
import torch
from mmengine.hooks import CheckpointHook, Hook

from mmvssm.run.hooks import (
    AtomicCheckpointHook,
    AtomicLocalBackend,
    NonFiniteError,
    NonFiniteGuardHook,
)
from mmvssm.run.settings import find_type
from mmvssm.run.train import prepare_training
from support.toy_training import toy_config, toy_runner


def test_file_appears_whole_or_not_at_all(tmp_path, monkeypatch):
    target = tmp_path / "new" / "a.pth"
    AtomicLocalBackend().put(b"first", target)
    assert target.read_bytes() == b"first"
    assert target.stat().st_mode & 0o777 == 0o666 & ~os.umask(os.umask(0o022) and 0o022)

    def die(*_):
        assert target.read_bytes() == b"first"  # still the old one, with the new one written
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", die)
    with pytest.raises(KeyboardInterrupt):
        AtomicLocalBackend().put(b"second", target)
    assert target.read_bytes() == b"first"
    assert [p.name for p in target.parent.iterdir()] == ["a.pth"]


def test_an_error_of_writing_names_the_file(tmp_path, monkeypatch):
    def full(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError) as caught:
        AtomicLocalBackend().put(b"first", tmp_path / "a.pth")
    assert caught.value.errno == errno.ENOSPC
    assert caught.value.filename == str(tmp_path / "a.pth")
    assert list(tmp_path.iterdir()) == []


class Killed(BaseException):
    pass


BEST_OF_TWO = {
    "default_hooks.checkpoint.save_best": ["toy/mAP", "toy/other"],
    "default_hooks.checkpoint.rule": "greater",
}
# Settings, and what is there whenever something is written after the second epoch.
KEPT = {
    "newest": ({}, ["epoch_*.pth"]),
    "best": (
        {"default_hooks.checkpoint.save_best": "auto"},
        ["epoch_*.pth", "best_toy_mAP_epoch_*.pth"],
    ),
    "best of two metrics": (
        {**BEST_OF_TWO, "val_evaluator.names": ["mAP", "other"]},
        ["epoch_*.pth", "best_toy_mAP_epoch_*.pth", "best_toy_other_epoch_*.pth"],
    ),
}


@pytest.mark.parametrize(
    ("case", "by_epoch"),
    [("newest", True), ("newest", False), ("best", True), ("best of two metrics", False)],
)
def test_killed_at_any_write(tmp_path, monkeypatch, case, by_epoch):
    """At every moment at which a file is complete but not yet in place, the one before is there.

    With max_keep_ckpts=1 mmengine removes the only checkpoint, and with save_best the best one,
    and then begins to write.
    """
    changes, patterns = KEPT[case]
    patterns = patterns if by_epoch else [p.replace("epoch", "iter") for p in patterns]
    settings = dict(by_epoch=by_epoch, amount=3 if by_epoch else 18, **changes)
    settings["default_hooks.checkpoint.max_keep_ckpts"] = 1
    replace, writes = os.replace, []

    def watch(source, target):
        writes.append(Path(target).name)
        if limit is not None and len(writes) > limit:
            raise Killed
        replace(source, target)

    monkeypatch.setattr(os, "replace", watch)
    limit = None
    run = toy_runner(tmp_path / "whole", **settings)
    run.train()
    kind, first, second, last = ("epoch", 1, 2, 3) if by_epoch else ("iter", 6, 12, 18)
    left = {path.name for path in (tmp_path / "whole").glob("*.pth")}
    assert left == {pattern.replace("*", str(last)) for pattern in patterns}
    assert f"{kind}_{first}.pth" in writes
    (saving,) = (hook for hook in run.hooks if isinstance(hook, AtomicCheckpointHook))
    assert type(saving.file_backend) is AtomicLocalBackend
    for limit in range(writes.index(f"{kind}_{second}.pth"), writes.index(f"{kind}_{last}.pth")):
        writes.clear()
        work_dir = tmp_path / str(limit)
        with pytest.raises(Killed):
            toy_runner(work_dir, **settings).train()
        for pattern in patterns:
            torch.load(next(work_dir.glob(pattern)), weights_only=True)
        assert Path((work_dir / "last_checkpoint").read_text()).is_file()


def test_what_a_killed_run_left_half_written_is_removed(tmp_path):
    torn, other = tmp_path / ".epoch_0.x.mmvssm-partial.pth", tmp_path / ".x.pth.txt"
    torn.touch(), other.touch()
    toy_runner(tmp_path, amount=1).train()
    assert not torn.exists() and other.exists() and (tmp_path / "epoch_1.pth").exists()


@pytest.mark.parametrize("fifo", [False, True])
def test_a_link_or_fifo_in_place_of_last_checkpoint_is_replaced(tmp_path, fifo):
    precious = tmp_path / "precious.txt"
    precious.write_text("mine")
    work_dir = tmp_path / "run"
    work_dir.mkdir()
    marker = work_dir / "last_checkpoint"
    os.mkfifo(marker) if fifo else marker.symlink_to(precious)
    toy_runner(work_dir, amount=1).train()
    assert precious.read_text() == "mine"
    assert (work_dir / "last_checkpoint").read_text().endswith("epoch_1.pth")


def test_so_is_it_in_a_folder_of_its_own(tmp_path):
    """``out_dir``, to which mmengine adds the last part of the work dir."""
    folder = tmp_path / "weights" / "run"
    folder.mkdir(parents=True)
    (folder / ".epoch_0.x.mmvssm-partial.pth").touch()
    settings = {"default_hooks.checkpoint.out_dir": str(tmp_path / "weights")}
    toy_runner(tmp_path / "run", amount=1, **settings).train()
    assert [path.name for path in folder.iterdir()] == ["epoch_1.pth"]


@pytest.mark.parametrize("kind", [CheckpointHook, "mmengine.CheckpointHook", "CheckpointHook"])
def test_however_the_hook_is_named(tmp_path, kind):
    cfg = toy_config(tmp_path)
    cfg.default_hooks.checkpoint.type = kind
    prepare_training(cfg)
    assert find_type(cfg.default_hooks.checkpoint.type) is AtomicCheckpointHook


def test_hooks_given_as_classes_are_not_added_again(tmp_path):
    cfg = toy_config(tmp_path, custom_hooks=[dict(type=NonFiniteGuardHook, patience=7)])
    kinds = [find_type(hook.type) for hook in cfg.custom_hooks]
    assert kinds.count(NonFiniteGuardHook) == 1 and cfg.custom_hooks[0].patience == 7


# What is spoilt after the first epoch, and how the sentence names it.
SPOILT = {
    "a parameter": (lambda run: run.model.head.bias, "head.bias"),
    "running statistics": (lambda run: run.model.stem[1].running_var, "stem.1.running_var"),
    "momentum": (
        lambda run: next(iter(run.optim_wrapper.optimizer.state.values()))["momentum_buffer"],
        "optimizer 0, parameter 0, momentum_buffer",
    ),
}


@pytest.mark.parametrize("case", SPOILT)
@pytest.mark.parametrize("value", [float("nan"), float("inf")], ids=str)
def test_nothing_that_is_not_finite_is_saved_and_nothing_good_removed(tmp_path, case, value):
    pick, name = SPOILT[case]
    run = toy_runner(tmp_path, **{"default_hooks.checkpoint.max_keep_ckpts": 1})

    class Spoil(Hook):
        def before_save_checkpoint(self, runner, checkpoint):
            assert runner.epoch == 0

        def after_train_epoch(self, runner):
            if runner.epoch == 1:
                with torch.no_grad():
                    pick(runner).view(-1)[-1] = value

    run.register_hook(Spoil())
    with pytest.raises(NonFiniteError) as caught:
        run.train()
    assert f"the state after 12 iterations holds NaN or infinity in {name}" in str(caught.value)
    assert f"last checkpoint: {tmp_path / 'epoch_1.pth'}" in str(caught.value)
    assert [path.name for path in tmp_path.glob("*.pth")] == ["epoch_1.pth"]


def test_a_buffer_that_is_meant_to_be_infinite_may_be(tmp_path):
    run = toy_runner(tmp_path, amount=1)
    run.model.register_buffer("mask", torch.tensor([0, -float("inf")]))
    run.train()
    assert (tmp_path / "epoch_1.pth").exists()


def test_a_best_checkpoint_written_again_under_its_name_stays(tmp_path):
    """A resumed run may repeat the evaluation whose checkpoint is already the best."""
    settings = {"amount": 1, "default_hooks.checkpoint.save_best": "auto"}
    run = toy_runner(tmp_path, **settings)
    best = tmp_path / "best_toy_mAP_epoch_1.pth"
    best.write_bytes(b"old")
    (saving,) = (hook for hook in run.hooks if isinstance(hook, AtomicCheckpointHook))
    run.message_hub.update_info("best_ckpt", str(best))
    run.train()
    assert saving.best_ckpt_path == str(best)
    torch.load(best, weights_only=True)


@pytest.mark.parametrize(
    ("names", "best"),
    [
        (["disk_precision", "bbox_mAP", "bbox_mAP_50"], "bbox_mAP"),
        (["disk_precision", "bbox_recall"], "disk_precision"),
    ],
    ids=["of mmdet", "of another evaluator"],
)
def test_the_best_is_that_of_all_classes(tmp_path, names, best):
    """mmdet's CocoMetric(classwise=True) puts the metrics of single classes first."""
    settings = {"default_hooks.checkpoint.save_best": "auto", "val_evaluator.names": names}
    toy_runner(tmp_path, amount=1, **settings).train()
    assert (tmp_path / f"best_toy_{best}_epoch_1.pth").exists()


@pytest.mark.parametrize(
    "named, removable",
    [
        ("elsewhere/best_toy_mAP_epoch_1.pth", "best_toy_mAP_epoch_1.pth"),
        ("epoch_1.pth", None),
        ("best_notes.txt", None),
    ],
)
def test_only_a_best_checkpoint_of_this_run_is_one_to_replace(tmp_path, named, removable):
    run = toy_runner(tmp_path, amount=1)
    (saving,) = (hook for hook in run.hooks if isinstance(hook, AtomicCheckpointHook))
    notes = dict(best_ckpt=named)
    saving.after_load_checkpoint(run, dict(message_hub=dict(runtime_info=notes)))
    assert notes == ({} if removable is None else dict(best_ckpt=str(tmp_path / removable)))
