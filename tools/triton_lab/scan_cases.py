"""Test inputs for the selective scan, for every backend, and the comparison with its definition."""

from __future__ import annotations

from typing import Callable, NamedTuple, Optional, Union

import torch
from torch import Tensor

from mmvssm.ops import cross_traversal
from mmvssm.ops.selective_scan.naive import selective_scan_naive

GRADIENTS = ("u", "delta", "A", "B", "C", "D", "delta_bias", "rest")
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}


class Case(NamedTuple):
    """One set of inputs.

    ``walk``: the given ones of order, source and gap; "images" for all of them with a different walk per image, or
    "grid" for those of a grid 7 tokens wide. ``layout``: see :func:`_lay_out`. ``sum_walks``: also give ``u`` and
    ``delta`` size 1 along the walks.
    """

    batch: int
    length: int
    walks: int
    channels: int
    states: int
    walk: Optional[str] = "images"
    layout: str = "plain"
    optional: bool = True
    softplus: bool = True
    dtype: torch.dtype = torch.float32
    extreme: bool = False
    sum_walks: bool = False

    def __str__(self):
        plain = Case(1, 1, 1, 1, 1)
        words = [f"{self.batch}x{self.length}x{self.walks}x{self.channels}x{self.states}"]
        words += [
            f"{field}={str(value).removeprefix('torch.')}"
            for field, value in self._asdict().items()
            if field in self._fields[5:] and value != getattr(plain, field)
        ]
        return "-".join(words)


CASES = [
    # Lengths around one and two chunks of 64 steps, and more.
    *(Case(1, length, 1, 3, 2) for length in (1, 63, 64, 65, 130)),
    Case(1, 600, 1, 1, 1),
    # Channels that fill less than a block, or several blocks.
    Case(1, 66, 1, 1, 1),
    Case(1, 66, 1, 33, 2),
    Case(1, 66, 2, 87, 1),
    Case(3, 65, 4, 3, 1),
    Case(1, 66, 1, 5, 16),
    # Optional arguments.
    Case(2, 70, 2, 3, 1, walk=None, optional=False),
    Case(1, 70, 2, 3, 2, walk=None, optional=False, softplus=False),
    Case(1, 70, 2, 3, 2, walk="order"),
    Case(2, 70, 2, 3, 2, walk="source"),
    Case(1, 70, 2, 3, 2, walk="gap", optional=False),
    Case(1, 77, 4, 3, 1, walk="grid"),
    # Memory layouts of tokens.
    Case(2, 21, 2, 3, 2, layout="expanded"),
    Case(2, 21, 2, 3, 2, layout="transposed"),
    Case(2, 21, 2, 3, 2, layout="sliced"),
    Case(2, 21, 2, 3, 2, layout="channels_first"),
    # Sums over the walks.
    Case(2, 21, 4, 3, 1, walk="grid", sum_walks=True),
    Case(1, 66, 2, 5, 3, dtype=torch.bfloat16, sum_walks=True),
    # Dtypes.
    Case(1, 100, 2, 5, 2, dtype=torch.bfloat16),
    Case(2, 98, 2, 33, 1, dtype=torch.bfloat16, walk="grid"),
    Case(1, 100, 2, 5, 2, dtype=torch.float16),
    Case(1, 100, 2, 5, 2, dtype=torch.float64),
    # Step sizes from e^-20 to 1e3, decay rates from -1e-4 to -1e4, values up to 1e4.
    Case(1, 200, 1, 5, 2, extreme=True),
    Case(1, 200, 1, 5, 2, extreme=True, dtype=torch.bfloat16),
]


