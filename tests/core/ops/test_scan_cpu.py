"""The compiled CPU scan against the definition, for every shape, layout and option that its code treats differently."""

import ast
import itertools
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

from mmvssm.ops import backend
from mmvssm.ops.selective_scan import cpu as scan_cpu
from mmvssm.ops.selective_scan import pytorch as scan_torch
from mmvssm.ops.selective_scan.inputs import ScanInputs
from mmvssm.ops.selective_scan.naive import selective_scan_naive

LIBRARY, REASON = scan_cpu._load()
needs_library = pytest.mark.skipif(
    LIBRARY is None, reason=f"no compiled CPU scan: {REASON or 'loaded'}"
)

DIFFERENTIABLE = ("u", "delta", "A", "B", "C", "D", "delta_bias", "rest")
ALL = frozenset(("D", "delta_bias", "order", "source", "gap", "softplus"))
PLAIN = frozenset(("softplus",))


def problem(batch, length, walks, channels, states, options=ALL, dtype=torch.float32, seed=0):
    """Inputs by name; ``options`` names the optional ones that are there."""
    random = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=random)

    def uniform(low, high, *shape):
        return torch.rand(*shape, generator=random) * (high - low) + low

    def permutations(*shape):
        return uniform(0, 1, *shape, length).argsort(-1).int()

    soft = "softplus" in options
    has_gap = "gap" in options
    rows = (batch, length, walks)
    return {
        "u": normal(*rows, channels).to(dtype),
        "delta": (normal(*rows, channels) if soft else uniform(0, 1, *rows, channels)).to(dtype),
        "A": uniform(-2, -0.05, walks, channels, states),
        "B": normal(*rows, states).to(dtype),
        "C": normal(*rows, states).to(dtype),
        "D": normal(walks, channels) if "D" in options else None,
        "delta_bias": uniform(0, 1, walks, channels) if "delta_bias" in options else None,
        "order": permutations(batch, walks) if "order" in options else None,
        "source": permutations(walks) if "source" in options else None,
        "gap": (uniform(0, 3, walks, length)).int() if has_gap else None,
        "rest": uniform(0, 1, walks, channels) if has_gap else None,
        "delta_softplus": soft,
    }


def as_float64(inputs):
    return {
        name: x.detach().double() if torch.is_tensor(x) and x.is_floating_point() else x
        for name, x in inputs.items()
    }


def compiled(inputs, grad_y):
    """Output and gradients by name."""
    scan = ScanInputs(**inputs)
    y, states = scan_cpu.forward(scan)
    grads = scan_cpu.backward(scan.grad_of_each_walk(grad_y), scan, states)
    for name, grad in zip(DIFFERENTIABLE, grads):
        x = inputs[name]
        assert grad.dtype == (inputs["u"] if x is None else x).dtype
        assert grad.shape == ((0,) if x is None else x.shape)
        assert grad.is_contiguous()
    assert y.dtype == inputs["u"].dtype and y.is_contiguous()
    return {"y": y, **{name: g for name, g in zip(DIFFERENTIABLE, grads) if g.numel()}}


def definition(inputs, grad_y):
    inputs = {
        name: x.requires_grad_() if torch.is_tensor(x) and x.is_floating_point() else x
        for name, x in as_float64(inputs).items()
    }
    y = selective_scan_naive(**inputs)
    y.backward(grad_y.double())
    grads = {name: inputs[name].grad for name in DIFFERENTIABLE if inputs[name] is not None}
    return {"y": y.detach(), **grads}


def vectorised(inputs, grad_y):
    """The PyTorch backend in float64: faster than the definition, and tested against it elsewhere."""
    inputs = as_float64(inputs)
    scan = ScanInputs(**inputs)
    y, states = scan_torch.forward(scan)
    grads = scan_torch.backward(scan.grad_of_each_walk(grad_y.double()), scan, states)
    return {"y": y, **{name: g for name, g in zip(DIFFERENTIABLE, grads) if g.numel()}}


def assert_close(actual, expected, tolerance):
    assert actual.keys() == expected.keys()
    for name, want in expected.items():
        error = (actual[name].double() - want).abs().max() / want.abs().max().clamp(min=1e-30)
        assert error < tolerance, f"{name}: relative error {error:.1e}"


def random_gradient(inputs):
    random = torch.Generator().manual_seed(1)
    return torch.randn(ScanInputs(**inputs).y_shape, generator=random).to(inputs["u"].dtype)


