"""Shared parts of the benchmarks: alternating timing, memory bandwidth, peak memory, machine description."""

import json
import multiprocessing
import platform
import random
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Optional

import torch
from prettytable import PrettyTable, TableStyle

import mmvssm
from mmvssm.run.allocator import keep_freed_memory


def cpu_name() -> str:
    """Return the name of this machine's processor."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def about(device: str, default_malloc: bool = False) -> dict[str, object]:
    """Describe the machine and the versions for a figure.

    Unless ``default_malloc``, this makes the process keep freed memory, as tools/train.py does.
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
    """Run candidates in turn, so that other load hits all of them alike.

    Each round has a different order, since the state of caches and memory depends on the candidate before.

    Args:
        candidates: Functions to time, by name.
        device: Device on which they run.
        seconds: Total time per candidate; slower ones run ``min_runs`` times.
        min_runs: Least number of runs.
        setup: Called before each run, not timed.

    Returns:
        Seconds of each run, without a first run to warm up.
    """

    def once(run: Callable[[], object]) -> float:
        if setup is not None:
            setup()
        synchronize(device)
        start = time.perf_counter()
        run()
        synchronize(device)
        return time.perf_counter() - start

    return alternate(
        {name: partial(once, run) for name, run in candidates.items()}, seconds, min_runs
    )


def alternate(
    candidates: dict[str, Callable[[], float]],
    seconds: float,
    min_runs: int,
    max_runs: int = sys.maxsize,
) -> dict[str, list[float]]:
    """Call functions that time one run each, as :func:`time_side_by_side` calls what it times.

    Args:
        candidates: Functions that return seconds, by name.
        seconds: Total time per candidate; slower ones run ``min_runs`` times.
        min_runs: Least number of runs.
        max_runs: Largest number of runs.

    Returns:
        Seconds of each run, without a first run to warm up.
    """
    times: dict[str, list[float]] = {name: [] for name in candidates}
    warm: set[str] = set()
    order = random.Random(0)
    while True:
        due = [
            name
            for name, taken in times.items()
            if len(taken) < min_runs or (len(taken) < max_runs and sum(taken) < seconds)
        ]
        if not due:
            return times
        order.shuffle(due)
        for name in due:
            taken = candidates[name]()
            if name in warm:
                times[name].append(taken)
            warm.add(name)


def synchronize(device: str) -> None:
    """Wait until the device is done."""
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)


def peak_memory(prepare: Callable[..., Callable[[], object]], *args: object) -> Optional[int]:
    """Measure the peak bytes that a run on a CPU adds to its process; None if this is not Linux.

    Args:
        prepare: Called with ``args`` in a separate process; returns the function to run. It must be defined at a
            module's top level.
        args: Its arguments.
    """
    if not Path("/proc/self/clear_refs").exists():
        return None
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(_growth, prepare, args).result()


def _growth(prepare: Callable[..., Callable[[], object]], args: tuple) -> int:
    run = prepare(*args)
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before = _resident("VmRSS")
    run()
    return _resident("VmHWM") - before


def _resident(entry: str) -> int:
    status = Path("/proc/self/status").read_text().splitlines()
    (line,) = (line for line in status if line.startswith(entry + ":"))
    return int(line.split()[1]) * 1024


def copy_bandwidth(device: str, megabytes: int = 256) -> float:
    """Measure the bytes per second that a copy reads and writes."""
    source = torch.ones(megabytes << 18, device=device)
    target = torch.empty_like(source)
    times = time_side_by_side(dict(copy=lambda: target.copy_(source)), device, seconds=0.5)
    return 2 * source.numel() * 4 / min(times["copy"])


def markdown_table(fields: list[str]) -> PrettyTable:
    """Make an empty table that prints as Markdown."""
    table = PrettyTable(fields)
    table.set_style(TableStyle.MARKDOWN)
    return table


def write_json(path: str, content: dict) -> None:
    """Write results; create a missing folder."""
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps(content, indent=2) + "\n")
    print(f"{target} holds every run")
