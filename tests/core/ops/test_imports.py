"""Operators need only torch."""

import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[3]
WITHOUT_OPENMMLAB = """
import sys, warnings
from importlib.abc import MetaPathFinder

class Absent(MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {"mmengine", "mmcv", "mmdet", "mmseg"}:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Absent())
import importlib.util
find_spec = importlib.util.find_spec
importlib.util.find_spec = lambda name: None if name in {"mmengine", "mmcv"} else find_spec(name)
warnings.simplefilter("error")
import mmvssm.ops, torch
x = torch.rand(1, 5, 1, 3)
assert mmvssm.ops.selective_scan(x, x, -torch.ones(1, 3, 2), x[..., :2], x[..., :2]).shape == x.shape
try:
    mmvssm.models
except ImportError as error:
    print(error)
"""


@pytest.mark.slow
def test_operators_need_neither_mmengine_nor_mmcv():
    run = subprocess.run(
        [sys.executable, "-c", WITHOUT_OPENMMLAB], cwd=REPOSITORY, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.startswith(
        "mmvssm.models needs mmengine (or its fork onedl-mmengine) and mmcv"
    )
