"""One-line errors for failures of the machine."""

import errno
import json
import multiprocessing
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from multiprocessing import resource_sharer
from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from mmengine.dataset import pseudo_collate
from torch.utils.data import DataLoader

from mmvssm.datasets import pictures
from mmvssm.errors import RunFailure, Stopped, UserError, run_tool
from mmvssm.models.pruning import PruningError
from mmvssm.run.distributed import init_processes
from mmvssm.run.failures import explain_failure, run_failures
from mmvssm.run.hooks import init_worker
from mmvssm.run.setup import use_worker_init

REPO = Path(__file__).resolve().parents[2]
TRAINER = REPO / "tests" / "support" / "toy_training.py"

# Messages of PyTorch and the system as they were met, and what is made of them.
MET = {
    "shared memory, handing over": (
        RuntimeError(
            "Caught RuntimeError in a data worker. Original Traceback ... RuntimeError: unable to "
            "allocate shared memory(shm) for file </torch_17682_376001500_0>: No space left on device (28)"
        ),
        ["shared memory is full (/dev/shm holds ", "set num_workers=0", "--shm-size"],
    ),
    "shared memory, bus error": (
        RuntimeError(
            "DataLoader worker (pid 7) is killed by signal: Bus error. It is possible that "
            "dataloader's workers are out of shared memory. Please try to raise your shared memory limit."
        ),
        ["shared memory is full", "set num_workers=0"],
    ),
    "killed worker": (
        RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. "),
        ["a data worker was killed by signal Killed", "memory ran out", "num_workers"],
    ),
    "worker that ended": (
        RuntimeError("DataLoader worker (pid(s) 7, 8) exited unexpectedly"),
        ["a data worker ended unexpectedly", "memory ran out", "num_workers"],
    ),
    "memory, PyTorch": (
        RuntimeError("[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory"),
        ["out of memory; use a smaller train_dataloader.batch_size", "num_workers"],
    ),
    "memory, Python": (MemoryError(), ["out of memory; use a smaller"]),
    "memory of a GPU": (
        torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        ["out of memory on the GPU", "--amp", "with_cp=True"],
    ),
    "port in use": (
        RuntimeError("The server socket has failed to listen: EADDRINUSE, message: address already in use"),
        ["port 29876 is in use", "PORT"],
    ),
    "quota": (
        OSError(errno.EDQUOT, "Disk quota exceeded", "work/epoch_3.pth"),
        ["the disk is full: work/epoch_3.pth could not be written", "earlier files are intact"],
    ),
    "ulimit -f": (OSError(errno.EFBIG, "File too large", "a.pth"), ["a.pth is larger", "`ulimit -f`"]),
    "undecodable image": (
        AssertionError(
            "Caught AssertionError in DataLoader worker process 0.\nOriginal Traceback:\n  x.py\n"
            "AssertionError: failed to load image: data/a b.png\n"
        ),
        ["data/a b.png cannot be decoded; restore it, or remove it from the data set"],
    ),
    "full disk, no name": (OSError(errno.ENOSPC, "No space left on device"), ["full"]),
}  # fmt: skip


@pytest.mark.parametrize("case", MET)
def test_one_sentence(case, monkeypatch):
    monkeypatch.setenv("MASTER_ADDR", "10.0.0.7")
    monkeypatch.setenv("MASTER_PORT", "29876")
    error, said = MET[case]
    with pytest.raises(RunFailure) as caught, run_failures():
        raise error
    sentence = str(caught.value)
    assert all(part in sentence for part in said), sentence
    assert "\n" not in sentence and caught.value.exit_code == 1


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("mat1 and mat2 shapes cannot be multiplied"),
        RuntimeError("shape '[2, 3]' is invalid for input of size 5"),
        FileNotFoundError(errno.ENOENT, "No such file", "a.png"),
        # Of data and hosts, not of a worker.
        EOFError("No data left in file"),
        ConnectionRefusedError(111, "Connection refused"),
        KeyError("DataLoader worker"),
    ],
    ids=str,
)
def test_mistakes_in_the_code_keep_their_traceback(error):
    if not isinstance(error, KeyError):
        assert explain_failure(error) is None
    with pytest.raises(type(error)) as caught, run_failures():
        raise error
    assert caught.value is error


