"""Reading of regular files, and atomic writing."""

import json
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


@pytest.mark.parametrize("step", ["fsync", "replace", "close"])
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


def test_names_of_as_many_bytes_as_a_file_system_takes(tmp_path):
    for name in ("a" * 251 + ".png", "\U0001f40d" * 62 + ".jpg", "." + "s" * 254):
        files.write_whole(tmp_path / name, "text")
        assert (tmp_path / name).read_text() == "text"
    assert len(list(tmp_path.iterdir())) == 3


def test_what_a_killed_process_left_is_removed_and_nothing_else(tmp_path, monkeypatch):
    own = tmp_path / ".x.pth.txt"
    own.touch()
    monkeypatch.setattr(files.Path, "unlink", lambda *_, **__: None)
    monkeypatch.setattr(files.os, "replace", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        files.write_whole(tmp_path / "epoch_1.pth", b"some of it")
    monkeypatch.undo()
    assert len(list(tmp_path.iterdir())) == 2
    files.remove_partial(tmp_path)
    assert list(tmp_path.iterdir()) == [own]


@pytest.mark.parametrize(
    "make", [os.mkfifo, os.mkdir, lambda path: None], ids=["fifo", "folder", "nothing"]
)
def test_what_is_no_regular_file_is_an_error(tmp_path, make):
    """At once: to open a FIFO waits for its other end."""
    make(tmp_path / "file")
    with pytest.raises(OSError) as caught, files.open_regular(tmp_path / "file"):
        pass
    assert caught.value.filename == str(tmp_path / "file")


def test_text_has_a_limit_and_may_be_damaged(tmp_path):
    (tmp_path / "text").write_bytes(b"caf\xe9")
    assert files.read_text(tmp_path / "text", 4) == "caf\ufffd"
    with pytest.raises(OSError, match="more than 3 bytes"):
        files.read_text(tmp_path / "text", 3)


def test_json_is_of_the_kind_wanted(tmp_path):
    path = tmp_path / "x.json"
    path.write_text(json.dumps({"a": [1]}))
    assert files.read_json(path, dict) == {"a": [1]}
    for text in ("{", "[]", "\xff", "[" * 100_000):
        path.write_text(text)
        with pytest.raises(ValueError):
            files.read_json(path, dict)


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