def make_inputs(case: Case, device: str = "cpu") -> dict[str, Union[Tensor, bool, None]]:
    """Make arguments of ``selective_scan_naive``, except ``delta_softplus``, and ``grad_y``."""
    generator = torch.Generator().manual_seed(0)
    batch, length, walks, channels, states = case[:5]

    def randn(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    def between(low, high, *shape):
        return low + (high - low) * torch.rand(shape, generator=generator, dtype=torch.float64)

    tensors = dict(
        u=randn(batch, length, walks, channels),
        delta=randn(batch, length, walks, channels),
        A=-between(0.1, 1.5, walks, channels, states),
        B=randn(batch, length, walks, states),
        C=randn(batch, length, walks, states),
        D=randn(walks, channels) if case.optional else None,
        delta_bias=randn(walks, channels) if case.optional else None,
        rest=between(0, 1, walks, channels),
        grad_y=randn(batch, length, walks, channels),
    )
    if not case.softplus:
        tensors["delta"].abs_()
    if case.extreme:
        tensors["u"] *= 1e4
        low = between(-20, 5, *tensors["delta"].shape)
        high = between(5, 1e3, *tensors["delta"].shape)
        tensors["delta"] = torch.where(randn(*low.shape) < 1, low, high)
        tensors["A"] = -(10 ** between(-4, 4, *tensors["A"].shape))
    parameters = ("A", "D", "delta_bias", "rest")
    tensors = {
        name: x if x is None else x.to(device, _dtype(case, name in parameters))
        for name, x in tensors.items()
    }
    indices = _walk(case, generator)
    if indices["gap"] is None:
        tensors["rest"] = None
    indices = {name: x if x is None else x.to(device) for name, x in indices.items()}
    tensors = _lay_out(tensors, case.layout) | indices
    if case.sum_walks:
        tensors["u"], tensors["delta"] = (tensors[name][:, :, 1:2] for name in ("u", "delta"))
        tensors["grad_y"] = tensors["grad_y"][:, :, 0]
        tensors["sum_walks"] = True
    return tensors


def _dtype(case: Case, is_parameter: bool) -> torch.dtype:
    """Return the dtype; parameters stay in float32 if activations are in half precision, as under autocast."""
    return torch.float32 if is_parameter and case.dtype.itemsize == 2 else case.dtype


def _walk(case: Case, generator: torch.Generator) -> dict[str, Optional[Tensor]]:
    def permutation(*images):
        return torch.rand(*images, case.walks, case.length, generator=generator).argsort(-1).int()

    def gaps(*images):
        return torch.randint(0, 3, (*images, case.walks, case.length), generator=generator).int()

    order = source = gap = None
    if case.walk == "order":
        order = permutation()
    elif case.walk == "source":
        source = permutation(case.batch)
    elif case.walk == "gap":
        gap = gaps()
    elif case.walk == "images":
        order, source, gap = permutation(case.batch), permutation(), gaps(case.batch)
    elif case.walk == "grid":
        order = cross_traversal(case.length // 7, 7).order[: case.walks]
    return dict(order=order, source=source, gap=gap)


def _lay_out(tensors: dict[str, Optional[Tensor]], layout: str) -> dict[str, Optional[Tensor]]:
    """Change the memory layout of tensors."""
    tensors = dict(tensors)
    activations = ("u", "delta", "B", "C", "grad_y")
    if layout == "expanded":  # along walks, and the gradient of a sum
        tensors["u"] = tensors["u"][:, :, :1].expand_as(tensors["u"])
        tensors["delta"] = tensors["delta"][:, :, :1].expand_as(tensors["delta"])
        tensors["grad_y"] = tensors["grad_y"][:1, :1, :1, :1].expand_as(tensors["grad_y"])
    elif layout == "transposed":  # (B, K, L, *) in memory
        for name in activations:
            tensors[name] = tensors[name].transpose(1, 2).contiguous().transpose(1, 2)
    elif layout == "sliced":  # out of one wider tensor, as the projections of a model are
        wide = torch.cat([tensors[name] for name in activations], dim=-1)
        widths = [tensors[name].shape[-1] for name in activations]
        tensors |= dict(zip(activations, wide.split(widths, dim=-1)))
    elif layout == "channels_first":  # (B, K, *, L) in memory: channels are not adjacent
        for name in activations:
            tensors[name] = tensors[name].permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
    return tensors


Run = Callable[[dict[str, Optional[Tensor]], bool], dict[str, Optional[Tensor]]]


def check(case: Case, run: Run, device: str = "cpu") -> None:
    """Compare ``run(inputs, delta_softplus)``, which returns ``y`` and the gradients by name, with the definition.

    The definition computes in float64 on the CPU, from the same rounded inputs. Errors are relative to the largest
    value.
    """
    inputs = make_inputs(case, device)
    results = run(dict(inputs), case.softplus)
    for name, expected in _defined(inputs, case.softplus).items():
        result = results[name]
        assert result.shape == expected.shape, name
        assert result.is_contiguous(), name
        assert result.dtype == (inputs["u"] if name == "y" else inputs[name]).dtype, name
        result = result.double().cpu()
        assert result.isfinite().all(), name
        error = (result - expected).abs().max() / expected.abs().max().clamp_min(1e-30)
        assert error < TOLERANCE[case.dtype], f"{name}: relative error {error:.1e}"


def _defined(inputs: dict[str, Optional[Tensor]], softplus: bool) -> dict[str, Tensor]:
    # On the CPU for any device, so that a GPU's profilers do not see its thousands of kernels.
    wide = {name: x.detach().cpu() if isinstance(x, Tensor) else x for name, x in inputs.items()}
    wide = {
        name: x.double() if isinstance(x, Tensor) and x.is_floating_point() else x
        for name, x in wide.items()
    }
    grad_y = wide.pop("grad_y")
    names = [name for name in GRADIENTS if wide[name] is not None]
    leaves = [wide[name].requires_grad_() for name in names]
    y = selective_scan_naive(**wide, delta_softplus=softplus)
    return dict(y=y.detach()) | dict(zip(names, torch.autograd.grad(y, leaves, grad_y)))
