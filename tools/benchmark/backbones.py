"""Compare our backbones with mmdet's Swin-T and ResNet-50, and with a ViT of DeiT-T's size.

They run in turn in one process, on the same images. Ratios are to the first of each group: GroupMamba-T with Swin-T and
ResNet-50; each of our backbones with Swin-T; PlainMamba-L1 with a ViT that uses torch's scaled_dot_product_attention.
The groups walks-* compare sums over the walks inside the scan with sums by PyTorch after it.

Examples:
    python tools/benchmark/backbones.py
    python tools/benchmark/backbones.py --group groupmamba --shape 128 224 224 --device cuda --dtype bfloat16
"""

import argparse
from collections.abc import Callable
from functools import partial
from unittest import mock

import torch
from mmengine.registry import MODELS, init_default_scope
from timing import (
    about,
    copy_bandwidth,
    markdown_table,
    peak_memory,
    time_side_by_side,
    write_json,
)
from torch import Tensor, nn

from mmvssm.errors import UserError, add_traceback_option, run_tool
from mmvssm.models import GroupMamba, PlainMamba, PlainMambaAdapter, SpatialMamba, Vim, VMamba
from mmvssm.ops import selective_scan

GROUPS = {
    "groupmamba": dict(
        models={
            "Swin-T": lambda: library_model("mmdet.SwinTransformer"),
            "ResNet-50": lambda: library_model("mmdet.ResNet", depth=50),
            "GroupMamba-T": lambda: GroupMamba("tiny"),
        },
        shapes=[(1, 800, 1280), (8, 224, 224), (1, 512, 2048)],
    ),
    "all": dict(
        models={
            "Swin-T": lambda: library_model("mmdet.SwinTransformer"),
            "GroupMamba-T": lambda: GroupMamba("tiny"),
            "VMamba-T": lambda: VMamba("T"),
            "Spatial-Mamba-T": lambda: SpatialMamba("T"),
            "Vim-T": lambda: Vim("T"),
            "PlainMamba-L1": lambda: PlainMamba("L1"),
            "PlainMamba-Adapter-L1": lambda: PlainMambaAdapter("L1"),
        },
        shapes=[(1, 800, 1280), (8, 224, 224)],
    ),
    "plainmamba": dict(
        models={
            "ViT, DeiT-T's size": lambda: PlainTransformer(),
            "PlainMamba-L1": lambda: PlainMamba("L1"),
            "PlainMamba-L1, pruned": lambda: PlainMamba("L1", pruning="L1"),
        },
        shapes=[(4, 224, 224), (1, 512, 512), (1, 1024, 1024), (1, 1536, 1536)],
    ),
    "vim": dict(
        models={
            "Vim-S": lambda: Vim("S"),
            "Vim-S, pruned": lambda: Vim("S", pruning="S"),
        },
        shapes=[(4, 224, 224), (1, 512, 512), (1, 1024, 1024)],
    ),
}
for backbone, arch in ((PlainMamba, "L1"), (VMamba, "T"), (Vim, "S")):
    GROUPS[f"walks-{backbone.__name__.lower()}"] = dict(
        models={
            f"{backbone.__name__}-{arch}, summed outside": (
                lambda backbone=backbone, arch=arch: SummedOutside(backbone(arch))
            ),
            f"{backbone.__name__}-{arch}": partial(backbone, arch),
        },
        shapes=[(1, 224, 224), (8, 224, 224), (1, 512, 512), (1, 800, 1280)],
    )


def library_model(name: str, **settings: object) -> nn.Module:
    """Build a backbone of another library."""
    try:
        init_default_scope(name.split(".")[0])
        return MODELS.build(dict(type=name, **settings))
    except (ImportError, KeyError) as error:
        raise UserError(f"{name} cannot be built here: {error}") from error


class PlainTransformer(nn.Module):
    """A vision transformer of DeiT-T's size: patches of 16, 192 channels, 12 layers, 3 heads."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 192, kernel_size=16, stride=16)
        layer = nn.TransformerEncoderLayer(
            192, nhead=3, dim_feedforward=768, activation="gelu", batch_first=True, norm_first=True
        )
        self.layers = nn.TransformerEncoder(layer, num_layers=12, enable_nested_tensor=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(B, 3, H, W)`` to ``(B, L, 192)``."""
        return self.layers(self.patches(x).flatten(2).transpose(1, 2))


class SummedOutside(nn.Module):
    """A backbone that lets PyTorch sum over the walks, and in the backward pass over those that share values."""

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone

    def forward(self, x: Tensor) -> object:
        """What the backbone returns."""
        module = type(self.backbone).__module__
        with mock.patch(f"{module}.selective_scan", scan_and_sum):
            return self.backbone(x)


def scan_and_sum(
    u: Tensor, delta: Tensor, A: Tensor, *args: object, sum_walks: bool, **kwargs: object
) -> Tensor:
    """Compute the same as the scan, with a row for each walk."""
    u, delta = (x.expand(-1, -1, A.shape[0], -1) for x in (u, delta))
    y = selective_scan(u, delta, A, *args, **kwargs)
    return y.sum(2) if sum_walks else y