def test_a_connection_to_a_worker_that_breaks(monkeypatch):
    """While a batch is taken over, which Python's resource_sharer does."""

    def broken(*_, **__):
        raise ConnectionResetError(104, "Connection reset by peer")

    monkeypatch.setattr("multiprocessing.connection.Client", broken)
    with pytest.raises(RunFailure, match=r"a data worker ended, most often"), run_failures():
        resource_sharer.DupFd(os.dup(0)).detach()


def test_a_batch_too_small_for_batch_norm():
    with pytest.raises(RunFailure, match="batch_size of at least 2"), run_failures():
        torch.nn.BatchNorm2d(3)(torch.rand(1, 3, 1, 1))


def test_interrupted_where_a_library_makes_another_error_of_it():
    """mmengine does this while it formats a config, which takes a large part of the time of saving."""

    def swallow():
        try:
            raise KeyboardInterrupt
        except:  # noqa: E722
            raise SyntaxError("Failed to format the config file")  # noqa: B904

    with pytest.raises(Stopped, match=r"^interrupted$") as caught, run_failures():
        swallow()
    assert caught.value.exit_code == 130
    with pytest.raises(SystemExit, match=r"^130$"):
        run_tool(swallow)


def test_interrupted(tmp_path):
    def interrupt(work_dir):
        with pytest.raises(Stopped) as caught, run_failures(work_dir):
            raise KeyboardInterrupt
        assert caught.value.exit_code == 130
        return str(caught.value)

    assert interrupt(None) == "interrupted"
    assert interrupt(str(tmp_path)) == "interrupted; no checkpoint was saved yet"
    file = tmp_path / "epoch_1.pth"
    (tmp_path / "last_checkpoint").write_text(str(file))
    assert interrupt(str(tmp_path)) == "interrupted; no checkpoint was saved yet"
    file.touch()
    assert interrupt(str(tmp_path)).endswith(f"with the same --work-dir continues from {file}")
    (tmp_path / "last_checkpoint").write_bytes(b"\xff\xfe\x00")  # damaged
    assert interrupt(str(tmp_path)).endswith("no checkpoint was saved yet")


def test_pruning_mistakes_are_the_users():
    with pytest.raises(Exception, match="no room") as caught, run_failures():
        raise PruningError("no room")
    assert isinstance(caught.value, UserError)


class Unsendable:
    """A data set whose samples a worker cannot send, like tensors when shared memory is full."""

    def __init__(self, length=8):
        self.length = length

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        return index if index < 4 else (lambda: index)


def test_what_a_worker_cannot_hand_over_is_an_error_and_no_wait_for_ever():
    loader = DataLoader(
        Unsendable(),
        batch_size=2,
        num_workers=2,
        collate_fn=pseudo_collate,
        worker_init_fn=init_worker,
        timeout=60,  # without init_worker's doing, it would wait as long
    )
    batches = []
    with pytest.raises(Exception, match=r"in a data worker(.|\n)*_ForkingPickler") as caught:
        batches.extend(loader)
    assert batches == [[0, 1], [2, 3]] and "timed out" not in str(caught.value)


def test_every_loader_gets_it():
    names = ("train_dataloader", "val_dataloader", "test_dataloader")
    cfg = Config({name: dict(num_workers=2) for name in names})
    use_worker_init(cfg)
    assert all(cfg[name].worker_init_fn.type == "mmvssm.init_worker" for name in names)