def check(inputs, against=vectorised, tolerance=1e-5):
    grad_y = random_gradient(inputs)
    actual = compiled(inputs, grad_y)
    assert_close(actual, against(inputs, grad_y), tolerance)
    return actual


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture
def instruction_set():
    yield LIBRARY.scan_limit_instruction_set
    LIBRARY.scan_limit_instruction_set(2)


@needs_library
@pytest.mark.parametrize("channels", [1, 3, 17, 48, 87])
@pytest.mark.parametrize("length", [1, 63, 64, 65, 257])
def test_equals_the_definition(length, channels):
    states = {1: 16, 3: 2, 17: 8, 48: 16, 87: 1}[channels]
    check(problem(3 if length < 100 else 1, length, 2, channels, states), definition)


@needs_library
@pytest.mark.parametrize("states", [1, 2, 5, 8, 16, 20])
@pytest.mark.parametrize("walks", [1, 4])
def test_states_and_walks(states, walks):
    check(problem(2, 130, walks, 33, states))


@needs_library
@pytest.mark.parametrize(
    "options",
    [frozenset(c) for n in range(len(ALL) + 1) for c in itertools.combinations(sorted(ALL), n)],
    ids=lambda options: "+".join(sorted(options)) or "none",
)
def test_every_combination_of_options(options):
    check(problem(2, 70, 2, 19, 1, options))


@needs_library
@pytest.mark.parametrize("limit", [0, 1, 2])
@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str
)
def test_instruction_sets(instruction_set, limit, dtype):
    if instruction_set(limit) != limit:
        pytest.skip("this processor has no such instructions")
    tolerance = {torch.float32: 1e-5, torch.float64: 1e-12}.get(dtype, 1e-2)
    for states in (1, 8, 16):
        inputs = problem(2, 70, 2, 87, states, dtype=dtype)
        if dtype == torch.float64:
            inputs = as_float64(inputs)
        check(inputs, tolerance=tolerance)


@needs_library
def test_float64_equals_the_definition():
    check(as_float64(problem(1, 65, 2, 9, 3)), definition, 1e-12)


@needs_library
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_narrow_dtypes_accumulate_in_float32(dtype):
    # Small steps that add up: a state of the inputs' dtype would stop growing after a few hundred.
    inputs = problem(1, 2000, 1, 16, 1, PLAIN, dtype)
    inputs["u"].fill_(1), inputs["delta"].fill_(-6), inputs["B"].fill_(1), inputs["C"].fill_(1)
    inputs["A"].fill_(-1e-3)
    y, states = scan_cpu.forward(ScanInputs(**inputs))
    expected, _ = scan_torch.forward(ScanInputs(**as_float64(inputs)))
    assert states.dtype == torch.float32
    # Nothing is lost but in rounding the output.
    assert torch.equal(y, expected.to(dtype)) or ((y - expected).abs() / expected).max() < 2**-8


@needs_library
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_output_is_rounded_to_nearest(dtype):
    # A scan that does nothing but multiply by D = 1 or 1/3: the only error is that of the conversion.
    bits = torch.arange(65536, dtype=torch.int32).to(torch.int16).view(dtype)
    u = bits.reshape(1024, 1, 1, 64)  # sequences of one token: nothing spreads
    zero = torch.zeros(1024, 1, 1, 1, dtype=dtype)
    for D in (1.0, 1 / 3):
        skip = torch.full((1, 64), D)
        y, _ = scan_cpu.forward(
            ScanInputs(u, torch.full_like(u, -torch.inf), -torch.ones(1, 64, 1), zero, zero, skip)
        )
        finite = u.isfinite()
        assert torch.equal(y[finite], (u.float() * skip[0, 0]).to(dtype)[finite])
    assert not y[~finite].isfinite().any()


@needs_library
def test_mixed_dtypes():
    inputs = problem(1, 70, 2, 19, 4)
    inputs["u"] = inputs["u"].bfloat16()
    inputs["B"] = inputs["B"].bfloat16()
    inputs["A"] = inputs["A"].bfloat16()
    check(inputs, tolerance=1e-2)
    inputs["delta"] = inputs["delta"].double()
    assert scan_cpu.forward(ScanInputs(**inputs))[1].dtype == torch.float64


