"""mamba-ssm's function against its definition, token by token."""

import pytest
import torch
import torch.nn.functional as F

from mmvssm.ops.mamba_compat import selective_scan_fn

SHAPES = {
    "constant": lambda batch, dim, states, length: (dim, states),
    "shared": lambda batch, dim, states, length: (batch, states, length),
    "groups": lambda batch, dim, states, length: (batch, 2, states, length),
    "channels": lambda batch, dim, states, length: (batch, dim, states, length),
}
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 4e-3}


def make_inputs(B="shared", C="shared", dtype=torch.float64, length=17, without=()):
    torch.manual_seed(0)
    batch, dim, states = 2, 6, 3
    wide = torch.promote_types(dtype, torch.float32)  # of parameters

    def projection(kind):
        shape = SHAPES[kind](batch, dim, states, length)
        return torch.randn(shape, dtype=wide if kind == "constant" else dtype)

    inputs = dict(
        u=torch.randn(batch, dim, length, dtype=dtype),
        delta=0.5 * torch.rand(batch, dim, length, dtype=dtype),
        A=-torch.rand(dim, states, dtype=wide),
        B=projection(B),
        C=projection(C),
        D=torch.randn(dim, dtype=wide),
        z=torch.randn(batch, dim, length, dtype=dtype),
        delta_bias=torch.rand(dim, dtype=wide),
    )
    return {name: None if name in without else x.requires_grad_() for name, x in inputs.items()}


def by_definition(u, delta, A, B, C, D, z, delta_bias, delta_softplus):
    def by_channel(x):
        """``(batch, dim, states, length)``."""
        if x.dim() == 2:
            return x[None, :, :, None].expand(len(u), -1, -1, u.shape[2])
        x = x[:, None] if x.dim() == 3 else x
        return x.repeat_interleave(u.shape[1] // x.shape[1], 1)

    dtype = u.dtype
    u, delta, A, B, C = (
        x.to(torch.promote_types(x.dtype, torch.float32)) for x in (u, delta, A, B, C)
    )
    B, C = by_channel(B), by_channel(C)
    if delta_bias is not None:
        delta = delta + delta_bias[:, None]
    if delta_softplus:
        delta = F.softplus(delta)
    state, outputs = 0, []
    for t in range(u.shape[2]):
        step = delta[:, :, t, None]
        state = torch.exp(step * A) * state + step * B[..., t] * u[:, :, t, None]
        outputs.append((C[..., t] * state).sum(-1))
    y = torch.stack(outputs, -1)
    if D is not None:
        y = y + D[:, None] * u
    if z is not None:
        y = y * F.silu(z.to(y.dtype))
    return y.to(dtype), state


def check(inputs, delta_softplus=True):
    tolerance = TOLERANCE[inputs["u"].dtype]
    results = []
    for function in (
        lambda **x: selective_scan_fn(**x, delta_softplus=delta_softplus, return_last_state=True),
        lambda **x: by_definition(**x, delta_softplus=delta_softplus),
    ):
        y, state = function(**inputs)
        torch.manual_seed(1)
        loss = (y * torch.randn(y.shape)).sum() + (state * torch.randn(state.shape)).sum()
        leaves = [x for x in inputs.values() if x is not None]
        results.append((y, state, *torch.autograd.grad(loss, leaves)))
    for actual, expected in zip(*results):
        assert actual.dtype == expected.dtype and actual.shape == expected.shape
        error, size = (actual - expected).double().norm(), expected.double().norm()
        assert error <= tolerance * size, f"{error:.1e} of {size:.1e}"


@pytest.mark.parametrize("B", SHAPES)
@pytest.mark.parametrize("C", SHAPES)
def test_every_shape_of_the_projections(B, C):
    check(make_inputs(B, C))


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("B", ["shared", "constant"])
def test_dtypes(dtype, B):
    check(make_inputs(B, dtype=dtype))


@pytest.mark.parametrize("without", [(), ("D",), ("z",), ("delta_bias",), ("D", "z", "delta_bias")])
@pytest.mark.parametrize("delta_softplus", [False, True])
def test_optional_arguments(without, delta_softplus):
    check(make_inputs("groups", "groups", without=without), delta_softplus)


@pytest.mark.parametrize("length", [1, 300])
def test_lengths(length):
    check(make_inputs(length=length))


def test_the_last_state_in_pieces(monkeypatch):
    monkeypatch.setattr("mmvssm.ops.mamba_compat._STATE_ELEMENTS", 100)
    check(make_inputs(length=50))


def test_the_output_alone():
    inputs = make_inputs()
    y = selective_scan_fn(**inputs)
    assert torch.equal(y, selective_scan_fn(**inputs, return_last_state=True)[0])


@pytest.mark.parametrize(
    "change, words",
    [
        (dict(A=torch.zeros(6, 3, dtype=torch.complex64)), "must be real"),
        (dict(A=torch.zeros(5, 3)), r"expected u and delta \(B, D, L\) and A \(D, N\)"),
        (dict(delta=torch.zeros(2, 6, 16)), r"got \(2, 6, 17\), \(2, 6, 16\)"),
        (dict(B=torch.zeros(2, 4, 3, 17)), r"B must be .* got \(2, 4, 3, 17\)"),
        (dict(C=torch.zeros(2, 17, 3)), r"C must be .* got \(2, 17, 3\)"),
    ],
)
def test_wrong_arguments_are_named(change, words):
    inputs = {name: x.detach() for name, x in make_inputs().items()}
    with pytest.raises(ValueError, match=words):
        selective_scan_fn(**{**inputs, **change})
