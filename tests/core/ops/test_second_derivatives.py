"""Second derivatives and forward mode, which take PyTorch's formula where a kernel has first derivatives only."""

import sys

import pytest
import torch

from mmvssm.ops import (
    chunks,
    conv_act,
    conv_ffn,
    cross_traversal,
    depthwise_conv,
    dilated_conv,
    in_chunks,
    line_conv,
    neighbor_table,
    selective_scan,
    sparse_depthwise_conv,
)
from mmvssm.ops.selective_scan.naive import selective_scan_naive

ffn = sys.modules["mmvssm.ops.conv_ffn"]


def leaves(*shapes, dtype=torch.float64):
    torch.manual_seed(0)
    return [torch.randn(shape, dtype=dtype).div(2).requires_grad_() for shape in shapes]


def scan_leaves(length=6):
    shapes = [(1, length, 4, 2)] * 2 + [(4, 2, 2)] + [(1, length, 4, 2)] * 2 + [(4, 2)] * 2
    inputs = leaves(*shapes)
    inputs[2] = inputs[2].detach().abs().neg().requires_grad_()
    return inputs


def scan(*tensors):
    return selective_scan(*tensors, traversal=cross_traversal(2, 3))


def summed_scan(u, delta, *tensors):
    walks = cross_traversal(2, 3)
    u, delta = u[:, :, :1], delta[:, :, 1:2]
    return selective_scan(u, delta, *tensors, traversal=walks, sum_walks=True)


TABLE = neighbor_table(torch.tensor([[0, 1, 3, 5]]), (2, 3), 3)
OPERATORS = {
    "selective_scan": (scan, scan_leaves()),
    "selective_scan of summed walks": (summed_scan, scan_leaves()),
    "selective_scan over chunks": (selective_scan, scan_leaves(130)),
    "sparse_depthwise_conv": (
        lambda x, weight, bias: sparse_depthwise_conv(x, weight, TABLE, bias),
        leaves((1, 4, 2), (2, 1, 3, 3), (2,)),
    ),
    "dilated_conv": (
        lambda x, *weights: dilated_conv(x, weights, (1, 2)),
        leaves((1, 3, 4, 2), (2, 1, 3, 3), (2, 1, 3, 3)),
    ),
    "in_chunks": (
        lambda a, b, weight: in_chunks(lambda a, b, w: (a * b * w).tanh(), (a, b), (), (weight,)),
        leaves((2, 6, 3), (2, 6, 3), (3,)),
    ),
    "conv_act": (
        lambda x, weight, bias: conv_act(x, weight, bias, "gelu"),
        leaves((1, 3, 4, 2), (2, 1, 3, 3), (2,)),
    ),
    "conv_ffn": (
        conv_ffn,
        leaves((1, 3, 4, 2), (4, 2), (4,), (4, 1, 3, 3), (4,), (2, 4), (2,)),
    ),
}


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch):
    """Everything that may go in pieces does."""
    monkeypatch.setattr(chunks, "CHUNK_BYTES", 100)
    monkeypatch.setattr(ffn, "BAND_BYTES", 100)
    monkeypatch.setattr(ffn, "WHOLE_BANDS", 1)


@pytest.mark.parametrize("name", OPERATORS)
def test_second_derivatives(name):
    function, inputs = OPERATORS[name]
    assert torch.autograd.gradgradcheck(function, inputs, fast_mode=True)


@pytest.mark.parametrize("kind", ["grid", "line"])
def test_second_derivatives_of_convolutions_of_all_tokens(kind):
    """Our gradients are for float32 alone."""
    narrow = leaves(
        (1, 12, 2), (2, 1, 5, 5) if kind == "grid" else (2, 1, 5), (2,), dtype=torch.float32
    )
    wide = [x.detach().double().requires_grad_() for x in narrow]
    found, expected = (
        penalty(
            depthwise_conv(x, weight, (3, 4), bias)
            if kind == "grid"
            else line_conv(x, weight, bias),
            x,
            weight,
            bias,
        )
        for x, weight, bias in (narrow, wide)
    )
    for ours, theirs in zip(found, expected):
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-4, atol=1e-4)


def penalty(y, *tensors):
    """Gradients of the squared norm of gradients."""
    first = torch.autograd.grad((y**2).sum(), tensors, create_graph=True)
    return torch.autograd.grad(sum((g**2).sum() for g in first), tensors)


def test_a_gradient_penalty_through_a_plain_sum():
    """The gradient of a sum needs no gradient itself, so autograd would cut the graph there without a word."""
    inputs = scan_leaves()[:5]
    walks = cross_traversal(2, 3)
    ys = selective_scan(*inputs, traversal=walks), selective_scan_naive(*inputs, None, None, *walks)
    firsts = [torch.autograd.grad(y.sum(), inputs, create_graph=True) for y in ys]
    found, expected = (torch.autograd.grad(sum((g**2).sum() for g in f), inputs) for f in firsts)
    torch.testing.assert_close(found, expected)


def test_arguments_that_are_one_tensor():
    u, _, A, B, *_ = scan_leaves()
    y, expected = (f(u, u, A, B, B) for f in (selective_scan, selective_scan_naive))
    torch.testing.assert_close(penalty(y, u, A, B), penalty(expected, u, A, B))


@pytest.mark.parametrize(
    "name",
    [
        "selective_scan",
        "selective_scan of summed walks",
        "sparse_depthwise_conv",
        "dilated_conv",
        "conv_act",
        "conv_ffn",
    ],
)
@pytest.mark.parametrize("grad", [True, False])
def test_forward_mode(name, grad):
    function, inputs = OPERATORS[name]
    inputs = tuple(x.detach() for x in inputs)
    tangents = tuple(torch.randn_like(x) for x in inputs)
    with torch.set_grad_enabled(grad):
        y, found = torch.func.jvp(function, inputs, tangents)
    step = 1e-6
    ahead, behind = (
        function(*(x + s * t for x, t in zip(inputs, tangents))) for s in (step, -step)
    )
    torch.testing.assert_close(y, function(*inputs))
    torch.testing.assert_close(found, (ahead - behind) / (2 * step), rtol=1e-6, atol=1e-7)


def test_forward_mode_of_chunks_is_refused():
    function, inputs = OPERATORS["in_chunks"]
    inputs = tuple(x.detach() for x in inputs)
    with pytest.raises((NotImplementedError, RuntimeError)):
        torch.func.jvp(function, inputs, inputs)
