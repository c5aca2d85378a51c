import pytest
import torch
import torch.nn.functional as F

from mmvssm.ops import centred, depthwise_conv, line_conv, neighbor_table, sparse_depthwise_conv
from mmvssm.ops.sparse_depthwise_conv import cpu


@pytest.mark.parametrize("kernel_size", [3, 7])
@pytest.mark.parametrize("grid", [(1, 1), (2, 9), (6, 5)])
@pytest.mark.parametrize("with_bias", [True, False])
def test_is_conv2d_with_its_gradients(grid, kernel_size, with_bias):
    torch.manual_seed(0)
    channels = 33
    x = torch.randn(2, grid[0] * grid[1], channels, requires_grad=True)
    weight = torch.randn(channels, 1, kernel_size, kernel_size, requires_grad=True)
    bias = torch.randn(channels, requires_grad=True) if with_bias else None
    image = x.transpose(1, 2).unflatten(2, grid).double()
    wide = None if bias is None else bias.double()
    expected = F.conv2d(image, weight.double(), wide, padding=kernel_size // 2, groups=channels)
    expected = expected.flatten(2).transpose(1, 2)
    actual = depthwise_conv(x, weight, grid, bias)
    assert actual.shape == x.shape
    leaves = [leaf for leaf in (x, weight, bias) if leaf is not None]
    grad_y = torch.randn_like(x)
    pairs = [(actual, expected)]
    pairs += zip(
        torch.autograd.grad(actual, leaves, grad_y),
        torch.autograd.grad(expected, leaves, grad_y.double()),
    )
    for a, e in pairs:
        assert (a - e).abs().max() <= 1e-5 * e.abs().max()


def test_only_gradients_that_are_needed():
    x, weight = torch.randn(1, 6, 2), torch.randn(2, 1, 7, 7, requires_grad=True)
    depthwise_conv(x, weight, (2, 3)).sum().backward()
    assert x.grad is None and weight.grad.isfinite().all()


@pytest.mark.skipif(not cpu.available(), reason="no compiled kernel")
def test_large_kernels_have_fast_gradients_on_a_cpu():
    x, weight = (torch.randn(*shape, requires_grad=True) for shape in ((1, 6, 2), (2, 1, 7, 7)))
    y = depthwise_conv(x, weight, (2, 3))
    assert "DepthwiseConv" in type(y.grad_fn).__name__
    with torch.no_grad():
        assert torch.equal(depthwise_conv(x, weight, (2, 3)), y)
    expected = torch.autograd.grad(y, [x, weight], torch.ones_like(y))
    with torch.autocast("cpu", torch.bfloat16):
        y = depthwise_conv(x, weight, (2, 3))
        lowered = [torch.autograd.grad(y, [x, weight], torch.ones_like(y))]
        y = line_conv(x, weight[:, :, 3], backwards=True)
    assert y.dtype == torch.bfloat16 and "DepthwiseConv" in type(y.grad_fn).__name__
    for actual, wanted in zip(*lowered, expected):
        assert actual.dtype == torch.float32
        torch.testing.assert_close(actual, wanted, atol=0.05, rtol=0.02)
    # Other dtypes are PyTorch's.
    assert depthwise_conv(x.double(), weight.double(), (2, 3)).dtype == torch.float64


@pytest.mark.parametrize("length, taps", [(1, 4), (3, 4), (11, 4), (9, 1)])
@pytest.mark.parametrize("backwards", [False, True])
def test_a_line_s_convolution_is_one_sided(length, taps, backwards):
    torch.manual_seed(0)
    x, weight, bias = torch.randn(2, length, 5), torch.randn(5, 1, taps), torch.randn(5)
    leaves = [leaf.requires_grad_() for leaf in (x, weight, bias)]
    line = x.double().flip(1) if backwards else x.double()
    line = F.conv1d(
        line.transpose(1, 2), weight.double(), bias.double(), padding=taps - 1, groups=5
    )
    expected = line[..., :length].transpose(1, 2)
    expected = expected.flip(1) if backwards else expected
    grad_y = torch.randn_like(x)
    gradients = torch.autograd.grad(expected, leaves, grad_y.double())
    with torch.no_grad():
        pairs = [(line_conv(*leaves, backwards=backwards), expected)]
    neighbors = neighbor_table(torch.arange(length).expand(2, -1), (1, length), (1, 2 * taps - 1))
    kept = sparse_depthwise_conv(x, centred(weight, backwards), neighbors, bias)
    for actual in (line_conv(*leaves, backwards=backwards), kept):
        pairs += [(actual, expected)]
        pairs += zip(torch.autograd.grad(actual, leaves, grad_y), gradients)
    for a, e in pairs:
        assert (a - e).abs().max() <= 1e-5 * e.abs().max()


def test_kernels_may_be_wider_than_high():
    torch.manual_seed(0)
    x, weight = torch.randn(1, 20, 3), torch.randn(3, 1, 1, 5)
    expected = F.conv2d(x.transpose(1, 2).unflatten(2, (4, 5)), weight, padding=(0, 2), groups=3)
    expected = expected.flatten(2).transpose(1, 2)
    neighbors = neighbor_table(torch.arange(20)[None], (4, 5), (1, 5))
    for actual in (
        depthwise_conv(x, weight, (4, 5)),
        sparse_depthwise_conv(x, weight, neighbors),
    ):
        assert torch.allclose(actual, expected, atol=1e-5)