@needs_library
def test_strides():
    inputs = problem(2, 70, 3, 24, 2)
    random = torch.Generator().manual_seed(2)
    projection = torch.randn(2, 70, 3, 2 * 24 + 4, generator=random)
    inputs["u"], inputs["delta"], inputs["B"], inputs["C"] = projection.split((24, 24, 2, 2), -1)
    check(inputs)
    inputs["u"] = projection[:, :, :1, :24].expand(-1, -1, 3, -1)  # shared by the walks
    inputs["delta"] = torch.randn(3, 70, 2, 24, generator=random).permute(2, 1, 0, 3)
    check(inputs)
    inputs["u"] = torch.randn(24, 70, 3, 2, generator=random).permute(3, 1, 2, 0)  # channels first
    inputs["order"] = inputs["order"].flip(-1).transpose(0, 1).contiguous().transpose(0, 1)
    check(inputs)
    y, states = scan_cpu.forward(ScanInputs(**inputs))
    ones = torch.ones(1).expand_as(y)  # the gradient that sum() sends
    for strided, plain in zip(
        scan_cpu.backward(ones, ScanInputs(**inputs), states),
        scan_cpu.backward(ones.contiguous(), ScanInputs(**inputs), states),
    ):
        assert torch.equal(strided, plain)


@needs_library
def test_saved_states():
    inputs = problem(2, 200, 2, 20, 3)
    _, states = scan_cpu.forward(ScanInputs(**inputs))
    _, expected = scan_torch.forward(ScanInputs(**as_float64(inputs)))
    assert_close({"states": states}, {"states": expected}, 1e-5)


@needs_library
@pytest.mark.parametrize("states", [1, 3, 16])
def test_stretches_of_a_sequence_for_many_threads(threads, states):
    # One walk of few channels cannot occupy these threads in any other way.
    inputs = problem(1, 2113, 1, 20, states)
    threads(1)
    single = check(inputs)
    threads(13)
    many = check(inputs)
    assert_close(many, {name: x.double() for name, x in single.items()}, 1e-5)


@needs_library
@pytest.mark.parametrize("states", [1, 16])
def test_two_runs_give_the_same_bits(threads, states):
    inputs = problem(2, 1100, 2, 150, states)
    grad_y = torch.ones_like(inputs["u"])
    runs = []
    for count in (2, 2, 1, 3):
        threads(count)
        runs.append(compiled(inputs, grad_y))
    for run in runs[1:]:
        for name, x in run.items():
            assert torch.equal(x, runs[0][name]), name


@needs_library
@pytest.mark.parametrize("low, high", [(-20, -15), (-1, 1), (10, 1e3)])
@pytest.mark.parametrize("decay", [-1e-4, -1.0, -1e4])
@pytest.mark.parametrize("options", [PLAIN, ALL], ids=["plain", "all"])
def test_extreme_values(low, high, decay, options):
    inputs = problem(1, 300, 2, 20, 2, options)
    random = torch.Generator().manual_seed(3)
    inputs["delta"] = torch.rand(1, 300, 2, 20, generator=random) * (high - low) + low
    inputs["A"].fill_(decay)
    for name in ("u", "B", "C"):
        inputs[name] = inputs[name] * 1e4
    grad_y = torch.ones_like(inputs["u"])
    actual, expected = compiled(inputs, grad_y), vectorised(inputs, grad_y)
    for name, want in expected.items():
        fits = want.abs() < torch.finfo(torch.float32).max
        assert actual[name][fits].isfinite().all(), name
    assert_close({"y": actual["y"]}, {"y": expected["y"]}, 1e-5)


@needs_library
def test_nan_and_infinity():
    inputs = problem(1, 10, 1, 20, 1, PLAIN)
    inputs["u"][0, 4, 0, 3] = torch.nan
    inputs["delta"][0, 4, 0, 5] = torch.nan
    inputs["delta"][0, 6, 0, 7] = torch.inf
    inputs["delta"][0, 6, 0, 9] = -torch.inf
    y, _ = scan_cpu.forward(ScanInputs(**inputs))
    expected = selective_scan_naive(**as_float64(inputs))
    assert torch.equal(y.isfinite(), expected.isfinite())
    assert torch.equal(y.isnan(), expected.isnan())