def parse_args() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--group", nargs="+", default=list(GROUPS), choices=list(GROUPS))
    parser.add_argument("--model", nargs="+", metavar="NAME", help="only these of the groups")
    parser.add_argument(
        "--shape", type=int, nargs=3, action="append", metavar=("B", "H", "W"), help="repeatable"
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument(
        "--default-malloc", action="store_true", help="do not keep freed memory, unlike our tools"
    )
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--compile", action="store_true", help="run all through torch.compile")
    parser.add_argument("--runs", type=int, default=5, help="runs of each model")
    parser.add_argument("--no-training", action="store_true", help="evaluation only")
    parser.add_argument("--no-memory", action="store_true", help="do not measure peak memory")
    parser.add_argument("--out", default="work_dirs/benchmark/backbones.json")
    add_traceback_option(parser)
    args = parser.parse_args()
    args.threads = torch.get_num_threads()
    known = {name for group in args.group for name in GROUPS[group]["models"]}
    unknown = set(args.model or ()) - known
    if unknown:
        raise UserError(f"no such model: {', '.join(unknown)}; known: {', '.join(sorted(known))}")
    return args


def evaluate(model: nn.Module, x: Tensor) -> None:
    """A forward pass."""
    with torch.no_grad():
        model(x)


def train(model: nn.Module, x: Tensor) -> None:
    """Run a forward and a backward pass."""
    y = model(x)
    maps = y if isinstance(y, (tuple, list)) else (y,)
    sum(m.sum() if isinstance(m, Tensor) else m.tokens.sum() for m in maps).backward()
    model.zero_grad()


def peak_memory_of(
    group: str, name: str, model: nn.Module, step: Callable, x: Tensor, args: argparse.Namespace
) -> int:
    """Measure the bytes that a pass takes beyond model and images."""
    if not args.device.startswith("cuda"):
        return peak_memory(prepare, group, name, step, tuple(x.shape), args)
    run(model, step, x, args)  # what stays allocated after a first run is no peak
    torch.cuda.reset_peak_memory_stats(args.device)
    before = torch.cuda.memory_allocated(args.device)
    run(model, step, x, args)
    return torch.cuda.max_memory_allocated(args.device) - before


def prepare(
    group: str, name: str, step: Callable, shape: tuple[int, ...], args: argparse.Namespace
) -> Callable[[], None]:
    """Prepare a pass in a separate process and warm up with a small image."""
    about(args.device, args.default_malloc)
    torch.set_num_threads(args.threads)
    model = GROUPS[group]["models"][name]()
    model.train(step is train)
    x = torch.rand(shape)
    run(model, step, x[:, :, :64, :64].contiguous(), args)
    return partial(run, model, step, x, args)


def run(model: nn.Module, step: Callable, x: Tensor, args: argparse.Namespace) -> None:
    """Run one pass in the requested dtype."""
    with torch.autocast(x.device.type, getattr(torch, args.dtype), args.dtype != "float32"):
        step(model, x)


def main() -> None:
    """Run the tool."""
    args = parse_args()
    if args.device.startswith("cuda") and not torch.cuda.is_available():
        raise UserError("this machine has no CUDA GPU; drop --device")
    machine = about(args.device, args.default_malloc)
    print(", ".join(f"{name} {value}" for name, value in machine.items()), args.dtype)
    bandwidth = copy_bandwidth(args.device)
    print(f"a copy moves {bandwidth / 1e9:.1f} GB/s, read and written")
    steps = {"evaluation": evaluate} | ({} if args.no_training else {"training": train})
    records = []
    table = markdown_table(["model", "input", "pass", "best (ms)", "ratio", "peak memory (MB)"])
    for group in args.group:
        torch.manual_seed(0)
        models = {
            name: build().to(args.device)
            for name, build in GROUPS[group]["models"].items()
            if args.model is None or name in args.model
        }
        first = next(iter(models), None)
        for shape in args.shape or GROUPS[group]["shapes"]:
            x = torch.rand(shape[0], 3, *shape[1:], device=args.device)
            for name, step in steps.items():
                for model in models.values():
                    model.train(step is train)
                record = dict(group=group, shape=shape, step=name)
                record.update(measure(group, models, step, x, args))
                records.append(record)
                best = {k: min(v) for k, v in record["seconds"].items()}
                for which in models:
                    row = [which, "x".join(map(str, shape)), name, f"{best[which] * 1e3:.0f}"]
                    row += [f"{best[which] / best[first]:.2f}"]
                    peak = record["peak_bytes"][which]
                    row += ["not measured" if peak is None else f"{peak / 1e6:.0f}"]
                    table.add_row(row)
                    print(", ".join(f"{k} {v}" for k, v in zip(table.field_names, row)), flush=True)
    print(table)
    write_json(args.out, dict(machine, copy_bytes_per_second=bandwidth, records=records))


def measure(
    group: str, models: dict[str, nn.Module], step: Callable, x: Tensor, args: argparse.Namespace
) -> dict[str, dict]:
    """Measure times and peak memory of one pass of each model."""
    runnable = {k: torch.compile(m) if args.compile else m for k, m in models.items()}
    peaks = {
        name: None
        if args.no_memory or (args.compile and x.device.type == "cpu")
        else peak_memory_of(group, name, model, step, x, args)
        for name, model in runnable.items()
    }
    candidates = {name: partial(run, model, step, x, args) for name, model in runnable.items()}
    seconds = time_side_by_side(candidates, args.device, seconds=0.0, min_runs=args.runs)
    return dict(seconds=seconds, peak_bytes=peaks)


if __name__ == "__main__":
    run_tool(main)
