"""Interpolation on a grid: bicubic as PyTorch's, and the mean of what is known around a position."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from mmvssm.models.interpolation import SIGMA, interpolate_known, resize_bicubic

SIZES = st.tuples(st.integers(1, 9), st.integers(1, 9))


@given(SIZES, SIZES)
def test_bicubic_is_pytorch_s(source, grid):
    torch.manual_seed(0)
    x = torch.randn(2, *source, 3, dtype=torch.float64, requires_grad=True)
    expected = F.interpolate(x.permute(0, 3, 1, 2), size=grid, mode="bicubic", align_corners=False)
    actual = resize_bicubic(x, grid)
    torch.testing.assert_close(actual, expected.permute(0, 2, 3, 1), atol=1e-12, rtol=1e-12)
    towards = torch.randn_like(actual)
    torch.testing.assert_close(
        *(
            torch.autograd.grad((y * towards).sum(), x)
            for y in (actual, expected.permute(0, 2, 3, 1))
        )
    )


@given(SIZES)
def test_known_around_a_position(grid):
    torch.manual_seed(0)
    h, w = grid
    known = (torch.rand(2, h, w, 1) < 0.4).double()
    known[:, 0, 0] = 1
    x = torch.randn(2, h, w, 3, dtype=torch.float64) * known
    place = torch.stack(torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij"), -1)
    distance = torch.cdist(place.view(-1, 2).double(), place.view(-1, 2).double())
    weight = torch.exp(-0.5 * (distance / SIGMA) ** 2) * known.view(2, 1, -1)
    expected = weight @ x.flatten(1, 2) / weight.sum(-1, keepdim=True)
    torch.testing.assert_close(interpolate_known(x, known).flatten(1, 2), expected)


def test_far_from_all_that_is_known():
    known = torch.zeros(1, 1, 90, 1)
    known[0, 0, 0] = 1
    filled = interpolate_known(known * 3, known)[0, 0, :, 0]
    torch.testing.assert_close(filled[:18], torch.full((18,), 3.0))
    assert filled[-1] == 0 and filled.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_summed_in_float32(dtype):
    x = torch.randn(1, 6, 7, 4).to(dtype)
    known = torch.ones(1, 6, 7, 1)
    for function in (lambda x: resize_bicubic(x, (9, 5)), lambda x: interpolate_known(x, known)):
        actual = function(x)
        assert actual.dtype == dtype
        torch.testing.assert_close(actual, function(x.float()).to(dtype))
        with torch.autocast("cpu", dtype=dtype):
            exact = function(x.float())
        assert torch.equal(exact, function(x.float()))
