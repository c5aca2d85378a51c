"""What the scan's Triton kernels cost on a GPU, counted in their machine code. Nothing runs on a GPU; none is needed.

The operator's own launch code is run on tensors without memory, and every kernel that it launches is compiled, with
the constants, alignments and warps that it is launched with. Then for each call, all its launches added up:

instructions_per_element   Machine instructions executed, per token, walk and channel. Instructions are counted one by
                           one in the disassembly (NOP left out, predicated ones counted, both sides of short branches
                           too), each as often as the loops around it turn. How often that is, is found by executing
                           the kernel's PTX for some of the launch's programs, with memory that reads as zero. Times the
                           threads launched, idle ones included, over the elements. Loops that wait for another
                           program count as if one look were enough. PyTorch's own kernels, which add up partial
                           sums, are not in it.
registers, stack, shared   Of the kernel that takes most: registers of a thread, bytes of its stack, which is where
                           registers are spilled, bytes of shared memory of a program.
bytes_per_element          Read and written: of each launch, and of each operation of PyTorch in between, every tensor
                           that it reads or writes once. Beside it the least possible: inputs read and outputs
                           written once.
predicted_share_of_copy_bandwidth
                           How fast an H100 would be at best, as a share of the speed of a copy of the least bytes: the
                           smaller of what its instructions and what its bytes allow, at 1.0e12 warp instructions a
                           second, half of them reached, and 3.0e12 bytes a second. A ratio of counts, and no
                           measurement.

Shapes: stage 1 of GroupMamba-T at 800x1280 for state 1 (4 walks of 16 channels over 64,000 tokens), and PlainMamba-L1
at 1600x2560 for state 16 (4 walks of 384 channels over 16,000 tokens, which share all but B and order).

Example:
    python tools/benchmark/triton_cost.py --json work_dirs/benchmark/triton_cost.json
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
import triton
from offline import compile_launch, parameters
from ptx_emulator import Counts, Program, count, parse, pointer
from report import markdown
from scan_inputs import PLAIN, STAGE_1, bytes_of, designs, least_bytes, make_inputs
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from mmvssm.ops.selective_scan import triton_launch
from mmvssm.ops.selective_scan.inputs import ScanInputs
from mmvssm.ops.triton_launcher import Launch, recorded_launches

WARP_INSTRUCTIONS_PER_SECOND = 1.0e12 * 0.5
BYTES_PER_SECOND = 3.0e12

SAMPLES = 64
"""Programs of a launch that are executed to find out how often its loops turn."""

CAPABILITIES = (80, 90)
SHAPES = {1: STAGE_1, 16: PLAIN}
"""By the number of states."""
DTYPES = ("float32", "bfloat16")
BATCHES = (1, 16)
DIRECTIONS = ("forward", "backward")


# ----------------------------------------------------------------------------------------------- the calls


class Call(NamedTuple):
    """What one pass of the operator does."""

    launches: list[Launch]
    torch_bytes: int
    least_bytes: int


def record(inputs: ScanInputs) -> dict[str, Call]:
    """The forward and the backward pass."""
    with _recorded() as forward:
        y, states = triton_launch.forward(inputs)
    with _recorded() as backward:
        triton_launch.backward(torch.empty_like(y), inputs, states)
    least = least_bytes(inputs)
    return {
        direction: Call(launches, traffic.bytes, least[direction])
        for direction, (launches, traffic) in zip(DIRECTIONS, (forward, backward))
    }


@contextmanager
def _recorded() -> Iterator[tuple[list[Launch], _Traffic]]:
    with recorded_launches() as launches, _Traffic() as traffic:
        yield launches, traffic


class _Traffic(TorchDispatchMode):
    """Bytes that PyTorch's operations read and write."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if not func.is_view and "empty" not in func.__name__:
            made = result if isinstance(result, (tuple, list)) else [result]
            self.bytes += sum(bytes_of(x) for x in (*args, *made) if isinstance(x, Tensor))
        return result


# ----------------------------------------------------------------------------------------- machine code