def test_a_killed_worker_ends_the_run(tmp_path):
    """In a process of its own: torch raises what it learns of a worker wherever the main thread then is."""
    settings = {"train_dataloader.num_workers": 1, "train_dataloader.dataset.deadly": 9}
    done = subprocess.run(
        [sys.executable, TRAINER, tmp_path / "run", json.dumps(settings)],
        env={**os.environ, "PYTHONPATH": f"{REPO}:{REPO / 'tests'}", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=120,
    )
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.returncode == 1 and len(errors) == 1, done.stderr
    # Which of the two comes first, its connection's end or its own, is chance.
    assert re.search(
        r"a data worker (was killed by signal Killed|ended( unexpectedly)?), most often", errors[0]
    )


def _read_slowly(path):
    Path(f"{path}.pid").write_text(str(os.getpid()))
    time.sleep(60)


def _runs(pid):
    """Whether a process exists and is no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def wait_until(condition, seconds=20):
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.05)


@pytest.mark.skipif(sys.platform != "linux", reason="asks the Linux kernel")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_readers_of_pictures_end_with_their_parent(tmp_path, monkeypatch, number):
    monkeypatch.setattr(pictures, "_FEW", 1)
    monkeypatch.setattr(pictures, "_CHUNK", 1)
    monkeypatch.setattr("os.cpu_count", lambda: 1)  # two readers
    paths = [str(tmp_path / name) for name in "ab"]

    def read():
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # whatever earlier tests made of it
        list(pictures.map_files(_read_slowly, paths, "images"))

    process = multiprocessing.get_context("fork").Process(target=read)
    process.start()
    wait_until(lambda: len([p for p in tmp_path.glob("*.pid") if p.read_text()]) == 2)
    readers = [int(path.read_text()) for path in tmp_path.glob("*.pid")]
    assert len(set(readers)) == 2
    os.kill(process.pid, number)
    process.join(20)
    wait_until(lambda: not any(map(_runs, readers)))
    left = [pid for pid in readers if _runs(pid)]
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    process.kill()
    assert left == [] and process.exitcode == -number


def test_a_port_in_use(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = str(server.getsockname()[1])
        settings = dict(RANK="0", WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
        for name, value in settings.items():
            monkeypatch.setenv(name, value)
        with pytest.raises(RunFailure, match=f"port {port} is in use, perhaps by another run"):
            init_processes(Config(dict(launcher="pytorch", env_cfg={})))
        for script in (
            ["dist_train.sh", "config.py", "2"],
            ["dist_test.sh", "config.py", "a.pth", "2"],
        ):
            done = subprocess.run(
                [REPO / "tools" / script[0], *script[1:]],
                env={**os.environ, "PORT": port, "PYTHON": sys.executable},
                capture_output=True,
                text=True,
                timeout=60,
            )
            assert done.returncode == 1 and done.stderr.count("\n") == 1
            assert done.stderr.startswith(
                f"error: port {port}: is in use, perhaps by another run; "
            )


def may_mount():
    """Whether this process may have its own mounts, which needs root and a container that allows it."""
    if not shutil.which("unshare"):
        return False
    command = ["unshare", "-m", "mount", "-t", "tmpfs", "tmpfs", "/dev/shm"]
    return subprocess.run(command, capture_output=True).returncode == 0


LARGE, WORKERS = 300, 2  # a batch of 4 images is 4.3 MB
# What is mounted where, with which settings, and what is said.
FULL = {
    "shared memory, training": (
        ("1m", "/dev/shm"),
        {"train_dataloader.num_workers": WORKERS, "train_dataloader.dataset.size": LARGE},
        ["shared memory is full (/dev/shm holds 1.0 MiB)", "set num_workers=0 and", "no checkpoint was"],
    ),
    "shared memory, validation": (
        ("1m", "/dev/shm"),
        {"val_dataloader.num_workers": WORKERS, "val_dataloader.dataset.size": LARGE},
        ["shared memory is full (/dev/shm holds 1.0 MiB)", "set num_workers=0 and", "epoch_1.pth"],
    ),
    "disk": (
        ("64k", "WORK_DIR"),
        {"amount": 30},
        ["the disk is full: ", "could not be written; make room", "continues from "],
    ),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.skipif(not may_mount(), reason="needs mounts of its own (root)")
@pytest.mark.parametrize(
    "case",
    [pytest.param(c, marks=pytest.mark.nightly) if "validation" in c else c for c in FULL],
)
def test_full(tmp_path, case):
    (size, where), settings, said = FULL[case]
    work_dir = tmp_path / "small" / "run"
    work_dir.parent.mkdir()
    where = where.replace("WORK_DIR", str(work_dir.parent))
    # What the mount holds goes with the process: list it before.
    script = (
        'mount -t tmpfs -o size=$1 tmpfs $2 && "$3" "$4" "$5" "$6"; code=$?; ls -a "$5"; exit $code'
    )
    arguments = [size, where, sys.executable, TRAINER, work_dir, json.dumps(settings)]
    done = subprocess.run(
        ["unshare", "-m", "sh", "-c", script, "sh", *map(str, arguments)],
        env={
            **os.environ,
            "PYTHONPATH": f"{REPO}:{REPO / 'tests'}",
            "OMP_NUM_THREADS": "1",
            "CUDA_VISIBLE_DEVICES": "",
        },
        capture_output=True,
        text=True,
        timeout=120,
    )
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.returncode == 1 and len(errors) == 1 and "Traceback" not in done.stderr, done.stderr
    assert all(part in errors[0] for part in said), errors
    if case == "disk":
        kept = Path(errors[0].rpartition(" continues from ")[2])
        files = done.stdout.split()
        assert kept.name in files and not any(name.startswith(".epoch") for name in files)
