"""Check and time the operators on a GPU, in one command and less than 8 minutes.

Each part runs in its own process. Its time limit is its share of the total time plus the time that earlier parts did
not use. If a part fails, crashes or hangs, we report that and continue with the next. DIR/gpu_check.json has all
figures, DIR/gpu_check.md is a table of them. This needs torch and Triton, but no mmengine, no mmcv and no network. We
skip and name parts whose tool is missing (compute-sanitizer, ncu, mamba-ssm, mmdet). We install nothing and change no
setting of the GPU.

Parts, in this order:
    versions     installed versions, and a trivial kernel
    bandwidth    copies of 50 and 800 MB
    primitives   Triton's scans along axis 0, forwards and backwards, and exp2 and softplus over [-90, 90]
    compile      all kernels that the other parts launch, in one process per core
    tests        the operators against their definition, forward and backward
    sanitizer    compute-sanitizer's memcheck and racecheck on small scans
    times        on the GPU and in Python, four shapes, 1 and 16 images, float32 and bfloat16
    profiler     ncu's instruction counts and those of triton_cost.py
    capture      CUDA graphs, torch.compile, another stream, equal bits in repeated runs
    mamba_ssm    the same scans with mamba-ssm's CUDA kernels
    backbones    times of backbones and of Swin-T, if mmdet is installed
    look_back    the single pass, which waits for other programs, launched 10,000 times

Two more run only if named, each in as much time as all of the above:
    more_times   times of what the others leave out: more walks and states in all dtypes, and float16
    training     training steps of all backbones beside Swin-T, plain, in float16, and through torch.compile

Examples:
    python tools/benchmark/gpu_check.py --out work_dirs/gpu_check
    python tools/benchmark/gpu_check.py --out work_dirs/gpu_training --only training
    python tools/benchmark/gpu_check.py --out work_dirs/gpu_check --mamba-source ../mamba
    python tools/benchmark/gpu_check.py --out work_dirs/gpu_check --device cpu    # the same flow at small sizes
"""

from __future__ import annotations

import argparse
import csv
import io
import itertools
import json
import multiprocessing
import os
import platform
import shutil
import signal
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from importlib.util import find_spec
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, NamedTuple, Optional
from unittest import mock

HERE = Path(__file__).resolve().parent
REPOSITORY = HERE.parents[1]
TOTAL_SECONDS = 460

sys.path[:0] = [str(REPOSITORY), str(REPOSITORY / "tools/triton_lab")]


class Skipped(Exception):
    """A part cannot run on this machine; the message has the cause."""


# ------------------------------------------------------------------------------------- the parent process


def parse_args() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="for the results")
    parser.add_argument("--device", default="cuda", help="cuda (default), cuda:1 and so on, or cpu")
    parser.add_argument(
        "--mamba-source",
        type=Path,
        metavar="DIR",
        help="a checkout of mamba-ssm, from which we compile the scan with nvcc if mamba-ssm is not installed",
    )
    parser.add_argument("--only", nargs="+", choices=list(PARTS), metavar="PART", help="some parts")
    parser.add_argument(
        "--part", choices=list(PARTS), help=argparse.SUPPRESS
    )  # in the child process
    return parser.parse_args()