@needs_library
def test_a_step_of_size_zero_leaves_the_state_to_the_bit():
    inputs = problem(1, 65, 1, 20, 2, PLAIN)
    inputs["delta"][:, 1:] = -torch.inf
    _, states = scan_cpu.forward(ScanInputs(**inputs))
    inputs["delta"] = inputs["delta"][:, :1].expand(-1, 65, -1, -1).clone()
    inputs["delta"][:, 1:64] = -torch.inf
    assert torch.equal(states, scan_cpu.forward(ScanInputs(**inputs))[1])
    assert states[:, :, 1].abs().min() > 0


SHAREABLE = {"u": 2, "delta": 2, "C": 2, "A": 0, "D": 0, "delta_bias": 0, "rest": 0, "source": 0}
"""The inputs that all walks may have in common, and which of their dimensions are the walks."""


def shared_problem(batch, length, channels, states, options=ALL, walks=4, dtype=torch.float32):
    """Make a :func:`problem` whose walks differ only in ``B``, order and gap. Some gaps are large."""
    inputs = problem(batch, length, walks, channels, states, options, dtype)
    for name, dim in SHAREABLE.items():
        if inputs[name] is not None:
            inputs[name] = inputs[name].narrow(dim, 0, 1).expand_as(inputs[name])
    if inputs["gap"] is not None:
        random = torch.Generator().manual_seed(4)
        wide = torch.randint(0, 100, (walks, length), generator=random, dtype=torch.int32)
        inputs["gap"] = torch.where(wide < 20, wide, inputs["gap"])
    return inputs


def without(*options):
    return ALL - set(options)


def summed(inputs, one=("u", "delta")):
    """The same with the walks summed, and those of ``u`` and ``delta`` that they share with size 1."""
    alike = {name: inputs[name][:, :, :1] for name in one}
    return {**inputs, **alike, "sum_walks": True}


@needs_library
@pytest.mark.parametrize("one", [(), ("u",), ("delta",), ("u", "delta")], ids="+".join)
@pytest.mark.parametrize("channels", [1, 17, 48])
@pytest.mark.parametrize("length", [1, 63, 64, 130])
def test_walks_summed(length, channels, one):
    states = {1: 16, 17: 1, 48: 3}[channels]
    check(summed(problem(3 if length < 100 else 1, length, 4, channels, states), one), definition)


@needs_library
@pytest.mark.parametrize("options", [ALL, PLAIN], ids=["all", "plain"])
@pytest.mark.parametrize("states", [1, 3, 16])
def test_shared_walks_summed(states, options):
    inputs = summed(shared_problem(2, 130, 33, states, options))
    assert scan_cpu.runs_walks_together(ScanInputs(**inputs)) == (states > 1)
    check(inputs, definition)


@needs_library
@pytest.mark.parametrize("limit", [0, 1, 2])
@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str
)
def test_walks_summed_with_every_instruction_set(instruction_set, limit, dtype):
    if instruction_set(limit) != limit:
        pytest.skip("this processor has no such instructions")
    tolerance = {torch.float32: 1e-5, torch.float64: 1e-12}.get(dtype, 1e-2)
    for make, states in ((problem, 1), (problem, 16), (shared_problem, 16)):
        if make is problem:
            inputs = summed(problem(2, 70, 4, 87, states, dtype=dtype), ("u",))
        else:
            inputs = summed(shared_problem(2, 70, 87, states, dtype=dtype))
        if dtype == torch.float64:
            inputs = as_float64(inputs)
        check(inputs, tolerance=tolerance)


@needs_library
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_sum_of_walks_is_rounded_once(dtype):
    """Outputs of 1 and three of 1/512, of which bfloat16 would lose each on its own."""
    u = torch.ones(1, 5, 1, 16, dtype=dtype)
    zero = torch.zeros(1, 5, 4, 1, dtype=dtype)
    skip = torch.tensor([1, 2**-9, 2**-9, 2**-9]).expand(16, 4).t()
    inputs = ScanInputs(u, u, -torch.ones(4, 16, 1), zero, zero, skip, sum_walks=True)
    y, _ = scan_cpu.forward(inputs)
    assert torch.equal(y, torch.full((1, 5, 16), 1 + 3 * 2**-9).to(dtype)) and (y > 1).all()


