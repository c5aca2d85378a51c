"""The operator itself: its definition, the vectorised PyTorch backend, and its registration with PyTorch."""

import importlib

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from mmvssm.ops import Traversal, cross_traversal, selective_scan
from mmvssm.ops.selective_scan import pytorch
from mmvssm.ops.selective_scan.inputs import ScanInputs
from mmvssm.ops.selective_scan.naive import selective_scan_naive
from support.masked_scan import compare as compare_with_masked

# The package's attribute of that name is the function.
scan_module = importlib.import_module("mmvssm.ops.selective_scan")
GRADIENTS = ("u", "delta", "A", "B", "C", "D", "delta_bias", "rest")


def make_inputs(
    batch, length, walks, channels, states, *, seed=0, dtype=torch.float64, optional=True
):
    """Random inputs as a dict; traversals are permutations that differ from image to image."""
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    def permutations():
        return torch.rand(batch, walks, length, generator=generator).argsort(-1).int()

    tensors = dict(
        u=randn(batch, length, walks, channels),
        delta=randn(batch, length, walks, channels),
        A=-torch.rand(walks, channels, states, generator=generator).to(dtype) - 0.1,
        B=randn(batch, length, walks, states),
        C=randn(batch, length, walks, states),
        D=randn(walks, channels) if optional else None,
        delta_bias=randn(walks, channels) if optional else None,
        order=permutations() if optional else None,
        source=permutations() if optional else None,
        gap=torch.randint(0, 3, (batch, walks, length), generator=generator).int()
        if optional
        else None,
        rest=torch.rand(walks, channels, generator=generator).to(dtype) if optional else None,
    )
    return {
        k: v.requires_grad_() if v is not None and v.is_floating_point() else v
        for k, v in tensors.items()
    }


def public(inputs, delta_softplus=True, **options):
    """Call the public operator with the reference's arguments."""
    inputs = dict(inputs)
    traversal = None
    if inputs["order"] is not None:
        traversal = Traversal(inputs["order"], inputs["source"], inputs["gap"])
    for name in ("order", "source", "gap"):
        del inputs[name]
    return selective_scan(**inputs, traversal=traversal, delta_softplus=delta_softplus, **options)


def gradients(y, inputs, seed=1):
    grad_y = torch.randn(
        y.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    ).to(y.dtype)
    wanted = [inputs[name] for name in GRADIENTS if inputs[name] is not None]
    return torch.autograd.grad(y, wanted, grad_y)


def assert_same(inputs, delta_softplus=True, sum_walks=False, **tolerance):
    actual = public(inputs, delta_softplus, sum_walks=sum_walks)
    expected = selective_scan_naive(**inputs, delta_softplus=delta_softplus, sum_walks=sum_walks)
    torch.testing.assert_close(actual, expected, **tolerance)
    for a, e in zip(gradients(actual, inputs), gradients(expected, inputs)):
        torch.testing.assert_close(a, e, **tolerance)


@pytest.fixture
def torch_backend(monkeypatch):
    # By name, since the package exports the function of the same name.
    module = importlib.import_module("mmvssm.ops.selective_scan")
    monkeypatch.setattr(module, "_backend", lambda u: pytorch)


def test_reference_one_step():
    """One token: y = sum_n C step B u + D u."""
    inputs = make_inputs(1, 1, 1, 2, 3, optional=False)
    step = F.softplus(inputs["delta"])
    expected = (inputs["B"] * inputs["C"]).sum(-1, keepdim=True) * step * inputs["u"]
    torch.testing.assert_close(selective_scan_naive(**inputs), expected)


def test_reference_against_closed_form():
    """h_T = sum_t exp(A * sum of later steps) * drive_t."""
    inputs = make_inputs(1, 5, 1, 2, 1, optional=False)
    step = F.softplus(inputs["delta"])[0, :, 0]  # (L, D)
    drive = step * inputs["u"][0, :, 0] * inputs["B"][0, :, 0]
    later = step.flip(0).cumsum(0).flip(0) - step
    last = (torch.exp(inputs["A"][0, :, 0] * later) * drive).sum(0)
    y = selective_scan_naive(**inputs)
    torch.testing.assert_close(y[0, -1, 0], last * inputs["C"][0, -1, 0])


