"""demo/mmvssm.ipynb: its cells run in order, and call tools that exist with options that they know."""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from core.test_docs import options_of

pytest.importorskip("mmseg")

REPO = Path(__file__).parents[2]
CELLS = json.loads((REPO / "demo/mmvssm.ipynb").read_text())["cells"]
CODE = ["".join(cell["source"]) for cell in CELLS if cell["cell_type"] == "code"]


def strings(node):
    return [
        n.value for n in ast.walk(node) if isinstance(n, ast.Constant) and isinstance(n.value, str)
    ]


def test_it_has_ten_cells_without_outputs():
    assert len(CELLS) == 10
    for cell in CELLS:
        assert not cell.get("outputs") and cell.get("execution_count") is None
    assert all(text.startswith("# ") for text in CODE)


def test_it_calls_tools_with_options_that_they_know():
    tree = ast.parse("\n".join(CODE))
    tools = {text for text in strings(tree) if text.startswith("tools/")}
    assert len(tools) == 7 and all((REPO / tool).exists() for tool in tools)
    known = frozenset().union(*map(options_of, tools - {"tools/install/environment.py"}))
    given = {text for text in strings(tree) if text.startswith("--")}
    assert len(given) > 8 and given <= known | {"--depth", "--no-build-isolation", "--no-deps"}


@pytest.mark.nightly
def test_it_runs(tmp_path):
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    shown = "def display(*pictures):\n    print(*(picture.size for picture in pictures))\n"
    environment = {**os.environ, "PYTHONPATH": str(REPO), "MMVSSM_NOTEBOOK_ITERS": "2"}
    done = subprocess.run(
        [sys.executable, "-c", "\n".join([shown, *CODE])],
        cwd=tmp_path,
        env={**environment, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert done.stdout.count(" mIoU\n") == 2
    assert float(done.stdout.split("the same class in ")[1].split("%")[0]) > 99.9
    (work,) = (tmp_path / "work_dirs").iterdir()
    assert {"curves.png", "predicted.png", "pruned.onnx"} <= {file.name for file in work.iterdir()}
