"""Costs of the kernels that the operator launches, counted as they would be executed."""

import contextlib
import io
import json
import os
import re
import sys
from unittest import mock

import pytest
import torch

triton = pytest.importorskip("triton", minversion="3.6")
pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="triton interprets"
)

import ptx_emulator  # noqa: E402
import triton.language as tl  # noqa: E402
import triton_cost  # noqa: E402
from scan_inputs import PLAIN, STAGE_1, bytes_of, least_bytes, make_inputs  # noqa: E402
from triton_cost import Branch, Code, Loop  # noqa: E402

from mmvssm.ops.triton_launcher import Launch  # noqa: E402
from support.shared_folder import shared_folder  # noqa: E402

# ------------------------------------------------------------------------------------------------ loops

ON = Branch(None, True)


@pytest.mark.parametrize(
    "code, loops",
    [
        ([ON, ON, Branch(1, True), ON], [Loop({1, 2}, [2])]),
        # One in another.
        (
            [ON, ON, ON, Branch(2, True), Branch(1, True), ON],
            [Loop({1, 2, 3, 4}, [4]), Loop({2, 3}, [3])],
        ),
        # Tested at the end, where it is entered.
        ([Branch(3, False), ON, ON, Branch(1, True), ON], [Loop({1, 2, 3}, [2])]),
        # A block that was moved behind the end jumps back, and closes no loop.
        ([ON, Branch(4, True), ON, Branch(None, False), Branch(2, False)], []),
        # What is never reached.
        ([ON, Branch(None, False), ON, Branch(2, False)], []),
    ],
)
def test_loops_are_found(code, loops):
    assert Code([""] * len(code), code).loops == loops


SASS = """
        /*0000*/                   MOV R1, c[0x0][0x28] ;   /* 0x0a */
        /*0010*/               @P0 BRA 0x50 ;
        /*0020*/                   LDG.E R2, [R4.64] ;
        /*0030*/                   STG.E [R4.64], R2 ;
        /*0040*/              @!P1 BRA 0x20 ;
        /*0050*/                   EXIT ;
        /*0060*/                   BRA 0x60;
        /*0070*/                   NOP;
"""
PTX = """
.visible .entry f(.param .u32 f_param_0) .reqntid 32 {
    ld.param.b32 %r1, [f_param_0];
    mov.b64 %rd1, 4096;
$LOOP:
    ld.global.b32 %r2, [%rd1];
    st.global.b32 [%rd1], %r2;
    sub.s32 %r1, %r1, 1;
    setp.gt.s32 %p1, %r1, 0;
    @%p1 bra $LOOP;
    ret;
}"""


@pytest.mark.parametrize("turns", [1, 5, 1000])
def test_instructions_are_counted_as_often_as_their_loop_turns(turns):
    program = ptx_emulator.parse(PTX)
    counts = ptx_emulator.count(program, (40,), [turns], shared_bytes=0, samples=3)
    # Outside the loop four that are executed at most once, and one jump to itself.
    assert triton_cost.executed(SASS, program, counts).instructions == 4 + 3 * turns


def test_a_loop_that_the_assembler_unrolled_turns_less_often():
    unrolled = SASS.replace(
        "@!P1 BRA 0x20 ;",
        "LDG.E R2, [R4.64] ;\n /*0044*/ STG.E [R4.64], R2 ;\n /*0048*/ @!P1 BRA 0x20 ;",
    )
    program = ptx_emulator.parse(PTX)
    counts = ptx_emulator.count(program, (40,), [1000], shared_bytes=0, samples=3)
    assert triton_cost.executed(unrolled, program, counts).instructions == 4 + 5 * 500


def test_a_loop_with_another_for_the_rest():
    """Four turns at once, then what is left, one at a time."""
    accesses = "LDG.E R2, [R4.64] ;\n /*00{}{}*/ STG.E [R4.64], R2 ;\n"
    unrolled = "\n".join(f"/*00{k}0*/ {accesses.format(k, 8)}" for k in (2, 3, 4, 5))
    sass = f"""
    /*0000*/ MOV R1, R2 ;
    {unrolled}
    /*0060*/ @P0 BRA 0x20 ;
    /*0070*/ @!P1 EXIT ;
    /*0080*/ LDG.E R2, [R4.64] ;
    /*0090*/ STG.E [R4.64], R2 ;
    /*00a0*/ @P0 BRA 0x80 ;
    /*00b0*/ EXIT ;
    """
    program = ptx_emulator.parse(PTX)
    counts = ptx_emulator.count(program, (40,), [1003], shared_bytes=0, samples=3)
    assert triton_cost.executed(sass, program, counts) == (3 + 250 * 9 + 3 * 3, 1)


