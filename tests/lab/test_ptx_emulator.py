"""The PTX emulator: it computes a GPU's results, and detects races and invalid accesses."""

import os

import numpy as np
import pytest
import torch

triton = pytest.importorskip("triton", minversion="3.6")
import ptx_emulator  # noqa: E402
import triton.language as tl  # noqa: E402
from emulated_gpu import emulated_gpu  # noqa: E402

from mmvssm.ops.triton_launcher import launch  # noqa: E402

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="triton interprets"
)


def run_ptx(body, count=1, threads=32, grid=(1,), shared=0, arguments=()):
    """Run instructions that leave 32-bit results in ``%r1`` to ``%r{count}``: ``(programs, threads, count)``."""
    stores = "\n".join(f"st.global.b32 [%rd9+{4 * k}], %r{k + 1};" for k in range(count))
    ptx = f"""
    .version 8.0
    .visible .entry f(.param .u64 f_param_0)
    .reqntid {threads}
    {{
    .reg .pred %p<9>; .reg .b16 %rs<9>; .reg .b32 %r<99>; .reg .b64 %rd<10>;
    {body}
    ld.param.b64 %rd8, [f_param_0];
    mov.u32 %r90, %tid.x; mov.u32 %r91, %ctaid.x;
    mad.lo.s32 %r92, %r91, {threads}, %r90;
    mul.lo.s32 %r93, %r92, {4 * count};
    cvt.s64.s32 %rd7, %r93;
    add.s64 %rd9, %rd8, %rd7;
    {stores}
    ret;
    }}"""
    out = np.zeros(4 * count * threads * grid[0], np.uint8)
    memory = ptx_emulator.Memory()
    address = memory.place(out, np.ones_like(out, bool))
    ptx_emulator.run(ptx_emulator.parse(ptx), grid, [address], shared, memory)
    return out.view(np.uint32).reshape(grid[0], threads, count)


FLOAT = {"one": "0f3F800000", "nan": "0f7FC00000", "tiny": "0f00000001", "minus": "0fBFC00000"}


@pytest.mark.parametrize(
    "instruction, expected",
    [
        # Comparisons are false for what is not a number, unless they end in u.
        (f"setp.ne.f32 %p1, {FLOAT['nan']}, {FLOAT['one']}; selp.b32 %r1, 1, 0, %p1;", 0),
        (f"setp.neu.f32 %p1, {FLOAT['nan']}, {FLOAT['one']}; selp.b32 %r1, 1, 0, %p1;", 1),
        (f"setp.geu.f32 %p1, {FLOAT['nan']}, {FLOAT['one']}; selp.b32 %r1, 1, 0, %p1;", 1),
        (f"setp.lt.f32 %p1, {FLOAT['minus']}, {FLOAT['one']}; selp.b32 %r1, 1, 0, %p1;", 1),
        ("setp.lt.u32 %p1, -1, 1; selp.b32 %r1, 1, 0, %p1;", 0),
        ("setp.lt.s32 %p1, -1, 1; selp.b32 %r1, 1, 0, %p1;", 1),
        # Shifts by more than there are bits, by as many, and of signed numbers.
        ("shl.b32 %r1, 1, 31;", 1 << 31),
        ("shl.b32 %r1, 1, 32;", 0),
        ("shr.u32 %r1, -1, 40;", 0),
        ("shr.s32 %r1, -8, 40;", 2**32 - 1),
        ("bfe.s32 %r1, 12, 2, 2;", 2**32 - 1),
        ("bfe.u32 %r1, 12, 2, 2;", 3),
        ("bfi.b32 %r1, 5, -1, 4, 4;", 0xFFFFFF5F),
        ("prmt.b32 %r1, 0x33221100, 0x77665544, 0x7410;", 0x77441100),
        ("lop3.b32 %r1, 12, 10, 6, 0x96;", 12 ^ 10 ^ 6),
        # Division towards zero, high halves, widening.
        ("div.s32 %r1, -7, 2;", 2**32 - 3),
        ("rem.s32 %r1, -7, 2;", 2**32 - 1),
        ("mul.hi.u32 %r1, -1, -1;", 2**32 - 2),
        ("mul.wide.s32 %rd1, -3, 5; cvt.u32.u64 %r1, %rd1;", 2**32 - 15),
        # Conversions.
        ("mov.b32 %r2, 0f4F800000; cvt.rzi.s32.f32 %r1, %r2;", 2**31 - 1),
        ("mov.b32 %r2, 0fBFC00000; cvt.rni.s32.f32 %r1, %r2;", 2**32 - 2),
        ("mov.b32 %r2, 0f3F808000; cvt.rn.bf16.f32 %rs1, %r2; cvt.u32.u16 %r1, %rs1;", 0x3F80),
        ("mov.b32 %r2, 0f3F818000; cvt.rn.bf16.f32 %rs1, %r2; cvt.u32.u16 %r1, %rs1;", 0x3F82),
        ("cvt.rn.f16x2.f32 %r1, 0f3F800000, 0f40000000;", 0x3C004000),
        ("mov.b32 %rs1, 0xFFFF; cvt.s32.s16 %r1, %rs1;", 2**32 - 1),
        # Numbers too small for their kind are zero where it says so.
        (f"add.ftz.f32 %r1, {FLOAT['tiny']}, 0f00000000;", 0),
        (f"add.f32 %r1, {FLOAT['tiny']}, 0f00000000;", 1),
        ("fma.rn.f32 %r1, 0f3F800001, 0f3F800001, 0fBF800002;", 0x28800000),
        (f"max.f32 %r1, {FLOAT['nan']}, {FLOAT['one']};", 0x3F800000),
        ("ex2.approx.ftz.f32 %r1, 0fC2FE0000;", 0),
        # Halves of a register, and one that a block declares for itself.
        ("mov.b64 %rd1, {1, 7}; { .reg .b32 t; mov.b64 {t, %r1}, %rd1; }", 7),
        ("mov.u32 %r1, %nctaid.x;", 2),
    ],
)
def test_instructions(instruction, expected):
    assert (run_ptx(instruction, grid=(2,)) == expected).all()


