import ctypes
import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from mmvssm.ops import backend, conv_act
from mmvssm.ops.conv_act import conv_act_gradients, cpu, formula

PADDINGS = list(itertools.product((0, 1), repeat=2))
needs_kernel = pytest.mark.skipif(not cpu.available(), reason="no compiled kernel")


def example(shape=(2, 7, 9, 20), padding=(1, 1), with_bias=True, dtype=torch.float32):
    """Leaves, and a gradient of the result."""
    torch.manual_seed(0)
    batch, height, width, channels = shape
    x = torch.randn(batch, height + 2 - sum(padding), width, channels).to(dtype).requires_grad_()
    weight = torch.randn(channels, 1, 3, 3, requires_grad=True)
    bias = torch.randn(channels, requires_grad=True) if with_bias else None
    return [x, weight, bias], torch.randn(shape).to(dtype)


def results(leaves, grad_y, *arguments, function=conv_act):
    """The result and all gradients."""
    y = function(*leaves, *arguments)
    leaves = [leaf for leaf in leaves if leaf is not None]
    return [y.detach(), *torch.autograd.grad(y, leaves, grad_y.to(y.dtype))]


def assert_as_the_formula(leaves, grad_y, *arguments, tolerance=2e-6, terms=0.0):
    """Compare with float64; ``terms`` is the size of terms that may cancel, where a result is a single number."""
    wide = [None if t is None else t.detach().double().requires_grad_() for t in leaves]
    expected = results(wide, grad_y, *arguments, function=formula)
    for actual, wanted in zip(results(leaves, grad_y, *arguments), expected):
        assert actual.shape == wanted.shape
        assert (actual - wanted).abs().max() <= tolerance * wanted.abs().max().clamp(min=terms)


@pytest.fixture
def limit():
    """Restricts the instruction set, until the test ends."""
    library = ctypes.CDLL(str(backend._LIBRARY))
    yield library.conv_act_limit_instruction_set
    library.conv_act_limit_instruction_set(2)


@pytest.mark.parametrize("activation", cpu.ACTIVATIONS)
@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("shape", [(2, 7, 9, 20), (1, 1, 1, 4), (1, 33, 5, 130), (3, 16, 2, 64)])
def test_is_convolution_and_activation_with_their_gradients(shape, padding, activation):
    for with_bias in (True, False):
        assert_as_the_formula(*example(shape, padding, with_bias), activation, padding)


