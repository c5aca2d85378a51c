import pytest
import torch
import torch.nn.functional as F

from mmvssm.ops import dilated_conv
from mmvssm.ops.sparse_depthwise_conv import cpu


def by_hand(x, weights, dilations):
    """Tap by tap, of positions that are clamped to the map."""
    _, height, width, _ = x.shape
    y = 0
    for weight, dilation in zip(weights, dilations):
        for i in range(3):
            for j in range(3):
                rows = (torch.arange(height) + (i - 1) * dilation).clamp(0, height - 1)
                columns = (torch.arange(width) + (j - 1) * dilation).clamp(0, width - 1)
                y = y + weight[:, 0, i, j] * x[:, rows][:, :, columns]
    return y


def example(grid, count, dtype=torch.float64):
    torch.manual_seed(0)
    x = torch.randn(2, *grid, 6, dtype=dtype, requires_grad=True)
    return x, [torch.randn(6, 1, 3, 3, dtype=dtype, requires_grad=True) for _ in range(count)]


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("grid", [(1, 1), (7, 1), (4, 9), (13, 12)])
@pytest.mark.parametrize("dilations", [(1, 3, 5), (2,), (1, 2)])
def test_is_a_sum_of_convolutions_with_its_gradients(grid, dilations, compiled, monkeypatch):
    if not compiled:
        monkeypatch.setattr(cpu, "available", lambda: False)
    x, weights = example(grid, len(dilations))
    actual, expected = (f(x, weights, dilations) for f in (dilated_conv, by_hand))
    assert actual.shape == x.shape
    torch.testing.assert_close(actual, expected)
    with torch.no_grad():
        torch.testing.assert_close(dilated_conv(x, weights, dilations), expected)
    grad_y = torch.randn_like(x)
    torch.testing.assert_close(
        *(torch.autograd.grad(y, [x, *weights], grad_y) for y in (actual, expected))
    )


@pytest.mark.skipif(not cpu.available(), reason="no compiled kernel")
def test_a_cpu_takes_the_compiled_kernel(monkeypatch):
    x, weights = example((4, 5), 2, torch.float32)
    with monkeypatch.context() as patch:
        patch.setattr(F, "conv2d", None)
        dilated_conv(x, weights, (1, 3)).sum().backward()
    assert x.grad.isfinite().all()
    with torch.autocast("cpu", torch.bfloat16):
        y = dilated_conv(x, weights, (1, 3))
    y.float().sum().backward()
    assert y.dtype == torch.bfloat16 and x.grad.dtype == torch.float32
    torch.testing.assert_close(y.float(), by_hand(x, weights, (1, 3)), atol=0.1, rtol=0.05)
