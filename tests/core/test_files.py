"""Atomic writing of files."""

import os
import stat

import pytest

from mmvssm import files


def test_content_and_permissions(tmp_path):
    path = tmp_path / "new" / "folder" / "out.txt"
    before = os.umask(0o022)
    try:
        files.write_whole(path, "text, ä\n")
    finally:
        os.umask(before)
    assert path.read_bytes() == "text, ä\n".encode()
    assert stat.S_IMODE(path.stat().st_mode) == 0o644
    files.write_whole(path, memoryview(b"later"))
    assert path.read_bytes() == b"later"
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("step", ["fsync", "replace", "fdopen"])
def test_a_full_disk_leaves_what_was_there(tmp_path, monkeypatch, step):
    path = tmp_path / "out.bin"
    path.write_bytes(b"earlier")

    def fail(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, step, fail)
    with pytest.raises(OSError, match="No space left") as caught:
        files.write_whole(path, b"later")
    assert caught.value.filename == str(path)
    assert [file.read_bytes() for file in tmp_path.iterdir()] == [b"earlier"]


def test_an_interruption_leaves_what_was_there(tmp_path, monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(files.os, "replace", stop)
    with pytest.raises(KeyboardInterrupt):
        files.write_whole(tmp_path / "out.bin", b"later")
    assert not list(tmp_path.iterdir())


def test_a_link_is_replaced_and_not_followed(tmp_path):
    (tmp_path / "target").write_bytes(b"mine")
    (tmp_path / "link").symlink_to(tmp_path / "target")
    files.write_whole(tmp_path / "link", b"new")
    assert (tmp_path / "target").read_bytes() == b"mine"
    assert (tmp_path / "link").read_bytes() == b"new"
