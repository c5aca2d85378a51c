"""Execute a compiled kernel's PTX in NumPy, for machines without a GPU.

It runs the code that a GPU would run, with the compiler's layouts, shuffles, shared memory and predicates. It also
raises an :class:`EmulationError` for errors that a GPU does not report:

- accesses outside the tensors, or misaligned;
- races: accesses to the same place, one of them a write, by two programs, or by two warps of a program without a
  barrier in between, or different values written there by one instruction. Warps count as synchronous; atomic and
  volatile accesses may meet each other;
- barriers and shuffles that not all threads reach.

Programs run side by side as parts of the same arrays. Programs that wait for each other (:attr:`Program.waits`) run in
sequence, in numeric order. Threads that diverge at a branch take turns, those furthest behind first. Approximate
instructions such as ``ex2.approx`` are computed to full precision.

NVIDIA's "PTX ISA", version 9.0, describes the instructions.
"""

from __future__ import annotations

import functools
import itertools
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Optional

import numpy as np

WARP = 32
MAX_STEPS = 20_000_000
"""Runs with more steps count as hanging."""

_MAX_THREADS = 8192  # of the programs that run side by side

_TYPES = {
    **{f"{kind}{8 * size}": f"u{size}" for kind in "ub" for size in (1, 2, 4, 8)},
    **{f"s{8 * size}": f"i{size}" for size in (1, 2, 4, 8)},
    **{"f16": "f2", "f32": "f4", "f64": "f8", "bf16": "bf", "pred": "?"},
}
_ROUNDING = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}


class EmulationError(Exception):
    """A kernel did something that no GPU allows, or that makes its results depend on chance."""


# ----------------------------------------------------------------------------------------------- parsing


class Instruction(NamedTuple):
    """``ld.global.b32`` has the name ``ld`` and the words ``global`` and ``b32``."""

    name: str
    words: tuple[str, ...]
    operands: tuple[str, ...]
    guard: Optional[str]
    negated: bool
    text: str

    @property
    def types(self) -> list[str]:
        """The types that it names, as NumPy names them; ``bf`` is bfloat16, ``?`` a predicate."""
        return _types(self.words)

    @property
    def communicates(self) -> bool:
        """Whether it reads or writes what another program may be writing."""
        ordered = {"volatile", "relaxed", "acquire", "release"}
        return self.name in ("atom", "red") or (
            self.name in ("ld", "st") and not ordered.isdisjoint(self.words)
        )


@functools.cache
def _types(words: tuple[str, ...]) -> list[str]:
    return [_TYPES[word] for word in words if word in _TYPES]


@dataclass
class Program:
    """A kernel.

    Attributes:
        name: Its name.
        threads: Threads per program.
        parameters: Types of the parameters.
        instructions: Instructions in the order of the text.
        labels: Number of the instruction after each label.
        widths: Types of registers by the letters of their names.
    """

    name: str
    threads: int
    parameters: list[str]
    instructions: list[Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)
    widths: dict[str, str] = field(default_factory=dict)

    @property
    def waits(self) -> bool:
        """Whether its programs communicate with each other."""
        return any(i.communicates for i in self.instructions)

    @functools.cached_property
    def waiting_loops(self) -> list[tuple[int, int]]:
        """First and last instruction of single-block loops that communicate."""
        jumps = [k for k, i in enumerate(self.instructions) if i.name == "bra"]
        loops = [(self.labels[self.instructions[k].operands[0]], k) for k in jumps]
        return [
            (first, last)
            for first, last in loops
            if any(i.communicates for i in self.instructions[first:last])
            and not any(first <= k < last for k in jumps)
        ]

    @functools.cached_property
    def heard(self) -> set[str]:
        """Registers that depend on what other programs wrote."""
        found: set[str] = set()
        through_shared, size = False, -1
        while size != len(found):
            size = len(found)
            for i in self.instructions:
                names = [re.findall(r"%\w+", operand) for operand in i.operands]
                known = any(name in found for group in names[1:] for name in group)
                if i.name in ("st", "stmatrix"):
                    through_shared |= known and "shared" in i.words
                    continue
                heard = i.communicates or (through_shared and "shared" in i.words)
                if names and (known or heard):
                    found.update(names[0])
        return found


def parse(ptx: str) -> Program:
    """Read the text of one kernel."""
    ptx = re.sub(r"/\*.*?\*/", "", re.sub(r"//[^\n]*", "", ptx), flags=re.S)
    head = re.search(r"\.entry\s+(\w+)\s*\((.*?)\)\s*\.reqntid\s+(\d+)[^{]*\{", ptx, re.S)
    types = [_TYPES[kind] for kind in re.findall(r"\.param\s+\.(\w+)", head[2])]
    program = Program(head[1], int(head[3]), types)
    body = re.sub(r"^\s*\.(loc|pragma)\b[^\n]*", "", _body(ptx[head.end() :]), flags=re.M)
    for statement in body.split(";"):
        statement = statement.lstrip("{} \t\n")
        while label := re.match(r"(\$\w+):\s*", statement):
            program.labels[label[1]] = len(program.instructions)
            statement = statement[label.end() :].lstrip("{} \t\n")
        declared = re.match(r"\.reg\s+\.(\w+)\s+(%?[a-z]+)", statement)
        if declared:
            program.widths[declared[2]] = _TYPES[declared[1]]
        elif statement.strip() and not statement.startswith("."):
            program.instructions.append(_instruction(" ".join(statement.split())))
    return program


