"""Files that version 0.1.0 saved, with older module names, load and resume."""

import gzip
import json
from pathlib import Path

import pytest

pytest.importorskip("mmseg")

from mmvssm.datasets.shapes import ShapesGenerator
from support import tiny_configs
from support.tool_runs import call

SAVED = Path(__file__).parents[1] / "golden" / "saved_by_0.1"


@pytest.fixture
def run_before(in_folder):
    """A folder with the config and the checkpoint of a run that ended after the first of two iterations."""
    ShapesGenerator(root="shapes", **tiny_configs.SIZE).ensure()
    (in_folder / "run").mkdir()
    (in_folder / "run/iter_1.pth").write_bytes(
        gzip.decompress((SAVED / "iter_1.pth.gz").read_bytes())
    )
    (in_folder / "run/last_checkpoint").write_text("run/iter_1.pth")
    return str(SAVED / "config.py")


def test_it_resumes_with_the_same_losses(run_before):
    name = (
        "--cfg-options",
        "visualizer.name=saved_by_0.1",
    )  # mmengine keeps one visualizer of each name
    call("train.py", run_before, "--work-dir", "run", "--resume", *name)
    (log,) = Path("run").glob("*/vis_data/scalars.json")
    training, validation = map(json.loads, log.read_text().splitlines())
    assert training["step"] == 2
    assert training["loss"] == pytest.approx(2.2953996658325195, rel=1e-5)
    assert validation["mIoU"] == pytest.approx(12.270000457763672, abs=0.05)


def test_it_is_evaluated(run_before):
    call("test.py", run_before, "run/iter_1.pth", "--work-dir", "test")
    assert json.loads(Path("test/test_results.json").read_text())["metrics"]["mIoU"] >= 0