def test_threads_that_part_meet_again():
    """Odd ones double, those above 15 go around a loop as often as their number says."""
    body = """
    mov.u32 %r1, %tid.x;
    and.b32 %r2, %r1, 1;
    setp.eq.s32 %p1, %r2, 0;
    @%p1 bra $EVEN;
    add.s32 %r1, %r1, %r1;
$EVEN:
    mov.u32 %r3, %tid.x;
    setp.lt.s32 %p2, %r3, 16;
    @%p2 bra $END;
$LOOP:
    add.s32 %r1, %r1, 1;
    sub.s32 %r3, %r3, 1;
    setp.gt.s32 %p3, %r3, 0;
    @%p3 bra $LOOP;
$END:
    shfl.sync.idx.b32 %r2, %r1, 31, 31, -1;
    """
    result = run_ptx(body, count=2)[0]
    t = np.arange(32)
    expected = np.where(t % 2, 2 * t, t) + np.where(t < 16, 0, t)
    assert (result[:, 0] == expected).all()
    assert (result[:, 1] == expected[31]).all()


@pytest.mark.parametrize(
    "mode, clamp, expected",
    [
        ("up", 0, lambda t: np.maximum(t - 3, 0) * (t >= 3) + t * (t < 3)),
        ("down", 31, lambda t: np.where(t + 3 <= 31, t + 3, t)),
        ("bfly", 31, lambda t: t ^ 3),
        ("idx", 31, lambda t: np.full(32, 3)),
        ("idx", 0x181F, lambda t: t // 8 * 8 + 3),  # among eight
    ],
)
def test_shuffles(mode, clamp, expected):
    body = f"mov.u32 %r2, %tid.x; shfl.sync.{mode}.b32 %r1, %r2, 3, {clamp}, -1;"
    assert (run_ptx(body, threads=64)[0, :, 0] % 32 == np.tile(expected(np.arange(32)), 2)).all()


EXCHANGE = """
    mov.u32 %r3, %tid.x;
    shl.b32 %r4, %r3, 2;
    st.shared.b32 [%r4], %r3;
    {barrier}
    xor.b32 %r5, %r4, {partner};
    ld.shared.b32 %r1, [%r5];
"""


def test_exchange_through_shared_memory():
    body = EXCHANGE.format(barrier="bar.sync 0;", partner=128)
    assert (run_ptx(body, threads=64, shared=256)[0, :, 0] == (np.arange(64) ^ 32)).all()
    # Within a warp no barrier is needed.
    body = EXCHANGE.format(barrier="", partner=64)
    assert (run_ptx(body, threads=64, shared=256)[0, :, 0] == (np.arange(64) ^ 16)).all()


@pytest.mark.parametrize(
    "body, words",
    [
        (EXCHANGE.format(barrier="", partner=128), "a race, 64 threads' reads"),
        ("mov.u32 %r1, %tid.x; st.shared.b32 [0], %r1;", "different values to one place"),
        ("mov.b32 %r1, 1; ld.shared.b32 %r2, [256];", "outside of shared memory"),
        ("mov.b32 %r1, 1; ld.shared.b32 %r2, [2];", "misaligned"),
        ("mov.u32 %r1, %tid.x; setp.lt.s32 %p1, %r1, 32; @%p1 bra $A; bar.sync 0; $A:", "barrier"),
        (
            "mov.u32 %r1, %tid.x; setp.lt.s32 %p1, %r1, 9; @%p1 shfl.sync.idx.b32 %r1, %r1, 0, 31, -1;",
            "not all threads of a warp",
        ),
        ("mov.b32 %r1, %r77;", "%r77 is read before it was written"),
    ],
)
def test_what_is_wrong_is_noticed(body, words):
    with pytest.raises(ptx_emulator.EmulationError, match=words):
        run_ptx(body, threads=64, shared=256)


def test_a_loop_without_end_is_noticed(monkeypatch):
    monkeypatch.setattr(ptx_emulator, "MAX_STEPS", 1000)
    with pytest.raises(ptx_emulator.EmulationError, match="f does not end"):
        run_ptx("$A: mov.b32 %r1, 1; bra.uni $A;")


def test_an_unknown_instruction_is_named():
    with pytest.raises(NotImplementedError, match=r"wgmma\.fence"):
        run_ptx("wgmma.fence.sync.aligned; mov.b32 %r1, 1;")


# --------------------------------------------------------------------------------- compiled from Triton


@triton.jit
def shift(x, y, size, by, SIZE: tl.constexpr):
    i = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    tl.store(y + i, tl.load(x + i + by, i < size), i < size)


def launch_shift(x, y, by=0):
    with emulated_gpu(90):
        arguments = dict(x=x, y=y, size=x.numel(), by=by, SIZE=64)
        launch(shift, (3,), arguments, num_warps=2, device=x.device)


def test_tensors_are_read_and_written_in_place():
    wide = torch.arange(300.0)
    y = torch.zeros(300)
    launch_shift(wide[7:157], y[3:153])
    assert torch.equal(y[3:153], wide[7:157])
    assert y[:3].eq(0).all()
    assert y[153:].eq(0).all()


def test_memory_beside_a_tensor_is_out_of_bounds():
    """Though it belongs to the same storage."""
    wide = torch.arange(300.0)
    with pytest.raises(ptx_emulator.EmulationError, match="1 threads are outside of all tensors"):
        launch_shift(wide[7:157], torch.zeros(150), by=1)


def test_programs_that_meet_in_memory_are_noticed():
    x = torch.arange(150.0)
    with pytest.raises(ptx_emulator.EmulationError, match="a race"):
        launch_shift(x[:149], x[1:150])


@triton.jit
def chain(x, total, flags):
    """A running sum, each program waiting for the one before it."""
    program = tl.program_id(0)
    before = 0.0
    if program > 0:
        while tl.atomic_add(flags + program - 1, 0) == 0:
            pass
        before = tl.load(total + program - 1, volatile=True)
    tl.store(total + program, before + tl.load(x + program))
    tl.debug_barrier()
    tl.atomic_xchg(flags + program, 1)


def test_programs_may_wait_for_earlier_ones():
    x, total = torch.arange(9.0), torch.zeros(9)
    with emulated_gpu(90):
        arguments = dict(x=x, total=total, flags=torch.zeros(9, dtype=torch.int32))
        launch(chain, (9,), arguments, num_warps=1, device=x.device)
    assert torch.equal(total, x.cumsum(0))
