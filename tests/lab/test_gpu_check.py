"""gpu_check.py on the CPU: every part reports, and no part stops the others."""

import itertools
import json
import os
import pickle
import re
import subprocess
import sys
import time
from argparse import Namespace
from pathlib import Path

import gpu_check
import pytest
import scan_cases
import sparse_conv_cases
import torch

REPOSITORY = Path(__file__).parents[2]
TOOL = REPOSITORY / "tools/benchmark/gpu_check.py"


def run_tool(out, *options):
    return subprocess.run(
        [sys.executable, TOOL, "--out", out, *options], capture_output=True, text=True
    )


def test_parts_come_in_the_order_in_which_they_are_useful():
    assert list(gpu_check.PARTS) == [
        *("versions", "bandwidth", "primitives", "compile", "tests", "sanitizer", "times"),
        *("profiler", "capture", "mamba_ssm", "backbones", "look_back"),
        *("more_times", "training"),
    ]
    assert gpu_check.TOTAL_SECONDS < 8 * 60


def test_every_part_has_its_time_however_long_the_others_take():
    ends = gpu_check.part_ends(gpu_check.FIRST_PARTS)
    assert list(ends) == list(gpu_check.FIRST_PARTS) == list(gpu_check.PARTS)[:-2]
    before = 0
    for name, end in ends.items():
        assert end - before >= gpu_check.PARTS[name].seconds
        before = end
    assert before <= gpu_check.TOTAL_SECONDS
    # Parts that run alone share all of it.
    assert gpu_check.part_ends(["times"]) == {"times": gpu_check.TOTAL_SECONDS}


def test_what_a_part_leaves_of_its_time_goes_to_the_next(tmp_path, monkeypatch):
    now, limits = 1000.0, {}

    def run_part(name, args, limit):
        nonlocal now
        limits[name] = limit
        now += {"versions": 1, "bandwidth": limit}.get(name, 0)
        return dict(status="ok", message="", rows=[])

    monkeypatch.setattr(gpu_check, "run_part", run_part)
    monkeypatch.setattr(gpu_check.time, "monotonic", lambda: now)
    gpu_check.run_parts(Namespace(only=None))
    parts = gpu_check.PARTS
    assert limits["bandwidth"] == parts["versions"].seconds - 1 + parts["bandwidth"].seconds
    assert limits["primitives"] == parts["primitives"].seconds


def test_a_part_that_no_time_is_left_for_is_a_failure(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_check, "TOTAL_SECONDS", 0)
    monkeypatch.setattr(sys, "argv", ["gpu_check.py", "--out", str(tmp_path), "--device", "cpu"])
    assert gpu_check.main() == 1
    results = json.loads((tmp_path / "gpu_check.json").read_text())
    for result in results.values():
        assert result["status"] == "failed"
        assert result["message"] == "not run: no time was left"


@pytest.mark.nightly
def test_every_part_at_small_sizes(tmp_path):
    out = tmp_path / "new"
    done = run_tool(out, "--device", "cpu")
    assert done.returncode == 0, done.stderr
    results = json.loads((out / "gpu_check.json").read_text())
    statuses = {name: result["status"] for name, result in results.items()}
    assert list(statuses) == list(gpu_check.FIRST_PARTS)
    assert set(statuses.values()) <= {"ok", "skipped"}, done.stdout
    for name in (
        *("versions", "bandwidth", "primitives", "compile", "tests", "sanitizer", "times"),
        "capture",
    ):
        assert statuses[name] == "ok"
        assert results[name]["rows"]
    (versions,) = results["versions"]["rows"][:1]
    assert versions["torch"]
    for name in ("profiler", "mamba_ssm", "look_back"):
        assert statuses[name] == "skipped"
        assert results[name]["message"] == "needs a GPU"
    # By Triton's interpreter against float64: scans, and exp2 and softplus.
    assert [row["right"] for row in results["primitives"]["rows"]] == [True] * 5
    for row in results["times"]["rows"]:
        assert row["forward_ms"] > 0
        assert row["backward_host_us"] > 0
    table = (out / "gpu_check.md").read_text()
    assert table.splitlines()[0] == f"# GPU check on {versions['device']}"
    assert re.search(r"\| mamba_ssm +\|", table)
    assert table in done.stdout