def run_parts(args: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Run one part after the other.

    Returns:
        For each: ``status`` ok, skipped, failed or timed out, ``seconds``, ``message`` and ``rows``.
    """
    begin = time.monotonic()
    results = {}
    for name, end in part_ends(args.only or FIRST_PARTS).items():
        print(f"{name} ...", end=" ", flush=True)
        start = time.monotonic()
        limit = begin + end - start
        if limit < 1:
            results[name] = dict(status="failed", message="not run: no time was left", rows=[])
        else:
            results[name] = run_part(name, args, limit)
        results[name]["seconds"] = round(time.monotonic() - start, 1)
        print(results[name]["status"], results[name]["message"], flush=True)
    return results


def part_ends(names: Iterable[str]) -> dict[str, float]:
    """Compute the seconds from the start at which each part must end, in this order.

    Each has its share of the total time, and the time that earlier parts did not use.
    """
    names = [name for name in PARTS if name in names]
    share = TOTAL_SECONDS / sum(PARTS[name].seconds for name in names)
    ends = itertools.accumulate(PARTS[name].seconds * share for name in names)
    return dict(zip(names, ends))


def run_part(name: str, args: argparse.Namespace, limit: float) -> dict[str, Any]:
    """Run one part in a separate process."""
    command = [sys.executable, str(Path(__file__).resolve()), "--part", name]
    command += ["--out", str(args.out), "--device", args.device]
    if args.mamba_source:
        command += ["--mamba-source", str(args.mamba_source)]
    return run_limited(command, args.out / name, limit)


def run_limited(command: list[str], place: Path, limit: float) -> dict[str, Any]:
    """Run a process that writes its result to ``{place}.json``, and kill it at the time limit.

    Args:
        command: Command to run; its output goes to ``{place}.log``.
        place: The folder and the part's name.
        limit: Seconds.

    Returns:
        Its result, with a status and a message if it failed.
    """
    file, log_name = place.with_suffix(".json"), f"{place.name}.log"
    file.unlink(missing_ok=True)
    with place.with_suffix(".log").open("w") as log:
        process = subprocess.Popen(
            command,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env=_environment(),
        )
        try:
            code = process.wait(limit)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # including its children
            with suppress(subprocess.TimeoutExpired):  # if it hangs in the driver
                process.wait(10)
            code = None
    result = dict(rows=[], status="failed")
    if file.exists():
        try:
            result = json.loads(file.read_text())
        except ValueError:  # such as on a full disk
            result["message"] = f"{file.name} cannot be read; see {log_name}"
    if code is None:
        wrong = sum(row.get("right") is False for row in result["rows"])
        passed = sum("skipped" not in row for row in result["rows"]) - wrong
        found = f"{passed} passed and {wrong} failed until then"
        message = f"not done after {limit:.0f} s, {found}; see {log_name}"
        result.update(status="timed out", message=message)
    elif (result["status"] == "ok" and code) or "message" not in result:
        result.update(status="failed", message=f"ended with code {code}; see {log_name}")
    return result


def _environment() -> dict[str, str]:
    """Return this process's environment, with this repository first in ``PYTHONPATH``."""
    paths = [str(REPOSITORY), str(HERE), os.environ.get("PYTHONPATH", "")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}


def write_table(results: dict[str, dict[str, Any]], out: Path) -> str:
    """Write a Markdown table of all figures under the name of the device."""
    from report import markdown

    about = next(iter(results.get("versions", {}).get("rows", [])), {})
    rows = []
    for name, result in results.items():
        rows.append(
            [name, "", f"{result['status']} {result['message']}".strip(), f"{result['seconds']} s"]
        )
        for row in result["rows"]:
            figures = [f"{key} {value}" for key, value in row.items() if key != "what"]
            rows.append(["", row["what"], ", ".join(figures), ""])
    title = f"GPU check on {about.get('device', 'an unknown device')}"
    text = f"# {title}\n\n{markdown(['part', 'what', 'result', 'time'], rows)}\n"
    (out / "gpu_check.md").write_text(text)
    return text


# --------------------------------------------------------------------------------------- the child process


class Report:
    """The findings of a part; we write them after each one, so that a hang loses nothing."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.content: dict[str, Any] = dict(status="failed", rows=[])

    def add(self, what: str, **figures: object) -> None:
        """Note a finding."""
        self.content["rows"].append(dict(what=what, **figures))
        self.write()
        print(what, figures, flush=True)

    def write(self) -> None:
        """Write the file atomically, since this process may be killed at any time."""
        unfinished = self.file.with_suffix(".unfinished")
        unfinished.write_text(json.dumps(self.content, indent=1) + "\n")
        os.replace(unfinished, self.file)


def run_in_child(args: argparse.Namespace) -> int:
    """Run one part here."""
    report = Report(args.out / f"{args.part}.json")
    if args.device == "cpu":
        os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported
    try:
        use_device(args.device)
        if args.device != "cpu" and args.part != "versions":
            require_triton()
        PARTS[args.part].run(report, args)
        wrong = [row["what"] for row in report.content["rows"] if row.get("right") is False]
        report.content.update(
            status="failed" if wrong else "ok",
            message=f"wrong: {_listed(wrong)}" if wrong else "",
        )
    except Skipped as reason:
        report.content.update(status="skipped", message=str(reason))
    except Exception as error:
        traceback.print_exc()
        first_line = (str(error).strip() or "no message").splitlines()[0]
        report.content.update(status="failed", message=f"{type(error).__name__}: {first_line}")
    report.write()
    return report.content["status"] == "failed"


def _listed(names: Sequence[str], most: int = 3) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def use_device(device: str) -> None:
    """Make a device, such as cuda:1, the current one.

    Raises:
        RuntimeError: If it does not exist.
    """
    if device == "cpu":
        return
    import torch

    if not torch.cuda.is_available():
        raise RuntimeError("torch sees no CUDA GPU here; the same flow runs with --device cpu")
    if ":" in device:
        torch.cuda.set_device(device)


def require_triton() -> None:
    """Check that operators run in Triton.

    Raises:
        RuntimeError: If they would run in plain PyTorch, which we do not want to measure.
    """
    from mmvssm.ops import backend

    if not backend.triton_available():
        raise RuntimeError('Triton cannot be imported; run "import triton" to see the error')
    if not backend.triton_works():
        missing = backend.missing_for_triton()
        raise RuntimeError(f"Triton cannot launch kernels: it found {missing}")


def attempt(report: Report, what: str, function: Callable[[], dict[str, object]]) -> None:
    """Add a function's findings or its failure to the report."""
    report.add(what, **outcome(function))


def outcome(function: Callable[[], dict[str, object]]) -> dict[str, object]:
    """Return a function's findings, or the cause of its failure."""
    try:
        return function()
    except Skipped as reason:
        return dict(skipped=str(reason))
    except Exception as error:
        traceback.print_exc()
        message = (str(error).strip() or "no message").splitlines()[0][:200]
        return dict(right=False, error=f"{type(error).__name__}: {message}")


# ----------------------------------------------------------------------------------------------- the parts


def check_versions(report: Report, args: argparse.Namespace) -> None:
    """Report installed versions, and run a kernel that adds two vectors."""
    import torch

    from mmvssm.version import __version__

    on_gpu = args.device != "cpu"
    figures = dict(device=torch.cuda.get_device_name(args.device) if on_gpu else platform.machine())
    if on_gpu:
        device = torch.cuda.get_device_properties(args.device)
        figures.update(
            capability=f"{device.major}.{device.minor}",
            multiprocessors=device.multi_processor_count,
            memory=f"{device.total_memory / 1e9:.0f} GB",
        )
    figures.update(
        python=platform.python_version(), torch=torch.__version__, cuda=torch.version.cuda
    )
    for name in ("triton", "mmengine", "mmcv", "mmdet", "mamba_ssm"):
        figures[name] = _version(name)
    report.add("versions", mmvssm=__version__, **figures)
    import gpu_check_kernels as kernels

    def add() -> dict[str, object]:
        x, y = torch.rand(2, 1000, device=args.device)
        z = torch.empty_like(x)
        kernels.add[(2,)](x, y, z, 1000, SIZE=512)
        return dict(right=torch.equal(z, x + y))

    attempt(report, "a trivial kernel", add)


def _version(name: str) -> str:
    from importlib.metadata import PackageNotFoundError, version

    for package in (name.replace("_", "-"), f"onedl-{name}"):
        try:
            return version(package)
        except PackageNotFoundError:
            continue
    return "none"


def check_bandwidth(report: Report, args: argparse.Namespace) -> None:
    """Measure bytes per second, read and written."""
    for megabytes in (50, 800) if args.device != "cpu" else (1, 4):
        speed = _copy_bandwidth(megabytes, args.device)
        report.add(f"copy of {megabytes} MB", gigabytes_per_second=round(speed / 1e9))


def _copy_bandwidth(megabytes: int, device: str) -> float:
    import torch

    source = torch.ones(megabytes * 250_000, device=device)
    target = torch.empty_like(source)
    return 2 * source.numel() * 4 / _time(lambda: target.copy_(source), device)


def check_primitives(report: Report, args: argparse.Namespace) -> None:
    """Compare the building blocks of the kernels with float64."""
    import gpu_check_kernels as kernels
    import torch

    def inputs(*shape: int):
        return torch.rand(shape, device=args.device), torch.randn(shape, device=args.device)

    for groups, lanes, warps in kernels.TILES if args.device != "cpu" else [(8, 16, 4)]:
        for reverse in (False, True):

            def scan(groups=groups, lanes=lanes, warps=warps, reverse=reverse) -> dict[str, object]:
                keep, add = inputs(groups, lanes)
                out = add.new_empty(3, groups, lanes)
                kernels.scan[(1,)](keep, add, out, groups, lanes, reverse, num_warps=warps)
                total = _recurrence(keep, add, reverse)
                before = torch.cat([total[:1], total[:-1]])
                return _compare(
                    out, torch.stack([total, before, total[-1:].expand_as(total)]), 1e-5
                )

            direction = "backward" if reverse else "forward"
            attempt(report, f"scan {groups} x {lanes}, {warps} warps, {direction}", scan)

    def scan_both_ways() -> dict[str, object]:
        keep, add = inputs(*kernels.GRADIENTS_TILE)
        out = add.new_empty(2, *add.shape)
        kernels.scan_both_ways[(1,)](keep, add, out, *add.shape, num_warps=1)
        steps = keep.movedim(2, 0), add.movedim(2, 0)
        expected = torch.stack([_recurrence(*steps, reverse) for reverse in (False, True)])
        return _compare(out, expected.movedim(1, -1), 1e-5)

    tile = " x ".join(map(str, kernels.GRADIENTS_TILE))
    attempt(report, f"scans {tile} along the last axis, 1 warp", scan_both_ways)

    x = torch.linspace(-90, 90, 180_001 if args.device != "cpu" else 2048, device=args.device)
    for name, function in kernels.FUNCTIONS.items():

        def apply(name: str = name, function: Callable = function) -> dict[str, object]:
            y = torch.empty_like(x)
            kernels.apply[(-(-len(x) // 1024),)](x, y, len(x), NAME=name, SIZE=1024)
            expected = function(x.double())
            error = ((y - expected) / expected).abs()[expected > 1e-37].max().item()
            return dict(relative_error=f"{error:.1e}", right=error < 1e-5)

        attempt(report, f"{name} over [-90, 90]", apply)


def _recurrence(keep, add, reverse: bool):
    keep, add = keep.double().cpu(), add.double().cpu()
    if reverse:
        keep, add = keep.flip(0), add.flip(0)
    state, states = 0, []
    for k, a in zip(keep, add):
        state = k * state + a
        states.append(state)
    import torch

    states = torch.stack(states)
    return states.flip(0) if reverse else states


def _compare(actual, expected, tolerance: float) -> dict[str, object]:
    scale = expected.abs().max().clamp_min(1e-30)  # all of it may be zero
    error = ((actual.double().cpu() - expected).abs().max() / scale).item()
    return dict(relative_error=f"{error:.1e}", right=error < tolerance)


class Job(NamedTuple):
    """A call for a separate process: ``function(*arguments)``."""

    what: str
    function: Callable[..., None]
    arguments: tuple


def check_compile(report: Report, args: argparse.Namespace) -> None:
    """Run the calls of the other parts once, so that they find every kernel in Triton's cache on disk."""
    run_jobs(compile_jobs(args.device), _processes(args.device), report, args.device)


def _processes(device: str) -> int:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return min(cores, 16) if device != "cpu" else 2


def compile_jobs(device: str) -> list[Job]:
    """Return one job for each set of kernels, the longest first."""
    import torch

    jobs = [
        Job(f"scan {_label(*timed)}", _run_passes, (*timed, device))
        for timed in timed_inputs(device)
    ]
    if not _missing_for_backbones():
        dtypes = ("float32", "bfloat16")
        for shape, dtype in itertools.product(_backbone_shapes(device), dtypes):
            what = f"GroupMamba-T, {'x'.join(map(str, shape))} {dtype}"
            jobs.append(Job(what, _run_backbone, (shape, dtype, device)))
    cases = operator_cases(device)
    if device != "cpu":
        cases += [("scan", case) for case in (*look_back_cases(), *sanitized_cases())]
        # Do not run the single pass, which may hang, before its own part, the last one.
        for case in look_back_cases():
            jobs.append(Job(f"single pass {case}", _compile_single_pass, (case, device)))
        for shape in single_pass_shapes(device):
            what = f"single pass {_label(shape, 1, torch.float32)}"
            jobs.append(Job(what, _compile_single_pass, (shape, device)))
    jobs += [
        Job(f"{operator} {case}", _run_case, (operator, case, device)) for operator, case in cases
    ]
    return jobs


def run_jobs(jobs: Sequence[Job], processes: int, report: Report, device: str) -> None:
    """Run jobs in several processes, and record their times. A process that dies loses only its own jobs."""
    context = multiprocessing.get_context("spawn")
    working = {}
    for k in range(min(processes, len(jobs))):
        share = jobs[k::processes]
        results, to_parent = context.Pipe(duplex=False)
        process = context.Process(target=_do_jobs, args=(share, device, to_parent))
        process.start()
        to_parent.close()
        working[results] = process, [job.what for job in share]
    while working:
        for results in wait(list(working)):
            process, left = working[results]
            try:
                figures = results.recv()
            except EOFError:
                process.join()
                del working[results]
                for what in left:
                    error = f"its process ended with code {process.exitcode}"
                    report.add(what, right=False, error=error)
                continue
            report.add(left.pop(0), **figures)


def _do_jobs(jobs: Sequence[Job], device: str, results: Connection) -> None:
    """Run jobs in this process, and send the outcome of each."""
    import torch

    torch.set_num_threads(1)
    use_device(device)
    for job in jobs:

        def do(job: Job = job) -> dict[str, object]:
            start = time.perf_counter()
            try:
                job.function(*job.arguments)
                if device != "cpu":
                    torch.cuda.synchronize()
            except torch.cuda.OutOfMemoryError as error:
                raise Skipped("the other processes left too little memory") from error
            return dict(seconds=round(time.perf_counter() - start, 1))

        results.send(outcome(do))
        if device != "cpu":
            with suppress(RuntimeError):  # after an error on the GPU, which is in the report
                torch.cuda.empty_cache()


def _run_passes(shape: Any, batch: int, dtype: Any, device: str) -> None:
    from scan_inputs import make_inputs

    for call in _passes(make_inputs(shape, batch, dtype, device)):
        call()


def _run_backbone(shape: tuple[int, ...], dtype: str, device: str) -> None:
    import backbones
    import torch

    model = backbones.GROUPS["groupmamba"]["models"]["GroupMamba-T"]().to(device)
    batch, *size = shape
    x = torch.rand(batch, 3, *size, device=device)
    for step in (backbones.evaluate, backbones.train):
        backbones.run(
            model.train(step is backbones.train), step, x, argparse.Namespace(dtype=dtype)
        )


def _run_case(operator: str, case: Any, device: str) -> None:
    import scan_cases
    import sparse_conv_cases

    if operator == "scan":
        _run_scan(scan_cases.make_inputs(case, device), case.softplus)
    else:
        inputs = sparse_conv_cases.make_inputs(case)
        _run_sparse_conv({name: x if x is None else x.to(device) for name, x in inputs.items()})


def _compile_single_pass(case: Any, device: str) -> None:
    """Return a job for a case of the tests or a shape."""
    import scan_cases
    import torch
    from scan_inputs import Shape, designs, make_inputs

    from mmvssm.ops.selective_scan import triton_launch
    from mmvssm.ops.selective_scan.inputs import ScanInputs
    from mmvssm.ops.triton_launcher import recorded_launches

    if isinstance(case, Shape):
        inputs = make_inputs(case, 1, torch.float32, device)
    else:
        tensors = scan_cases.make_inputs(case, device)
        del tensors["grad_y"]
        inputs = ScanInputs(**tensors, delta_softplus=case.softplus)
    with designs(1)["single_pass"](), recorded_launches() as launches:
        triton_launch.forward(inputs)
    for launch in launches:
        launch.kernel.warmup(grid=launch.grid, **launch.arguments, **launch.options)


def check_operators(report: Report, args: argparse.Namespace) -> None:
    """Run the cases of the tests, as many as the time allows."""
    import scan_cases
    import sparse_conv_cases

    modules = {
        "scan": (scan_cases, _run_scan),
        "sparse convolution": (sparse_conv_cases, _run_sparse_conv),
    }
    for operator, case in operator_cases(args.device):
        module, run = modules[operator]

        def check(module=module, run=run, case=case) -> dict[str, object]:
            module.check(case, run, device=args.device)
            return dict(right=True)

        attempt(report, f"{operator} {case}", check)


def operator_cases(device: str) -> list[tuple[str, Any]]:
    """List operators and test cases; the cases that show something new come first."""
    import scan_cases
    import sparse_conv_cases

    every = 6 if device == "cpu" else 1
    cases = [("scan", case) for case in scan_cases.CASES[::every]]
    cases += [("sparse convolution", case) for case in sparse_conv_cases.CASES[::every]]
    first, others, seen = [], [], set()
    for operator, case in cases:
        fields = case._asdict()
        for size in ("batch", "length", "grid", "kept", "channels", "walks"):
            fields.pop(size, None)
        if operator == "scan":  # one state and several have kernels of their own, for every dtype
            fields["kernels"] = case.states == 1, case.dtype
        new = {(operator, *field) for field in fields.items()} - seen
        (first if new else others).append((operator, case))
        seen |= new
    return first + others


def _run_scan(inputs: dict, delta_softplus: bool) -> dict:
    import torch
    from scan_cases import GRADIENTS

    from mmvssm.ops import Traversal, selective_scan

    inputs = {
        name: x.detach().requires_grad_()
        if isinstance(x, torch.Tensor) and x.is_floating_point()
        else x
        for name, x in inputs.items()
    }
    leaves = {name: inputs[name] for name in GRADIENTS if inputs[name] is not None}
    walk = [inputs.pop(name) for name in ("order", "source", "gap")]
    grad_y = inputs.pop("grad_y").detach()
    traversal = None if all(x is None for x in walk) else Traversal(*walk)
    y = selective_scan(**inputs, traversal=traversal, delta_softplus=delta_softplus)
    gradients = torch.autograd.grad(y, list(leaves.values()), grad_y)
    return dict(y=y.detach(), **dict(zip(leaves, gradients)))


def _run_sparse_conv(inputs: dict) -> dict:
    import torch
    from sparse_conv_cases import GRADIENTS

    from mmvssm.ops import sparse_depthwise_conv

    leaves = {
        name: inputs[name].detach().requires_grad_()
        for name in GRADIENTS
        if inputs[name] is not None
    }
    y = sparse_depthwise_conv(
        leaves["x"], leaves["weight"], inputs["neighbors"], leaves.get("bias")
    )
    gradients = torch.autograd.grad(y, list(leaves.values()), inputs["grad_y"])
    return dict(y=y.detach(), **dict(zip(leaves, gradients)))


def sanitized_cases() -> list:
    """Return small inputs, for kernels of both kinds."""
    from scan_cases import Case

    return [Case(1, 130, 2, 13, states) for states in (1, 2)]


SANITIZED = """
import sys
sys.path[:0] = {paths}
import gpu_check
from scan_cases import check
gpu_check.use_device({device!r})
for case in gpu_check.sanitized_cases():
    check(case, gpu_check._run_scan, device={device!r})
print("both agree with the definition")
"""


def check_sanitizer(report: Report, args: argparse.Namespace) -> None:
    """Run small scans under NVIDIA's compute-sanitizer if it is installed."""
    small = SANITIZED.format(paths=[str(HERE), str(REPOSITORY / "tests")], device=args.device)
    tool = _cuda_tool("compute-sanitizer")
    for kind in ("memcheck", "racecheck") if args.device != "cpu" else ("memcheck",):
        command = [sys.executable, "-c", small]
        if args.device != "cpu":
            if tool is None:
                raise Skipped("compute-sanitizer is not installed")
            command = [tool, "--tool", kind, "--error-exitcode", "9", *command]

        def run(command: list[str] = command) -> dict[str, object]:
            done = subprocess.run(command, capture_output=True, text=True, env=_environment())
            print(done.stdout[-4000:], done.stderr[-4000:])
            lines = [line for line in done.stdout.splitlines() if "SUMMARY" in line]
            return dict(
                right=done.returncode == 0, summary=lines[-1].strip("= ") if lines else "none"
            )

        attempt(report, f"{kind} on 1x130x2x13 with 1 and 2 states", run)


def _cuda_tool(name: str) -> Optional[str]:
    """Find a program that comes with CUDA."""
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    folders = [os.path.join(home, "bin") for home in homes if home]
    return shutil.which(name) or shutil.which(name, path=os.pathsep.join(folders))


def _shapes(device: str) -> list:
    from scan_inputs import PLAIN, STAGE_1, STAGE_3, V_STAGE_1, Shape

    return (
        [STAGE_1, STAGE_3, PLAIN, V_STAGE_1]
        if device != "cpu"
        else [Shape((6, 9), 5, 1), Shape((5, 8), 6, 16, "snake"), Shape((4, 7), 3, 1, "cross")]
    )


def _more_shapes(device: str) -> list:
    from scan_inputs import V_STAGE_3, V_STATES, VIM, Shape

    return [V_STATES, VIM, V_STAGE_3] if device != "cpu" else [Shape((4, 7), 3, 2, "line")]


def check_times(report: Report, args: argparse.Namespace) -> None:
    """Measure milliseconds on the GPU, microseconds in Python, and the ratio to a copy of the least bytes."""
    _time_scans(report, args, timed_inputs(args.device))


def check_more_times(report: Report, args: argparse.Namespace) -> None:
    """Measure the same of further scans, after compiling them in one process per core."""
    timed = more_timed_inputs(args.device)
    jobs = [
        Job(f"compiled: scan {_label(*each)}", _run_passes, (*each, args.device)) for each in timed
    ]
    run_jobs(jobs, _processes(args.device), report, args.device)
    _time_scans(report, args, timed)


def _time_scans(report: Report, args: argparse.Namespace, scans: Sequence[tuple]) -> None:
    from scan_inputs import least_bytes, make_inputs

    bandwidth = _copy_bandwidth(800 if args.device != "cpu" else 4, args.device)
    for timed in scans:
        least = least_bytes(make_inputs(*timed, "meta"))

        def measure(timed=timed, least=least) -> dict[str, object]:
            forward, backward = _passes(make_inputs(*timed, args.device))
            figures = {}
            for name, call in (("forward", forward), ("backward", backward)):
                seconds = _time(call, args.device)
                copied = least[name] / bandwidth
                figures[f"{name}_ms"] = round(seconds * 1e3, 4)
                figures[f"{name}_share_of_copy"] = round(copied / seconds, 3)
                figures[f"{name}_host_us"] = round(_host_time(call, args.device) * 1e6, 1)
            return figures

        attempt(report, _label(*timed), measure)


def timed_inputs(device: str) -> list[tuple[Any, int, Any]]:
    """Yield shape, batch size and dtype: everything in float32, then in bfloat16."""
    import torch

    batches = (1, 16) if device != "cpu" else (1, 2)
    dtypes = (torch.float32, torch.bfloat16)
    return [
        (shape, batch, dtype)
        for dtype, batch, shape in itertools.product(dtypes, batches, _shapes(device))
    ]


def more_timed_inputs(device: str) -> list[tuple[Any, int, Any]]:
    """Yield the same of the other shapes, in bfloat16 first, then of all shapes in float16."""
    import torch

    batches = (1, 16) if device != "cpu" else (1,)
    more, shapes = _more_shapes(device), _shapes(device)
    chosen = ((torch.bfloat16, more), (torch.float32, more), (torch.float16, shapes + more))
    return [
        (shape, batch, dtype)
        for dtype, some in chosen
        for batch, shape in itertools.product(batches, some)
    ]


def _label(shape: object, batch: int, dtype: object) -> str:
    return f"{batch} x {shape}, {str(dtype).removeprefix('torch.')}"


def _passes(inputs) -> tuple[Callable, Callable]:
    """Return the operator's forward and backward pass, without autograd's overhead.

    The latter finds in ``grad_y`` whether walks were summed, the last of the inputs.
    """
    import torch

    operator = torch.ops.mmvssm
    y, states = operator.selective_scan(*inputs)
    torch.manual_seed(0)
    grad_y = torch.randn_like(y)
    return (
        lambda: operator.selective_scan(*inputs),
        lambda: operator.selective_scan_backward(grad_y, *inputs[:-1], states),
    )


def _time(call: Callable, device: str) -> float:
    """Measure seconds on the device: the median of some runs, on a GPU with a cold cache."""
    return statistics.median(
        _times_on_cpu(call) if device == "cpu" else _times_on_gpu(call, device)
    )


def _times_on_cpu(call: Callable, runs: int = 3) -> list[float]:
    times = []
    for _ in range(runs):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return times


def _times_on_gpu(call: Callable, device: str, runs: int = 20) -> list[float]:
    """Measure seconds from a call's first kernel to its last, all launched while the GPU is kept busy."""
    import torch

    cache = torch.empty(64_000_000, device=device)  # more than any GPU's cache holds
    for _ in range(3):
        call()
    times: list[float] = []
    wait = 100_000  # cycles of the GPU
    while len(times) < runs:
        cache.zero_()
        torch.cuda._sleep(wait)
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        late = start.query()
        end.synchronize()
        if not late:
            times.append(start.elapsed_time(end) / 1e3)
            continue
        # Python had not launched everything yet, so we would measure its time and not the GPU's.
        wait *= 2
        if wait > 1_000_000_000:
            raise RuntimeError("a call waits for the GPU, so its time includes Python's")
    return times


def _host_time(call: Callable, device: str, runs: int = 100) -> float:
    """Measure seconds that a call keeps Python busy: the fastest of some runs, with synchronisation in between."""
    import torch

    fastest = float("inf")
    for _ in range(runs if device != "cpu" else 2):
        start = time.perf_counter()
        call()
        fastest = min(fastest, time.perf_counter() - start)
        if device != "cpu":
            torch.cuda.synchronize()
    return fastest


PROFILED = """
import sys
sys.path[:0] = {paths}
import torch, gpu_check, scan_inputs
gpu_check.use_device({device!r})
inputs = scan_inputs.make_inputs(scan_inputs.{shape}, 1, torch.float32, {device!r})
passes = gpu_check._passes(inputs)
for call in passes:
    call()
torch.cuda.synchronize()
torch.cuda.profiler.start()
for call in passes:
    call()
torch.cuda.synchronize()
torch.cuda.profiler.stop()
"""


def check_profiler(report: Report, args: argparse.Namespace) -> None:
    """Compare ncu's warp instructions of each kernel with those of triton_cost.py."""
    if args.device == "cpu":
        raise Skipped("needs a GPU")
    tool = _cuda_tool("ncu")
    if tool is None:
        raise Skipped("ncu is not installed")
    import torch
    from scan_inputs import PLAIN, STAGE_1, make_inputs
    from triton_cost import measure, record

    capability = torch.cuda.get_device_capability(args.device)
    capability = 10 * capability[0] + capability[1]
    for name, shape in (("STAGE_1", STAGE_1), ("PLAIN", PLAIN)):

        def compare(name: str = name, shape=shape) -> dict[str, object]:
            text = PROFILED.format(paths=[str(HERE)], shape=name, device=args.device)
            command = [tool, "--csv", "--profile-from-start", "off"]
            command += ["--metrics", "smsp__inst_executed.sum", sys.executable, "-c", text]
            done = subprocess.run(command, capture_output=True, text=True, env=_environment())
            print(done.stdout[-4000:], done.stderr[-4000:])
            if "ERR_NVGPUCTRPERM" in done.stdout + done.stderr:
                raise Skipped("this user may not read the GPU's counters")
            counted = _ncu_counts(done.stdout)
            calls = record(make_inputs(shape, 1, torch.float32, "meta"))
            figures = {}
            for direction, call in calls.items():
                for k, launch in enumerate(call.launches):
                    kernel = measure(launch, capability)
                    found = counted.get(kernel.name, [])
                    figures[f"{direction}_{k}_{kernel.name}"] = (
                        f"{found.pop(0) if found else 'none'} by ncu, {kernel.instructions / 32:.0f} counted"
                    )
            return figures

        attempt(report, f"warp instructions, {shape}", compare)


def _ncu_counts(text: str) -> dict[str, list[int]]:
    """Return counts by kernel name, in launch order."""
    rows = text[text.find('"ID"') :]
    counts: dict[str, list[int]] = {}
    for row in csv.DictReader(io.StringIO(rows)):
        if row.get("Metric Name") == "smsp__inst_executed.sum":
            value = int(float(row["Metric Value"].replace(",", "")))
            counts.setdefault(row["Kernel Name"].split("(")[0], []).append(value)
    return counts


def check_capture(report: Report, args: argparse.Namespace) -> None:
    """Compare CUDA graphs, torch.compile and streams bit by bit with a plain call."""
    import torch
    from scan_inputs import make_inputs

    shape = _shapes(args.device)[0]
    inputs = make_inputs(shape, 1, torch.float32, args.device)
    passes = _passes(inputs)
    expected = [call() for call in passes]

    def repeated() -> dict[str, object]:
        return dict(right=all(_same([call() for call in passes], expected) for _ in range(5)))

    def graph() -> dict[str, object]:
        if args.device == "cpu":
            raise Skipped("needs a GPU")
        return _replayed(passes, expected)

    def other_stream() -> dict[str, object]:
        if args.device == "cpu":
            raise Skipped("needs a GPU")
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            torch.cuda._sleep(10_000_000)  # the kernels have to wait for this
            copies = type(inputs)(
                *(x.clone() if isinstance(x, torch.Tensor) else x for x in inputs)
            )
            results = [call() for call in _passes(copies)]
        torch.cuda.synchronize()
        return dict(right=_same(results, expected))

    def compiled() -> dict[str, object]:
        from mmvssm.ops import Traversal, selective_scan

        def model(u, delta, A, B, C, D, bias):
            traversal = Traversal(inputs.order, inputs.source)
            return selective_scan(u, delta, A, B, C, D, bias, traversal=traversal) * 2

        backend = "aot_eager" if args.device == "cpu" else "inductor"
        leaves = [x.detach().requires_grad_() for x in inputs[:7]]
        y = torch.compile(model, fullgraph=True, backend=backend)(*leaves)
        gradients = torch.autograd.grad(y, leaves, torch.ones_like(y))
        plain = model(*leaves)
        plain_gradients = torch.autograd.grad(plain, leaves, torch.ones_like(y))
        return dict(right=_same([[y, *gradients]], [[plain, *plain_gradients]]))

    for what, function in (
        ("equal bits in repeated runs", repeated),
        ("CUDA graph", graph),
        ("another stream", other_stream),
        ("torch.compile(fullgraph=True)", compiled),
    ):
        attempt(report, what, function)


def _replayed(passes: Sequence[Callable], expected: list) -> dict[str, object]:
    """Whether a CUDA graph of some calls gives the same results."""
    import torch

    captured = torch.cuda.CUDAGraph()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for call in passes:
            call()
    torch.cuda.synchronize()
    with torch.cuda.graph(captured):
        results = [call() for call in passes]
    right = True
    for _ in range(3):
        for tensors in results:
            for x in tensors:
                x.zero_()
        captured.replay()
        torch.cuda.synchronize()
        right &= _same(results, expected)
    return dict(right=right)


def _same(first: list, second: list) -> bool:
    import torch

    return all(torch.equal(x, y) for xs, ys in zip(first, second) for x, y in zip(xs, ys))


def check_mamba_ssm(report: Report, args: argparse.Namespace) -> None:
    """Measure milliseconds of mamba-ssm's kernels, and their ratio to ours.

    Alone, they are given what they want, channels before tokens and each walk in its own order. Arranged counts what
    brings the backbones' tensors there, and the output back.
    """
    if args.device == "cpu":
        raise Skipped("needs a GPU")
    import torch
    from scan_inputs import make_inputs

    kernels = _mamba_kernels(args)
    for timed in timed_inputs(args.device):

        def measure(timed=timed) -> dict[str, object]:
            inputs = make_inputs(*timed, args.device).for_each_walk()
            inputs = inputs._replace(sum_walks=False)  # mamba-ssm does not sum walks
            ours = [_time(call, args.device) for call in _passes(inputs)]
            expected = torch.ops.mmvssm.selective_scan(*inputs)[0].double().cpu()
            y, passes = _mamba_passes(kernels, inputs)
            theirs = [_time(call, args.device) for call in passes]
            return dict(
                forward_ms=round(theirs[0] * 1e3, 4),
                forward_ours_is_faster_by=round(theirs[0] / ours[0], 2),
                arranged_ms=round(theirs[1] * 1e3, 4),
                arranged_ours_is_faster_by=round(theirs[1] / ours[0], 2),
                backward_ms=round(theirs[2] * 1e3, 4),
                backward_ours_is_faster_by=round(theirs[2] / ours[1], 2),
                **_compare(y, expected, 1e-4 if inputs.u.dtype == torch.float32 else 2e-2),
            )

        attempt(report, _label(*timed), measure)


def _mamba_passes(kernels, inputs) -> tuple[Any, list[Callable]]:
    """Return the output ``(B, L, K, D)``, the forward pass, the same with our layout, and the backward pass."""
    import torch

    u, delta, A, B, C, D, bias, order, source = inputs[:9]
    batch, _, walks, channels = u.shape
    steps = order.long()[None, None].expand(batch, channels, -1, -1)  # (B, D, K, L)
    sources = steps if source is None else source.long()[None, None].expand_as(steps)
    back = order.long().argsort(-1)

    def walk(x, index):  # (B, L, K, *) to (B, K, *, L)
        x = x.permute(0, 3, 2, 1)
        index = index[:, :1].expand(-1, x.shape[1], -1, -1)
        return x.gather(-1, index).transpose(1, 2).contiguous()

    def arrange():
        rows = (walk(x, i).flatten(1, 2) for x, i in ((u, steps), (delta, sources)))
        return (*rows, parameters[0], walk(B, sources), walk(C, sources), *parameters[1:])

    def forward(u, delta, A, B, C, D, bias):
        return kernels.fwd(u, delta, A, B, C, D, None, bias, True)

    def arranged():
        out = forward(*arrange())[0].unflatten(1, (walks, channels))
        out = out.gather(-1, back[None, :, None].expand_as(out))
        return out.permute(0, 3, 1, 2).contiguous()

    parameters = [x.flatten(0, 1).contiguous() for x in (A, D, bias)]
    given = arrange()
    out, states = forward(*given)
    grad = torch.randn_like(out)
    D, bias = given[5:]
    return arranged(), [
        lambda: forward(*given),
        arranged,
        lambda: kernels.bwd(*given[:5], *(D, None, bias, grad, states, None, None, True, False)),
    ]


def _mamba_kernels(args: argparse.Namespace) -> Any:
    """Import mamba-ssm's compiled extension, installed or built."""
    if find_spec("selective_scan_cuda"):
        import selective_scan_cuda

        return selective_scan_cuda
    if args.mamba_source is None:
        raise Skipped("mamba-ssm is not installed, and --mamba-source names none")
    import importlib.util

    built = args.out / "mamba_build" / f"{MAMBA_MODULE}.so"
    log = args.out / "mamba_build.log"
    while not built.exists():  # the process that the parent started builds it
        if (args.out / "mamba_build" / "failed").exists():
            raise RuntimeError(f"mamba-ssm cannot be compiled here; see {log.name}")
        time.sleep(1)
    spec = importlib.util.spec_from_file_location(MAMBA_MODULE, built)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


MAMBA_MODULE = "mamba_selective_scan"
MAMBA_SOURCES = (
    *("selective_scan.cpp", "selective_scan_fwd_fp32.cu", "selective_scan_fwd_bf16.cu"),
    *("selective_scan_bwd_fp32_real.cu", "selective_scan_bwd_bf16_real.cu"),
)
MAMBA_REST = """
// Stands in for what is not compared: float16 and complex numbers.
#include <cuda_runtime.h>
#include <torch/extension.h>
#include "selective_scan.h"
using complex_t = c10::complex<float>;
template <typename input_t, typename weight_t>
void selective_scan_fwd_cuda(SSMParamsBase &, cudaStream_t) { TORCH_CHECK(false, "left out"); }
template <typename input_t, typename weight_t>
void selective_scan_bwd_cuda(SSMParamsBwd &, cudaStream_t) { TORCH_CHECK(false, "left out"); }
template void selective_scan_fwd_cuda<at::Half, float>(SSMParamsBase &, cudaStream_t);
template void selective_scan_fwd_cuda<at::Half, complex_t>(SSMParamsBase &, cudaStream_t);
template void selective_scan_bwd_cuda<at::Half, float>(SSMParamsBwd &, cudaStream_t);
template void selective_scan_bwd_cuda<at::Half, complex_t>(SSMParamsBwd &, cudaStream_t);
template void selective_scan_bwd_cuda<float, complex_t>(SSMParamsBwd &, cudaStream_t);
template void selective_scan_bwd_cuda<at::BFloat16, complex_t>(SSMParamsBwd &, cudaStream_t);
"""


def build_mamba(args: argparse.Namespace) -> int:
    """Compile mamba-ssm's scan for this GPU, with the options of its own setup.py, parallel to the other parts."""
    os.nice(19)
    folder = args.out / "mamba_build"
    try:
        commands, link = mamba_commands(args.mamba_source, folder, _architecture(args.device))
        processes = [subprocess.Popen(command) for command in commands]
        codes = [process.wait() for process in processes]
        if any(codes) or subprocess.call(link):
            raise RuntimeError("the compiler failed")
        (folder / "linked.so").rename(folder / f"{MAMBA_MODULE}.so")
    except Exception:
        (folder / "failed").touch()
        traceback.print_exc()
        return 1
    return 0


def _architecture(device: str) -> str:
    import torch

    return "sm_{}{}".format(*torch.cuda.get_device_capability(device))


def mamba_commands(
    source: Path, folder: Path, architecture: str
) -> tuple[list[list[str]], list[str]]:
    """Return the commands that compile each file, and the one that links them to ``linked.so``."""
    import sysconfig

    import torch

    nvcc = _cuda_tool("nvcc")
    if nvcc is None:
        raise RuntimeError("nvcc is not installed")
    code = source.resolve() / "csrc/selective_scan"
    rest = folder.resolve() / "rest.cpp"
    rest.write_text(MAMBA_REST)
    home, torch_home = Path(nvcc).resolve().parents[1], Path(torch.__file__).parent
    headers = (code, torch_home / "include", torch_home / "include/torch/csrc/api/include")
    options = ["-O3", "-std=c++20", "-Xcompiler", "-fPIC", "--use_fast_math", "-arch", architecture]
    options += ["--expt-relaxed-constexpr", "--expt-extended-lambda"]
    options += [
        f"-U__CUDA_NO_{kind}_{what}__"
        for kind in ("HALF", "BFLOAT16", "BFLOAT162")
        for what in ("OPERATORS", "CONVERSIONS")
    ]
    options += [f"-DTORCH_EXTENSION_NAME={MAMBA_MODULE}", "-DTORCH_API_INCLUDE_EXTENSION_H"]
    options += [f"-D_GLIBCXX_USE_CXX11_ABI={int(torch._C._GLIBCXX_USE_CXX11_ABI)}"]
    options += [f"-I{path}" for path in (*headers, sysconfig.get_path("include"))]
    sources = [*(code / name for name in MAMBA_SOURCES), rest]
    objects = [str(folder / f"{path.stem}.o") for path in sources]
    commands = [
        [nvcc, *options, "-c", str(path), "-o", target] for path, target in zip(sources, objects)
    ]
    libraries = ["c10", "c10_cuda", "torch", "torch_cpu", "torch_cuda", "torch_python", "cudart"]
    link = [nvcc, "-shared", *objects, "-o", str(folder / "linked.so"), f"-L{torch_home / 'lib'}"]
    return commands, [*link, f"-L{home / 'lib64'}", *(f"-l{name}" for name in libraries)]


def check_backbones(report: Report, args: argparse.Namespace) -> None:
    """Compare GroupMamba-T with Swin-T and ResNet-50, by backbones.py."""
    _require_backbones()
    if args.device == "cpu":
        runs = [["--runs", "1", "--no-training"]]
    else:
        runs = [["--runs", "10", "--dtype", dtype] for dtype in ("float32", "bfloat16")]
    for options in runs:
        _time_backbones(report, args, "groupmamba", _backbone_shapes(args.device), options)


def check_training(report: Report, args: argparse.Namespace) -> None:
    """Compare all backbones with Swin-T; what takes longest comes last, one backbone at a time."""
    _require_backbones()
    shapes = [(16, 224, 224), (2, 512, 512)] if args.device != "cpu" else [(1, 32, 32)]
    for options in training_runs(args.device):
        run = partial(_time_backbones, report, args, "all", shapes, options)
        attempt(report, f"backbones.py {' '.join(options)}", run)


def training_runs(device: str) -> list[list[str]]:
    """Return options of backbones.py, of what matters most first."""
    if device == "cpu":
        return [["--runs", "1", "--model", "Swin-T", "VMamba-T"]]
    import backbones

    first, *ours = backbones.GROUPS["all"]["models"]
    plain = [["--runs", "10", "--dtype", dtype] for dtype in ("bfloat16", "float16")]
    compiled = ["--runs", "10", "--compile", "--dtype", "bfloat16", "--model", first]
    return [*plain, *([*compiled, name] for name in ours)]


def _time_backbones(
    report: Report,
    args: argparse.Namespace,
    group: str,
    shapes: Sequence[tuple[int, int, int]],
    options: Sequence[str],
) -> dict[str, object]:
    """Report milliseconds of a group of backbones.py, and ratios to Swin-T."""
    out = args.out / "backbones_runs.json"
    command = [sys.executable, str(HERE / "backbones.py"), "--group", group, "--no-memory"]
    command += ["--device", args.device, "--out", str(out), *options]
    for shape in shapes:
        command += ["--shape", *map(str, shape)]
    start = time.monotonic()
    subprocess.run(command, check=True, env=_environment())
    for record in json.loads(out.read_text())["records"]:
        best = {name: min(seconds) for name, seconds in record["seconds"].items()}
        figures = {f"{name}_ms": round(seconds * 1e3, 2) for name, seconds in best.items()}
        for name in best.keys() - {"Swin-T"}:
            figures[f"{name}_to_swin_t"] = round(best[name] / best["Swin-T"], 2)
        size = "x".join(map(str, record["shape"]))
        report.add(f"{record['step']}, {size} {' '.join(options)}", **figures)
    return dict(seconds=round(time.monotonic() - start, 1))


def _require_backbones() -> None:
    missing = _missing_for_backbones()
    if missing:
        raise Skipped(f"{' and '.join(missing)} is not installed")


def _missing_for_backbones() -> list[str]:
    return [name for name in ("mmengine", "mmcv", "mmdet") if not find_spec(name)]


def _backbone_shapes(device: str) -> list[tuple[int, int, int]]:
    """Batch, height and width."""
    return [(1, 800, 1280), (16, 224, 224)] if device != "cpu" else [(1, 64, 64)]


def check_look_back(report: Report, args: argparse.Namespace) -> None:
    """Check that the single pass is right and gives the same bits many times, alone and parallel to other work."""
    if args.device == "cpu":
        raise Skipped("needs a GPU")
    import torch
    from scan_inputs import designs, make_inputs

    single_pass = designs(1)["single_pass"]
    shapes = single_pass_shapes(args.device)
    for shape in shapes:
        inputs = make_inputs(shape, 1, torch.float32, args.device)
        attempt(report, f"beside the default, {shape}", partial(compare_designs, inputs))
    for case in look_back_cases():
        run = partial(run_in_single_pass, case, args.device)
        attempt(report, f"scan {case}", run)

    forward, _ = _passes(make_inputs(shapes[0], 1, torch.float32, args.device))
    launches = 10_000
    other = torch.rand(2048, 2048, device=args.device)
    with single_pass():
        expected = forward()
        attempt(report, "CUDA graph", partial(_replayed, [forward], [expected]))
        for what in ("alone", "beside products of matrices"):

            def run(what: str = what) -> dict[str, object]:
                right = True
                stream = torch.cuda.Stream()
                for k in range(launches // 2):
                    if what != "alone":
                        with torch.cuda.stream(stream):
                            other @ other.t()
                    results = forward()
                    if k % 100 == 0:
                        right &= _same([results], [expected])
                return dict(launches=launches // 2, right=right and _same([forward()], [expected]))

            attempt(report, f"{launches // 2} launches {what}", run)
        report.add("time", ms=round(_time(forward, args.device) * 1e3, 4))


def single_pass_shapes(device: str) -> list:
    """Return the cases with one state per channel."""
    return [shape for shape in _shapes(device) if shape.d_state == 1]


def compare_designs(inputs: Any) -> dict[str, object]:
    """Compare outputs and saved states of the single pass with the default design's."""
    import torch
    from scan_inputs import designs

    default = torch.ops.mmvssm.selective_scan(*inputs)
    with designs(1)["single_pass"](), _launched() as kernels:
        results = torch.ops.mmvssm.selective_scan(*inputs)
    if kernels != ["single_pass"]:
        raise RuntimeError(f"launched {kernels} instead of the single pass")
    y, states = (_compare(x, d.double().cpu(), 1e-5) for x, d in zip(results, default))
    return dict(
        relative_error=y["relative_error"],
        relative_error_of_states=states["relative_error"],
        right=y["right"] and states["right"],
    )


def run_in_single_pass(case: Any, device: str) -> dict[str, object]:
    """Run a case of the tests with the single pass, and the backward pass from its saved states."""
    import scan_cases
    from scan_inputs import designs

    with designs(1)["single_pass"](), _launched() as kernels:
        scan_cases.check(case, _run_scan, device=device)
    if kernels[0] != "single_pass":
        raise RuntimeError(f"launched {kernels[0]} instead of the single pass")
    return dict(right=True)


def look_back_cases() -> list:
    """Return cases with several blocks of tiles, and with partly filled last tiles and blocks of channels."""
    import torch
    from scan_cases import Case

    return [
        Case(1, 2405, 2, 87, 1),  # a walk of its own, a source and gaps
        Case(1, 2405, 2, 87, 1, dtype=torch.bfloat16),
        Case(2, 2405, 1, 87, 1, walk="source"),
        Case(2, 2405, 1, 87, 1, walk="gap", optional=False, dtype=torch.bfloat16),
    ]


@contextmanager
def _launched() -> Iterator[list[str]]:
    """Return the names of the kernels that the scan launches."""
    from mmvssm.ops.selective_scan import triton_launch

    launch, names = triton_launch.launch, []

    def noted(kernel: Any, *args: Any, **options: Any) -> None:
        names.append(kernel.__name__)
        launch(kernel, *args, **options)

    with mock.patch.object(triton_launch, "launch", noted):
        yield names


class Part(NamedTuple):
    """A part, and its guaranteed seconds: see :func:`part_ends`."""

    run: Callable[[Report, argparse.Namespace], None]
    seconds: float


PARTS = {
    "versions": Part(check_versions, 35),
    "bandwidth": Part(check_bandwidth, 20),
    "primitives": Part(check_primitives, 30),
    "compile": Part(check_compile, 70),
    "tests": Part(check_operators, 40),
    "sanitizer": Part(check_sanitizer, 50),
    "times": Part(check_times, 40),
    "profiler": Part(check_profiler, 45),
    "capture": Part(check_capture, 40),
    "mamba_ssm": Part(check_mamba_ssm, 25),
    "backbones": Part(check_backbones, 40),
    "look_back": Part(check_look_back, 25),
    "more_times": Part(check_more_times, TOTAL_SECONDS),
    "training": Part(check_training, TOTAL_SECONDS),
}
FIRST_PARTS = tuple(PARTS)[:-2]
"""Those that run without ``--only``."""


def main() -> int:
    """Run the tool."""
    args = parse_args()
    if args.mamba_source and not (args.mamba_source / "csrc/selective_scan").is_dir():
        sys.exit(
            f"error: --mamba-source {args.mamba_source} has no csrc/selective_scan; give a checkout of mamba-ssm."
        )
    if args.part:
        return run_in_child(args)
    args.out.mkdir(parents=True, exist_ok=True)
    builder = _start_build(args)
    try:
        results = run_parts(args)
    finally:
        if builder is not None and builder.poll() is None:
            os.killpg(builder.pid, signal.SIGKILL)
    (args.out / "gpu_check.json").write_text(json.dumps(results, indent=1) + "\n")
    print(f"\n{write_table(results, args.out)}")
    return any(result["status"] in ("failed", "timed out") for result in results.values())


def _start_build(args: argparse.Namespace) -> Optional[subprocess.Popen]:
    """Compile mamba-ssm's scan in the background if necessary."""
    if args.device == "cpu" or args.mamba_source is None or find_spec("selective_scan_cuda"):
        return None
    folder = args.out / "mamba_build"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    code = "import sys, gpu_check; sys.exit(gpu_check.build_mamba(gpu_check.parse_args()))"
    command = [sys.executable, "-c", code, "--out", str(args.out), "--device", args.device]
    with (args.out / "mamba_build.log").open("w") as log:
        return subprocess.Popen(
            [*command, "--mamba-source", str(args.mamba_source)],
            **dict(stdout=log, stderr=subprocess.STDOUT, start_new_session=True),
            env=_environment(),
        )


if __name__ == "__main__":
    sys.exit(main())
