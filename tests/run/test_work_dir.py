"""One run per work dir."""

import errno
import fcntl
import multiprocessing
import os
import time
from pathlib import Path

import pytest

from mmvssm.errors import UserError
from mmvssm.run import work_dir as work_dirs
from mmvssm.run.work_dir import LOCK, check_not_locked, lock_work_dir

TAKEN = "another run is training into out; wait until it ends, or name another --work-dir"


@pytest.fixture(autouse=True)
def impatient(monkeypatch, tmp_path):
    monkeypatch.setattr(work_dirs, "_PATIENCE", 0.05)
    monkeypatch.chdir(tmp_path)


def test_a_second_run_beside_a_living_one():
    check_not_locked("out")
    with lock_work_dir("out"):
        for refused in (lambda: check_not_locked("out"), lambda: lock_work_dir("out").__enter__()):
            process = multiprocessing.get_context("fork").Process(target=report, args=(refused,))
            process.start()
            process.join()
            assert Path("told").read_text() == TAKEN
    check_not_locked("out")


def report(refused):
    work_dirs._held.clear()  # as a process of its own has none
    try:
        refused()
    except UserError as error:
        Path("told").write_text(str(error))


def test_lock_of_a_killed_process():
    """Also if a forked process, such as a data worker, outlives it for a moment."""
    context = multiprocessing.get_context("fork")

    def train():
        with lock_work_dir("out"):
            Path("started").touch()
            time.sleep(60)

    process = context.Process(target=train)
    process.start()
    end = time.monotonic() + 30
    while not Path("started").exists() and time.monotonic() < end:
        time.sleep(0.01)
    with pytest.raises(UserError, match=TAKEN):
        check_not_locked("out")
    process.kill()
    process.join()
    check_not_locked("out")
    with lock_work_dir("out"):
        pass


def test_a_lock_that_is_a_link_or_no_file_is_refused():
    Path("out").mkdir()
    Path("mine").write_text("content")
    Path("out", LOCK).symlink_to(Path("mine").absolute())
    for make in (lambda: None, lambda: (Path("out", LOCK).unlink(), os.mkfifo(f"out/{LOCK}"))):
        make()
        for use in (lambda: check_not_locked("out"), lambda: lock_work_dir("out").__enter__()):
            with pytest.raises(
                UserError, match=rf"out/{LOCK} is a link or no regular file.*remove"
            ):
                use()
    assert Path("mine").read_text() == "content"


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP])
def test_file_system_without_locks(monkeypatch, capsys, number):
    def flock(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)
    with lock_work_dir("out"):
        assert f"the file system of out/{LOCK} has no locks" in capsys.readouterr().out


def test_a_folder_that_cannot_be_written_to():
    Path("out").write_text("a file")
    with pytest.raises(UserError, match="cannot write to the work dir out: "):
        lock_work_dir("out").__enter__()
