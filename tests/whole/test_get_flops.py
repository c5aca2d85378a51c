import os
import subprocess
import sys
from pathlib import Path

import pytest

from support.tool_runs import run_here

REPO = Path(__file__).parents[2]


TOOL = REPO / "tools/analysis_tools/get_flops.py"


def test_detector_by_config():
    done = subprocess.run(
        [sys.executable, TOOL, "configs/groupmamba_maskrcnn_shapes.py", "--shape", "64"],
        capture_output=True,
        text=True,
        cwd=REPO,
        env={**os.environ, "PYTHONPATH": str(REPO)},
    )
    assert done.returncode == 0, done.stderr
    assert "at 64x64" in done.stdout
    rows = {line.split()[1]: line.split() for line in done.stdout.splitlines() if "|" in line}
    assert {"backbone", "neck", "rpn_head", "roi_head", "total"} <= set(rows)
    # Between bars: name, parameters in millions, FLOPs in billions, of which scan.
    parameters = {name: float(row[3]) for name, row in rows.items() if name != "part"}
    parts = sum(value for name, value in parameters.items() if name != "total")
    assert abs(parts - parameters["total"]) < 0.01
    assert 0 < float(rows["backbone"][5]) < float(rows["total"][5])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("groupmamba_mask2former", {"backbone", "decode_head"}),
        ("groupmamba_cascade_maskrcnn", {"backbone", "neck", "rpn_head", "roi_head"}),
    ],
)
def test_heads_that_run_in_ways_of_their_own(name, parts):
    """All operations belong to a part; the cascade has three of Mask R-CNN's heads, each with 100 masks."""
    found = {}
    for one in (name, "groupmamba_maskrcnn"):
        done = run_here(TOOL, str(REPO / f"configs/{one}_shapes.py"), "--shape", "160")
        assert done.returncode == 0, done.stderr
        rows = [line.split() for line in done.stdout.splitlines() if line.startswith("| ")]
        found[one] = {row[1]: float(row[5]) for row in rows if row[1] != "part"}
    costs = found[name]
    assert set(costs) == {*parts, "total"} and min(costs.values()) > 0
    assert costs["total"] == pytest.approx(sum(costs[part] for part in parts), abs=0.005)
    if "roi_head" in parts:
        assert costs["roi_head"] == pytest.approx(
            3 * found["groupmamba_maskrcnn"]["roi_head"], rel=0.1
        )


def test_mistakes_in_one_sentence():
    for arguments, words in (
        (["NoSuchModel"], "NoSuchModel"),
        (["configs/none.py"], "there is no config file configs/none.py"),
        (["GroupMamba", "--cfg-options", "arch=huge"], "unknown arch 'huge'; known are 'tiny'"),
    ):
        done = run_here(TOOL, *arguments)
        assert done.returncode != 0 and "Traceback" not in done.stderr
        (sentence,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
        assert words in sentence