@pytest.mark.nightly
def test_the_parts_that_are_to_be_named_at_small_sizes(tmp_path):
    done = run_tool(tmp_path, "--device", "cpu", "--only", "more_times", "training")
    assert done.returncode == 0, done.stdout + done.stderr
    results = json.loads((tmp_path / "gpu_check.json").read_text())
    rows = results["more_times"]["rows"]
    timed = [row for row in rows if "forward_ms" in row]
    assert len(rows) == 2 * len(timed) > 0  # compiled before
    assert {row["what"].split(", ")[-1] for row in timed} == {"bfloat16", "float32", "float16"}
    steps = {row["what"].split(",")[0]: row for row in results["training"]["rows"]}
    for step in ("evaluation", "training"):
        assert steps[step]["VMamba-T_to_swin_t"] > 0


def test_all_backbones_are_timed_before_any_is_compiled():
    pytest.importorskip("mmdet")
    import backbones

    runs = gpu_check.training_runs("cuda")
    assert [options[-1] for options in runs[:2]] == ["bfloat16", "float16"]
    compiled = runs[2:]
    assert all("--compile" in options for options in compiled)
    _, *ours = backbones.GROUPS["all"]["models"]
    assert [options[-2:] for options in compiled] == [["Swin-T", name] for name in ours]


def test_other_shapes_and_dtypes_are_timed_only_if_named():
    first, more = gpu_check.timed_inputs("cuda"), gpu_check.more_timed_inputs("cuda")
    assert len(more) == len(set(more)) == 26 and not set(first) & set(more)
    walks = {(shape.kind, shape.d_state) for shape, _, _ in (*first, *more)}
    assert walks == {("groups", 1), ("snake", 16), ("cross", 1), ("cross", 16), ("line", 16)}
    dtypes = [dtype for _, _, dtype in more]
    assert dtypes == [torch.bfloat16] * 6 + [torch.float32] * 6 + [torch.float16] * 14


