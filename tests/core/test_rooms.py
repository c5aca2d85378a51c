"""Imports go down the list of folders, and importing the package has no side effects."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

REPO = Path(__file__).parents[2]
TOOL = Path("tools/analysis_tools/rooms.py")


def run(root):
    return subprocess.run(
        [sys.executable, str(TOOL)], cwd=root, capture_output=True, text=True, check=False
    )


@pytest.fixture
def checkout(tmp_path):
    """A copy of what the tool reads."""
    for name in ("mmvssm", "tools", "web", "configs"):
        shutil.copytree(
            REPO / name,
            tmp_path / name,
            ignore=shutil.ignore_patterns("__pycache__", "*.so", ".mim"),
        )
    (tmp_path / "tests/support").mkdir(parents=True)
    return tmp_path


def test_no_import_goes_up():
    done = run(REPO)
    assert done.returncode == 0, done.stderr
    assert "| ops |" in done.stdout and "| run |" in done.stdout


@pytest.mark.parametrize(
    ("file", "statement", "words"),
    [
        ("mmvssm/models/pruning.py", "from ..run import setup", "mmvssm.run.setup, which is above"),
        ("mmvssm/models/pruning.py", "def f():\n    import mmvssm.datasets", "mmvssm.datasets"),
        ("mmvssm/errors.py", "from .ops import selective_scan", "mmvssm.ops.selective_scan"),
        ("mmvssm/ops/chunks.py", "from ..errors import UserError", "mmvssm.errors.UserError"),
        ("mmvssm/models/pruning.py", "from .backbones import plain_mamba", "in a circle: "),
        ("tools/triton_lab/report.py", "import timing", "tools/triton_lab/report.py:"),
        ("tools/benchmark/scan.py", "from support import tiny_configs", "imports support"),
    ],
)
def test_an_import_that_goes_up_or_round_is_found(checkout, file, statement, words):
    path = checkout / file
    path.write_text(f"{path.read_text()}\n{statement}\n")
    done = run(checkout)
    assert done.returncode == 1
    assert words in done.stderr


NEUTRAL = """
import torch, mmengine.fileio, mmdet.apis
from mmengine.hooks import CheckpointHook
from mmengine.runner.checkpoint import CheckpointLoader

def seen():
    schemes = {name: loader for name, loader in CheckpointLoader._schemes.items() if name != "mmvssm://"}
    return schemes, list(torch.serialization.get_safe_globals())

before = seen()
import os
environment = dict(os.environ)
import mmvssm, mmvssm.models, mmvssm.datasets, sys
assert seen() == before
assert dict(os.environ) == environment
assert "load" in mmvssm.__all__ and "mmvssm.run" not in sys.modules
from mmengine.registry import HOOKS
assert HOOKS.get("mmvssm.AtomicCheckpointHook") is not None  # imported now, since it was asked for by name
assert "mmvssm.run" in sys.modules
"""


@pytest.mark.slow
def test_importing_the_package_changes_nothing_for_others():
    pytest.importorskip("mmdet")
    done = subprocess.run(
        [sys.executable, "-c", NEUTRAL], cwd=REPO, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