@pytest.mark.parametrize("optional", [True, False])
@pytest.mark.parametrize("delta_softplus", [True, False])
def test_reference_gradcheck(optional, delta_softplus):
    inputs = make_inputs(2, 4, 2, 2, 2, optional=optional)
    if not delta_softplus:
        inputs["delta"] = inputs["delta"].detach().abs().requires_grad_()
    names = [name for name in GRADIENTS if inputs[name] is not None]

    def run(*values):
        return selective_scan_naive(
            **{**inputs, **dict(zip(names, values))}, delta_softplus=delta_softplus
        )

    assert torch.autograd.gradcheck(run, [inputs[name] for name in names])


@pytest.mark.parametrize(
    "shape",
    [(1, 1, 1, 1, 1), (2, 7, 4, 3, 1), (1, 64, 1, 5, 2), (3, 65, 4, 1, 1), (2, 130, 2, 3, 16)],
    ids=str,
)
@pytest.mark.parametrize("optional", [True, False])
@pytest.mark.parametrize("delta_softplus", [True, False])
def test_torch_backend_float64(torch_backend, shape, optional, delta_softplus):
    inputs = make_inputs(*shape, optional=optional)
    if not delta_softplus:
        inputs["delta"] = inputs["delta"].detach().abs().requires_grad_()
    assert_same(inputs, delta_softplus, atol=1e-10, rtol=1e-10)


def shared_by_walks(inputs, *names):
    """Give the named ones size 1 along the walks."""
    return {**inputs, **{x: inputs[x].detach()[:, :, :1].clone().requires_grad_() for x in names}}


@pytest.mark.parametrize("names", [("u",), ("delta",), ("u", "delta")], ids="+".join)
def test_the_definition_sums_the_walks(names):
    """The sum is that of the outputs; values that walks share get the sum of what each walk's own would get."""
    inputs = make_inputs(2, 5, 4, 3, 2)
    once = shared_by_walks(inputs, *names)
    copied = {x: once[x].detach().repeat(1, 1, 4, 1).requires_grad_() for x in names}
    inputs.update(copied)
    summed = selective_scan_naive(**once, sum_walks=True)
    expected = selective_scan_naive(**inputs).sum(2)
    torch.testing.assert_close(summed, expected)
    for name, a, e in zip(GRADIENTS, gradients(summed, once), gradients(expected, inputs)):
        torch.testing.assert_close(a, e.sum(2, keepdim=True) if name in names else e)


def test_the_definition_of_a_sum_passes_gradcheck():
    inputs = shared_by_walks(make_inputs(2, 4, 2, 2, 2), "u", "delta")

    def run(*values):
        given = {**inputs, **dict(zip(GRADIENTS, values))}
        return selective_scan_naive(**given, sum_walks=True)

    assert torch.autograd.gradcheck(run, [inputs[name] for name in GRADIENTS])


@pytest.mark.parametrize("shape", [(1, 1, 1, 1, 1), (2, 7, 4, 3, 1), (2, 130, 2, 3, 16)], ids=str)
@pytest.mark.parametrize("names", [(), ("u",), ("u", "delta")], ids=str)
@pytest.mark.parametrize("backend", ["default", "torch"])
def test_walks_summed(shape, names, backend, request):
    if backend == "torch":
        request.getfixturevalue("torch_backend")
    inputs = shared_by_walks(make_inputs(*shape), *names)
    assert_same(inputs, sum_walks=True, atol=1e-10, rtol=1e-10)


@settings(max_examples=25, deadline=None)
@given(
    height=st.integers(1, 9),
    width=st.integers(1, 9),
    channels=st.integers(1, 20),
    states=st.integers(1, 3),
    seed=st.integers(0, 2**16),
)
def test_walks_summed_over_any_grid(height, width, channels, states, seed):
    inputs = make_inputs(2, height * width, 4, channels, states, seed=seed, optional=False)
    inputs = shared_by_walks(inputs, "u")
    inputs["order"] = cross_traversal(height, width).order
    assert_same(inputs, sum_walks=True, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 2e-5), (torch.bfloat16, 2e-2)])
def test_torch_backend_low_precision(torch_backend, dtype, tolerance):
    inputs = make_inputs(2, 97, 4, 17, 2, dtype=dtype)
    exact = {
        k: v.detach().double().requires_grad_() if v.is_floating_point() else v
        for k, v in inputs.items()
    }
    y, y_exact = public(inputs), selective_scan_naive(**exact)
    assert y.dtype == dtype
    pairs = [
        (y, y_exact),
        *zip(gradients(y, inputs), gradients(y_exact, exact)),
    ]
    for actual, expected in pairs:
        error = (actual.double() - expected).norm() / expected.norm()
        assert error < tolerance


