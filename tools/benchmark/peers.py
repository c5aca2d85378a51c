"""Compare the selective scan on a CPU with other projects' selective scans, each in a process of its own.

They are mamba-ssm's reference in PyTorch, mambapy's parallel scan, the operators of Intel's extension for PyTorch,
onnxruntime and ggml, and our definition. We print how to install what is missing. All run in turn on the same inputs,
without skip connection and bias, which not all have. First we check outputs and gradients against our scan in float64.
A copy of the same bytes reads each input once and writes each output once. Tables show medians.

Examples:
    python tools/benchmark/peers.py
    python tools/benchmark/peers.py --python ipex=/path/to/environment/bin/python     # that runs the peer there
    python tools/benchmark/peers.py --peer mambapy --shape 1 16384 64 1
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Optional

import torch
from peer_scans import PASSES, PEERS, Scan, passes, timed, with_one_walk
from timing import about, alternate, markdown_table, write_json
from torch import Tensor

from mmvssm.errors import UserError, add_traceback_option, run_tool
from mmvssm.ops import selective_scan

SHAPES = [(2, 4096, 348, 1), (1, 4096, 384, 16)]
"""Images, tokens, channels, states."""

TOLERANCE = 1e-4
"""Largest difference to our scan in float64 that counts as the same result, of the tensor's largest value."""

OURS, COPY = "mmvssm", "copy of the same bytes"


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
    parser.add_argument(
        "--peer", choices=PEERS, action="append", help="repeatable (default: all that are there)"
    )
    parser.add_argument(
        "--python",
        action="append",
        default=[],
        metavar="PEER=PATH",
        help="the interpreter that has a peer; repeatable (default: this one)",
    )
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of each")
    parser.add_argument(
        "--seconds", type=float, default=1.0, help="for each candidate, or 100 runs"
    )
    parser.add_argument(
        "--default-malloc", action="store_true", help="do not keep freed memory, unlike our tools"
    )
    parser.add_argument("--out", default="work_dirs/benchmark/peers.json")
    add_traceback_option(parser)
    args = parser.parse_args()
    args.python = dict(entry.partition("=")[::2] for entry in args.python)
    for peer, python in args.python.items():
        if peer not in PEERS:
            raise UserError(f"--python has no peer {peer!r}; choose from {', '.join(PEERS)}")
        if not Path(python).is_file():
            raise UserError(f"--python {peer}: there is no interpreter {python!r}")
    return args


def make_inputs(shape: tuple[int, ...]) -> dict[str, Tensor]:
    """Make random ``u`` and ``delta (B, L, D)``, ``A (D, N)``, ``B`` and ``C (B, L, N)``."""
    batch, length, channels, states = shape
    torch.manual_seed(0)
    return dict(
        u=torch.randn(batch, length, channels),
        delta=torch.randn(batch, length, channels),
        A=-torch.randn(channels, states).exp(),
        B=torch.randn(batch, length, states),
        C=torch.randn(batch, length, states),
    )


def build_ours(inputs: dict[str, Tensor]) -> Callable[[], Tensor]:
    """Prepare our scan."""
    given = with_one_walk(inputs)
    return lambda: selective_scan(**given)[:, :, 0]


class Worker:
    """A peer in a process of its own.

    Args:
        peer: Its name.
        python: The interpreter.
        folder: Where the inputs are, and the results will be.
        args: The command line.
        kept: Whether the process keeps freed memory, as this one does.
    """

    def __init__(
        self, peer: str, python: str, folder: str, args: argparse.Namespace, kept: bool
    ) -> None:
        self.peer = peer
        names = ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_") if kept else ()
        variables = dict.fromkeys(names, str(2**31 - 1))
        variables["OMP_NUM_THREADS"] = str(args.threads)
        script = Path(__file__).with_name("peer_scans.py")
        self.log = Path(folder, f"{peer}.log")
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [python, str(script), peer, folder, str(args.threads)],
                env=os.environ | variables,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )
        self._reply()
        self.results = torch.load(Path(folder, f"{peer}.pt"), weights_only=True)

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, *_: object) -> None:
        self.process.stdin.close()
        self.process.stdout.close()
        self.process.wait()

    def run(self, step: str) -> float:
        """Run a pass; return its seconds."""
        print(step, file=self.process.stdin, flush=True)
        return float(self._reply())

    def _reply(self) -> str:
        line = self.process.stdout.readline()
        if not line:
            code = self.process.wait()
            lines = self.log.read_text().strip().splitlines() or [f"exit code {code}"]
            raise UserError(f"{self.peer}: {lines[-1]}")
        return line