@needs_library
def test_strides_of_walks_summed():
    """Slices of one projection, channels that are not adjacent, and the gradient that sum() sends."""
    inputs = summed(problem(2, 70, 4, 24, 2))
    random = torch.Generator().manual_seed(2)
    projection = torch.randn(2, 70, 4, 2 * 24 + 4, generator=random)
    _, inputs["delta"], inputs["B"], inputs["C"] = projection.split((24, 24, 2, 2), -1)
    inputs["u"] = projection[:, :, 1:2, :24]
    check(inputs)
    inputs["u"] = torch.randn(24, 70, 1, 2, generator=random).permute(3, 1, 2, 0)
    inputs["order"] = inputs["order"].flip(-1).transpose(0, 1).contiguous().transpose(0, 1)
    check(inputs)
    ones = torch.ones(1).expand(2, 70, 24)
    strided, plain = compiled(inputs, ones), compiled(inputs, ones.contiguous())
    assert all(torch.equal(strided[name], plain[name]) for name in plain)


@needs_library
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("states", [1, 16])
@pytest.mark.parametrize("make", [problem, shared_problem], ids=["apart", "shared"])
def test_the_sum_of_walks_does_not_depend_on_threads(threads, make, states, dtype):
    """More threads than tasks of all walks: the walks run side by side, and their terms are added up afterwards."""
    sizes = (1, 300, 4, 33, states) if make is problem else (1, 300, 33, states)
    inputs = summed(make(*sizes, dtype=dtype))
    grad_y = random_gradient(inputs)
    threads(1)
    first = check(inputs, tolerance=1e-5 if dtype == torch.float32 else 1e-2)
    for count in (2, 11):
        threads(count)
        for name, x in compiled(inputs, grad_y).items():
            assert torch.equal(x, first[name]), name


@needs_library
@pytest.mark.parametrize("states", [1, 3])
def test_stretches_of_walks_summed(threads, states):
    inputs = summed(problem(1, 2113, 2, 20, states))
    threads(13)
    check(inputs)


@needs_library
@pytest.mark.parametrize("options", [ALL, without("gap"), without("order", "source")], ids=len)
@pytest.mark.parametrize("length", [1, 63, 64, 65, 130, 600])
def test_shared_walks(length, options):
    batch, channels, states = {1: (3, 5, 16), 63: (3, 33, 8), 65: (3, 1, 3)}.get(
        length, (1, 87, 16)
    )
    inputs = shared_problem(batch, length, channels, states, options)
    assert scan_cpu.runs_walks_together(ScanInputs(**inputs))
    check(inputs, definition)


@needs_library
@pytest.mark.parametrize("states", [1, 3, 8, 16, 20])
@pytest.mark.parametrize("channels", [1, 5, 33, 87])
@pytest.mark.parametrize("options", [ALL, PLAIN], ids=["all", "plain"])
def test_shared_walks_of_any_width(threads, states, channels, options):
    inputs = shared_problem(3, 130, channels, states, options)
    inputs["B"] = inputs["B"].transpose(1, 2).contiguous().transpose(1, 2)
    threads(1)
    first = check(inputs)
    for count in (1, 2):
        threads(count)
        assert scan_cpu.runs_walks_together(ScanInputs(**inputs)) == (states > 1)
        again = compiled(inputs, random_gradient(inputs))
        for name, x in again.items():
            assert torch.equal(x, first[name]), name