def test_a_block_inside_a_loop_runs_when_its_condition_holds():
    """Every fourth turn there are two more stores."""
    ptx = PTX.replace(
        "sub.s32",
        """and.b32 %r3, %r1, 3;
    setp.ne.s32 %p2, %r3, 0;
    @%p2 bra $SKIP;
    st.global.b32 [%rd1+4], %r2;
    st.global.b32 [%rd1+8], %r2;
$SKIP:
    sub.s32""",
    )
    sass = """
    /*0000*/ MOV R1, R2 ;
    /*0010*/ LDG.E R2, [R4.64] ;
    /*0020*/ STG.E [R4.64], R2 ;
    /*0030*/ @P0 BRA 0x60 ;
    /*0040*/ STG.E [R4.64+0x4], R2 ;
    /*0050*/ STG.E [R4.64+0x8], R2 ;
    /*0060*/ @P1 BRA 0x10 ;
    /*0070*/ EXIT ;
    """
    program = ptx_emulator.parse(ptx)
    counts = ptx_emulator.count(program, (1,), [1000], shared_bytes=0, samples=1)
    assert triton_cost.executed(sass, program, counts) == (2 + 4 * 1000 + 2 * 250, 1)


def test_a_loop_that_was_unrolled_altogether():
    program = ptx_emulator.parse(PTX)
    counts = ptx_emulator.count(program, (1,), [2], shared_bytes=0, samples=1)
    sass = "  /*0000*/ MOV R1, R2 ;\n  /*0010*/ EXIT ;"
    assert triton_cost.executed(sass, program, counts).instructions == 2


def test_loops_of_which_the_ptx_knows_nothing_are_an_error():
    program = ptx_emulator.parse(re.sub(r"@%p1 bra .LOOP;", "", PTX))
    counts = ptx_emulator.count(program, (1,), [1], shared_bytes=0, samples=1)
    with pytest.raises(triton_cost.CannotTell, match="more loops in the machine code"):
        triton_cost.executed(SASS, program, counts)


@triton.jit
def running_sum(x, y, unused, length, SIZE: tl.constexpr):
    lane = tl.arange(0, SIZE)
    total = tl.zeros((SIZE,), tl.float32)
    for step in range(length):
        total += tl.load(x + step * SIZE + lane)
        tl.store(y + step * SIZE + lane, total)


def test_a_kernel_s_cost_grows_with_its_loop():
    def cost(length, programs=1):
        x = torch.empty(length, 32, device="meta")
        arguments = dict(x=x, y=x, unused=x, length=length, SIZE=32)
        return triton_cost.measure(
            Launch(running_sum, (programs,), arguments, dict(num_warps=1)), 90
        )

    short, long, two = cost(100), cost(1000), cost(1000, programs=2)
    # Read once and written once, and what is not used not at all.
    assert short.bytes == 2 * 100 * 32 * 4
    # No byte comes twice, though two programs ask for each.
    assert two.bytes == 2 * 1000 * 32 * 4
    assert long.instructions > 9 * short.instructions
    assert two.instructions == 2 * long.instructions
    assert long.accesses == pytest.approx(1, abs=0.01)
    # An access each way, a sum and something to count with; less than that cannot be.
    assert 4 * 1000 * 32 <= long.instructions <= 16 * 1000 * 32


# ------------------------------------------------------------------------------------------------ bytes


@triton.jit
def copy_part(x, y, there, SIZE: tl.constexpr):
    lane = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    tl.store(y + lane, tl.load(x + lane), lane < there)


def test_of_what_a_launch_leaves_out_nothing_counts():
    x, y = (torch.empty(100, 32, device="meta") for _ in range(2))
    launch = Launch(copy_part, (60,), dict(x=x, y=y, there=40 * 32, SIZE=32), dict(num_warps=1))
    # Sixty programs read a row each; forty write one.
    assert triton_cost.measure(launch, 90).bytes == (60 + 40) * 32 * 4


def test_least_bytes():
    inputs = make_inputs(STAGE_1, 16, torch.float32, "meta")
    elements = inputs.u.numel()
    order = 4 * 4 * 64000
    parameters = 4 * (4 * 16) * 3
    least = least_bytes(inputs)
    # u, delta, y; B and C for 16 channels each; a state for 64 steps.
    each = 12 * elements + 2 * 4 * elements // 16 + 4 * elements // 64
    assert least["forward"] == each + order + parameters
    # The gradient of y in place of y, and those of what has one.
    assert least["backward"] == least["forward"] + 8 * elements + 8 * elements // 16 + parameters


@triton.jit
def look_back(flags, y, SIZE: tl.constexpr):
    """Wait for all earlier programs, one after the other."""
    program = tl.program_id(0)
    tl.atomic_xchg(flags + program, 1)
    for other in range(program):
        while tl.load(flags + other, volatile=True) == 0:
            pass
        tl.store(y + program * 1024 + other, program)


def test_waiting_counts_as_one_look_at_each_other_program():
    flags = torch.empty(64, dtype=torch.int32, device="meta")
    arguments = dict(flags=flags, y=torch.empty(64 * 1024, device="meta"), SIZE=1)
    kernel = triton_cost.measure(Launch(look_back, (64,), arguments, dict(num_warps=1)), 90)
    # Each of 64 programs waits for 31.5 others on average, with a look, another and a store.
    assert 3 * 31.5 < kernel.instructions / 64 / 32 < 40 * 31.5
    assert kernel.accesses == pytest.approx(1, abs=0.5)


