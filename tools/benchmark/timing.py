"""What the benchmarks share: timing side by side, memory bandwidth, peak memory, and who the machine is."""

import json
import multiprocessing
import platform
import random
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Optional

import torch
from prettytable import PrettyTable, TableStyle

import mmvssm
from mmvssm.run.allocator import keep_freed_memory


def cpu_name() -> str:
    """What this machine's processor calls itself."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def about(device: str, default_malloc: bool = False) -> dict[str, object]:
    """The machine and the versions that a figure belongs to.

    Unless told otherwise, makes this process keep freed memory, as tools/train.py does; that
    holds for all candidates alike.
    """
    kept = device == "cpu" and not default_malloc and keep_freed_memory()
    name = torch.cuda.get_device_name(device) if device.startswith("cuda") else cpu_name()
    return dict(
        machine=name,
        threads=torch.get_num_threads(),
        python=platform.python_version(),
        torch=torch.__version__,
        mmvssm=mmvssm.__version__,
        keeps_freed_memory=kept,
    )


def time_side_by_side(
    candidates: dict[str, Callable[[], object]],
    device: str,
    seconds: float = 1.0,
    min_runs: int = 3,
    setup: Optional[Callable[[], None]] = None,
) -> dict[str, list[float]]:
    """Run candidates in turn, so that whatever else the machine does hits all of them alike.

    Each round has an order of its own: what ran before leaves caches and memory behind, which would slow down or speed
    up the same candidate each time.

    Args:
        candidates: What to run, by name.
        device: Where it runs.
        seconds: How long each may take in all; those that take longer run ``min_runs`` times.
        min_runs: The least number of runs.
        setup: Called before each run, not timed.

    Returns:
        Seconds of each run but a first one that warms up.
    """
    times: dict[str, list[float]] = {name: [] for name in candidates}
    warm: set[str] = set()
    order = random.Random(0)
    while True:
        due = [n for n in candidates if len(times[n]) < min_runs or sum(times[n]) < seconds]
        if not due:
            return times
        order.shuffle(due)
        for name in due:
            if setup is not None:
                setup()
            synchronize(device)
            start = time.perf_counter()
            candidates[name]()
            synchronize(device)
            if name in warm:
                times[name].append(time.perf_counter() - start)
            warm.add(name)


def synchronize(device: str) -> None:
    """Wait until the device is done."""
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)


def peak_memory(prepare: Callable[..., Callable[[], object]], *args: object) -> Optional[int]:
    """Bytes of memory that a run on a CPU adds to its process, at most; None where this is not Linux.

    Args:
        prepare: Called with ``args`` in a process of its own; returns what is run. It has to be
            a function of a module's top level.
        args: Its arguments.
    """
    if not Path("/proc/self/clear_refs").exists():
        return None
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(_growth, prepare, args).result()


def _growth(prepare: Callable[..., Callable[[], object]], args: tuple) -> int:
    run = prepare(*args)
    Path("/proc/self/clear_refs").write_text("5")  # forgets the peak so far
    before = _resident("VmRSS")
    run()
    return _resident("VmHWM") - before


def _resident(entry: str) -> int:
    status = Path("/proc/self/status").read_text().splitlines()
    (line,) = (line for line in status if line.startswith(entry + ":"))
    return int(line.split()[1]) * 1024


def copy_bandwidth(device: str, megabytes: int = 256) -> float:
    """Bytes per second that a copy reads and writes, measured now."""
    source = torch.ones(megabytes << 18, device=device)
    target = torch.empty_like(source)
    times = time_side_by_side(dict(copy=lambda: target.copy_(source)), device, seconds=0.5)
    return 2 * source.numel() * 4 / min(times["copy"])


def markdown_table(fields: list[str]) -> PrettyTable:
    """An empty table that prints as Markdown."""
    table = PrettyTable(fields)
    table.set_style(TableStyle.MARKDOWN)
    return table


def write_json(path: str, content: dict) -> None:
    """Write results, making the folder where it is missing."""
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps(content, indent=2) + "\n")
    print(f"{target} holds every run")