@needs_kernel
@pytest.mark.parametrize("instruction_set", [0, 1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("activation", cpu.ACTIVATIONS)
def test_every_instruction_set(limit, instruction_set, dtype, activation):
    if limit(instruction_set) != instruction_set:
        pytest.skip("this processor lacks it")
    leaves, grad_y = example(dtype=dtype)
    tolerance = 2e-6 if dtype == torch.float32 else 8e-3
    assert_as_the_formula(leaves, grad_y, activation, (1, 1), tolerance=tolerance)
    assert conv_act(*leaves, activation).dtype == dtype


@given(
    st.tuples(st.integers(1, 3), st.integers(1, 40), st.integers(1, 12), st.integers(1, 70)),
    st.sampled_from(PADDINGS),
    st.sampled_from(cpu.ACTIVATIONS),
)
@settings(max_examples=30, deadline=None)
def test_any_shape(shape, padding, activation):
    if shape[1] + 2 - sum(padding) < 1:
        return
    assert_as_the_formula(*example(shape, padding), activation, padding, terms=1.0)


def test_far_from_zero():
    z = torch.tensor([-1e4, -90.0, -12.0, -6.0, -1e-3, 0.0, 1e-3, 6.0, 12.0, 90.0, 1e4])
    weight = torch.zeros(1, 1, 3, 3)
    weight[0, 0, 1, 1] = 1
    for activation in ("silu", "gelu"):
        leaves = [z.view(1, 1, -1, 1).requires_grad_(), weight, None]
        y = conv_act(*leaves, activation)
        expected = formula(*(t if t is None else t.double() for t in leaves), activation, (1, 1))
        torch.testing.assert_close(y.double(), expected, atol=1e-6, rtol=1e-6)
        slopes = [
            torch.autograd.grad(f.sum(), leaves[0], retain_graph=True)[0] for f in (y, expected)
        ]
        torch.testing.assert_close(*slopes, atol=1e-6, rtol=1e-5)
    assert conv_act(torch.full((1, 1, 1, 1), torch.nan), weight, None, "gelu").isnan().all()


def test_memory_may_have_gaps():
    leaves, grad_y = example()
    wide = torch.randn(2, 9, 11, 50)
    for x in (wide[:, 1:8, 1:10, 10:30], wide[:, 1:8, 1:10, ::2][..., :20]):
        leaves[0] = x.requires_grad_()
        assert_as_the_formula(leaves, grad_y, "silu", (1, 1))
    grad_y = torch.randn(2, 9, 7, 20).transpose(1, 2)
    assert_as_the_formula(leaves, grad_y, "silu", (1, 1))
    assert_as_the_formula(leaves, torch.randn(20).expand(2, 7, 9, 20), "silu", (1, 1))


@needs_kernel
def test_threads_leave_the_bits_alone():
    leaves, grad_y = example((2, 40, 17, 130))
    before = torch.get_num_threads()
    found = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        found.append(results(leaves, grad_y, "gelu"))
    torch.set_num_threads(before)
    for other in found[1:]:
        assert all(map(torch.equal, found[0], other))


@pytest.mark.parametrize("available", [True, False])
def test_gradients_come_with_the_result(available, monkeypatch):
    if not available:
        monkeypatch.setattr(cpu, "available", lambda: False)
    leaves, grad_y = example(padding=(0, 1))
    y, *grads = results(leaves, grad_y, "gelu", (0, 1))
    found = conv_act_gradients(grad_y, *(t.detach() for t in leaves), "gelu", (0, 1))
    for actual, expected in zip(found, [*grads, y]):
        torch.testing.assert_close(actual, expected, atol=1e-4, rtol=1e-4)


def test_second_derivatives():
    found = []
    for function in (conv_act, formula):
        leaves, grad_y = example()
        y = function(*leaves, "gelu", (1, 1))
        grads = torch.autograd.grad(y, leaves, grad_y, create_graph=True)
        found.append(torch.autograd.grad(sum(g.square().sum() for g in grads), leaves))
    for actual, expected in zip(*found):
        assert (actual - expected).abs().max() <= 1e-5 * expected.abs().max()


@needs_kernel
def test_it_is_a_proper_operator():
    leaves, _ = example((1, 3, 4, 5))
    torch.library.opcheck(torch.ops.mmvssm.conv_act, (*leaves, "silu", [1, 0]))


def test_other_dtypes_and_autocast():
    leaves, _ = example()
    for dtype in (torch.float64, torch.float16):
        assert conv_act(*(t.to(dtype) for t in leaves), "silu").dtype == dtype
    with torch.autocast("cpu", torch.bfloat16):
        y = conv_act(*leaves, "silu")
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), conv_act(*leaves, "silu"), atol=0.1, rtol=0.02)


def test_flops_are_those_of_the_convolution():
    leaves, grad_y = example()
    counts = []
    for function in (conv_act, formula):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            function(*leaves, "gelu", (1, 1))
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] == 2 * 9 * grad_y.numel()
    with FlopCounterMode(display=False) as counter:
        results(leaves, grad_y, "gelu", (1, 1))
    assert counter.get_total_flops() == 3 * counts[0]  # once for each gradient


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(activation="relu"), "unknown activation 'relu'; known are 'identity', 'silu'"),
        (dict(padding=(2, 0)), "padding must be two numbers, each 0 or 1"),
        (dict(padding=(0, 0), x=torch.zeros(1, 2, 4, 5)), "3 rows with padding"),
        (dict(x=torch.zeros(3, 4, 5)), r"x must have shape \(B, H, W, C\)"),
        (dict(weight=torch.zeros(5, 1, 5, 5)), r"= \(5, 1, 3, 3\); got \(5, 1, 5, 5\)"),
        (dict(bias=torch.zeros(4)), r"bias must have shape \(C,\) = \(5,\)"),
    ],
    ids=str,
)
@pytest.mark.parametrize("direct", [False, pytest.param(True, marks=needs_kernel)])
def test_what_does_not_fit(changes, message, direct):
    arguments = dict(x=torch.zeros(1, 3, 4, 5), weight=torch.zeros(5, 1, 3, 3), bias=None)
    arguments.update({**dict(activation="silu", padding=(1, 1)), **changes})
    function = torch.ops.mmvssm.conv_act if direct else conv_act
    with pytest.raises(ValueError, match=message):
        function(*arguments.values())


@needs_kernel
def test_direct_calls_with_what_the_kernel_cannot_take():
    x, weight = torch.zeros(1, 3, 4, 5), torch.zeros(5, 1, 3, 3)
    with pytest.raises(ValueError, match="takes float32 and bfloat16"):
        torch.ops.mmvssm.conv_act(x.double(), weight, None, "silu", (1, 1))
    with pytest.raises(ValueError, match=r"grad_y must have shape \(1, 3, 4, 5\)"):
        torch.ops.mmvssm.conv_act_backward(x[:, 1:], x, weight, None, "silu", (1, 1), False)
