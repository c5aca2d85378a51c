"""Compare the selective scan with other implementations, in one process.

They are the sequential definition, mambapy's parallel scan if it is installed, our fallback in plain PyTorch,
mamba-ssm's CUDA kernel if it is installed, and a copy of the same bytes, which reads each input once and writes the
output once.

Examples:
    python tools/benchmark/scan.py
    python tools/benchmark/scan.py --growth      # 1 k to 256 k tokens, with a picture
    python tools/benchmark/scan.py --errors      # against float64
    python tools/benchmark/scan.py --host        # Python's time for a call that would launch GPU kernels; needs no GPU
"""

import argparse
import functools
import importlib
import sys
import timeit
from collections.abc import Callable
from contextlib import nullcontext
from importlib.util import find_spec
from pathlib import Path
from unittest import mock

import torch
import torch.nn.functional as F
from timing import about, copy_bandwidth, markdown_table, time_side_by_side, write_json
from torch import Tensor

from mmvssm.errors import UserError, add_traceback_option, run_tool
from mmvssm.ops import selective_scan
from mmvssm.ops.selective_scan import pytorch
from mmvssm.ops.selective_scan.inputs import ScanInputs
from mmvssm.ops.selective_scan.naive import selective_scan_naive
from mmvssm.ops.selective_scan.traversal import Traversal
from mmvssm.ops.triton_launcher import recorded_launches

SHAPES = [(2, 4096, 348, 1), (1, 4096, 384, 16), (1, 4096, 64, 1), (2, 64000, 64, 1)]
"""Images, tokens, channels, states."""


def parse_args() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--shape",
        type=int,
        nargs=4,
        action="append",
        metavar=("B", "L", "D", "N"),
        help="repeatable",
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument(
        "--default-malloc", action="store_true", help="do not keep freed memory, unlike our tools"
    )
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--seconds", type=float, default=1.0, help="for each candidate")
    parser.add_argument("--growth", action="store_true", help="time against length instead")
    parser.add_argument(
        "--errors", action="store_true", help="errors against float64 instead of times"
    )
    parser.add_argument(
        "--host",
        action="store_true",
        help="Python's time for a forward call that would launch Triton kernels, which are recorded instead",
    )
    parser.add_argument(
        "--sequential", action="store_true", help="include the definition, which is slow"
    )
    parser.add_argument("--out", default="work_dirs/benchmark/scan.json")
    add_traceback_option(parser)
    args = parser.parse_args()
    if args.device.startswith("cuda") and not torch.cuda.is_available():
        raise UserError("this machine has no CUDA GPU; drop --device")
    return args


def make_inputs(shape: tuple[int, ...], args: argparse.Namespace) -> dict[str, Tensor]:
    """Make random arguments of :func:`mmvssm.ops.selective_scan` for one walk."""
    batch, length, channels, states = shape
    torch.manual_seed(0)
    randn = functools.partial(torch.randn, device=args.device)
    dtype = getattr(torch, args.dtype)
    inputs = dict(
        u=randn(batch, length, 1, channels).to(dtype),
        delta=randn(batch, length, 1, channels).to(dtype),
        A=-randn(1, channels, states).exp(),
        B=randn(batch, length, 1, states).to(dtype),
        C=randn(batch, length, 1, states).to(dtype),
        D=randn(1, channels),
        delta_bias=randn(1, channels),
    )
    return {name: x.requires_grad_() for name, x in inputs.items()}


def in_pytorch(u, delta, A, B, C, D, delta_bias) -> Tensor:
    """Run our PyTorch fallback, with its gradients."""
    return _InPyTorch.apply(u, delta, A, B, C, D, delta_bias)


class _InPyTorch(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *inputs):
        y, states = pytorch.forward(ScanInputs(*inputs))
        ctx.save_for_backward(*inputs, states)
        return y

    @staticmethod
    def backward(ctx, grad_y):
        *inputs, states = ctx.saved_tensors
        grads = pytorch.backward(grad_y, ScanInputs(*inputs), states)
        return grads[:7]


def with_mambapy(u, delta, A, B, C, D, delta_bias) -> Tensor:
    """Run mambapy's parallel scan, as its Mamba block uses it."""
    from mambapy.pscan import pscan

    step = F.softplus(delta[:, :, 0] + delta_bias[0])
    decay = torch.exp(step[..., None] * A[0])
    drive = (step * u[:, :, 0])[..., None] * B
    h = pscan(decay, drive)
    return (h @ C[:, :, 0, :, None]).squeeze(3) + D[0] * u[:, :, 0]


