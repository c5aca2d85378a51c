import sys

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from mmvssm.ops import linear

module = sys.modules["mmvssm.ops.linear"]
needs_onednn = pytest.mark.skipif(not module._has_onednn(), reason="no AVX-512 or no oneDNN")


@pytest.fixture(autouse=True)
def any_size(monkeypatch):
    monkeypatch.setattr(module, "LEAST_WORK", 1)


def example(shape, out_features, with_bias=True):
    torch.manual_seed(0)
    leaves = [torch.randn(shape), torch.randn(out_features, shape[-1])]
    leaves += [torch.randn(out_features)] * with_bias
    return [leaf.requires_grad_() for leaf in leaves]


def results(leaves, function, grad_y):
    y = function(*leaves)
    return [y, *torch.autograd.grad(y, leaves, grad_y.to(y.dtype))]


@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize(
    "shape, out_features", [((5, 3), 7), ((2, 4, 6, 10), 3), ((1, 1), 1), ((3, 50, 12), 40)]
)
def test_is_a_linear_layer_with_its_gradients(shape, out_features, with_bias):
    leaves = example(shape, out_features, with_bias)
    grad_y = torch.randn(*shape[:-1], out_features)
    wide = [leaf.detach().double().requires_grad_() for leaf in leaves]
    expected = results(wide, F.linear, grad_y)
    for actual, wanted in zip(results(leaves, linear, grad_y), expected):
        torch.testing.assert_close(actual.double(), wanted, atol=1e-5, rtol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(linear(*leaves).double(), expected[0], atol=1e-5, rtol=1e-5)


def test_memory_may_have_gaps():
    weight = torch.randn(8, 6, requires_grad=True)
    inputs = [
        torch.randn(2, 5, 20)[..., 3:9],
        torch.randn(2, 6, 5).transpose(1, 2),
        torch.randn(6).expand(2, 5, 6),
    ]
    for x in inputs:
        leaves = [x.requires_grad_(), weight]
        for grad_y in (torch.randn(2, 5, 20)[..., :8], torch.randn(8).expand(2, 5, 8)):
            pairs = zip(results(leaves, linear, grad_y), results(leaves, F.linear, grad_y))
            for actual, expected in pairs:
                torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)


@needs_onednn
def test_float32_takes_onednn(monkeypatch):
    leaves = example((4, 5), 3)
    assert type(linear(*leaves).grad_fn).__name__ == "_LinearBackward"
    y = linear(*(leaf.double() for leaf in leaves))
    assert y.dtype == torch.float64 and type(y.grad_fn).__name__ != "_LinearBackward"
    with torch.autocast("cpu", torch.bfloat16):
        assert linear(*leaves).dtype == torch.bfloat16
    monkeypatch.setattr(module, "LEAST_WORK", 4 * 5 * 3 + 1)
    assert type(linear(*leaves).grad_fn).__name__ != "_LinearBackward"


@needs_onednn
def test_another_torch_without_the_operator_is_no_obstacle(monkeypatch):
    def fail(*args):
        raise RuntimeError

    module._has_onednn.cache_clear()
    monkeypatch.setattr(module, "_product", fail)
    leaves = example((4, 5), 3)
    assert torch.equal(linear(*leaves), F.linear(*leaves))
    monkeypatch.undo()
    module._has_onednn.cache_clear()
    assert module._has_onednn()


@pytest.mark.parametrize(
    "x, weight, bias",
    [
        (torch.zeros(4, 5), torch.zeros(3, 6), None),
        (torch.zeros(4, 6), torch.zeros(3, 5), None),
        (torch.zeros(4, 5), torch.zeros(3, 5), torch.zeros(4)),
        (torch.zeros(4, 5), torch.zeros(1, 3, 5), None),
    ],
)
@pytest.mark.parametrize("grad", [False, True])
def test_what_does_not_fit_is_pytorch_s_to_refuse(x, weight, bias, grad):
    with pytest.raises(RuntimeError):
        linear(x, weight.requires_grad_(grad), bias)
    with pytest.raises(RuntimeError):
        module.matmul(torch.zeros(4, 5), torch.zeros(6, 3))


def test_one_row_and_a_shared_bias():
    x, weight = torch.randn(5), torch.randn(3, 5, requires_grad=True)
    assert torch.equal(linear(x, weight), F.linear(x, weight))
    x, bias = torch.randn(4, 5), torch.randn(1)
    assert torch.equal(linear(x, weight, bias), F.linear(x, weight, bias))


def test_flops_are_those_of_a_linear_layer():
    leaves = example((4, 6, 5), 3)
    counts = []
    for function in (linear, F.linear):
        with FlopCounterMode(display=False) as counter:
            results(leaves, function, torch.randn(4, 6, 3))
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] == 3 * 2 * 24 * 5 * 3


def test_only_gradients_that_are_needed():
    x, weight, bias = example((4, 5), 3)
    linear(x.detach(), weight, bias.detach()).sum().backward()
    assert weight.grad.isfinite().all() and bias.grad is None and x.grad is None


def test_second_derivatives():
    leaves = example((2, 3), 2)
    y = linear(*leaves).square().sum()
    (grad,) = torch.autograd.grad(y, leaves[0], create_graph=True)
    (second,) = torch.autograd.grad(grad.sum(), leaves[1])
    expected = F.linear(*leaves).square().sum()
    (grad,) = torch.autograd.grad(expected, leaves[0], create_graph=True)
    torch.testing.assert_close(second, torch.autograd.grad(grad.sum(), leaves[1])[0])
