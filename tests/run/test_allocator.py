import platform
import subprocess
import sys
from pathlib import Path

import pytest

COUNT_FAULTS = """
import resource
import torch
from mmvssm.run.allocator import keep_freed_memory

if KEEP:
    assert keep_freed_memory()
# 100 MB and more, more than malloc ever keeps by itself. Each has room where the one before was: for a tensor of the
# same size glibc wants some bytes more, for the alignment, and finds them only if nothing small came to lie behind.
for size in (30_000_000, 27_500_000, 25_000_000):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(size)
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
print(faults)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="not glibc")
def test_large_tensors_reuse_memory():
    """Fewer fresh pages for the third tensor than without; a page may have 4 KB or 2 MB."""
    faults = [
        int(
            subprocess.run(
                [sys.executable, "-c", COUNT_FAULTS.replace("KEEP", str(keep))],
                check=True,
                capture_output=True,
                text=True,
                cwd=Path(__file__).parents[2],
            ).stdout
        )
        for keep in (False, True)
    ]
    assert faults[0] >= 40 and faults[1] < faults[0] / 10


def test_another_libc_is_left_alone(monkeypatch):
    from mmvssm.run.allocator import keep_freed_memory

    monkeypatch.setattr(platform, "libc_ver", lambda: ("", ""))
    assert keep_freed_memory() is False
