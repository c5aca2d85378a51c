"""Compare the selective scan in onnxruntime with the operator in torch.

onnxruntime runs it as mmvssm's native operator, as the portable function that exported models carry, and as its own
LinearAttention, which releases from 1.25 have. Needs onnx, onnxruntime and the compiled CPU kernels. We time one only
after the threads of the one before have stopped spinning.

Examples:
    python tools/benchmark/onnxruntime_scan.py
    python tools/benchmark/onnxruntime_scan.py --threads 1 --shape 1 65536 4 16 1
"""

import argparse
import time
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec

import torch
from mmengine.utils import digit_version
from peer_scans import build_onnxruntime
from timing import about, markdown_table, time_side_by_side, write_json
from torch import Tensor

from mmvssm.errors import UserError, add_traceback_option, run_tool
from mmvssm.ops import onnxruntime_library, selective_scan

SHAPES = [(1, 4096, 4, 64, 1), (1, 4096, 1, 384, 16)]
"""Images, tokens, walks, channels, states."""


def parse_args() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--shape",
        type=int,
        nargs=5,
        action="append",
        metavar=("B", "L", "K", "D", "N"),
        help="repeatable",
    )
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of each")
    parser.add_argument("--seconds", type=float, default=0.5, help="for each candidate")
    parser.add_argument(
        "--default-malloc", action="store_true", help="do not keep freed memory, unlike our tools"
    )
    parser.add_argument("--out", default="work_dirs/benchmark/onnxruntime_scan.json")
    add_traceback_option(parser)
    args = parser.parse_args()
    for name in ("onnx", "onnxruntime"):
        if not find_spec(name):
            raise UserError(f"{name} is not installed; pip install onnx onnxruntime adds it")
    return args


def make_inputs(shape: tuple[int, ...]) -> dict[str, Tensor]:
    """Make random arguments of :func:`mmvssm.ops.selective_scan`."""
    batch, length, walks, channels, states = shape
    torch.manual_seed(0)
    rows = (batch, length, walks)
    return dict(
        u=torch.randn(*rows, channels),
        delta=torch.randn(*rows, channels),
        A=-torch.randn(walks, channels, states).exp(),
        B=torch.randn(*rows, states),
        C=torch.randn(*rows, states),
        D=torch.randn(walks, channels),
        delta_bias=torch.randn(walks, channels),
    )


def in_onnxruntime(
    inputs: dict[str, Tensor], threads: int, native: bool = True
) -> Callable[[], Tensor]:
    """Return the run of a session on a model of this one node, as our operator or as its portable function."""
    import onnxruntime
    from onnx import TensorProto, helper

    from mmvssm.export.scan_function import scan_function

    node = helper.make_node("SelectiveScan", list(inputs), ["y"], domain="mmvssm", delta_softplus=1)
    values = [helper.make_tensor_value_info(x, TensorProto.FLOAT, None) for x in (*inputs, "y")]
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid("mmvssm", 1)]
    graph = helper.make_graph([node], "scan", values[:-1], values[-1:])
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    if native:
        options.register_custom_ops_library(onnxruntime_library())
    else:
        one_state = inputs["A"].shape[-1] == 1
        function = scan_function(["D", "delta_bias"], one_state, delta_softplus=True, opset=18)
        model.functions.append(function)
        model.graph.node[0].overload = function.overload
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    feeds = {name: x.numpy() for name, x in inputs.items()}
    return lambda: torch.from_numpy(session.run(["y"], feeds)[0])


def as_linear_attention(inputs: dict[str, Tensor]) -> Callable[[], Tensor]:
    """Return the run of a model on onnxruntime's own operator, with the walks side by side."""
    by_walk = ("A", "D", "delta_bias")
    flat = {
        name: x.flatten(0, 1) if name in by_walk else x.flatten(2) for name, x in inputs.items()
    }
    run = build_onnxruntime(flat, walks=inputs["u"].shape[2])
    return lambda: run().view_as(inputs["u"])


@torch.no_grad()
def main() -> None:
    """Run the tool."""
    args = parse_args()
    torch.set_num_threads(args.threads)
    machine = about("cpu", args.default_malloc)
    import onnxruntime

    machine["onnxruntime"] = onnxruntime.__version__
    print(", ".join(f"{name} {value}" for name, value in machine.items()))
    table = markdown_table(
        ["B, L, K, D, N", "scan", "best (ms)", "of torch's time", "largest difference"]
    )
    records = []
    for shape in args.shape or SHAPES:
        inputs = make_inputs(tuple(shape))
        runs = {
            "torch": partial(selective_scan, **inputs),
            "native operator": in_onnxruntime(inputs, args.threads),
            "portable function": in_onnxruntime(inputs, args.threads, native=False),
        }
        if digit_version(onnxruntime.__version__) >= digit_version("1.25"):
            runs["LinearAttention"] = as_linear_attention(inputs)
        y = runs["torch"]()
        differences = {name: float((run() - y).abs().max()) for name, run in runs.items()}
        # Idle threads of each spin for a while and would slow down the other.
        times = time_side_by_side(runs, "cpu", args.seconds, setup=lambda: time.sleep(0.02))
        records.append(dict(shape=shape, seconds=times, differences=differences))
        for name, seconds in times.items():
            table.add_row(
                [
                    ", ".join(map(str, shape)),
                    name,
                    f"{min(seconds) * 1e3:.2f}",
                    f"{min(seconds) / min(times['torch']):.2f}",
                    f"{differences[name]:.1e}",
                ]
            )
    print(table)
    write_json(args.out, dict(machine, records=records))


if __name__ == "__main__":
    run_tool(main)