def bytes_moved(inputs: dict[str, Tensor], step: str) -> int:
    """Return the bytes that a pass must at least read and write: inputs, outputs and gradients, each once."""
    given, y = sum(x.nbytes for x in inputs.values()), inputs["u"].nbytes
    # The backward pass reads the inputs again and the gradient of y, and writes the gradients.
    return given + y + (2 * given + y) * (step != PASSES[0])


def copying(moved: int) -> Callable[[], Tensor]:
    """Return a copy that reads and writes so many bytes, one half each."""
    source = torch.ones(moved // 8)
    target = torch.empty_like(source)
    return lambda: target.copy_(source)


def check(peer: str, results: dict[str, list[Tensor]], expected: dict[str, list[Tensor]]) -> float:
    """Return the largest difference of a peer's results to the expected ones, of each tensor's largest value.

    Raises:
        UserError: If one exceeds the tolerance.
    """
    differences = [
        float((x.double() - y).abs().max() / y.abs().max())
        for step, found in results.items()
        for x, y in zip(found, expected[step])
    ]
    largest = float(torch.tensor(differences).max())  # NaN if one is
    if not largest <= TOLERANCE:
        raise UserError(
            f"{peer} computes something else: its results differ by {largest:.1e} of the largest value"
        )
    return largest


def compare(shape: tuple[int, ...], peers: list[str], args: argparse.Namespace, kept: bool) -> dict:
    """Check and time our scan, the peers and a copy on one shape.

    Returns:
        Seconds of each run by pass and candidate, and the largest differences to our scan in float64.
    """
    inputs = make_inputs(shape)
    grad_y = torch.randn(inputs["u"].shape)
    scan = Scan(build_ours, "mmvssm", differentiable=True)
    exact = passes(scan, {name: x.double() for name, x in inputs.items()}, grad_y.double())
    expected = {step: run() for step, run in exact.items()}
    ours = passes(scan, inputs, grad_y)
    differences = {OURS: check(OURS, {step: run() for step, run in ours.items()}, expected)}
    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        given = {name: x.detach() for name, x in inputs.items()}
        torch.save(dict(inputs=given, grad_y=grad_y), Path(folder, "inputs.pt"))
        workers = {}
        for peer in peers:
            python = args.python.get(peer, sys.executable)
            try:
                workers[peer] = stack.enter_context(Worker(peer, python, folder, args, kept))
            except UserError as error:
                print(f"without {error}", flush=True)
                continue
            differences[peer] = check(peer, workers[peer].results, expected)
        seconds = {}
        for step in PASSES:
            runs = {OURS: timed(ours[step])}
            for peer, worker in workers.items():
                if step in worker.results:
                    runs[peer] = partial(worker.run, step)
            runs[COPY] = timed(copying(bytes_moved(inputs, step)))
            rested = {name: partial(after_rest, run) for name, run in runs.items()}
            seconds[step] = alternate(rested, args.seconds, min_runs=3, max_runs=100)
    return dict(shape=shape, seconds=seconds, differences=differences)


def after_rest(run: Callable[[], float]) -> float:
    """Run after a rest, since idle threads of the process before spin for a while and would slow down this one."""
    time.sleep(0.02)
    return run()


def missing(peer: str, args: argparse.Namespace) -> Optional[str]:
    """Return how to get a peer that this interpreter lacks, or None."""
    if peer in args.python or find_spec(PEERS[peer].needs):
        return None
    return f"{peer} is missing; {PEERS[peer].install} adds it"


def main() -> None:
    """Run the tool."""
    args = parse_args()
    torch.set_num_threads(args.threads)
    machine = about("cpu", args.default_malloc)
    print(", ".join(f"{name} {value}" for name, value in machine.items()))
    peers = []
    for peer in args.peer or PEERS:
        line = missing(peer, args)
        print(line) if line else peers.append(peer)
    table = markdown_table(
        [
            "B, L, D, N",
            "pass",
            "candidate",
            "median (ms)",
            "ours is faster by",
            "of the copy's speed",
        ]
    )
    records = []
    for shape in args.shape or SHAPES:
        records.append(compare(tuple(shape), peers, args, machine["keeps_freed_memory"]))
        largest = {name: f"{x:.0e}" for name, x in records[-1]["differences"].items()}
        print(f"{tuple(shape)}: same results; largest differences {largest}", flush=True)
        for step, runs in records[-1]["seconds"].items():
            median = {name: statistics.median(times) for name, times in runs.items()}
            for name, seconds in median.items():
                table.add_row(
                    [
                        ", ".join(map(str, shape)),
                        step,
                        name,
                        f"{seconds * 1e3:.2f}",
                        f"{seconds / median[OURS]:.2f}",
                        f"{median[COPY] / seconds:.1%}",
                    ]
                )
    print(table)
    write_json(args.out, dict(machine, tolerance=TOLERANCE, records=records))


if __name__ == "__main__":
    run_tool(main)