@needs_library
@pytest.mark.parametrize("limit", [0, 1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_shared_walks_with_every_instruction_set(instruction_set, limit, dtype):
    if instruction_set(limit) != limit:
        pytest.skip("this processor has no such instructions")
    for states in (3, 8, 16):
        inputs = shared_problem(2, 70, 87, states, dtype=dtype)
        assert scan_cpu.runs_walks_together(ScanInputs(**inputs))
        check(inputs, tolerance=1e-5 if dtype == torch.float32 else 1e-2)


@needs_library
def test_walks_run_together_in_float64():
    inputs = as_float64(problem(1, 130, 4, 9, 3))
    for name, dim in SHAREABLE.items():
        inputs[name] = inputs[name].narrow(dim, 0, 1).expand_as(inputs[name])
    assert scan_cpu.runs_walks_together(ScanInputs(**inputs))
    check(inputs, definition, 1e-12)


@needs_library
@pytest.mark.parametrize("name", SHAREABLE)
def test_walks_that_share_almost_everything_run_apart(name):
    inputs = shared_problem(2, 70, 33, 4)
    assert scan_cpu.runs_walks_together(ScanInputs(**inputs))
    inputs[name] = inputs[name].clone(memory_format=torch.contiguous_format)
    if name != "source":
        inputs[name].select(SHAREABLE[name], 1).mul_(0.5)
    assert not scan_cpu.runs_walks_together(ScanInputs(**inputs))
    check(inputs)


@needs_library
def test_walks_run_together_where_that_pays(threads):
    inputs = shared_problem(1, 70, 33, 4)
    threads(1)
    assert scan_cpu.runs_walks_together(ScanInputs(**inputs))
    assert scan_cpu.runs_walks_together(ScanInputs(**{**inputs, "source": None, "order": None}))
    # Each walk reads delta, B and C where it stands.
    assert not scan_cpu.runs_walks_together(ScanInputs(**{**inputs, "source": None}))
    assert not scan_cpu.runs_walks_together(ScanInputs(**shared_problem(1, 70, 33, 1)))
    assert not scan_cpu.runs_walks_together(ScanInputs(**shared_problem(1, 70, 33, 4, walks=1)))
    threads(16)  # more than vectors of 33 channels
    assert not scan_cpu.runs_walks_together(ScanInputs(**inputs))
    check(inputs)


@needs_library
def test_shared_walks_save_their_states():
    inputs = shared_problem(2, 200, 20, 3)
    _, states = scan_cpu.forward(ScanInputs(**inputs))
    _, expected = scan_torch.forward(ScanInputs(**as_float64(inputs)))
    assert_close({"states": states}, {"states": expected}, 1e-5)


@needs_library
@pytest.mark.parametrize("low, high", [(-20, -15), (-1, 1), (10, 1e3)])
@pytest.mark.parametrize("decay", [-1e-4, -1.0, -1e4])
@pytest.mark.parametrize("rest", [0.0, 1e-6, 1.0, 1e3])
def test_extreme_values_of_shared_walks(low, high, decay, rest):
    inputs = shared_problem(1, 300, 20, 2)
    random = torch.Generator().manual_seed(3)
    delta = torch.rand(1, 300, 1, 20, generator=random) * (high - low) + low
    inputs["delta"] = delta.expand(-1, -1, 4, -1)
    inputs["A"] = torch.full((1, 20, 2), decay).expand(4, -1, -1)
    inputs["rest"] = torch.full((1, 20), rest).expand(4, -1)
    for name in ("B", "C"):
        inputs[name] = inputs[name][:, :, :1].expand(-1, -1, 4, -1) * 1e4
    inputs["C"] = inputs["C"][:, :, :1].expand(-1, -1, 4, -1)
    assert scan_cpu.runs_walks_together(ScanInputs(**inputs))
    y, _ = scan_cpu.forward(ScanInputs(**inputs))
    expected, _ = scan_torch.forward(ScanInputs(**as_float64(inputs)))
    assert_close({"y": y}, {"y": expected}, 1e-5)


@needs_library
@pytest.mark.parametrize("decay, step, rest", [(-2.0, -60.0, 60.0), (-2.0, 60.0, -60.0)])
def test_a_step_that_undoes_a_gap(decay, step, rest):
    # exp(step A) and exp(rest A) are 0 and infinite, their product is not.
    inputs = shared_problem(1, 3, 20, 2, frozenset(("gap",)))
    inputs["delta"] = torch.full((1, 3, 1, 20), step).expand(-1, -1, 4, -1)
    inputs["A"] = torch.full((1, 20, 2), decay).expand(4, -1, -1)
    inputs["gap"] = torch.ones_like(inputs["gap"])
    inputs["rest"] = torch.full((1, 20), rest).expand(4, -1)
    assert scan_cpu.runs_walks_together(ScanInputs(**inputs))
    check(inputs)


@needs_library
def test_nan_and_infinity_in_shared_walks():
    inputs = shared_problem(1, 10, 20, 2, frozenset(("softplus", "gap")))
    u, delta = inputs["u"][:, :, :1].clone(), inputs["delta"][:, :, :1].clone()
    u[0, 4, 0, 3] = torch.nan
    delta[0, 4, 0, 5] = torch.nan
    delta[0, 6, 0, 7] = torch.inf
    delta[0, 6, 0, 9] = -torch.inf
    inputs["u"], inputs["delta"] = (x.expand(-1, -1, 4, -1) for x in (u, delta))
    assert scan_cpu.runs_walks_together(ScanInputs(**inputs))
    y, _ = scan_cpu.forward(ScanInputs(**inputs))
    expected = selective_scan_naive(**as_float64(inputs))
    assert torch.equal(y.isfinite(), expected.isfinite())
    assert torch.equal(y.isnan(), expected.isnan())


@needs_library
@pytest.mark.parametrize("name", ["order", "source"])
@pytest.mark.parametrize("wrong", [-1, 70, 2**31 - 1])
def test_index_out_of_range(name, wrong):
    inputs = problem(2, 70, 2, 5, 1)
    y, states = scan_cpu.forward(ScanInputs(**inputs))
    inputs[name] = inputs[name].clone()
    inputs[name][..., -1, 69] = wrong
    with pytest.raises(IndexError, match=f"traversal.{name}"):
        scan_cpu.forward(ScanInputs(**inputs))
    with pytest.raises(IndexError, match=f"traversal.{name}"):
        scan_cpu.backward(y, ScanInputs(**inputs), states)


@needs_library
def test_repeated_index():
    # Where something is written, each token must be visited once; reading a token twice is fine.
    inputs = problem(2, 70, 2, 5, 1)
    repeated = inputs["order"].clone()
    repeated[1, 1, 3] = repeated[1, 1, 4]
    with pytest.raises(ValueError, match=r"traversal.order must visit every token exactly once"):
        scan_cpu.forward(ScanInputs(**{**inputs, "order": repeated}))
    inputs["source"] = repeated
    y, states = scan_cpu.forward(ScanInputs(**inputs))
    expected = selective_scan_naive(**as_float64(inputs))
    assert_close({"y": y}, {"y": expected}, 1e-5)
    with pytest.raises(ValueError, match=r"traversal.source must visit every token exactly once"):
        scan_cpu.backward(y, ScanInputs(**inputs), states)


@needs_library
@pytest.mark.slow
def test_shares_the_thread_pool_of_torch():
    code = (
        "import torch, ctypes\n"
        "from mmvssm.ops.selective_scan import cpu as scan_cpu\n"
        "assert scan_cpu.available()\n"
        "with open('/proc/self/maps') as maps:\n"
        "    print({line.split()[-1] for line in maps if 'omp' in line.rsplit('/')[-1]})\n"
    )
    if not sys.platform.startswith("linux"):
        pytest.skip("reads /proc")
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    runtimes = ast.literal_eval(run.stdout)
    assert len([path for path in runtimes if "gomp" in path or "libomp" in path]) <= 1, runtimes


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """The module as if the library belonged into an empty folder."""
    monkeypatch.setattr(backend, "_LIBRARY", tmp_path / "_kernels.so")
    scan_cpu._load.cache_clear()
    backend.warn_no_library.cache_clear()
    yield tmp_path
    monkeypatch.undo()
    scan_cpu._load.cache_clear()
    backend.warn_no_library.cache_clear()


def test_missing_library_warns_once(elsewhere):
    with pytest.warns(RuntimeWarning, match=r"were not built.*many times slower.*reinstall"):
        assert not scan_cpu.available()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not scan_cpu.available()


@needs_library
@pytest.mark.parametrize("share", [0.0001, 0.01, 0.5, 0.99])
def test_part_of_a_library_warns(elsewhere, share):
    """To load one would end the process by SIGBUS."""
    content = (Path(backend.__file__).parent / "_kernels.so").read_bytes()
    (elsewhere / "_kernels.so").write_bytes(content[: int(share * len(content))])
    with pytest.warns(RuntimeWarning, match="only part of a file|cannot be loaded"):
        assert not scan_cpu.available()


@needs_library
def test_library_without_a_function_warns(monkeypatch, elsewhere):
    monkeypatch.undo()
    scan_cpu._load.cache_clear()
    assert backend.load_library("scan", scan_cpu._INTERFACE_VERSION, scan_cpu._Scan, ["forward"])[0]
    library, reason = backend.load_library(
        "scan", scan_cpu._INTERFACE_VERSION, scan_cpu._Scan, ["forward", "sideways"]
    )
    assert library is None and "another version" in reason


def test_library_that_cannot_be_loaded_warns(elsewhere):
    (elsewhere / "_kernels.so").write_bytes(b"for another machine")
    with pytest.warns(RuntimeWarning, match="cannot be loaded"):
        assert not scan_cpu.available()
