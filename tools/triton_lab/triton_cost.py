"""Count the cost of the scan's Triton kernels on a GPU from their machine code, without a GPU.

We run the operator's own launch code on tensors without memory and compile every kernel with the constants, alignments
and warps of its launch. The figures of a call are sums over its launches:

instructions_per_element   Machine instructions executed per token, walk and channel. We count the instructions of the
                           disassembly (without NOP, with predicated ones), each as often as the loop or conditional
                           block around it runs. We find that number by executing the kernel's PTX for some of the
                           launch's programs, with memory that reads as zero. The count is multiplied by the threads
                           launched, including idle ones, and divided by the elements. Programs that wait for others
                           look once. PyTorch's own kernels, which add up partial sums, are not included.
registers, stack, shared   Of the kernel with the most: registers per thread, bytes of its stack (spilled registers),
                           bytes of shared memory per program.
bytes_per_element          Bytes read and written by each launch and by PyTorch's operations in between: every tensor
                           once, or the bytes that the threads access if that is less. Beside it the least possible:
                           inputs read and outputs written once.
predicted_share_of_copy_bandwidth
                           Upper bound of an H100's speed, as a share of the speed of a copy of the least bytes: the
                           smaller of the bounds by instructions and by bytes, at 1.0e12 warp instructions a second,
                           half of them reached, and 3.0e12 bytes a second. It is a ratio of counts with two digits,
                           like these constants, and no measurement.

Shapes: stage 1 of GroupMamba-T at 800x1280 for state 1 (4 walks of 16 channels over 64,000 tokens), and PlainMamba-L1
at 1600x2560 for state 16 (4 walks of 384 channels over 16,000 tokens, which share all but B and order, and are summed).
With --walks cross, stages 1 and 3 of VMamba-T at 800x1280, the latter with 16 states, for walks that share u alone and
are summed. PyTorch sums outputs, and gradients of what walks share; the bytes count that.

Example:
    python tools/triton_lab/triton_cost.py --json work_dirs/benchmark/triton_cost.json
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
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
from scan_inputs import (
    PLAIN,
    STAGE_1,
    V_STAGE_1,
    V_STATES,
    bytes_of,
    designs,
    elements,
    least_bytes,
    make_inputs,
)
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from mmvssm.ops.selective_scan import triton_launch
from mmvssm.ops.selective_scan.inputs import ScanInputs
from mmvssm.ops.triton_launcher import Launch, recorded_launches

WARP_INSTRUCTIONS_PER_SECOND = 1.0e12 * 0.5
BYTES_PER_SECOND = 3.0e12

SAMPLES = 64
"""Programs of a launch that we execute to count iterations of its loops."""

CAPABILITIES = (80, 90)
SHAPES = {"own": {1: STAGE_1, 16: PLAIN}, "cross": {1: V_STAGE_1, 16: V_STATES}}
"""By the option --walks and the number of states."""
DTYPES = ("float32", "bfloat16")
BATCHES = (1, 16)
DIRECTIONS = ("forward", "backward")


# ----------------------------------------------------------------------------------------------- the calls


class Call(NamedTuple):
    """Launches and traffic of one pass of the operator."""

    launches: list[Launch]
    torch_bytes: int
    least_bytes: int


def record(inputs: ScanInputs) -> dict[str, Call]:
    """Record the forward and the backward pass."""
    with _recorded() as forward:
        y, states = triton_launch.forward(inputs)
    with _recorded() as backward:
        grad_y = inputs.grad_of_each_walk(torch.empty_like(y))
        triton_launch.backward(grad_y, inputs, states)
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
        name = func.__name__
        if not func.is_view and "empty" not in name:
            made = result if isinstance(result, (tuple, list)) else [result]
            # zeros_like and other such functions do not read their argument.
            read = () if name.startswith("new_") or "_like." in name else args
            self.bytes += sum(bytes_of(x) for x in (*read, *made) if isinstance(x, Tensor))
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
    programs = math.prod(launch.grid)
    # We assume perfect caches: no launch reads a byte twice, nor more than its threads request.
    moved = sum(
        min(bytes_of(tensors[number]), round(accessed * programs / counts.programs))
        for kind in counts.accessed.values()
        for number, accessed in kind.items()
    )

    sass = disassemble(compiled.asm["cubin"])
    registers, stack = resources(sass)
    instructions, accesses = executed(sass, program, counts)
    return Kernel(
        launch.kernel.__name__,
        tuple(launch.grid),
        instructions * programs * program.threads,
        *(registers, stack, compiled.metadata.shared, moved, accesses),
    )


class MissingTool(RuntimeError):
    """A tool for counting is missing; the message tells what to do."""


def disassemble(cubin: bytes) -> str:
    """The resources that a kernel uses, and its instructions.

    Raises:
        MissingTool: Without ``cuobjdump``.
    """
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    if not tool.exists():
        raise MissingTool("this triton came without cuobjdump; install triton from PyPI.")
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.cubin"
        file.write_bytes(cubin)
        command = [tool, "-res-usage", "-sass", file]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def resources(sass: str) -> tuple[int, int]:
    """Registers of a thread, and bytes of its stack, which is where registers are spilled."""
    return tuple(map(int, re.search(r"REG:(\d+) STACK:(\d+)", sass).groups()))


class Executed(NamedTuple):
    """Average counts per thread over the programs that were run.

    Attributes:
        instructions: Machine instructions.
        accesses: Loads, stores and barriers among them, as a share of those in PTX. It is 1 if loops were matched
            correctly, no access was optimised away, and branches that are not taken have none.
    """

    instructions: float
    accesses: float


def executed(sass: str, program: Program, counts: Counts) -> Executed:
    """Count a kernel's instructions."""
    rows = [
        (int(found[1], 16), found[2])
        for found in re.finditer(r"^\s+/\*([0-9a-f]{4,})\*/\s+(.*?);", sass, re.M)
    ]
    code = Code([text for _, text in rows], _branches(rows))
    ptx = Code(
        [i.text for i in program.instructions],
        [
            Branch(
                program.labels[i.operands[0]] if i.name == "bra" else None,
                i.name not in ("bra", "ret") or i.guard is not None,
            )
            for i in program.instructions
        ],
    )
    in_ptx = counts.executed / (counts.programs * program.threads // 32)
    parts = _parts(code, ptx, in_ptx)
    instructions = accesses = 0.0
    for number, text in enumerate(code.texts):
        # An instruction is executed as often as the innermost part around it.
        _, times = min((len(inside), times) for inside, times in parts if number in inside)
        instructions += times * (_operation(text) != "NOP")
        accesses += times * _is_access(text)
    expected = sum(times for times, text in zip(in_ptx, ptx.texts) if _is_access(text))
    return Executed(float(instructions), float(accesses / max(expected, 1e-9)))


def _parts(code: Code, ptx: Code, in_ptx: Sequence[float]) -> list[tuple[set[int], float]]:
    """Find loops and conditional blocks of machine code, as sets of instructions, and how often each runs.

    They are those of the PTX, in the same order. But the assembler may split a loop: a first one does several
    iterations at once, others do the rest. The number of iterations at once is the ratio of accesses to memory and
    barriers between machine code and PTX. A missing loop was fully unrolled. We match conditional blocks by their
    accesses; a block without a match counts as always executed.
    """
    parts = [(set(range(len(code.texts))), 1.0)]

    def match_loops(outer: Loop, original: Loop, share: float) -> None:
        """Match loops inside a loop that does ``share`` of the original's iterations."""
        loops, originals = code.loops_in(outer), ptx.loops_in(original)
        sizes = [code.accesses(loop) for loop in loops]
        groups = _groups([ptx.accesses(loop) for loop in originals], sizes)
        for inner_original, group in zip(originals, groups):
            total = sum(in_ptx[k] for k in inner_original.ends) * share
            size, left = ptx.accesses(inner_original), total
            for k in sorted(group, key=lambda k: -sizes[k]):
                at_once = max(1, round(sizes[k] / size)) if size else 1
                # The last one does the remaining iterations.
                times = left // at_once if at_once > 1 else left
                left -= times * at_once
                parts.append((loops[k].inside, times))
                done = share * (times * at_once / total if total else 1.0)
                match_loops(loops[k], inner_original, done)
                match_blocks(loops[k], inner_original, done, at_once)

    def match_blocks(loop: Loop, original: Loop, share: float, at_once: int) -> None:
        known = [
            (ptx.accesses_by_kind(block), in_ptx[block[0]] * share / at_once)
            for block in ptx.conditional_blocks(original)
        ] * at_once
        for block in code.conditional_blocks(loop):
            kinds = code.accesses_by_kind(block)
            # Stores are never optimised away; loads may be.
            which = 0 if kinds[0] else 1
            fits = [k for k in known if k[0][which] == kinds[which] > 0]
            if fits:
                known.remove(fits[0])
                parts.append((set(block), fits[0][1]))

    match_loops(code.whole, ptx.whole, 1.0)
    match_blocks(code.whole, ptx.whole, 1.0, 1)
    return parts


def _groups(originals: list[int], sizes: list[int]) -> list[range]:
    """Assign consecutive loops to the originals that they were split from, by their sizes."""
    if not originals:
        if sizes:
            raise CannotTell("there are more loops in the machine code than in PTX")
        return []

    def cost(original: int, group: range) -> float:
        """Return how badly they fit."""
        held = [sizes[k] / max(original, 1) for k in group]
        return 10 * (not held) + sum(abs(x - max(1, round(x))) for x in held) + 0.1 * len(held)

    ways = []
    for cuts in itertools.combinations_with_replacement(range(len(sizes) + 1), len(originals) - 1):
        edges = (0, *cuts, len(sizes))
        ways.append([range(first, last) for first, last in itertools.pairwise(edges)])
    return min(ways, key=lambda way: sum(map(cost, originals, way)))


class CannotTell(Exception):
    """The number of iterations of a loop is unknown."""


class Branch(NamedTuple):
    """Targets of an instruction's jump, and whether the next instruction may follow."""

    target: Optional[int]
    goes_on: bool


def _branches(rows: list[tuple[int, str]]) -> list[Branch]:
    """Find the jumps of machine code."""
    numbers = {at: number for number, (at, _) in enumerate(rows)}
    meeting_points: dict[str, int] = {}
    branches: list[Branch] = []
    for _, text in rows:
        operation, target = _operation(text), re.search(r"0x([0-9a-f]+)\s*$", text)
        # A call is of a subroutine, which returns here, or a normal jump.
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
    """The instructions inside, and those that jump back."""

    inside: set[int]
    ends: list[int]


class Code:
    """PTX or machine code.

    Args:
        texts: Texts of its instructions.
        branches: Jumps of its instructions.
    """

    def __init__(self, texts: Sequence[str], branches: Sequence[Branch]) -> None:
        self.texts, self.branches = texts, branches
        self.before = _before(branches)
        self.passed = _passed(self.before)
        self.loops = self._find_loops()
        last = [
            k
            for k, branch in enumerate(branches)
            if not branch.goes_on and branch.target is None and (k == 0 or self.before[k])
        ]
        self.whole = Loop(set(range(len(branches))), last)

    def _find_loops(self) -> list[Loop]:
        """Find loops, in the order of the text.

        A jump closes a loop if its target dominates it (Aho, Sethi, Ullman: natural loops). Jumps backwards in the text
        need not close a loop, since the assembler moves blocks.
        """
        loops: dict[int, Loop] = {}
        for first, earlier in enumerate(self.before):
            for last in earlier:
                if not self.has_passed(last, first):
                    continue
                loop = loops.setdefault(first, Loop({first}, []))
                loop.ends.append(last)
                found = [last]
                while found:
                    number = found.pop()
                    if number not in loop.inside:
                        loop.inside.add(number)
                        found.extend(self.before[number])
        return [loops[first] for first in sorted(loops)]

    def has_passed(self, number: int, other: int) -> bool:
        """Whether ``other`` dominates an instruction: every path to it passes ``other``."""
        return bool(self.passed[number] >> other & 1)

    def loops_in(self, outer: Loop) -> list[Loop]:
        """Return the outermost loops inside a loop, or inside the whole code."""
        inside = [x for x in self.loops if x.inside < outer.inside or outer is self.whole]
        return [x for x in inside if not any(x.inside < other.inside for other in inside)]

    def conditional_blocks(self, loop: Loop) -> list[list[int]]:
        """Return a loop's own blocks that not every path to its ends passes."""
        inner = set().union(*(x.inside for x in self.loops_in(loop)))
        blocks: list[list[int]] = []
        for number in sorted(loop.inside):
            if number in inner or (number and not self.before[number]):
                continue
            follows = (
                blocks and blocks[-1][-1] == number - 1 and self.before[number] == [number - 1]
            )
            if follows and self.branches[number - 1].target is None:
                blocks[-1].append(number)
            else:
                blocks.append([number])
        return [b for b in blocks if not all(self.has_passed(end, b[0]) for end in loop.ends)]

    def accesses(self, loop: Loop) -> int:
        """Count accesses in a loop."""
        return sum(_is_access(self.texts[k]) for k in loop.inside)

    def accesses_by_kind(self, block: Sequence[int]) -> tuple[int, int]:
        """Count accesses that are not loads, and loads."""
        found = [self.texts[k] for k in block if _is_access(self.texts[k])]
        loads = sum(bool(re.search(r"(^|\s)(LDG|ld\.)", text)) for text in found)
        return len(found) - loads, loads


def _before(branches: Sequence[Branch]) -> list[list[int]]:
    """List the predecessors of each reachable instruction."""
    count = len(branches)
    after: list[list[int]] = []
    for number, branch in enumerate(branches):
        after.append([number + 1] if branch.goes_on and number + 1 < count else [])
        if branch.target is not None:
            after[-1].append(branch.target)
    reached, found = {0}, [0]
    while found:
        new = set(after[found.pop()]) - reached
        reached |= new
        found.extend(new)
    before: list[list[int]] = [[] for _ in range(count)]
    for number in sorted(reached):
        for k in after[number]:
            before[k].append(number)
    return before


def _passed(before: list[list[int]]) -> list[int]:
    """Compute the dominators of each instruction, as bits of an integer."""
    everything = (1 << len(before)) - 1
    passed = [1, *[everything] * (len(before) - 1)]
    changed = True
    while changed:
        changed = False
        for number in range(1, len(before)):
            common = everything
            for earlier in before[number]:
                common &= passed[earlier]
            common |= 1 << number
            changed |= common != passed[number]
            passed[number] = common
    return passed


def _is_access(text: str) -> bool:
    """Whether an instruction, of PTX or machine code, is an access to global memory or a barrier.

    The assembler keeps these; it drops many others, such as exchanges between threads.
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
    """Add up the cost of a call."""
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
    """Yield one row for each requested call."""
    for d_state in args.d_state:
        for dtype in args.dtype:
            for batch in args.batch:
                for design, chosen in designs(d_state).items():
                    shape = SHAPES[args.walks][d_state]
                    inputs = make_inputs(shape, batch, getattr(torch, dtype), "meta")
                    with chosen():
                        calls = record(inputs)
                    if design != "default":  # the designs differ in the forward pass only
                        del calls["backward"]
                    for direction, call in calls.items():
                        for capability in args.capability:
                            yield dict(
                                **dict(triton=triton.__version__, capability=capability),
                                **dict(d_state=d_state, dtype=dtype, direction=direction),
                                **dict(design=design, batch=batch, shape=list(inputs.delta.shape)),
                                **add_up(call, elements(inputs), d_state, capability),
                            )


def parse_args() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", metavar="FILE", help="also write the figures to this file")
    parser.add_argument("--walks", default="own", choices=list(SHAPES), help="see above")
    for name, values in (
        ("capability", CAPABILITIES),
        ("d-state", tuple(SHAPES["own"])),
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
    try:
        for row in rows_of(args):
            rows.append(row)
            print(".", end="", flush=True, file=sys.stderr)
    except MissingTool as error:
        sys.exit(f"error: {error}")
    print(file=sys.stderr)
    print(f"Triton {triton.__version__}; counted in machine code, nothing ran on a GPU\n")
    print(markdown(list(COLUMNS), ([row[key] for key in COLUMNS.values()] for row in rows)))
    if args.json:
        target = Path(args.json)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