@settings(max_examples=25, deadline=None)
@given(
    height=st.integers(1, 9),
    width=st.integers(1, 9),
    channels=st.integers(1, 5),
    states=st.integers(1, 3),
    seed=st.integers(0, 2**16),
)
def test_cross_traversal_property(height, width, channels, states, seed):
    """On any grid, outputs and gradients along the four walks are the definition's."""
    inputs = make_inputs(2, height * width, 4, channels, states, seed=seed, optional=False)
    inputs["order"] = cross_traversal(height, width).order
    assert_same(inputs, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("height, width", [(3, 8), (11, 2), (1, 9)])
def test_column_scan_gradient(height, width):
    """The column walk equals a row walk over the transposed map, in outputs and gradients, also where H != W."""
    inputs = make_inputs(2, height * width, 1, 3, 1, optional=False)
    columns = cross_traversal(height, width).order[1:2]
    walked = public({**inputs, "order": columns})

    def transpose(x):
        return x.unflatten(1, (height, width)).transpose(1, 2).flatten(1, 2)

    tokens = ("u", "delta", "B", "C")
    moved = {k: transpose(v) if k in tokens else v for k, v in inputs.items()}
    y = selective_scan_naive(**moved)
    back = y.unflatten(1, (width, height)).transpose(1, 2).flatten(1, 2)
    torch.testing.assert_close(walked, back)
    for actual, expected in zip(gradients(walked, inputs), gradients(back, inputs)):
        torch.testing.assert_close(actual, expected)


def test_gap_equals_masked_dense_scan():
    """Passing an absent position by its rest step is scanning a token of value zero there."""
    batch, length, walks, channels, states = 2, 40, 2, 3, 4
    dense = make_inputs(batch, length, walks, channels, states, optional=False)
    generator = torch.Generator().manual_seed(3)
    rest = torch.rand(walks, channels, generator=generator, dtype=torch.float64)
    kept = torch.rand(length, generator=generator) < 0.5
    dense["order"] = torch.stack([torch.arange(length), torch.arange(length).flip(0)]).int()
    masked = dict(dense)
    masked["delta"] = torch.where(kept[:, None, None], dense["delta"], torch.log(torch.expm1(rest)))
    masked["u"] = torch.where(kept[:, None, None], dense["u"], 0.0)
    expected = selective_scan_naive(**masked)[:, kept]

    positions = kept.nonzero().flatten()
    compact = {k: v[:, positions] if k in ("u", "delta", "B", "C") else v for k, v in dense.items()}
    count = len(positions)
    compact["order"] = torch.stack([torch.arange(count), torch.arange(count).flip(0)]).int()
    # How many positions were skipped; before a walk's first kept token the state is zero anyway.
    forward_gap = torch.diff(positions, prepend=positions[:1] - 1) - 1
    backward_gap = torch.diff(length - 1 - positions.flip(0), prepend=positions.new_zeros(1)) - 1
    compact["gap"] = torch.stack([forward_gap, backward_gap.clamp(min=0)]).int()
    compact["rest"] = rest
    torch.testing.assert_close(public(compact), expected, atol=1e-10, rtol=1e-10)


GRIDS = [(1, 1), (1, 7), (5, 1), (6, 9), (13, 8)]


@pytest.mark.parametrize("backend", ["public", "torch"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("grid", GRIDS)
def test_pruned_walks_equal_the_masked_dense_scan(grid, dtype, backend, monkeypatch):
    """Every direction, other tokens in each image: the state is aligned exactly, and so are all gradients."""
    if backend == "torch":
        monkeypatch.setattr(scan_module, "_backend", lambda u: pytorch)
    compare_with_masked(selective_scan, grid, batch=3, keep=0.4, dtype=dtype)


@given(
    height=st.integers(1, 8),
    width=st.integers(1, 8),
    batch=st.integers(1, 3),
    keep=st.floats(0, 1),
    seed=st.integers(0, 1000),
)
@settings(max_examples=40, deadline=None)
def test_any_pruned_walks_equal_the_masked_dense_scan(height, width, batch, keep, seed):
    compare_with_masked(selective_scan, (height, width), batch, keep, torch.float64, seed)


@pytest.mark.parametrize("optional", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_opcheck(optional, dtype):
    inputs = make_inputs(2, 6, 2, 3, 2, dtype=dtype, optional=optional)
    torch.library.opcheck(torch.ops.mmvssm.selective_scan.default, (*inputs.values(), True))
    inputs = shared_by_walks(inputs, "u", "delta")
    torch.library.opcheck(torch.ops.mmvssm.selective_scan.default, (*inputs.values(), True, True))


def test_expanded_and_strided_inputs():
    """Values shared by all walks need no copies, and halves of one projection no slices."""
    inputs = make_inputs(2, 30, 4, 6, 2, dtype=torch.float64)
    one = inputs["u"].detach()[:, :, :1].requires_grad_()
    halves = torch.randn(2, 30, 4, 12, dtype=torch.float64, requires_grad=True)
    inputs["u"], inputs["delta"] = one.expand(-1, -1, 4, -1), halves[..., 6:]
    actual, expected = public(inputs), selective_scan_naive(**inputs)
    torch.testing.assert_close(actual, expected)
    wanted = [one, halves]
    for a, e in zip(
        torch.autograd.grad(actual.square().sum(), wanted),
        torch.autograd.grad(expected.square().sum(), wanted),
    ):
        torch.testing.assert_close(a, e)


def test_gradients_of_pytorch_are_contiguous_whatever_the_inputs_are():
    """The operator's fake implementation tells compilers so."""
    inputs = {name: x.detach() for name, x in make_inputs(1, 5, 2, 3, 4).items()}
    for name in ("A", "rest"):
        inputs[name] = inputs[name].transpose(0, 1).contiguous().transpose(0, 1)
    inputs = ScanInputs(**inputs)._replace(gap=None)
    y, states = pytorch.forward(inputs)
    gradients = pytorch.backward(torch.ones_like(y), inputs, states)
    assert all(x.is_contiguous() for x in gradients)


def test_autocast_keeps_parameters_in_float32():
    inputs = make_inputs(1, 20, 2, 4, 1, dtype=torch.float32)
    seen = {}

    class Spy(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func is torch.ops.mmvssm.selective_scan.default:
                seen.update(zip(inputs, (x.dtype for x in args if isinstance(x, torch.Tensor))))
            return func(*args, **(kwargs or {}))

    with torch.autocast("cpu", dtype=torch.bfloat16), Spy():
        y = public(inputs)
    assert y.dtype == torch.bfloat16
    assert {seen[k] for k in ("u", "delta", "B", "C")} == {torch.bfloat16}
    assert {seen[k] for k in ("A", "D", "delta_bias", "rest")} == {torch.float32}
    y.sum().backward()
    assert inputs["u"].grad.dtype == torch.float32 and inputs["A"].grad.dtype == torch.float32
    error = (y.double() - selective_scan_naive(**inputs)).norm() / y.double().norm()
    assert error < 2e-2


def test_flops_follow_the_papers():
    batch, length, walks, channels, states = 2, 6, 4, 3, 5
    inputs = make_inputs(batch, length, walks, channels, states, optional=False)
    with FlopCounterMode(display=False) as counter:
        y = public(inputs)
    forward = batch * walks * (9 * length * channels * states + length * channels)
    assert counter.get_total_flops() == forward
    with FlopCounterMode(display=False) as counter:
        y.sum().backward()
    assert counter.get_total_flops() == 2 * forward
    with FlopCounterMode(display=False) as counter:
        public(shared_by_walks(inputs, "u", "delta"), sum_walks=True).sum().backward()
    assert counter.get_total_flops() == 3 * forward


@pytest.mark.parametrize("backend", ["default", "torch"])
def test_nothing_of_size_length_times_channels_times_states(backend, request):
    if backend == "torch":
        request.getfixturevalue("torch_backend")
    batch, length, walks, channels, states = 1, 256, 2, 8, 16
    inputs = make_inputs(batch, length, walks, channels, states, dtype=torch.float32)
    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            for x in out if isinstance(out, (tuple, list)) else [out]:
                if isinstance(x, torch.Tensor):
                    largest = max(largest, x.numel())
            return out

    with Watch():
        public(inputs).sum().backward()
    assert largest <= 2 * batch * length * walks * channels


def test_compile_and_export():
    inputs = make_inputs(2, 12, 2, 3, 2, dtype=torch.float32)

    def model(u):
        summed = public({**inputs, "u": u[:, :, :1]}, sum_walks=True)
        return public({**inputs, "u": u}).square() * summed[:, :, None]

    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    u = inputs["u"]
    torch.testing.assert_close(compiled(u), model(u))
    (actual,) = torch.autograd.grad(compiled(u).sum(), u)
    (expected,) = torch.autograd.grad(model(u).sum(), u)
    torch.testing.assert_close(actual, expected)

    class Module(torch.nn.Module):
        def forward(self, u, delta, A, B, C):
            apart = selective_scan(u, delta, A, B, C)
            return apart, selective_scan(u[:, :, :1], delta, A, B, C, sum_walks=True)

    arguments = tuple(inputs[k].detach() for k in ("u", "delta", "A", "B", "C"))
    exported = torch.export.export(Module(), arguments)
    torch.testing.assert_close(exported.module()(*arguments), Module()(*arguments))


@pytest.mark.parametrize(
    "change, words",
    [
        (dict(u=torch.zeros(2, 6, 3)), "u must have shape"),
        (dict(A=torch.zeros(3, 2)), "A must have shape"),
        (dict(u=torch.zeros(2, 6, 3, 3)), "u must have shape"),
        (dict(delta=torch.zeros(2, 6, 2, 4)), "delta must have shape"),
        (dict(delta=torch.zeros(2, 6, 1, 4)), "delta must have shape"),
        (dict(B=torch.zeros(2, 6, 1, 2)), "B must have shape"),
        (dict(B=torch.zeros(2, 6, 2, 3)), "B must have shape"),
        (dict(D=torch.zeros(3)), "D must have shape"),
        (dict(C=torch.zeros(2, 6, 2, 2, dtype=torch.int64)), "C must be floating point"),
        (dict(order=torch.zeros(2, 5, dtype=torch.int32)), "traversal.order must have shape"),
        (dict(order=torch.zeros(2, 6, dtype=torch.int64)), "traversal.order must be int32"),
        (dict(rest=None), "traversal.gap needs rest"),
    ],
)
def test_wrong_input_is_named(change, words):
    inputs = {**make_inputs(2, 6, 2, 3, 2), **change}
    with pytest.raises(ValueError, match=words):
        public(inputs)


def test_empty_input_is_refused():
    with pytest.raises(ValueError, match="at least 1"):
        public(make_inputs(2, 0, 2, 3, 2, optional=False))


# ------------------------------------------------------------------------------------------------ devices

TENSORS = ("delta", "A", "B", "C", "D", "delta_bias", "order", "source", "gap", "rest")


def with_one_elsewhere(name):
    """Inputs on the CPU but for one, which is on the device that has no memory."""
    inputs = make_inputs(2, 6, 2, 3, 2)
    return {**inputs, name: inputs[name].detach().to("meta")}


@pytest.mark.parametrize("name", TENSORS)
def test_inputs_on_two_devices_are_refused(name):
    written = f"traversal.{name}" if name in ("order", "source", "gap") else name
    words = f"^selective_scan: {written} must be on the device of u, cpu; got meta.$"
    with pytest.raises(ValueError, match=words):
        public(with_one_elsewhere(name))


@pytest.mark.parametrize("name", TENSORS)
def test_the_bare_operator_refuses_two_devices(name):
    """An exported program calls it so after a move to another device than its constants."""
    inputs = with_one_elsewhere(name)
    with pytest.raises(ValueError, match=f"{name} must be on the device of u, cpu; got meta"):
        torch.ops.mmvssm.selective_scan(*inputs.values(), True)


# ----------------------------------------------------------------------------------------- the definition


@pytest.mark.parametrize("name", [name for name in GRADIENTS if name != "u"])
def test_the_definition_computes_in_the_widest_dtype(name):
    """Any input may be the float64 one, not only ``u`` and ``A``."""
    narrow = make_inputs(2, 9, 2, 3, 2, dtype=torch.float32)
    inputs = {**narrow, name: narrow[name].double() * 1.1}
    wide = {
        k: x.double() if x is not None and x.is_floating_point() else x for k, x in inputs.items()
    }
    assert torch.equal(selective_scan_naive(**inputs), selective_scan_naive(**wide).float())
