"""Compare the time that pruning saves with the FLOPs that it saves: a pruned and a dense backbone in one run.

Both have the same weights. Their runs alternate, so that other load hits both; the table shows the fastest of each, and
the JSON file all of them. The ideal speed-up is the ratio of FLOPs.

Examples:
    python tools/benchmark/pruning.py                                  # L1 and L3, evaluation and training
    python tools/benchmark/pruning.py --arch L3 --shape 64 224 224 --device cuda --dtype bfloat16
    python tools/benchmark/pruning.py --backbone PlainMambaAdapter --shape 1 800 1280
    python tools/benchmark/pruning.py --backbone Vim --arch S T
    python tools/benchmark/pruning.py --arch L1 L1-pyramid             # two presets
"""

import argparse
import statistics
from collections.abc import Callable
from functools import partial

import torch
from timing import about, markdown_table, time_side_by_side, write_json
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from mmvssm.analysis.flops import count
from mmvssm.errors import UserError, add_traceback_option, run_tool
from mmvssm.models import PlainMamba, PlainMambaAdapter, Vim
from mmvssm.models.pruning import PrunedTokens

BACKBONES = {kind.__name__: kind for kind in (PlainMamba, PlainMambaAdapter, Vim)}
SHAPES = [(4, 224, 224), (1, 512, 512), (1, 800, 1280)]
KINDS = {
    "linear layers": ("aten::addmm", "aten::mm", "aten::bmm", "mkldnn::_linear_pointwise"),
    "scan": ("mmvssm::selective_scan",),
    "depthwise and other convolutions": (
        "aten::mkldnn_convolution",
        "aten::cudnn_convolution",
        "aten::_conv_depthwise2d",
        "mmvssm::sparse_depthwise_conv",
    ),
    "activations, sums, norms, copies": (
        *("aten::silu", "aten::mul", "aten::add", "aten::sum", "aten::copy_", "aten::fill_"),
        *("aten::native_layer_norm", "aten::native_batch_norm", "aten::exp", "aten::gelu"),
        *("aten::add_", "aten::cat", "aten::clamp_min_", "aten::relu_", "aten::embedding"),
    ),
}
"""Operators of a profile by purpose; all others count as bookkeeping."""


