"""A process killed while it writes a checkpoint leaves one to resume from."""

import os
from collections import deque
from types import SimpleNamespace

import pytest
from mmengine.fileio.backends import LocalBackend

from mmvssm.engine import AtomicCheckpointHook, AtomicLocalBackend


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


class Killed(BaseException):
    pass


def test_old_checkpoint_goes_only_after_the_new_one_is_there(tmp_path):
    """With max_keep_ckpts=1 mmengine removes the only checkpoint and then begins to write."""
    for name in ("epoch_1.pth", ".epoch_0.pth.torn"):
        (tmp_path / name).write_bytes(b"old")
    hook = AtomicCheckpointHook(interval=1, max_keep_ckpts=1)
    runner = SimpleNamespace(
        work_dir=str(tmp_path),
        logger=SimpleNamespace(info=print),
        message_hub=SimpleNamespace(runtime_info={}, update_info=lambda *_: None),
    )
    hook.before_train(runner)
    assert not (tmp_path / ".epoch_0.pth.torn").exists()
    hook.keep_ckpt_ids = deque([1], maxlen=1)

    def killed(*_, **__):
        assert (tmp_path / "epoch_1.pth").exists()
        raise Killed

    runner.save_checkpoint = killed
    with pytest.raises(Killed):
        hook._save_checkpoint_with_step(runner, 2, {})
    assert (tmp_path / "epoch_1.pth").exists()

    hook.keep_ckpt_ids = deque([1], maxlen=1)
    runner.save_checkpoint = lambda *_, **__: (tmp_path / "epoch_2.pth").write_bytes(b"new")
    hook._save_checkpoint_with_step(runner, 2, {})
    assert sorted(p.name for p in tmp_path.glob("*.pth")) == ["epoch_2.pth"]
    assert (tmp_path / "last_checkpoint").read_text() == str(tmp_path / "epoch_2.pth")
    assert isinstance(hook.file_backend, LocalBackend)
