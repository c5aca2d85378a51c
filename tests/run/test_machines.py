"""Ranks of one run on several machines, each with a network interface and a disk of its own."""

import os
import subprocess
from pathlib import Path

import pytest

REPO = Path(__file__).parents[2]


# --- networks -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("tool", ["train", "test"])
@pytest.mark.parametrize(
    ("variables", "total", "each"),
    [
        ({}, 8, 8),
        (dict(GPUS="2"), 2, 2),
        (dict(GPUS="16"), 16, 8),
        (dict(GPUS="16", GPUS_PER_NODE="4"), 16, 4),
    ],
)
def test_slurm_is_asked_for_no_more_gpus_than_used(tmp_path, tool, variables, total, each):
    srun = tmp_path / "srun"
    srun.write_text('#!/bin/sh\necho "$@"\n')
    srun.chmod(0o755)
    environment = {k: v for k, v in os.environ.items() if not k.startswith("GPUS")}
    environment.update(variables, PATH=f"{tmp_path}:{os.environ['PATH']}")
    command = [REPO / f"tools/slurm_{tool}.sh", "part", "job", "config.py", "checkpoint.pth"]
    told = subprocess.run(command, env=environment, capture_output=True, text=True).stdout.split()
    expected = {f"--gres=gpu:{each}", f"--ntasks={total}", f"--ntasks-per-node={each}"}
    assert expected <= set(told)
