"""Compare the selective scan as onnxruntime's native operator with the operator in torch.

Needs onnx, onnxruntime and the compiled CPU kernels. We time one only after the other's threads have stopped spinning.

Examples:
    python tools/benchmark/onnxruntime_scan.py
    python tools/benchmark/onnxruntime_scan.py --threads 1 --shape 1 65536 4 16 1
"""

import argparse
import time
from collections.abc import Callable
from importlib.util import find_spec

import torch
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


def in_onnxruntime(inputs: dict[str, Tensor], threads: int) -> Callable[[], Tensor]:
    """Return the run of a session on a model of this one node."""
    import onnxruntime
    from onnx import TensorProto, helper

    node = helper.make_node("SelectiveScan", list(inputs), ["y"], domain="mmvssm", delta_softplus=1)
    values = [helper.make_tensor_value_info(x, TensorProto.FLOAT, None) for x in (*inputs, "y")]
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid("mmvssm", 1)]
    graph = helper.make_graph([node], "scan", values[:-1], values[-1:])
    model = helper.make_model(graph, opset_imports=opsets, ir_version=8)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.register_custom_ops_library(onnxruntime_library())
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    feeds = {name: x.numpy() for name, x in inputs.items()}
    return lambda: torch.from_numpy(session.run(["y"], feeds)[0])


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
        ["B, L, K, D, N", "torch (ms)", "onnxruntime (ms)", "of torch's time", "largest difference"]
    )
    records = []
    for shape in args.shape or SHAPES:
        inputs = make_inputs(tuple(shape))
        runs = {
            "torch": lambda inputs=inputs: selective_scan(**inputs),
            "onnxruntime": in_onnxruntime(inputs, args.threads),
        }
        difference = float((runs["torch"]() - runs["onnxruntime"]()).abs().max())
        # Idle threads of each spin for a while and would slow down the other.
        times = time_side_by_side(runs, "cpu", args.seconds, setup=lambda: time.sleep(0.02))
        best = {name: min(seconds) for name, seconds in times.items()}
        records.append(dict(shape=shape, seconds=times, difference=difference))
        table.add_row(
            [
                ", ".join(map(str, shape)),
                *(f"{seconds * 1e3:.2f}" for seconds in best.values()),
                f"{best['onnxruntime'] / best['torch']:.2f}",
                f"{difference:.1e}",
            ]
        )
    print(table)
    write_json(args.out, dict(machine, records=records))


if __name__ == "__main__":
    run_tool(main)