class Kernel(NamedTuple):
    """One launch. ``instructions`` are those of all its threads."""

    name: str
    grid: tuple[int, ...]
    instructions: float
    registers: int
    stack: int
    shared: int
    bytes: int


def measure(launch: Launch, capability: int) -> Kernel:
    """Compile and count one launch."""
    compiled = compile_launch(launch, capability)
    program = parse(compiled.asm["ptx"])
    given = parameters(compiled, launch)
    tensors = {k: x for k, x in enumerate(given) if isinstance(x, Tensor)}
    arguments = [pointer(k) if k in tensors else x for k, x in enumerate(given)]
    counts = count(program, launch.grid, arguments, compiled.metadata.shared, SAMPLES)
    moved = sum(bytes_of(tensors[k - 1]) for kind in counts.accessed.values() for k in kind)

    usage, sass = disassemble(compiled.asm["cubin"])
    programs = 1
    for size in launch.grid:
        programs *= size
    registers, stack = map(int, re.search(r"REG:(\d+) STACK:(\d+)", usage).groups())
    return Kernel(
        launch.kernel.__name__,
        tuple(launch.grid),
        executed(sass, program, counts) * programs * program.threads,
        *(registers, stack, compiled.metadata.shared, moved),
    )


def disassemble(cubin: bytes) -> tuple[str, str]:
    """The resources that a kernel uses, and its instructions."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    if not tool.exists():
        sys.exit("error: this triton came without cuobjdump; install triton from PyPI.")
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.cubin"
        file.write_bytes(cubin)
        return tuple(
            subprocess.run([tool, what, file], capture_output=True, text=True, check=True).stdout
            for what in ("-res-usage", "-sass")
        )


def executed(sass: str, program: Program, counts: Counts) -> float:
    """Instructions that a thread executes, on average over the programs that were run."""
    rows = [
        (int(found[1], 16), found[2])
        for found in re.finditer(r"^\s+/\*([0-9a-f]{4,})\*/\s+(.*?);", sass, re.M)
    ]
    warps = counts.programs * program.threads // 32
    turns = _turns(rows, program, counts.executed / warps)
    total = 0.0
    for at, text in rows:
        # The innermost loop around an instruction says how often it is executed.
        inside = [loop for loop in turns if loop[0] <= at <= loop[1]]
        times = turns[min(inside, key=lambda loop: loop[1] - loop[0])] if inside else 1
        total += 0 if _operation(text) == "NOP" else times
    return total


def _turns(
    rows: list[tuple[int, str]], program: Program, executed: list[float]
) -> dict[tuple[int, int], float]:
    """How often each loop of the machine code turns, by its first and last address.

    Loops are those of the PTX, in the same order. Where the assembler unrolled one, it turns as much less often as it
    holds more accesses to memory and exchanges between threads than the PTX does.
    """
    loops = sorted(
        (int(target[1], 16), at)
        for at, text in rows
        if (target := re.search(r"\bBRA\b.*?0x([0-9a-f]+)", text)) and int(target[1], 16) < at
    )
    in_ptx = sorted(
        (program.labels[i.operands[0]], at)
        for at, i in enumerate(program.instructions)
        if i.name == "bra" and program.labels[i.operands[0]] <= at
    )
    if len(loops) != len(in_ptx):
        sys.exit(
            f"error: {program.name} has {len(in_ptx)} loops in PTX and {len(loops)} in machine code, so that the turns "
            "of the latter cannot be told."
        )
    turns = {}
    for loop, (first, last) in zip(loops, in_ptx):
        landmarks = sum(_is_landmark(i.text.split()) for i in program.instructions[first:last])
        found = sum(_is_landmark(text.split()) for at, text in rows if loop[0] <= at <= loop[1])
        unrolled = max(1, round(found / landmarks)) if landmarks else 1
        turns[loop] = executed[last] / unrolled
    return turns


def _is_landmark(words: list[str]) -> bool:
    """Whether an instruction, of PTX or machine code, is one that the assembler keeps as it is."""
    name = words[1] if words[0].startswith("@") else words[0]
    return name.startswith(
        ("ld.global", "st.global", "atom", "shfl", "bar.sync", "LDG", "STG", "ATOM", "SHFL", "BAR")
    )


def _operation(text: str) -> str:
    words = text.split()
    return (words[1] if words[0].startswith("@") else words[0]).split(".")[0]


# ------------------------------------------------------------------------------------------- the table


def add_up(call: Call, elements: int, d_state: int, capability: int) -> dict[str, object]:
    """What a call costs."""
    kernels = [measure(launch, capability) for launch in call.launches]
    instructions = sum(kernel.instructions for kernel in kernels)
    moved = sum(kernel.bytes for kernel in kernels) + call.torch_bytes
    seconds = max(instructions / 32 / WARP_INSTRUCTIONS_PER_SECOND, moved / BYTES_PER_SECOND)
    return dict(
        launches=len(kernels),
        instructions_per_element=round(instructions / elements, 2),
        instructions_per_element_and_state=round(instructions / elements / d_state, 2),
        registers=max(kernel.registers for kernel in kernels),
        stack=max(kernel.stack for kernel in kernels),
        shared=max(kernel.shared for kernel in kernels),
        bytes_per_element=round(moved / elements, 2),
        least_bytes_per_element=round(call.least_bytes / elements, 2),
        predicted_share_of_copy_bandwidth=round(call.least_bytes / BYTES_PER_SECOND / seconds, 3),
        kernels=[
            dict(
                name=kernel.name,
                grid=kernel.grid,
                instructions_per_element=round(kernel.instructions / elements, 2),
                registers=kernel.registers,
                stack=kernel.stack,
                shared=kernel.shared,
                bytes_per_element=round(kernel.bytes / elements, 2),
            )
            for kernel in kernels
        ],
    )


def rows_of(args: argparse.Namespace) -> Iterator[dict[str, object]]:
    """One for each call that was asked for."""
    for d_state in args.d_state:
        for dtype in args.dtype:
            for batch in args.batch:
                for design, chosen in designs(d_state).items():
                    inputs = make_inputs(SHAPES[d_state], batch, getattr(torch, dtype), "meta")
                    with chosen():
                        calls = record(inputs)
                    for direction, call in calls.items():
                        for capability in args.capability:
                            yield dict(
                                **dict(triton=triton.__version__, capability=capability),
                                **dict(d_state=d_state, dtype=dtype, direction=direction),
                                **dict(design=design, batch=batch, shape=list(inputs.u.shape)),
                                **add_up(call, inputs.u.numel(), d_state, capability),
                            )


def parse_args() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", metavar="FILE", help="where to write the figures, too")
    for name, values in (
        ("capability", CAPABILITIES),
        ("d-state", tuple(SHAPES)),
        ("dtype", DTYPES),
        ("batch", BATCHES),
    ):
        parser.add_argument(
            f"--{name}",
            nargs="+",
            type=type(values[0]),
            default=list(values),
            choices=list(values) if name != "batch" else None,
            help=f"only these (default: {' '.join(map(str, values))})",
        )
    return parser.parse_args()


COLUMNS = {
    "sm": "capability",
    "states": "d_state",
    "dtype": "dtype",
    "pass": "direction",
    "design": "design",
    "images": "batch",
    "launches": "launches",
    "instructions an element": "instructions_per_element",
    "and state": "instructions_per_element_and_state",
    "registers": "registers",
    "stack": "stack",
    "shared": "shared",
    "bytes": "bytes_per_element",
    "least": "least_bytes_per_element",
    "predicted share": "predicted_share_of_copy_bandwidth",
}


def main() -> None:
    """Run the tool."""
    args = parse_args()
    rows = []
    for row in rows_of(args):
        rows.append(row)
        print(".", end="", flush=True, file=sys.stderr)
    print(file=sys.stderr)
    print(f"Triton {triton.__version__}; counted in machine code, nothing ran on a GPU\n")
    print(markdown(list(COLUMNS), ([row[key] for key in COLUMNS.values()] for row in rows)))
    if args.json:
        target = Path(args.json)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