@pytest.mark.nightly
def test_a_missing_gpu_is_said(tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    done = run_tool(tmp_path, "--only", "tests")
    assert done.returncode == 1
    results = json.loads((tmp_path / "gpu_check.json").read_text())
    assert list(results) == ["tests"]
    assert results["tests"]["status"] == "failed"
    assert "torch sees no CUDA GPU here" in results["tests"]["message"]


def test_a_folder_that_is_no_mamba_is_refused(tmp_path):
    done = run_tool(tmp_path, "--mamba-source", tmp_path, "--device", "cpu")
    assert done.returncode == 1
    assert done.stderr.strip().endswith("give a checkout of mamba-ssm.")
    assert "\n" not in done.stderr.strip()


# ------------------------------------------------------------------------------------------- single parts

FINDS = "import json, pathlib; pathlib.Path({file!r}).write_text(json.dumps({content})); "


@pytest.mark.parametrize(
    "ending, status, message",
    [
        ("", "ok", ""),
        ("import os; os.abort()", "failed", "ended with code -6; see part.log"),
        (
            *("import time; time.sleep(60)", "timed out"),
            "not done after 5 s, 1 passed and 0 failed until then; see part.log",
        ),
    ],
)
def test_a_part_that_does_not_end_well_keeps_what_it_found(tmp_path, ending, status, message):
    content = dict(status="ok", message="", rows=[dict(what="a copy", right=True)])
    if ending:  # before it was done
        content = dict(status="failed", rows=content["rows"])
    code = FINDS.format(file=str(tmp_path / "part.json"), content=content) + ending
    result = gpu_check.run_limited([sys.executable, "-c", code], tmp_path / "part", limit=5)
    assert result["status"] == status
    assert result["message"].startswith(message)
    assert result["rows"] == content["rows"]


def test_a_part_that_crashes_before_it_begins(tmp_path):
    command = [sys.executable, "-c", "raise SystemExit(3)"]
    result = gpu_check.run_limited(command, tmp_path / "part", limit=5)
    assert result == dict(rows=[], status="failed", message="ended with code 3; see part.log")


def test_results_that_cannot_be_read_are_a_failed_part(tmp_path):
    code = f"import pathlib; pathlib.Path({str(tmp_path / 'part.json')!r}).write_text('{{')"
    result = gpu_check.run_limited([sys.executable, "-c", code], tmp_path / "part", limit=5)
    message = "part.json cannot be read; see part.log"
    assert result == dict(rows=[], status="failed", message=message)


def test_results_are_there_or_complete(tmp_path, monkeypatch):
    report = gpu_check.Report(tmp_path / "part.json")
    report.add("before")

    def end_here(*paths):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(gpu_check.os, "replace", end_here)
        with pytest.raises(KeyboardInterrupt):
            report.add("after")
    read = json.loads((tmp_path / "part.json").read_text())
    assert [row["what"] for row in read["rows"]] == ["before"]
    report.write()
    assert len(json.loads((tmp_path / "part.json").read_text())["rows"]) == 2
    assert [file.name for file in tmp_path.iterdir()] == ["part.json"]


def test_what_the_user_wants_python_to_find_is_found(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", "/somewhere/else")
    paths = gpu_check._environment()["PYTHONPATH"].split(":")
    assert paths == [str(REPOSITORY), str(TOOL.parent), "/somewhere/else"]
    monkeypatch.delenv("PYTHONPATH")
    assert gpu_check._environment()["PYTHONPATH"].split(":") == paths[:2]


@pytest.fixture
def run_here(tmp_path, monkeypatch):
    """Run a part in this process."""
    monkeypatch.setenv("TRITON_INTERPRET", "0")

    def run(function):
        monkeypatch.setitem(gpu_check.PARTS, "versions", gpu_check.Part(function, 1))
        gpu_check.run_in_child(Namespace(part="versions", out=tmp_path, device="cpu"))
        return json.loads((tmp_path / "versions.json").read_text())

    return run


def test_a_failure_inside_a_part_does_not_end_it(run_here):
    def part(report, args):
        gpu_check.attempt(report, "division", lambda: dict(right=1 / 0))
        gpu_check.attempt(report, "sum", lambda: dict(right=1 + 1 == 2))

    result = run_here(part)
    assert result["status"] == "failed"
    assert result["message"] == "wrong: division"
    assert [row["right"] for row in result["rows"]] == [False, True]
    assert result["rows"][0]["error"] == "ZeroDivisionError: division by zero"


def test_many_failures_are_not_all_named_in_a_message(run_here):
    def part(report, args):
        for k in range(9):
            report.add(f"case {k}", right=k == 0)

    assert run_here(part)["message"] == "wrong: case 1, case 2, case 3 and 5 more"


def test_a_part_that_raises_is_reported(run_here):
    def part(report, args):
        report.add("before", right=True)
        raise ValueError("no such thing\nand more")

    result = run_here(part)
    assert result["status"] == "failed"
    assert result["message"] == "ValueError: no such thing"
    assert len(result["rows"]) == 1


def test_wrong_results_are_noticed():
    right = gpu_check._compare(torch.ones(3), torch.ones(3).double(), 1e-5)
    assert right["right"]
    wrong = gpu_check._compare(torch.tensor([1, 1, 1.1]), torch.ones(3).double(), 1e-5)
    assert not wrong["right"]
    zero = torch.zeros(3)
    assert gpu_check._compare(zero, zero.double(), 1e-5)["right"]
    assert not gpu_check._compare(zero / 0, zero.double(), 1e-5)["right"]
    assert not gpu_check._compare(zero / 0, torch.ones(3).double(), 1e-5)["right"]


class FakeGpu:
    """Two clocks: the host's, and the GPU's, which is busy until some time. In seconds."""

    def __init__(self, monkeypatch):
        self.host = self.busy = 0.0
        monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: self.run(cycles / 1e9))
        monkeypatch.setattr(torch.cuda, "Event", lambda enable_timing: FakeEvent(self))

    def run(self, seconds):
        self.host += 5e-6  # a launch
        self.busy = max(self.busy, self.host) + seconds


class FakeEvent:
    def __init__(self, gpu):
        self.gpu = gpu

    def record(self):
        self.gpu.run(0)
        self.at = self.gpu.busy

    def query(self):
        return self.gpu.host >= self.at

    def synchronize(self):
        self.gpu.host = max(self.gpu.host, self.at)

    def elapsed_time(self, end):
        return (end.at - self.at) * 1e3


@pytest.mark.parametrize("host", [20e-6, 3e-3])
def test_the_time_of_a_call_is_the_time_of_its_kernels(monkeypatch, host):
    gpu = FakeGpu(monkeypatch)

    def call():
        for _ in range(2):
            gpu.host += host / 2
            gpu.run(40e-6)

    assert gpu_check._time(call, "meta") == pytest.approx(80e-6)


def test_a_call_that_waits_for_the_gpu_has_no_time_of_its_own(monkeypatch):
    gpu = FakeGpu(monkeypatch)

    def call():
        gpu.run(40e-6)
        gpu.host = gpu.busy

    with pytest.raises(RuntimeError, match="a call waits for the GPU"):
        gpu_check._time(call, "meta")


def test_without_triton_no_figures_are_passed_off_as_its(tmp_path, monkeypatch):
    from mmvssm.ops import backend

    ran = []
    for name in ("versions", "times"):
        part = gpu_check.Part(lambda report, args: ran.append(args.part), 1)
        monkeypatch.setitem(gpu_check.PARTS, name, part)

    def result(name, device="cuda"):
        gpu_check.run_in_child(Namespace(part=name, out=tmp_path, device=device))
        return json.loads((tmp_path / f"{name}.json").read_text())

    monkeypatch.setenv("TRITON_INTERPRET", "0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(backend, "triton_available", lambda: True)
    monkeypatch.setattr(backend, "triton_works", lambda: False)
    monkeypatch.setattr(backend, "missing_for_triton", lambda: "no C compiler")
    assert result("times")["status"] == "failed"
    assert result("times")["message"].endswith("it found no C compiler")
    monkeypatch.setattr(backend, "triton_available", lambda: False)
    assert "Triton cannot be imported" in result("times")["message"]
    assert ran == []
    assert result("versions")["status"] == result("times", "cpu")["status"] == "ok"
    assert ran == ["versions", "times"]


@pytest.mark.parametrize("script", [gpu_check.SANITIZED, gpu_check.PROFILED])
def test_scripts_under_other_tools_use_the_device(script, monkeypatch):
    class Used(Exception):
        pass

    def use_device(device):
        raise Used(device)

    monkeypatch.setattr(gpu_check, "use_device", use_device)
    with pytest.raises(Used, match=r"^cuda:1$"):
        exec(script.format(paths=[], device="cuda:1", shape="STAGE_1"), {})


def test_parts_use_the_device(tmp_path, monkeypatch):
    used = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", used.append)
    monkeypatch.setattr(gpu_check, "require_triton", lambda: None)
    monkeypatch.setitem(gpu_check.PARTS, "times", gpu_check.Part(lambda report, args: None, 1))
    gpu_check.run_in_child(Namespace(part="times", out=tmp_path, device="cuda:1"))
    assert used == ["cuda:1"]


def test_times_and_memory_are_those_of_the_device(monkeypatch):
    import backbones
    import timing

    asked = []
    for name in (
        *("synchronize", "reset_peak_memory_stats", "memory_allocated", "max_memory_allocated"),
    ):
        monkeypatch.setattr(torch.cuda, name, lambda device=None: asked.append(device) or 0)
    timing.synchronize("cuda:1")
    args = Namespace(device="cuda:1", dtype="float32")
    x = torch.rand(1)
    backbones.peak_memory_of("", "", torch.nn.Identity(), backbones.evaluate, x, args)
    assert asked == ["cuda:1"] * 4


def test_the_definition_is_computed_on_the_cpu():
    from torch._subclasses.fake_tensor import FakeTensorMode

    inputs = scan_cases.make_inputs(scan_cases.Case(1, 3, 2, 5, 2))
    with FakeTensorMode():
        inputs = {
            name: torch.empty(x.shape, dtype=x.dtype, device="cuda") for name, x in inputs.items()
        }
        defined = scan_cases._defined(inputs, True)
    assert {x.device.type for x in inputs.values()} == {"cuda"}
    assert {x.device.type for x in defined.values()} == {"cpu"}


def test_primitives_are_tried_in_the_tiles_that_are_launched():
    pytest.importorskip("triton")
    from gpu_check_kernels import GRADIENTS_TILE, TILES
    from scan_inputs import designs, make_inputs

    from mmvssm.ops.selective_scan import triton_launch
    from mmvssm.ops.triton_launcher import recorded_launches

    scanned, others = set(), set()
    for shape in gpu_check._shapes("cuda") + gpu_check._more_shapes("cuda"):
        for batch, design in itertools.product((1, 16), designs(shape.d_state).values()):
            inputs = make_inputs(shape, batch, torch.float32, "meta")
            with design(), recorded_launches() as launches:
                y, states = triton_launch.forward(inputs)
                triton_launch.backward(inputs.grad_of_each_walk(y), inputs, states)
            for launch in launches:
                values, warps = launch.arguments, launch.options["num_warps"]
                if "CHANNELS" in values:
                    tile = (values["CHANNELS"], values["LANES"], values["GROUPS"], warps)
                    assert tile == (*GRADIENTS_TILE, 1)
                elif "GROUPS" in values:
                    lanes = values["LANES"] if "LANES" in values else values["COLUMNS"]
                    scanned.add((values["GROUPS"], lanes, warps))
                else:
                    others.add(launch.kernel.__name__)
    assert scanned == set(TILES)
    assert others == {"sweep", "weights_by_step", "weights_by_token"}  # they scan nothing


def test_cases_that_show_something_new_come_first():
    cases = gpu_check.operator_cases("cuda")
    assert len(cases) == len(set(cases)) == len(scan_cases.CASES) + len(sparse_conv_cases.CASES)
    early = cases[:30]
    assert len(early) < 0.6 * len(cases)
    for operator, fields in (
        ("scan", ("walk", "layout", "optional", "softplus", "dtype", "extreme")),
        ("sparse convolution", ("kernel", "layout", "bias", "dtype")),
    ):
        for field in fields:
            everything, shown = (
                {getattr(case, field) for name, case in some if name == operator}
                for some in (cases, early)
            )
            assert shown == everything, field
    one_state = {(case.states == 1, case.dtype) for name, case in early if name == "scan"}
    assert (True, torch.bfloat16) in one_state
    assert (False, torch.bfloat16) in one_state


def test_every_shape_is_timed_in_float32_before_any_is_in_bfloat16():
    timed = gpu_check.timed_inputs("cuda")
    assert len(timed) == len(set(timed)) == 16
    assert {dtype for _, _, dtype in timed[:8]} == {torch.float32}
    assert len({(shape, batch) for shape, batch, _ in timed[:8]}) == 8


@pytest.fixture
def launching(monkeypatch):
    """The scan launches what it would on a GPU, where nothing runs; its results are those of the CPU's kernels."""
    pytest.importorskip("triton")
    from mmvssm.ops import backend
    from mmvssm.ops.selective_scan import pytorch, triton_launch
    from mmvssm.ops.triton_launcher import recorded_launches

    class Launching:
        backward = staticmethod(pytorch.backward)
        error_of_states = 0.0

        def forward(self, inputs):
            with recorded_launches():
                triton_launch.forward(inputs)
            y, states = pytorch.forward(inputs)
            return y, states * (1 + self.error_of_states * triton_launch.SINGLE_PASS)

    launching = Launching()
    monkeypatch.setattr(backend, "choose", lambda x, gpu, cpu, fallback: launching)
    return launching


def test_the_single_pass_is_compared_with_the_default(launching):
    import scan_inputs

    def inputs(dtype):
        return scan_inputs.make_inputs(scan_inputs.Shape((7, 10), 5, 1), 1, dtype, "cpu")

    assert gpu_check.compare_designs(inputs(torch.float32))["right"]
    launching.error_of_states = 1e-3
    assert not gpu_check.compare_designs(inputs(torch.float32))["right"]
    with pytest.raises(RuntimeError, match="instead of the single pass"):  # which has no float64
        gpu_check.compare_designs(inputs(torch.float64))


def test_cases_run_in_the_single_pass(launching):
    case = scan_cases.Case(1, 70, 1, 5, 1)
    assert gpu_check.run_in_single_pass(case, "cpu")["right"]
    with pytest.raises(RuntimeError, match="launched sweep instead of the single pass"):
        gpu_check.run_in_single_pass(case._replace(states=2), "cpu")
    launching.error_of_states = 1e-2
    with pytest.raises(AssertionError, match="relative error"):
        gpu_check.run_in_single_pass(case, "cpu")


@pytest.mark.parametrize("case", gpu_check.look_back_cases(), ids=str)
def test_cases_of_the_look_back_ask_for_all_of_it(case):
    pytest.importorskip("triton")
    import scan_inputs

    from mmvssm.ops.selective_scan import triton_launch
    from mmvssm.ops.selective_scan.inputs import ScanInputs
    from mmvssm.ops.triton_launcher import recorded_launches

    inputs = scan_cases.make_inputs(case)
    del inputs["grad_y"]
    with scan_inputs.designs(1)["single_pass"](), recorded_launches() as launches:
        triton_launch.forward(ScanInputs(**inputs))
    (launch,) = launches
    values = launch.arguments
    assert launch.kernel.__name__ == "single_pass"
    assert values["tiles"] > values["BLOCK"]
    assert case.length % values["STEPS"] and case.channels % values["LANES"]
    assert not values["ALIGNED"]


@pytest.mark.nightly
def test_cases_of_the_look_back_are_within_their_tolerance():
    """Long walks in half precision: by the CPU's kernels."""
    scan_cases.check(gpu_check.look_back_cases()[1], gpu_check._run_scan)


def test_whatever_is_launched_later_is_compiled_before():
    jobs = {job.what for job in gpu_check.compile_jobs("cuda")}
    timed = {f"scan {gpu_check._label(*timed)}" for timed in gpu_check.timed_inputs("cuda")}
    cases = {f"{operator} {case}" for operator, case in gpu_check.operator_cases("cuda")}
    cases |= {f"scan {case}" for case in gpu_check.sanitized_cases()}
    look_back = {
        f"{how} {case}" for how in ("scan", "single pass") for case in gpu_check.look_back_cases()
    }
    shapes = {
        f"single pass {gpu_check._label(shape, 1, torch.float32)}"
        for shape in gpu_check.single_pass_shapes("cuda")
    }
    assert len(shapes) == 3
    assert timed | cases | look_back | shapes <= jobs
    others = jobs - timed - cases - look_back - shapes
    if gpu_check._missing_for_backbones():
        assert not others
    else:
        assert len(others) == 4
        assert all(what.startswith("GroupMamba-T, ") for what in others)
    pickle.dumps(gpu_check.compile_jobs("cuda"))  # for other processes


@pytest.mark.nightly
def test_jobs_run_in_processes_of_their_own(tmp_path):
    report = gpu_check.Report(tmp_path / "part.json")
    jobs = [
        gpu_check.Job("first", time.sleep, (0,)),
        gpu_check.Job("second", int, ("x",)),
        gpu_check.Job("ends the first process", os._exit, (3,)),
        gpu_check.Job("fourth", time.sleep, (0,)),
        gpu_check.Job("would be the first process's", time.sleep, (0,)),
    ]
    gpu_check.run_jobs(jobs, 2, report, "cpu")
    rows = {row.pop("what"): row for row in report.content["rows"]}
    assert rows.keys() == {job.what for job in jobs}
    assert rows["first"].keys() == rows["fourth"].keys() == {"seconds"}
    assert rows["second"]["right"] is False
    assert rows["second"]["error"].startswith("ValueError: invalid literal")
    for job in (jobs[2], jobs[4]):
        assert rows[job.what] == dict(right=False, error="its process ended with code 3")


def test_too_little_memory_beside_other_processes_is_no_failure():
    def run():
        raise torch.cuda.OutOfMemoryError("2 GiB")

    sent = []
    gpu_check._do_jobs([gpu_check.Job("large", run, ())], "cpu", Namespace(send=sent.append))
    assert sent == [dict(skipped="the other processes left too little memory")]


@pytest.mark.parametrize("bfloat16", [True, False])
def test_the_single_pass_is_compiled_and_not_run(monkeypatch, bfloat16):
    pytest.importorskip("triton")
    from mmvssm.ops.selective_scan.triton_kernels_scalar import single_pass

    compiled = []
    monkeypatch.setattr(single_pass, "warmup", lambda **given: compiled.append(given))
    monkeypatch.setattr(single_pass, "run", None)
    case = gpu_check.look_back_cases()[1]
    gpu_check._compile_single_pass(case if bfloat16 else gpu_check._shapes("cpu")[0], "cpu")
    (given,) = compiled
    assert given.keys() == {"grid", *single_pass.arg_names, "num_warps", "enable_fp_fusion"}
    assert given["u"].dtype == (torch.bfloat16 if bfloat16 else torch.float32)


def test_counts_of_ncu_are_read():
    text = """==PROF== Connected to process 1
"ID","Process ID","Kernel Name","Metric Name","Metric Unit","Metric Value"
"0","1","outputs","smsp__inst_executed.sum","inst","1,234,567"
"1","1","outputs","launch__grid_size","","12"
"2","1","outputs(float *)","smsp__inst_executed.sum","inst","89"
"""
    assert gpu_check._ncu_counts(text) == {"outputs": [1234567, 89]}


def test_how_mamba_is_compiled(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_check, "_cuda_tool", lambda name: f"/opt/cuda/bin/{name}")
    commands, link = gpu_check.mamba_commands(tmp_path / "mamba", tmp_path, "sm_90")
    sources = [Path(command[command.index("-c") + 1]).name for command in commands]
    assert sources == [*gpu_check.MAMBA_SOURCES, "rest.cpp"]
    for command in commands:
        assert command[0] == "/opt/cuda/bin/nvcc"
        assert command[command.index("-arch") + 1] == "sm_90"
        assert command[-1] in link
    monkeypatch.setattr(gpu_check, "_cuda_tool", lambda name: None)
    with pytest.raises(RuntimeError, match="nvcc is not installed"):
        gpu_check.mamba_commands(tmp_path / "mamba", tmp_path, "sm_90")


WITHOUT_OPENMMLAB = """
import sys
from argparse import Namespace
from importlib.abc import MetaPathFinder
from pathlib import Path

class Absent(MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {"mmengine", "mmcv", "mmdet", "mmseg", "prettytable"}:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Absent())
import importlib.util
find_spec = importlib.util.find_spec
absent = {"mmengine", "mmcv", "mmdet"}
importlib.util.find_spec = lambda name: None if name in absent else find_spec(name)
import gpu_check
for part in ("bandwidth", "times", "tests", "backbones"):
    gpu_check.run_in_child(Namespace(part=part, out=Path(sys.argv[1]), device="cpu"))
"""


@pytest.mark.nightly
def test_torch_alone_is_enough(tmp_path):
    command = [sys.executable, "-c", WITHOUT_OPENMMLAB, tmp_path]
    subprocess.run(command, check=True, cwd=TOOL.parent, env=gpu_check._environment())
    statuses = {
        file.stem: json.loads(file.read_text())["status"] for file in tmp_path.glob("*.json")
    }
    assert statuses == dict(bandwidth="ok", times="ok", tests="ok", backbones="skipped")
