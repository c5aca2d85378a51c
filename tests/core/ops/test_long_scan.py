"""Numbers stay finite over 256 k tokens where float64 says that they are (VMamba, issue 300; mamba, issue 72)."""

import pytest
import torch

from mmvssm.ops import selective_scan
from mmvssm.ops.selective_scan import pytorch
from mmvssm.ops.selective_scan.inputs import ScanInputs

LENGTH = 262_144


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("states", [1, 16])
@pytest.mark.parametrize(
    ("delta", "decay", "accuracy"),
    [
        # Hardly damped: each state sums up tens of thousands of steps, and so do float32's roundings.
        ((-20, 5), 1e-4, 3e-5),
        ((-20, 1e3), 1.0, 1e-5),
        ((0, 1e3), 1e4, 1e-5),
        ((-20, -10), 1e4, 1e-5),
    ],
)
@pytest.mark.slow
def test_no_inf_or_nan_where_float64_has_none(delta, decay, accuracy, states, dtype):
    generator = torch.Generator().manual_seed(0)

    def rand(low, high, *shape):
        return low + (high - low) * torch.rand(shape, generator=generator, dtype=torch.float64)

    u = rand(-1e4, 1e4, 1, LENGTH, 1, 3)
    step = rand(*delta, 1, LENGTH, 1, 3)
    A = -decay * rand(0.5, 1, 1, 3, states)
    B, C = rand(-1, 1, 2, 1, LENGTH, 1, states)
    grad_y = rand(-1, 1, 1, LENGTH, 1, 3)
    inputs = [u.to(dtype), step.to(dtype), A.float(), B.to(dtype), C.to(dtype)]

    wide = ScanInputs(*(x.double() for x in inputs))
    y, states_saved = pytorch.forward(wide)
    expected = pytorch.backward(grad_y, wide, states_saved)
    assert y.isfinite().all() and all(x.isfinite().all() for x in expected[:5])

    leaves = [x.requires_grad_() for x in inputs]
    actual = selective_scan(*leaves)
    gradients = torch.autograd.grad(actual, leaves, grad_y.to(dtype))
    tolerance = 1e-2 if dtype == torch.bfloat16 else accuracy
    for a, e in zip((actual, *gradients), (y, *expected[:5])):
        assert a.isfinite().all()
        assert (a.double() - e).abs().max() <= tolerance * e.abs().max()