def with_mamba_ssm(u, delta, A, B, C, D, delta_bias) -> Tensor:
    """Run mamba-ssm's CUDA kernel, which expects channels before tokens."""
    from mamba_ssm.ops.selective_scan_interface import selective_scan_fn

    u, delta, B, C = (x[:, :, 0].transpose(1, 2).contiguous() for x in (u, delta, B, C))
    y = selective_scan_fn(u, delta, A[0], B, C, D[0], None, delta_bias[0], True)
    return y.transpose(1, 2).contiguous()


def candidates(args: argparse.Namespace) -> dict[str, Callable]:
    """Return the implementations to time by name; ours first."""
    found = {"mmvssm": selective_scan, "mmvssm in PyTorch": in_pytorch}
    if find_spec("mambapy"):
        found["mambapy"] = with_mambapy
    if args.device.startswith("cuda") and find_spec("mamba_ssm"):
        found["mamba-ssm"] = with_mamba_ssm
    if args.sequential:
        found["sequential definition"] = selective_scan_naive
    return found


def measure(shape: tuple[int, ...], args: argparse.Namespace) -> dict[str, dict]:
    """Measure seconds of forward passes, and of forward and backward passes, by implementation."""
    inputs = make_inputs(shape, args)
    leaves = list(inputs.values())

    def forward(scan: Callable) -> None:
        with torch.no_grad():
            scan(**inputs)

    def both(scan: Callable) -> None:
        y = scan(**inputs)
        torch.autograd.grad(y, leaves, torch.ones_like(y))

    scans = candidates(args)
    times = {}
    for name, step in (("forward", forward), ("forward and backward", both)):
        runs = {which: functools.partial(step, scan) for which, scan in scans.items()}
        if name == "forward":
            runs["copy of the same bytes"] = _copy(inputs)
        times[name] = time_side_by_side(runs, args.device, args.seconds)
    return times