def parse_args() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--backbone", default="PlainMamba", choices=sorted(BACKBONES))
    parser.add_argument("--arch", nargs="+", default=["L1", "L3"], help="presets, of these models")
    parser.add_argument(
        "--shape", type=int, nargs=3, action="append", metavar=("B", "H", "W"), help="repeatable"
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument(
        "--default-malloc", action="store_true", help="do not keep freed memory, unlike our tools"
    )
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--runs", type=int, default=7, help="runs of each model")
    parser.add_argument("--no-training", action="store_true", help="evaluation only")
    parser.add_argument("--out", default="work_dirs/benchmark/pruning.json", help="where to write")
    add_traceback_option(parser)
    args = parser.parse_args()
    if args.device.startswith("cuda") and not torch.cuda.is_available():
        raise UserError("this machine has no CUDA GPU; drop --device")
    return args


def flops(model: PlainMamba, x: Tensor) -> int:
    """Count the FLOPs of one forward pass as the papers do."""
    return count(model, lambda: model(x))["total"].flops


def build_pair(preset: str, args: argparse.Namespace) -> dict[str, PlainMamba]:
    """Build the dense model that a preset is named after, and the same model pruned by it."""
    torch.manual_seed(0)
    backbone = BACKBONES[args.backbone]
    arch = preset.partition("-")[0]
    if arch not in backbone.arch_settings:
        raise UserError(f"unknown arch {arch}; known are {', '.join(backbone.arch_settings)}")
    models = {name: backbone(arch, pruning=p) for name, p in (("dense", None), ("pruned", preset))}
    models["pruned"].load_state_dict(models["dense"].state_dict())
    return {name: model.to(args.device).eval() for name, model in models.items()}


def evaluate(model: PlainMamba, x: Tensor) -> None:
    """A forward pass."""
    with torch.no_grad():
        model(x)


def train(model: PlainMamba, x: Tensor) -> None:
    """Run a forward and a backward pass; dropped tokens take part as with a restoration neck."""
    parts = [
        part
        for y in model(x)
        for part in ((y.tokens, y.departed) if isinstance(y, PrunedTokens) else (y,))
    ]
    sum(part.sum() for part in parts).backward()
    model.zero_grad()


def compare(
    step: Callable, models: dict[str, PlainMamba], x: Tensor, args: argparse.Namespace
) -> dict[str, list[float]]:
    """Measure seconds of alternating runs by name of the model."""

    def run(model: PlainMamba) -> None:
        with torch.autocast(x.device.type, getattr(torch, args.dtype), args.dtype != "float32"):
            step(model, x)

    candidates = {name: partial(run, model) for name, model in models.items()}
    return time_side_by_side(candidates, args.device, seconds=0.0, min_runs=args.runs)


def shares(model: PlainMamba, x: Tensor) -> dict[str, float]:
    """Measure milliseconds of one evaluation by kind of operator."""
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        evaluate(model, x)
    spent = {event.key: event.self_cpu_time_total / 1e3 for event in profiler.key_averages()}
    kinds = {kind: sum(spent.get(op, 0.0) for op in ops) for kind, ops in KINDS.items()}
    kinds["the rest"] = sum(spent.values()) - sum(kinds.values())
    return kinds


def main() -> None:
    """Run the tool."""
    args = parse_args()
    machine = about(args.device, args.default_malloc)
    print(", ".join(f"{name} {value}" for name, value in machine.items()), args.dtype)
    table = markdown_table(
        ["arch", "input", "pass", "dense (ms)", "pruned (ms)", "FLOPs saved", "faster", "ideal"]
    )
    records = []
    steps = {"evaluation": evaluate} | ({} if args.no_training else {"training": train})
    for arch in args.arch:
        models = build_pair(arch, args)
        for shape in args.shape or SHAPES:
            x = torch.rand(shape[0], 3, *shape[1:], device=args.device)
            costs = {name: flops(model, x) for name, model in models.items()}
            ideal = costs["dense"] / costs["pruned"]
            for name, step in steps.items():
                for model in models.values():
                    model.train(step is train)
                times = compare(step, models, x, args)
                best = {name: min(runs) for name, runs in times.items()}
                row = [
                    *(arch, "x".join(map(str, shape)), name),
                    *(f"{best[which] * 1e3:.0f}" for which in ("dense", "pruned")),
                    *(f"{1 - 1 / ideal:.1%}", f"{best['dense'] / best['pruned']:.2f}"),
                    f"{ideal:.2f}",
                ]
                table.add_row(row)
                print(", ".join(f"{k} {v}" for k, v in zip(table.field_names, row)), flush=True)
                records.append(dict(arch=arch, shape=shape, step=name, flops=costs, seconds=times))
                records[-1]["medians"] = {k: statistics.median(v) for k, v in times.items()}
            if args.device == "cpu":
                for model in models.values():
                    model.eval()
                records[-1]["milliseconds"] = {k: shares(m, x) for k, m in models.items()}
    print("\nThe fastest of", args.runs, "alternating runs each:")
    print(table)
    _print_shares(records)
    write_json(args.out, dict(machine, dtype=args.dtype, records=records))


def _print_shares(records: list[dict]) -> None:
    for record in records:
        if "milliseconds" not in record:
            continue
        dense, pruned = record["milliseconds"]["dense"], record["milliseconds"]["pruned"]
        table = markdown_table(["operators", "dense (ms)", "pruned (ms)", "faster"])
        for kind in dense:
            ratio = dense[kind] / max(pruned[kind], 1e-9)
            table.add_row([kind, f"{dense[kind]:.1f}", f"{pruned[kind]:.1f}", f"{ratio:.2f}"])
        print(f"\nWhere the time goes, {record['arch']} at {'x'.join(map(str, record['shape']))}:")
        print(table)


if __name__ == "__main__":
    run_tool(main)