def test_what_is_expanded_counts_once():
    assert bytes_of(torch.empty(3, 1, 5).expand(3, 7, 5)) == 60
    inputs = make_inputs(PLAIN, 1, torch.bfloat16, "meta")
    walks = inputs.for_each_walk()
    assert bytes_of(walks.u) == bytes_of(inputs.u) == 16000 * 384 * 2
    assert walks.u.shape == (1, 16000, 4, 384) and inputs.u.shape == (1, 16000, 1, 384)


def test_operations_of_pytorch_count(monkeypatch):
    x = torch.empty(100, 10, device="meta")
    with triton_cost._recorded() as (launches, traffic):
        x.new_empty(5)
        x.view(1000)
        x.sum(0)
        assert traffic.bytes == 4000 + 40
        x.new_zeros(5)  # reads nothing
        torch.zeros_like(x)
    assert traffic.bytes == 4000 + 40 + 20 + 4000
    assert launches == []


# ------------------------------------------------------------------------------------------- the operator


TARGETS = {(90, "float32"): (1, 16), (80, "bfloat16"): (16,)}
"""Numbers of states by capability and dtype.

A kernel's registers differ little between these: two pairs show what spills in any. Kernels for one state need few; the
emulated scans ask them for spills, too.
"""


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """What the tool finds at one image."""
    rows = []
    with shared_folder(tmp_path_factory, "cost") as folder:
        for (capability, dtype), states in TARGETS.items():
            file, output = folder / f"new/{dtype}.json", folder / f"{dtype}.txt"
            if not file.exists():
                options = ["--capability", str(capability), "--dtype", dtype, "--batch", "1"]
                options += ["--d-state", *map(str, states)]
                argv = ["triton_cost.py", *options, "--json", str(file)]
                printed = io.StringIO()
                with mock.patch.object(sys, "argv", argv), contextlib.redirect_stdout(printed):
                    triton_cost.main()
                output.write_text(printed.getvalue())
            found = json.loads(file.read_text())
            assert "nothing ran on a GPU" in output.read_text()
            assert output.read_text().count("\n| ") == len(found) + 2
            rows += found
    return rows


KEYS = {"triton", "capability", "d_state", "dtype", "direction", "design"}
KEYS |= {"instructions_per_element", "instructions_per_element_and_state", "registers", "stack"}
KEYS |= {"shared", "bytes_per_element", "least_bytes_per_element"}
KEYS |= {"predicted_share_of_copy_bandwidth"}


@pytest.mark.nightly
def test_the_table_is_complete(rows):
    for row in rows:
        assert row.keys() >= KEYS
        assert row["triton"] == triton.__version__
        assert row["instructions_per_element_and_state"] == pytest.approx(
            row["instructions_per_element"] / row["d_state"], abs=0.01
        )
        assert row["instructions_per_element"] == pytest.approx(
            sum(kernel["instructions_per_element"] for kernel in row["kernels"]), abs=0.05
        )
        for kernel in row["kernels"]:
            assert 0.9 < kernel["accesses_beside_ptx"] < 1.1, kernel
        assert row["bytes_per_element"] >= row["least_bytes_per_element"]
    found = [
        tuple(row[key] for key in ("capability", "d_state", "dtype", "direction", "design"))
        for row in rows
    ]
    assert len(found) == len(set(found)) == 5 + 2  # with one state, a design more
    assert {(capability, dtype) for capability, _, dtype, *_ in found} == set(TARGETS)


LIMITS = {
    # States, direction, design: instructions an element and state.
    (1, "forward", "default"): 90,
    (1, "backward", "default"): 140,
    (16, "forward", "default"): 18,
    (16, "backward", "default"): 50,
    (1, "forward", "single_pass"): 70,
}


def limited(rows):
    """In float32 on GPUs of compute capability 9.0, for which the limits were set."""
    return [row for row in rows if row["capability"] == 90 and row["dtype"] == "float32"]


@pytest.mark.nightly
def test_costs_stay_low(rows):
    assert all(row["stack"] == 0 for row in rows)
    for row in limited(rows):
        limit = LIMITS[row["d_state"], row["direction"], row["design"]]
        assert row["instructions_per_element_and_state"] <= limit, row


@pytest.mark.nightly
def test_predicted_share_of_copy_bandwidth(rows):
    shares = [
        row["predicted_share_of_copy_bandwidth"]
        for row in limited(rows)
        if (row["d_state"], row["direction"], row["design"]) == (1, "forward", "default")
    ]
    assert shares and min(shares) >= 0.6


def test_without_the_disassembler_it_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setattr(triton_cost.triton, "__file__", str(tmp_path / "__init__.py"))
    with pytest.raises(RuntimeError, match=r"without cuobjdump; install triton from PyPI\.$"):
        triton_cost.disassemble(b"")
    monkeypatch.setattr(triton_cost, "rows_of", lambda args: [triton_cost.disassemble(b"")])
    monkeypatch.setattr(sys, "argv", ["triton_cost.py"])
    with pytest.raises(SystemExit, match=r"^error: this triton came without cuobjdump; .*\.$"):
        triton_cost.main()
