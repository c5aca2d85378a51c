"""One training on two machines: two networks that a cable connects, and two folders for two disks."""

import os
import shutil
import signal
import subprocess
import time
from contextlib import suppress

import pytest

pytest.importorskip("mmdet")
pytest.importorskip("mmseg")

from whole.test_train_test import DETECTION, ENVIRONMENT, REPO, free_port

ADDRESSES = ("10.77.0.1", "10.77.0.2")
# Every rank notes a hash of its weights and buffers after every epoch.
HASHES = """
import hashlib
from mmengine.hooks import Hook
from mmengine.registry import HOOKS

@HOOKS.register_module()
class NoteHashes(Hook):
    def after_train_epoch(self, runner):
        content = hashlib.sha256()
        for value in runner.model.module.state_dict().values():
            content.update(value.numpy().tobytes())
        with open("hashes.txt", "a") as file:
            print(runner.epoch + 1, content.hexdigest(), file=file)
"""
WORKERS = "num_workers=2, persistent_workers=True"
SETTINGS = """
custom_imports = dict(imports=["mmvssm", "note_hashes"])
custom_hooks = [dict(type="NoteHashes", priority="LOW")]  # after SyncBuffersHook
train_cfg = dict(max_epochs=3, val_interval=1)
"""


def ip(*words):
    return subprocess.run(["ip", *words], capture_output=True, text=True)


@pytest.fixture
def networks():
    """Two network namespaces with a cable between them; in each, the host's name is that of the loopback device."""
    if not shutil.which("ip"):
        pytest.skip("needs ip, of iproute2")
    names = [f"mmvssm-{os.getpid()}-{side}" for side in "ab"]
    a, b = names
    commands = [f"netns add {name}" for name in names]
    commands += [f"-n {a} link add cable type veth peer name cable netns {b}"]
    for name, address in zip(names, ADDRESSES):
        commands += [f"-n {name} addr add {address}/24 dev cable"]
        commands += [f"-n {name} link set {device} up" for device in ("cable", "lo")]
    try:
        for command in commands:
            done = ip(*command.split())
            if done.returncode:
                pytest.skip(f"needs network namespaces (root): {done.stderr.strip()}")
        yield names
    finally:
        for name in names:
            ip("netns", "delete", name)


@pytest.fixture
def start(networks, tmp_path):
    """Starts the two ends of a run, each in its network and its folder; kills what is left after the test."""

    def start(*arguments):
        port = str(free_port())
        ends = []
        for rank, name in enumerate(networks):
            folder = tmp_path / "ab"[rank]
            if not folder.exists():
                folder.mkdir()
                text = DETECTION.replace("ROOT", "data/small").replace(WORKERS, "num_workers=0")
                (folder / "small.py").write_text(text + SETTINGS)
                (folder / "note_hashes.py").write_text(HASHES)
            command = ["ip", "netns", "exec", name, REPO / "tools/dist_train.sh", "small.py", "1"]
            settings = dict(NNODES="2", NODE_RANK=str(rank), MASTER_ADDR=ADDRESSES[0], PORT=port)
            settings["PYTHONPATH"] = f"{ENVIRONMENT['PYTHONPATH']}:{folder}"
            with (folder / "output.txt").open("w") as output:
                ends.append(
                    subprocess.Popen(
                        list(map(str, [*command, *arguments])),
                        cwd=folder,
                        env={**ENVIRONMENT, **settings},
                        stdout=output,
                        stderr=subprocess.STDOUT,
                    )
                )
        return ends

    yield start
    for name in networks:
        kill_all_in(name)


def kill_all_in(network):
    """torchrun's workers are in sessions of their own."""
    for process in ip("netns", "pids", network).stdout.split():
        with suppress(ProcessLookupError):
            os.kill(int(process), signal.SIGKILL)


def hashes(folder):
    """Those of a machine by epoch, and forget them."""
    file = folder / "hashes.txt"
    found = dict(line.split() for line in file.read_text().splitlines())
    file.unlink()
    return found


@pytest.mark.nightly
def test_killed_on_one_machine_and_resumed_as_if_never_stopped(start, networks, tmp_path):
    a, b = tmp_path / "a", tmp_path / "b"

    def run(*arguments):
        for end in start(*arguments):
            assert end.wait(300) == 0, [(f / "output.txt").read_text()[-4000:] for f in (a, b)]

    run("--work-dir", "whole")
    whole = hashes(a)
    assert whole == hashes(b) and list(whole) == ["1", "2", "3"]

    first, second = start("--work-dir", "broken")
    deadline = time.monotonic() + 300
    while not (a / "broken/last_checkpoint").exists():
        assert time.monotonic() < deadline and first.poll() is second.poll() is None
        time.sleep(0.02)
    kill_all_in(networks[1])
    killed = time.monotonic()
    # Seconds if cores are idle; by itself gloo gives up after half an hour.
    assert first.wait(60) != 0
    print(f"The other end stopped {time.monotonic() - killed:.1f} s after the kill")
    said = [line for line in (a / "output.txt").read_text().splitlines() if "error: " in line]
    assert "the connection to another rank broke" in said[0] and "broken/epoch_" in said[0]
    before = hashes(a)
    assert before.items() < whole.items() and hashes(b).items() < whole.items()

    run("--work-dir", "broken", "--resume")
    resumed = hashes(a)
    assert resumed == hashes(b) and resumed.items() < whole.items() <= (before | resumed).items()
    assert sorted(path.suffix for path in (b / "broken").rglob("*.*")) == []