def _copy(inputs: dict[str, Tensor]) -> Callable:
    """Return a copy that reads as many bytes as the inputs and writes as many as the output."""
    reads = sum(x.numel() * x.element_size() for x in inputs.values())
    writes = inputs["u"].numel() * inputs["u"].element_size()
    source = torch.ones((reads + writes) // 8, device=inputs["u"].device)
    target = torch.empty_like(source)
    return lambda: target.copy_(source)


def compare(args: argparse.Namespace) -> list[dict]:
    """Print the operator's speed relative to each other implementation."""
    table = markdown_table(["B, L, D, N", "pass", "candidate", "best (ms)", "ours is faster by"])
    records = []
    for shape in args.shape or SHAPES:
        times = measure(tuple(shape), args)
        records.append(dict(shape=shape, seconds=times))
        for step, by_candidate in times.items():
            best = {name: min(runs) for name, runs in by_candidate.items()}
            for name, seconds in best.items():
                ratio = seconds / best["mmvssm"]
                row = [
                    ", ".join(map(str, shape)),
                    step,
                    name,
                    f"{seconds * 1e3:.2f}",
                    f"{ratio:.2f}",
                ]
                table.add_row(row)
                print(", ".join(f"{k} {v}" for k, v in zip(table.field_names, row)), flush=True)
    print(table)
    return records


def grow(args: argparse.Namespace) -> list[dict]:
    """Print and draw how time grows with length."""
    records = []
    table = markdown_table(
        ["tokens", "states", "forward (ms)", "ns a token", "both (ms)", "ns a token "]
    )
    for states in (1, 16):
        for length in (2**k * 1024 for k in range(9)):
            inputs = make_inputs((1, length, 64, states), args)
            leaves = list(inputs.values())

            def forward(inputs: dict = inputs) -> None:
                with torch.no_grad():
                    selective_scan(**inputs)

            def both(inputs: dict = inputs, leaves: list = leaves) -> None:
                y = selective_scan(**inputs)
                torch.autograd.grad(y, leaves, torch.ones_like(y))

            times = time_side_by_side(dict(forward=forward, both=both), args.device, 0.3)
            records.append(dict(length=length, states=states, seconds=times))
            row = [length, states]
            for runs in times.values():
                row += [f"{min(runs) * 1e3:.2f}", f"{min(runs) / length * 1e9:.1f}"]
            table.add_row(row)
            print(", ".join(f"{k} {v}" for k, v in zip(table.field_names, row)), flush=True)
    print(table)
    _draw(records, Path(args.out).with_suffix(".png"))
    return records


def show_errors(args: argparse.Namespace) -> list[dict]:
    """Print relative errors against float64, and whether two runs give the same bits."""
    table = markdown_table(["B, L, D, N", "tensor", "relative error", "two runs alike"])
    records = []
    for shape in args.shape or SHAPES:
        inputs = make_inputs(tuple(shape), args)
        exact = {k: x.detach().cpu().double().requires_grad_() for k, x in inputs.items()}
        first, second = (_outputs(selective_scan, inputs) for _ in range(2))
        expected = _outputs(in_pytorch, exact)
        for name, x in first.items():
            truth = expected[name].to(x.device)
            error = float((x.double() - truth).norm() / truth.norm())
            same = bool((x == second[name]).all())
            records.append(dict(shape=shape, tensor=name, error=error, same_bits=same))
            table.add_row([", ".join(map(str, shape)), name, f"{error:.1e}", same])
    print(table)
    return records


def show_host_time(args: argparse.Namespace) -> list[dict]:
    """Print the microseconds that a forward call keeps Python busy before Triton's launcher takes over."""
    sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "triton_lab"))
    import scan_inputs

    from mmvssm.ops.selective_scan import triton_launch

    table = markdown_table(["states", "gradients wanted", "launches", "microseconds a call"])
    records, repeats = [], max(3, round(args.seconds * 100))
    # The package's attribute of this name is the function, not the module.
    operator = importlib.import_module("mmvssm.ops.selective_scan")
    with mock.patch.object(operator, "_backend", lambda u: triton_launch):
        for layer in (scan_inputs.STAGE_1, scan_inputs.PLAIN):
            # The same Python code, without the system calls of large tensors, which only CPUs have.
            layer = layer._replace(grid=(16, 16), channels=16)
            given = scan_inputs.make_inputs(layer, 1, getattr(torch, args.dtype), "cpu")
            for gradients in (False, True):
                inputs = given._replace(u=given.u.detach().requires_grad_(gradients))
                call = functools.partial(
                    selective_scan,
                    *inputs[:7],
                    traversal=Traversal(inputs.order, inputs.source, inputs.gap),
                    rest=inputs.rest,
                    delta_softplus=inputs.delta_softplus,
                )
                with (
                    recorded_launches() as launches,
                    nullcontext() if gradients else torch.no_grad(),
                ):
                    call()
                    launched = len(launches)
                    runs = timeit.repeat(call, launches.clear, number=100, repeat=repeats)
                seconds = min(runs) / 100
                records.append(
                    dict(
                        states=layer.d_state,
                        gradients=gradients,
                        launches=launched,
                        seconds=seconds,
                    )
                )
                table.add_row([layer.d_state, gradients, launched, f"{seconds * 1e6:.1f}"])
    print(table)
    return records


def _outputs(scan: Callable, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the output and every gradient."""
    y = scan(**inputs)
    generator = torch.Generator().manual_seed(1)
    grad_y = torch.randn(y.shape, generator=generator, dtype=torch.float64).to(y)
    grads = torch.autograd.grad(y, list(inputs.values()), grad_y)
    names = [f"gradient of {name}" for name in inputs]
    return dict(zip(["y", *names], (y.detach(), *grads)))


def _draw(records: list[dict], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 4), constrained_layout=True)
    for states in sorted({record["states"] for record in records}):
        for step, line in (("forward", "-o"), ("both", "--s")):
            chosen = [record for record in records if record["states"] == states]
            lengths = [record["length"] for record in chosen]
            best = [min(record["seconds"][step]) * 1e3 for record in chosen]
            label = f"{states} state{'s' * (states > 1)}, {step if step == 'forward' else 'forward and backward'}"
            axes.loglog(lengths, best, line, label=label)
    axes.set_xlabel("tokens (1 image, 64 channels)")
    axes.set_ylabel("milliseconds")
    axes.grid(alpha=0.3)
    axes.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    print(f"{path} shows it")


def main() -> None:
    """Run the tool."""
    args = parse_args()
    machine = about(args.device, args.default_malloc)
    print(", ".join(f"{name} {value}" for name, value in machine.items()), args.dtype)
    bandwidth = copy_bandwidth(args.device)
    print(f"a copy moves {bandwidth / 1e9:.1f} GB/s, read and written")
    chosen = show_errors if args.errors else grow if args.growth else compare
    records = (show_host_time if args.host else chosen)(args)
    write_json(args.out, dict(machine, copy_bytes_per_second=bandwidth, records=records))


if __name__ == "__main__":
    run_tool(main)
