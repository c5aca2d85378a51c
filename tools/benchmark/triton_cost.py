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
import itertools
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple, Optional

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
    """One launch. ``instructions`` are those of all its threads; ``accesses`` see :class:`Executed`."""

    name: str
    grid: tuple[int, ...]
    instructions: float
    registers: int
    stack: int
    shared: int
    bytes: int
    accesses: float


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
    instructions, accesses = executed(sass, program, counts)
    return Kernel(
        launch.kernel.__name__,
        tuple(launch.grid),
        instructions * programs * program.threads,
        *(registers, stack, compiled.metadata.shared, moved, accesses),
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


class Executed(NamedTuple):
    """What a thread executes, on average over the programs that were run.

    Attributes:
        instructions: Of the machine code.
        accesses: Of these, loads, stores and barriers, as a share of those in PTX. It is 1 where loops were told
            right, and neither were accesses saved nor are there any in branches that are not taken.
    """

    instructions: float
    accesses: float


def executed(sass: str, program: Program, counts: Counts) -> Executed:
    """Count a kernel's instructions."""
    rows = [
        (int(found[1], 16), found[2])
        for found in re.finditer(r"^\s+/\*([0-9a-f]{4,})\*/\s+(.*?);", sass, re.M)
    ]
    in_ptx = counts.executed / (counts.programs * program.threads // 32)
    turns = _turns(rows, program, in_ptx)
    instructions = accesses = 0.0
    for number, (_, text) in enumerate(rows):
        # The innermost loop around an instruction says how often it is executed.
        around = [(len(inside), times) for inside, times in turns if number in inside]
        times = min(around)[1] if around else 1
        instructions += times * (_operation(text) != "NOP")
        accesses += times * _is_access(text)
    expected = sum(times for times, i in zip(in_ptx, program.instructions) if _is_access(i.text))
    return Executed(float(instructions), float(accesses / max(expected, 1e-9)))


def _turns(
    rows: list[tuple[int, str]], program: Program, executed: Sequence[float]
) -> list[tuple[set[int], float]]:
    """The loops of the machine code, as the numbers of their instructions, and how often each turns.

    They are those of the PTX, in the same order. But the assembler may make several of one: a first that does several
    turns at once, and others that do the rest. How many turns a loop does at once is how many times as many accesses to
    memory and barriers it holds as the PTX. A loop that is missing was unrolled altogether.
    """
    branches = [
        Branch(
            program.labels[i.operands[0]] if i.name == "bra" else None,
            i.name not in ("bra", "ret") or i.guard is not None,
        )
        for i in program.instructions
    ]

    def accesses(loop: Loop, texts: Sequence[str]) -> int:
        return sum(_is_access(texts[k]) for k in loop.inside)

    in_ptx = [i.text for i in program.instructions]
    in_code = [text for _, text in rows]
    turns = []

    def match(originals: list[Loop], loops: list[Loop], share: float) -> None:
        """``share``: of the turns of the originals, how many are done in these loops."""
        outer, outer_originals = _outermost(loops), _outermost(originals)
        sizes = [accesses(loop, in_code) for loop in outer]
        groups = _groups([accesses(loop, in_ptx) for loop in outer_originals], sizes)
        for original, group in zip(outer_originals, groups):
            total = sum(executed[k] for k in original.ends) * share
            size, left = accesses(original, in_ptx), total
            for k in sorted(group, key=lambda k: -sizes[k]):
                at_once = max(1, round(sizes[k] / size)) if size else 1
                # The last one does whatever the others leave.
                times = left // at_once if at_once > 1 else left
                left -= times * at_once
                turns.append((outer[k].inside, times))
                done = times * at_once / total if total else 1.0
                match(_within(original, originals), _within(outer[k], loops), share * done)

    match(find_loops(branches), find_loops(_branches(rows)), 1.0)
    return turns


def _within(loop: Loop, loops: list[Loop]) -> list[Loop]:
    return [other for other in loops if other.inside < loop.inside]


def _outermost(loops: list[Loop]) -> list[Loop]:
    return [loop for loop in loops if not any(loop.inside < other.inside for other in loops)]


def _groups(originals: list[int], sizes: list[int]) -> list[range]:
    """Which of some loops in a row were made of each original, told by how much they hold."""
    if not originals:
        if sizes:
            raise CannotTell("there are more loops in the machine code than in PTX")
        return []

    def cost(original: int, group: range) -> float:
        """How badly they fit."""
        held = [sizes[k] / max(original, 1) for k in group]
        return 10 * (not held) + sum(abs(x - max(1, round(x))) for x in held) + 0.1 * len(held)

    ways = []
    for cuts in itertools.combinations_with_replacement(range(len(sizes) + 1), len(originals) - 1):
        edges = (0, *cuts, len(sizes))
        ways.append([range(first, last) for first, last in itertools.pairwise(edges)])
    return min(ways, key=lambda way: sum(map(cost, originals, way)))


class CannotTell(Exception):
    """How often a loop turns."""


class Branch(NamedTuple):
    """Where an instruction may jump to, and whether the next one may follow."""

    target: Optional[int]
    goes_on: bool


def _branches(rows: list[tuple[int, str]]) -> list[Branch]:
    """Of machine code."""
    numbers = {at: number for number, (at, _) in enumerate(rows)}
    meeting_points: dict[str, int] = {}
    branches = []
    for _, text in rows:
        operation, target = _operation(text), re.search(r"0x([0-9a-f]+)\s*$", text)
        # Calls are of subroutines, which return here, or jumps like any other.
        jumps = operation in ("BRA", "CALL") and target
        if operation == "BSSY":
            meeting_points[text.split()[1].rstrip(",")] = numbers[int(target[1], 16)]
        place = numbers[int(target[1], 16)] if jumps else None
        if operation == "BSYNC":
            place = meeting_points[text.split()[-1]]
        ends = operation in ("BRA", "EXIT", "RET") and not text.startswith("@")
        branches.append(Branch(place, not ends or "BRA.U" in text))
    return branches


class Loop(NamedTuple):
    """The instructions inside, and those from which it turns."""

    inside: set[int]
    ends: list[int]


def find_loops(branches: Sequence[Branch]) -> list[Loop]:
    """The loops of some code, in the order in which the text comes to them.

    A step closes a loop if it leads to where every way to it has passed (Aho, Sethi, Ullman: natural loops). Steps
    backwards in the text need not, since blocks are moved about.
    """
    count = len(branches)
    before: list[list[int]] = [[] for _ in range(count)]
    for number, branch in enumerate(branches):
        if branch.goes_on and number + 1 < count:
            before[number + 1].append(number)
        if branch.target is not None:
            before[branch.target].append(number)
    after: list[list[int]] = [[] for _ in range(count)]
    for number, earlier in enumerate(before):
        for k in earlier:
            after[k].append(number)
    reached, found = {0}, [0]
    while found:
        new = set(after[found.pop()]) - reached
        reached |= new
        found.extend(new)
    before = [[k for k in earlier if k in reached] for earlier in before]
    # Sets of what every way has passed, as the bits of integers.
    passed = [1, *[(1 << count) - 1] * (count - 1)]
    changed = True
    while changed:
        changed = False
        for number in range(1, count):
            common = (1 << count) - 1
            for earlier in before[number]:
                common &= passed[earlier]
            common |= 1 << number
            changed |= common != passed[number]
            passed[number] = common
    loops: dict[int, Loop] = {}
    for first in range(count):
        for last in before[first]:
            if not passed[last] >> first & 1:
                continue
            loop = loops.setdefault(first, Loop({first}, []))
            loop.ends.append(last)
            found = [last]
            while found:
                number = found.pop()
                if number not in loop.inside:
                    loop.inside.add(number)
                    found.extend(before[number])
    return [loops[first] for first in sorted(loops)]


def _is_access(text: str) -> bool:
    """Whether an instruction, of PTX or machine code, is an access to global memory or a barrier.

    Those the assembler keeps; of exchanges between threads, for one, it drops many.
    """
    name = next(word for word in text.split() if not word.startswith("@"))
    return name.startswith(("LDG", "STG", "ATOM", "RED.", "BAR", "atom", "red.", "bar.sync")) or (
        name.startswith(("ld.", "st.")) and ".global" in name
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
                accesses_beside_ptx=round(kernel.accesses, 3),
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
