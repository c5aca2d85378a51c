"""tools/browse_dataset.py and tools/plot_log.py as programs."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("mmdet")

from mmvssm.datasets.shapes import ShapesGenerator
from support import tiny_configs

TOOLS = Path(__file__).resolve().parents[2] / "tools"


def run(folder, tool, *arguments):
    command = [sys.executable, TOOLS / tool, *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120)


def test_browse_dataset(tmp_path):
    ShapesGenerator(root=str(tmp_path / "data"), **tiny_configs.SIZE).ensure()
    (tmp_path / "tiny.py").write_text(tiny_configs.DETECTOR.replace("ROOT", str(tmp_path / "data")))
    done = run(tmp_path, "browse_dataset.py", "tiny.py", "--num", "1")
    assert done.returncode == 0, done.stderr
    assert "4 images" in done.stdout
    folder = tmp_path / "work_dirs" / "tiny" / "browse_train"
    assert sorted(path.suffix for path in folder.iterdir()) == [".jpg", ".txt"]


def test_plot_log(tmp_path):
    file = tmp_path / "run" / "20250101_000000" / "vis_data" / "scalars.json"
    file.parent.mkdir(parents=True)
    file.write_text(json.dumps(dict(lr=0.1, loss=1.0, iter=1, step=1)) + "\n")
    done = run(tmp_path, "plot_log.py", "run", "--out", "a.png")
    assert (done.returncode, (tmp_path / "a.png").exists()) == (0, True), done.stderr
