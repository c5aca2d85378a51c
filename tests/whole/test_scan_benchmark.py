"""The benchmark of the scan reports all figures, whatever the times are."""

import argparse

import pytest

pytest.importorskip("triton", minversion="3.6")

import scan


def test_host_time_is_that_of_calls_that_would_launch_kernels(capsys):
    records = scan.show_host_time(argparse.Namespace(dtype="float32", seconds=0.0))
    found = [(r["states"], r["gradients"], r["launches"]) for r in records]
    assert found == [(1, False, 2), (1, True, 2), (16, False, 3), (16, True, 3)]
    assert all(0 < r["seconds"] < 0.1 for r in records)
    assert capsys.readouterr().out.count("\n") == len(records) + 2