def _body(text: str) -> str:
    """Return the text up to the closing brace."""
    depth = 1
    for found in re.finditer(r"[{}]", text):
        depth += 1 if found[0] == "{" else -1
        if depth == 0:
            return text[: found.start()]
    raise ValueError("this PTX ends in the middle of a kernel")


def _instruction(text: str) -> Instruction:
    found = re.match(r"(?:@(!?)(%\w+)\s+)?([a-z][\w.:]*)\s*(.*)", text)
    name, *words = found[3].replace("::", ".").split(".")
    operands = re.findall(r"(?:\{[^}]*\}|\[[^\]]*\]|[^,{\[])+", found[4])
    operands = tuple(operand.strip() for operand in operands if operand.strip())
    return Instruction(name, tuple(words), operands, found[2], found[1] == "!", text)


# ------------------------------------------------------------------------------------------------ memory


class Memory:
    """A GPU's memory: tensors with unmapped space between them."""

    def __init__(self) -> None:
        self._pieces: list[tuple[int, np.ndarray, np.ndarray]] = []
        self._top = 4096
        self.data = np.zeros(0, np.uint8)
        self.valid = np.zeros(0, bool)

    def place(self, data: np.ndarray, valid: np.ndarray, offset: int = 0) -> int:
        """Add a storage.

        Args:
            data: Its bytes, uint8; a launch writes them at its end.
            valid: Bytes that may be read and written, bool.
            offset: Its address modulo 256.

        Returns:
            Its address.
        """
        address = -(-self._top // 256) * 256 + offset
        self._pieces.append((address, data, valid))
        self._top = address + len(data) + 4096
        return address

    def load(self) -> None:
        """Copy the storages in before a launch."""
        size = -(-self._top // 256) * 256
        self.data, self.valid = np.zeros(size, np.uint8), np.zeros(size, bool)
        for address, data, valid in self._pieces:
            self.data[address : address + len(data)] = data
            self.valid[address : address + len(data)] = valid

    def store(self) -> None:
        """Copy the storages back after a launch."""
        for address, data, valid in self._pieces:
            np.copyto(data, self.data[address : address + len(data)], where=valid)


class _Accesses:
    """The last reader and writer of each place, to find races."""

    _NOBODY, _WARPS, _PROGRAMS = -1, -2, -3  # the latter two: several

    def __init__(self, size: int, granule: int, warps: int) -> None:
        self.granule, self.warps = granule, warps
        self.writer, self.reader = np.full((2, size // granule + 1), self._NOBODY, np.int32)
        self.write_time, self.read_time = np.zeros((2, size // granule + 1), np.int32)

    def note(self, address, size: int, actor, time, what: Optional[str], writes: bool) -> None:
        """Raise an :class:`EmulationError` if accesses by warps ``actor`` at ``time``, in barriers, meet others."""
        for k in range(0, max(size, self.granule), self.granule):
            place = (address + k) // self.granule
            problem = self._clash(self.writer[place], self.write_time[place], actor, time)
            if writes:
                problem |= self._clash(self.reader[place], self.read_time[place], actor, time)
            if problem.any():
                kind = "writes" if writes else "reads"
                raise EmulationError(
                    f"{what}: a race, {int(problem.sum())} threads' {kind} meet earlier accesses by other warps"
                )
            if writes:
                self.writer[place], self.write_time[place] = actor, time
            else:
                self._note_read(place, actor, time)

    def _clash(self, earlier, earlier_time, actor, time):
        other = (earlier != self._NOBODY) & (earlier != actor)
        same_program = (earlier == self._WARPS) | (earlier // self.warps == actor // self.warps)
        return other & (~same_program | (earlier_time == time) | (earlier == self._PROGRAMS))

    def _note_read(self, place, actor, time) -> None:
        earlier, earlier_time = self.reader[place], self.read_time[place]
        several = earlier // self.warps != actor // self.warps
        several &= (earlier >= 0) | (earlier == self._PROGRAMS)
        now = np.where(
            several,
            self._PROGRAMS,
            np.where(
                (earlier == self._NOBODY) | (earlier_time < time) | (earlier == actor),
                actor,
                self._WARPS,
            ),
        )
        self.reader[place], self.read_time[place] = now, time
        # Of several threads that read the same place in one instruction, all but the last.
        lost = self.reader[place] != now
        if lost.any():
            again = self.reader[place]
            others = np.where(again // self.warps == actor // self.warps, self._WARPS, -3)
            self.reader[place[lost]] = others[lost]


# ------------------------------------------------------------------------------------------------- threads


@dataclass
class Counts:
    """Number of executions of each instruction, by warps, and number of programs.

    ``accessed``: bytes that all threads together loaded and stored, by number of the tensor.
    """

    executed: np.ndarray
    programs: int
    accessed: dict[str, Counter[int]] = field(
        default_factory=lambda: {"ld": Counter(), "st": Counter()}
    )


class _Threads:
    """All threads of some programs."""

    def __init__(
        self,
        program: Program,
        grid: tuple[int, int, int],
        numbers: Sequence[int],
        arguments: Sequence[object],
        shared_bytes: int,
        memory: Optional[Memory],
        accesses: Optional[_Accesses],
        counts: Counts,
    ) -> None:
        self.program, self.grid, self.arguments = program, grid, arguments
        self.memory, self.accesses, self.counts = memory, accesses, counts
        threads = program.threads
        self.count = threads * len(numbers)
        self.tid = np.tile(np.arange(threads, dtype=np.uint32), len(numbers))
        self.lane = self.tid.astype(np.int64) % WARP
        self.place = np.repeat(np.arange(len(numbers)), threads)  # of its program among these
        self.warp = np.repeat(np.array(numbers), threads) * (threads // WARP) + self.tid // WARP
        number = np.repeat(np.array(numbers, dtype=np.int64), threads)
        self.ctaid = (
            *(number % grid[0], number // grid[0] % grid[1]),
            number // (grid[0] * grid[1]),
        )
        self.registers: dict[str, np.ndarray] = {}
        self.time = np.zeros(self.count, np.int32)
        self.done = np.zeros(self.count, bool)
        stride = -(-max(shared_bytes, 16) // 16) * 16
        self.shared_bytes, self.shared_base = shared_bytes, self.place.astype(np.int64) * stride
        self.shared = np.zeros(stride * len(numbers), np.uint8)
        self.shared_accesses = _Accesses(len(self.shared), 1, threads // WARP)
        self.mask: Optional[np.ndarray] = None  # who executes; None for all

    # ---------------------------------------------------------------------------------- control flow

    @np.errstate(all="ignore")
    def run(self) -> None:
        """Execute the program to its end."""
        instructions = self.program.instructions
        pc, steps, here = 0, 0, np.ones(self.count, bool)
        waiting: dict[int, np.ndarray] = {}
        self._activate(here)
        while True:
            if pc in waiting or (waiting and pc > min(waiting)):
                waiting[pc] = here | waiting.get(pc, False)
                pc = min(waiting)
                here = waiting.pop(pc)
                self._activate(here)
            steps += 1
            if steps > MAX_STEPS:
                raise EmulationError(
                    f"{self.program.name} does not end: still at {instructions[pc].text}"
                )
            instruction = instructions[pc] if pc < len(instructions) else _RETURN
            if pc < len(instructions):
                self.counts.executed[pc] += self.warps
            if instruction.name not in ("bra", "ret"):
                self._execute(instruction)
                pc += 1
                continue
            leaving = here & self._guard(instruction)
            if instruction.name == "ret":
                self.done |= leaving
            else:
                target = self.program.labels[instruction.operands[0]]
                if self.memory is None:
                    leaving = self._without_waiting(instruction, pc, target, here, leaving)
                if leaving.any():
                    waiting[target] = leaving | waiting.get(target, False)
            staying = here & ~leaving
            if staying.any():
                waiting[pc + 1] = staying | waiting.get(pc + 1, False)
            if not waiting:
                return
            pc = min(waiting)
            here = waiting.pop(pc)
            self._activate(here)

    def _without_waiting(self, i: Instruction, pc: int, target: int, here, leaving):
        """Return the threads that jump if other programs have already published what this loop waits for."""
        if i.guard is None or i.guard not in self.program.heard:
            return leaving
        for first, last in self.program.waiting_loops:
            if first <= target <= last:  # it leads there
                return np.zeros_like(here)
            between = self.program.instructions[pc + 1 : first]
            if pc < first and all(k.name != "bra" for k in between):  # where else it would go
                return here
        return leaving

    def _activate(self, here: np.ndarray) -> None:
        self.mask = None if here.all() else here
        self.warps = int(here.reshape(-1, WARP).any(1).sum())

    def _guard(self, instruction: Instruction) -> np.ndarray:
        if instruction.guard is None:
            return np.ones(self.count, bool)
        holds = self.registers[instruction.guard]
        return ~holds if instruction.negated else holds

    def _mask(self, instruction: Instruction) -> Optional[np.ndarray]:
        """Return the threads that execute this instruction; None for all."""
        if instruction.guard is None:
            return self.mask
        guard = self._guard(instruction)
        return guard if self.mask is None else guard & self.mask

    def _execute(self, instruction: Instruction) -> None:
        handler = getattr(self, f"_do_{instruction.name}", None)
        mask = self._mask(instruction)
        if handler is not None:
            handler(instruction, mask)
        elif instruction.name in _PURE:
            self._compute(instruction, mask)
        elif instruction.name not in _WITHOUT_EFFECT:
            raise NotImplementedError(instruction.text)

    # ------------------------------------------------------------------------------------- registers

    def get(self, operand: str, dtype: str) -> np.ndarray:
        """Return the values of an operand, one per thread or one for all."""
        if operand in self.registers:
            value = self.registers[operand]
            if dtype == "?":
                return value
            if dtype == "bf":
                return (self._bits(value, "u2").astype("u4") << np.uint32(16)).view("f4")
            return self._bits(value, f"u{dtype[1]}").view(dtype)
        if dtype == "?":
            return np.array(int(operand) != 0)
        if operand.startswith("%"):
            return self._special(operand).astype(f"u{dtype[1]}").view(dtype)
        return _immediate(operand, dtype)

    @staticmethod
    def _bits(value: np.ndarray, dtype: str) -> np.ndarray:
        return value if value.dtype == dtype else value.astype(dtype)

    def _special(self, name: str) -> np.ndarray:
        base, _, axis = name[1:].partition(".")
        axis = "xyz".find(axis)
        if base == "tid":
            return self.tid if axis == 0 else np.zeros_like(self.tid)
        if base == "ntid":
            return np.array(self.program.threads if axis == 0 else 1)
        if base == "ctaid":
            return self.ctaid[axis]
        if base == "nctaid":
            return np.array(self.grid[axis])
        if base == "laneid":
            return self.lane
        raise EmulationError(f"{name} is read before it was written")

    def set(self, name: str, value: np.ndarray, mask: Optional[np.ndarray]) -> None:
        """Write a register; threads that do not execute keep their value."""
        if name == "_":
            return
        if value.dtype != bool:
            size = value.dtype.itemsize
            width = self.program.widths.get(_letters(name), f"u{size}")
            if int(width[1]) == size:
                value = value.view(width) if value.ndim else value[None].view(width)
            else:  # extended by its sign, or cut off
                value = value.astype(f"{value.dtype.kind}{width[1]}").view(f"u{width[1]}")
        if value.shape != (self.count,):
            value = np.broadcast_to(value, (self.count,))
        if mask is not None:
            old = self.registers.get(name)
            value = np.where(mask, value, np.zeros((), value.dtype) if old is None else old)
        self.registers[name] = value

    # ----------------------------------------------------------------------------------------- memory

    def _address(self, operand: str, dtype: str) -> np.ndarray:
        base, offset = _base_and_offset(operand)
        return self.get(base, dtype).astype(np.int64) + offset

    def _do_ld(self, i: Instruction, mask) -> None:
        if "param" in i.words:
            number = int(re.search(r"_param_(\d+)", i.operands[1])[1])
            dtype = self.program.parameters[number]
            value = np.array(self.arguments[number]).astype(dtype)
            loaded = self.get_parameter(value, i.types[-1])
            self.set(i.operands[0], loaded, mask)
            return
        dtype = i.types[-1]
        for k, name in enumerate(_registers(i.operands[0])):
            value = self._read(i, self._address_of(i, i.operands[1]), k, int(dtype[1]), mask)
            self.set(name, value.view(dtype), mask)

    @staticmethod
    def get_parameter(value: np.ndarray, dtype: str) -> np.ndarray:
        """Return a parameter as the type that the instruction loads."""
        return (
            value.reshape(1).view(dtype)
            if value.dtype.itemsize == int(dtype[1])
            else value.astype(dtype)
        )

    def _do_st(self, i: Instruction, mask) -> None:
        dtype = f"u{i.types[-1][1]}"
        for k, name in enumerate(_registers(i.operands[1])):
            value = np.broadcast_to(self.get(name, dtype), (self.count,))
            self._write(i, self._address_of(i, i.operands[0]), k, value, mask)

    def _address_of(self, i: Instruction, operand: str) -> np.ndarray:
        return self._address(operand, "u4" if "shared" in i.words else "u8")

    def _read(self, i: Instruction, address, k: int, size: int, mask) -> np.ndarray:
        """Read the ``k``-th value of ``size`` bytes from an address on."""
        value = np.zeros(self.count, f"u{size}")
        who = slice(None) if mask is None else mask
        at = np.broadcast_to(address, (self.count,))[who] + k * size
        if at.size:
            data = self._checked(i, at, size, who, writes=False)
            if data is not None:
                value[who] = data.view(value.dtype)[self._index(i, at, size, who)]
        return value

    def _write(self, i: Instruction, address, k: int, value: np.ndarray, mask) -> None:
        size = value.dtype.itemsize
        who = slice(None) if mask is None else mask
        at = np.broadcast_to(address, (self.count,))[who] + k * size
        if not at.size:
            return
        data = self._checked(i, at, size, who, writes=True)
        if data is not None:
            data, index = data.view(value.dtype), self._index(i, at, size, who)
            data[index] = value[who]
            differs = data[index] != value[who]
            # Within a warp one of them wins: copies of a sum may differ in the last bit, if only some threads fuse it
            # with a multiplication.
            warp = self.warp[who]
            if differs.any() and (self._last_writer(i, index * size) != warp)[differs].any():
                raise EmulationError(f"{i.text}: a race, warps write different values to one place")

    def _last_writer(self, i: Instruction, at: np.ndarray) -> np.ndarray:
        accesses = self.shared_accesses if "shared" in i.words else self.accesses
        return accesses.writer[at // accesses.granule]

    def _index(self, i: Instruction, at, size: int, who) -> np.ndarray:
        return (at + self.shared_base[who] if "shared" in i.words else at) // size

    def _checked(self, i: Instruction, at, size: int, who, writes: bool) -> Optional[np.ndarray]:
        """Check an instruction's access and return the memory that it accesses."""
        if (at % size).any():
            raise EmulationError(f"{i.text}: misaligned")
        if "shared" in i.words:
            outside = (at < 0) | (at + size > self.shared_bytes)
            if outside.any():
                raise EmulationError(f"{i.text}: outside of shared memory, at {at[outside][0]}")
            self.shared_accesses.note(
                at + self.shared_base[who], size, self.warp[who], self.time[who], i.text, writes
            )
            return self.shared
        self._note_parameter(at, size, writes)
        if self.memory is None:
            return None
        outside = (at < 0) | (at + size > len(self.memory.data))
        if not outside.any():
            outside = ~(self.memory.valid[at] & self.memory.valid[at + size - 1])
        if outside.any():
            raise EmulationError(
                f"{i.text}: {int(outside.sum())} threads are outside of all tensors"
            )
        if not i.communicates:
            self.accesses.note(at, size, self.warp[who], self.time[who], i.text, writes)
        return self.memory.data

    def _do_atom(self, i: Instruction, mask) -> None:
        operation = next(w for w in i.words if w in _ATOMIC or w in ("exch", "cas"))
        dtype, address = i.types[-1], self._address_of(i, i.operands[1])
        operands = [np.broadcast_to(self.get(x, dtype), (self.count,)) for x in i.operands[2:]]
        before = np.zeros(self.count, dtype)
        size = int(dtype[1])
        chosen = np.ones(self.count, bool) if mask is None else mask
        for thread in np.flatnonzero(chosen):
            who = slice(thread, thread + 1)
            at = address[who] if address.ndim else address[None]
            data = self._checked(i, at, size, who, writes=True)
            if data is None:
                continue
            index = self._index(i, at, size, who)[0]
            data = data.view(dtype)
            before[thread] = data[index]
            now = operands[0][thread]
            if operation == "cas":
                now = operands[1][thread] if before[thread] == now else before[thread]
            elif operation != "exch":
                now = _ATOMIC[operation](before[thread], now)
            data[index] = now
        if i.operands[0].startswith("%") and i.name == "atom":
            self.set(i.operands[0], before, mask)

    def _do_red(self, i: Instruction, mask) -> None:
        self._do_atom(i._replace(operands=("_", *i.operands)), mask)

    def _do_ldmatrix(self, i: Instruction, mask) -> None:
        self._everyone(i, mask)
        address = np.broadcast_to(self._address_of(i, i.operands[1]), (self.count,))
        for k, name in enumerate(_registers(i.operands[0])):
            low, high = (
                self._read(i, at, 0, 2, mask) for at in self._matrix_addresses(i, address, k)
            )
            self.set(name, low.astype("u4") | (high.astype("u4") << np.uint32(16)), mask)

    def _do_stmatrix(self, i: Instruction, mask) -> None:
        self._everyone(i, mask)
        address = np.broadcast_to(self._address_of(i, i.operands[0]), (self.count,))
        for k, name in enumerate(_registers(i.operands[1])):
            value = self.get(name, "u4")
            for half, at in enumerate(self._matrix_addresses(i, address, k)):
                self._write(i, at, 0, (value >> np.uint32(16 * half)).astype("u2"), mask)

    def _matrix_addresses(self, i: Instruction, address: np.ndarray, k: int) -> Iterator:
        """Yield addresses of a thread's two elements of the ``k``-th 8 by 8 matrix; lane ``8 k + row`` holds row's."""
        first = np.arange(self.count) - self.lane + 8 * k
        for half in range(2):
            if "trans" in i.words:
                yield address[first + 2 * (self.lane % 4) + half] + 2 * (self.lane // 4)
            else:
                yield address[first + self.lane // 4] + 4 * (self.lane % 4) + 2 * half

    def _do_cp(self, i: Instruction, mask) -> None:
        """Execute ``cp.async`` at once; we do not check the waits for it."""
        if "commit_group" in i.words or "wait_group" in i.words or "wait_all" in i.words:
            return
        if "async" not in i.words or "bulk" in i.words:
            raise NotImplementedError(i.text)
        size = int(i.operands[2], 0)
        source = self._address(i.operands[1], "u8")
        given = self.get(i.operands[3], "u4") if len(i.operands) > 3 else np.uint32(size)
        target = self._address(i.operands[0], "u4")
        load = i._replace(words=("global",))
        for k in range(size // 4):
            there = np.broadcast_to(given > 4 * k, (self.count,))
            there = there if mask is None else there & mask
            value = self._read(load, source, k, 4, there)
            self._write(i._replace(words=("shared",)), target, k, value, mask)

    # ---------------------------------------------------------------------- exchange between threads

    def _do_bar(self, i: Instruction, mask) -> None:
        if "warp" in i.words:
            return
        here = np.ones(self.count, bool) if mask is None else mask
        expected = (~self.done).reshape(-1, self.program.threads)
        arrived = here.reshape(expected.shape)
        if (arrived.any(1) & (arrived != expected).any(1)).any():
            raise EmulationError(f"{i.text}: not all threads of a program reach this barrier")
        self.time += here

    _do_barrier = _do_bar

    def _everyone(self, i: Instruction, mask) -> None:
        """Check that whole warps execute this."""
        if mask is not None:
            warps = mask.reshape(-1, WARP)
            if (warps.any(1) != warps.all(1)).any():
                raise EmulationError(f"{i.text}: not all threads of a warp reach this instruction")

    def _do_shfl(self, i: Instruction, mask) -> None:
        self._everyone(i, mask)
        mode = next(word for word in i.words if word in ("up", "down", "bfly", "idx"))
        value = np.broadcast_to(self.get(i.operands[1], "u4"), (self.count,))
        b, c = (self.get(operand, "u4").astype(np.int64) for operand in i.operands[2:4])
        fixed, clamp = (c >> 8) & 31, c & 31
        last = (self.lane & fixed) | (clamp & ~fixed)
        b = b & 31
        source = {
            "up": self.lane - b,
            "down": self.lane + b,
            "bfly": self.lane ^ b,
            "idx": (self.lane & fixed) | (b & ~fixed),
        }[mode]
        inside = source >= last if mode == "up" else source <= last
        source = np.where(inside, source, self.lane)
        names = i.operands[0].split("|")
        self.set(names[0], value[np.arange(self.count) - self.lane + source], mask)
        if len(names) > 1:
            self.set(names[1], np.broadcast_to(inside, (self.count,)), mask)

    def _do_redux(self, i: Instruction, mask) -> None:
        self._everyone(i, mask)
        operation = next(w for w in i.words if w in _ATOMIC)
        value = np.broadcast_to(self.get(i.operands[1], i.types[-1]), (self.count,))
        total = _ATOMIC[operation].reduce(value.reshape(-1, WARP), axis=1)
        self.set(i.operands[0], np.repeat(total.astype(value.dtype), WARP), mask)

    def _do_vote(self, i: Instruction, mask) -> None:
        holds = np.broadcast_to(self.get(i.operands[1].lstrip("!"), "?"), (self.count,))
        holds = ~holds if i.operands[1].startswith("!") else holds
        warps = (holds if mask is None else holds & mask).reshape(-1, WARP)
        if "ballot" in i.words:
            bits = (warps.astype(np.uint64) << np.arange(WARP, dtype=np.uint64)).sum(1)
            self.set(i.operands[0], np.repeat(bits.astype("u4"), WARP), mask)
            return
        everyone = warps if mask is None else warps | ~mask.reshape(-1, WARP)
        result = warps.any(1) if "any" in i.words else everyone.all(1)
        self.set(i.operands[0], np.repeat(result, WARP), mask)

    # ------------------------------------------------------------------------------------ arithmetic

    def _do_mov(self, i: Instruction, mask) -> None:
        target, source = i.operands
        dtype = i.types[-1]
        if target.startswith("{"):
            parts = _registers(target)
            bits = 8 * int(dtype[1]) // len(parts)
            value = self.get(source, f"u{dtype[1]}")
            for k, name in enumerate(parts):
                self.set(name, (value >> value.dtype.type(bits * k)).astype(f"u{bits // 8}"), mask)
        elif source.startswith("{"):
            parts = _registers(source)
            bits, wide = 8 * int(dtype[1]) // len(parts), np.dtype(f"u{dtype[1]}")
            values = [self.get(name, f"u{bits // 8}").astype(wide) for name in parts]
            joined = sum(v << wide.type(bits * k) for k, v in enumerate(values))
            self.set(target, joined.astype(wide), mask)
        else:
            self.set(target, self.get(source, dtype), mask)

    def _do_cvta(self, i: Instruction, mask) -> None:
        self.set(i.operands[0], self.get(i.operands[1], "u8"), mask)

    def _do_setp(self, i: Instruction, mask) -> None:
        x, y = (self.get(operand, i.types[-1]) for operand in i.operands[1:3])
        holds = _COMPARISONS[i.words[0]](x, y)
        # "ltu" is true where either is not a number, "lt" false; "lo" is for integers.
        if x.dtype.kind == "f" and i.words[0] not in ("nan", "num"):
            unordered = np.isnan(x) | np.isnan(y)
            holds = holds | unordered if i.words[0].endswith("u") else holds & ~unordered
        names = i.operands[0].split("|")
        results = (holds, ~holds)
        if len(i.operands) > 3:
            combine = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}[
                i.words[1]
            ]
            negated = i.operands[3].startswith("!")
            third = self.get(i.operands[3].lstrip("!"), "?") ^ negated
            results = tuple(combine(holds, third) for holds in results)
        for name, result in zip(names, results):
            self.set(name, result, mask)

    def _do_selp(self, i: Instruction, mask) -> None:
        x, y = (self.get(operand, i.types[-1]) for operand in i.operands[1:3])
        self.set(i.operands[0], np.where(self.get(i.operands[3], "?"), x, y), mask)

    def _do_cvt(self, i: Instruction, mask) -> None:
        if any(word.startswith(("bf16x2", "f16x2")) for word in i.words):
            kind = "bf" if "bf16x2" in i.words else "f2"
            high, low = (_narrow(self.get(x, "f4"), kind) for x in i.operands[1:3])
            high, low = (x.view("u2").astype("u4") for x in np.broadcast_arrays(high, low))
            self.set(i.operands[0], (high << np.uint32(16)) | low, mask)
            return
        target, source = i.types
        value = self.get(i.operands[1], source)
        for word in i.words:
            if word in _ROUNDING:
                value = _ROUNDING[word](value)
        if target[0] in "ui" and value.dtype.kind == "f":
            limits = np.iinfo(target)
            wide = np.nan_to_num(value.astype(np.longdouble), nan=0.0)
            value = np.clip(wide, limits.min, limits.max).astype(target)
        elif target in ("bf", "f2"):
            value = _narrow(value, target)
        else:
            if "sat" in i.words:
                value = np.clip(value, 0, 1)
            value = value.astype(target)
        self.set(i.operands[0], value, mask)

    def _compute(self, i: Instruction, mask) -> None:
        dtype = i.types[-1]
        function = _PURE[i.name]
        sources = i.operands[1:]
        if dtype == "?" or i.name in ("shl", "shr", "bfe", "bfi", "prmt"):
            values = [
                self.get(x, dtype if k == 0 or dtype == "?" else "u4")
                for k, x in enumerate(sources)
            ]
            if i.name == "bfi":
                values[1] = self.get(sources[1], dtype)
        else:
            wide = i.name == "mad" and "wide" in i.words
            values = [
                self.get(x, _widened(dtype) if wide and k == 2 else dtype)
                for k, x in enumerate(sources)
            ]
        if "ftz" in i.words:
            values = [_flush(value) for value in values]
        result = function(i, *values)
        if dtype == "bf":
            result = _narrow(result, "bf")
        self.set(i.operands[0], _flush(result) if "ftz" in i.words else result, mask)

    def _note_parameter(self, at: np.ndarray, size: int, writes: bool) -> None:
        """Record the tensor that is accessed, for counts of bytes."""
        if self.memory is None:
            numbers, times = np.unique((at >> _DRY_BITS) - 1, return_counts=True)
            accessed = dict(zip(numbers.tolist(), (times * size).tolist()))
            self.counts.accessed["st" if writes else "ld"].update(accessed)


_DRY_BITS = 44
"""Without memory, these and higher bits of an address hold the number of the parameter."""

_RETURN = Instruction("ret", (), (), None, False, "ret")
_WITHOUT_EFFECT = {"fence", "membar", "nanosleep", "griddepcontrol", "prefetch", "applypriority"}
_ATOMIC = {"add": np.add, "min": np.minimum, "max": np.maximum} | {
    name: getattr(np, f"bitwise_{name}") for name in ("and", "or", "xor")
}
_COMPARISONS: dict[str, Callable] = {
    **dict.fromkeys(("eq", "equ"), np.equal),
    **dict.fromkeys(("ne", "neu"), np.not_equal),
    **dict.fromkeys(("lt", "ltu", "lo"), np.less),
    **dict.fromkeys(("le", "leu", "ls"), np.less_equal),
    **dict.fromkeys(("gt", "gtu", "hi"), np.greater),
    **dict.fromkeys(("ge", "geu", "hs"), np.greater_equal),
    "nan": lambda x, y: np.isnan(x) | np.isnan(y),
    "num": lambda x, y: ~(np.isnan(x) | np.isnan(y)),
}


# What a text means is found once: a loop comes by the same instruction thousands of times.


@functools.cache
def _letters(register: str) -> str:
    return re.match(r"%?[a-z]+", register)[0]


@functools.cache
def _base_and_offset(operand: str) -> tuple[str, int]:
    """Of ``[%rd1+4]``."""
    found = re.match(r"\[\s*([%\w]+)\s*(?:([+-])\s*(-?\w+))?\s*\]", operand)
    base, sign, offset = found.groups()
    return base, int(offset or "0", 0) * (-1 if sign == "-" else 1)


@functools.cache
def _registers(operand: str) -> list[str]:
    return [name.strip() for name in operand.strip("{} ").split(",")]


@functools.cache
def _immediate(operand: str, dtype: str) -> np.ndarray:
    if operand == "global_smem":
        return np.zeros((), dtype)
    if operand.startswith(("0f", "0F")):
        value = np.array(int(operand[2:], 16), "u4")
        return value.view("f4").astype(dtype) if dtype == "f8" else value.view(dtype)
    if operand.startswith(("0d", "0D")):
        return np.array(int(operand[2:], 16), "u8").view(dtype)
    if not re.fullmatch(r"-?(0x[0-9a-fA-F]+|\d+)U?", operand):
        raise EmulationError(f"{operand} is read before it was written")
    size = 2 if dtype == "bf" else int(dtype[1])
    return np.array(int(operand.rstrip("U"), 0) & ((1 << 8 * size) - 1), f"u{size}").view(
        f"u{size}" if dtype == "bf" else dtype
    )


def _narrow(value: np.ndarray, kind: str) -> np.ndarray:
    """Round to half precision, ties to even."""
    if kind == "f2":
        return value.astype("f2")
    value = np.asarray(value, "f4")
    bits = value.view("u4") if value.ndim else value[None].view("u4")[0]
    bits = np.asarray(bits).astype(np.uint64)
    rounded = ((bits + 0x7FFF + ((bits >> np.uint64(16)) & np.uint64(1))) >> np.uint64(16)).astype(
        "u2"
    )
    return np.where(np.isnan(value), np.uint16(0x7FFF), rounded)


def _flush(value: np.ndarray) -> np.ndarray:
    """Flush denormal numbers to zeros of the same sign."""
    if value.dtype != np.float32:
        return value
    return np.where(
        np.abs(value) < np.finfo(np.float32).tiny, np.copysign(np.float32(0), value), value
    )


def _widened(dtype: str) -> str:
    return f"{dtype[0]}{2 * int(dtype[1])}"


def _multiply(i: Instruction, x, y):
    if "wide" in i.words:
        wide = _widened(x.dtype.str[1:])
        return x.astype(wide) * y.astype(wide)
    if "hi" in i.words:
        bits = 8 * x.dtype.itemsize
        if bits < 64:
            wide = _widened(x.dtype.str[1:])
            return ((x.astype(wide) * y.astype(wide)) >> np.array(bits, wide)).astype(x.dtype)
        product = x.astype(object) * y.astype(object)
        return (product >> 64 & (2**64 - 1)).astype("u8").view(x.dtype)
    return x * y


def _multiply_add(i: Instruction, x, y, z):
    if x.dtype.kind != "f":
        return _multiply(i, x, y) + z
    wide = {"f2": np.float64, "f4": np.float64, "f8": np.longdouble}[x.dtype.str[1:]]
    return (x.astype(wide) * y.astype(wide) + z.astype(wide)).astype(x.dtype)


def _divide(i: Instruction, x, y):
    if x.dtype.kind == "f":
        return x / y
    quotient = np.abs(x.astype(object)) // np.maximum(np.abs(y.astype(object)), 1)
    return (np.sign(x).astype(object) * np.sign(y).astype(object) * quotient).astype(x.dtype)


def _shift_left(i: Instruction, x, k):
    bits = 8 * x.dtype.itemsize
    return np.where(k < bits, x << np.minimum(k, bits - 1).astype(x.dtype), np.zeros((), x.dtype))


def _shift_right(i: Instruction, x, k):
    bits = 8 * x.dtype.itemsize
    shifted = x >> np.minimum(k, bits - 1).astype(x.dtype)
    return shifted if x.dtype.kind == "i" else np.where(k < bits, shifted, np.zeros((), x.dtype))


def _extract(i: Instruction, x, position, length):
    """Execute ``bfe`` for fields inside the register."""
    bits = np.array(8 * x.dtype.itemsize)
    left = (bits - position - length).astype(x.dtype)
    return (x << left) >> (bits - length).astype(x.dtype)


def _insert(i: Instruction, x, y, position, length):
    position, length = position.astype(x.dtype), length.astype(x.dtype)
    field_mask = ((np.ones((), x.dtype) << length) - np.ones((), x.dtype)) << position
    return (y & ~field_mask) | ((x << position) & field_mask)


def _permute(i: Instruction, x, y, selector):
    both = x.astype("u8") | (y.astype("u8") << np.uint64(32))
    result = np.zeros(np.broadcast(x, y, selector).shape, "u4")
    for k in range(4):
        choice = (selector >> np.uint32(4 * k)) & np.uint32(15)
        byte = (both >> ((choice & np.uint32(7)).astype("u8") * np.uint64(8))) & np.uint64(255)
        signs = np.where(byte & np.uint64(128), np.uint64(255), np.uint64(0))
        byte = np.where(choice & np.uint32(8), signs, byte).astype("u4")
        result |= byte << np.uint32(8 * k)
    return result


def _logic(i: Instruction, x, y, z, table):
    table = int(table)
    result = np.zeros(np.broadcast(x, y, z).shape, x.dtype)
    for bit, (a, b, c) in enumerate(itertools.product((False, True), repeat=3)):
        if table >> bit & 1:
            result |= (x if a else ~x) & (y if b else ~y) & (z if c else ~z)
    return result


def _by_exact(function: Callable) -> Callable:
    """Compute in double precision, then round."""
    return lambda i, x: function(x.astype("f8")).astype(x.dtype)


def _extreme(of_floats: Callable, of_integers: Callable, with_nan: Callable) -> Callable:
    def function(i, x, y):
        if "NaN" in i.words:
            return with_nan(x, y)
        return of_floats(x, y) if x.dtype.kind == "f" else of_integers(x, y)

    return function


_PURE: dict[str, Callable] = {
    "add": lambda i, x, y: x + y,
    "sub": lambda i, x, y: x - y,
    "mul": _multiply,
    "mad": _multiply_add,
    "fma": _multiply_add,
    "div": _divide,
    "rem": lambda i, x, y: (x - _divide(i, x, y) * y).astype(x.dtype),
    "neg": lambda i, x: -x,
    "abs": lambda i, x: np.abs(x),
    "min": _extreme(np.fmin, np.minimum, np.minimum),
    "max": _extreme(np.fmax, np.maximum, np.maximum),
    "and": lambda i, x, y: x & y,
    "or": lambda i, x, y: x | y,
    "xor": lambda i, x, y: x ^ y,
    "not": lambda i, x: ~x,
    "shl": _shift_left,
    "shr": _shift_right,
    "bfe": _extract,
    "bfi": _insert,
    "prmt": _permute,
    "lop3": _logic,
    "copysign": lambda i, x, y: np.copysign(y, x),
    "ex2": _by_exact(np.exp2),
    "lg2": _by_exact(np.log2),
    "sqrt": _by_exact(np.sqrt),
    "rsqrt": _by_exact(lambda x: 1 / np.sqrt(x)),
    "rcp": _by_exact(lambda x: 1 / x),
    "tanh": _by_exact(np.tanh),
}


# ------------------------------------------------------------------------------------------------- launches


def run(
    program: Program,
    grid: Sequence[int],
    arguments: Sequence[object],
    shared_bytes: int,
    memory: Memory,
) -> None:
    """Launch a kernel and wait for its end.

    Args:
        program: From :func:`parse`.
        grid: Programs along up to three axes.
        arguments: Values of its parameters, addresses for pointers.
        shared_bytes: Shared memory of a program.
        memory: Memory with the tensors; changed in place.

    Raises:
        EmulationError: See the top of this file.
        NotImplementedError: If an instruction is not supported.
    """
    memory.load()
    grid = (*grid, *(1,) * (3 - len(grid)))
    count = int(np.prod(grid))
    side_by_side = 1 if program.waits else max(1, _MAX_THREADS // program.threads)
    accesses = _Accesses(len(memory.data), 2, program.threads // WARP)
    counts = Counts(np.zeros(len(program.instructions), np.int64), count)
    for first in range(0, count, side_by_side):
        numbers = range(first, min(first + side_by_side, count))
        _Threads(*(program, grid, numbers, arguments, shared_bytes, memory, accesses, counts)).run()
    memory.store()


def count(
    program: Program,
    grid: Sequence[int],
    arguments: Sequence[object],
    shared_bytes: int,
    samples: int,
) -> Counts:
    """Count executions of instructions, if they do not depend on the content of memory.

    All memory reads as zero. Programs do not wait for each other.

    Args:
        program: From :func:`parse`.
        grid: Programs along up to three axes.
        arguments: Values of its parameters; pointers are ``pointer(number)``.
        shared_bytes: Shared memory of a program.
        samples: Number of programs to run, spread evenly over the grid.
    """
    grid = (*grid, *(1,) * (3 - len(grid)))
    total = int(np.prod(grid))
    numbers = np.unique(((np.arange(samples) + 0.5) * total / samples).astype(np.int64))
    counts = Counts(np.zeros(len(program.instructions), np.int64), len(numbers))
    _Threads(program, grid, numbers, arguments, shared_bytes, None, None, counts).run()
    return counts


def pointer(number: int) -> int:
    """Return the argument of :func:`count` for the tensor of this number."""
    return (number + 1) << _DRY_BITS
