"""Selective scan on CUDA GPUs: choice of Triton kernels, grids and arguments.

:func:`forward` and :func:`backward` keep the contract of ``pytorch.py``. The mathematics is in the kernels' modules:
``triton_kernels_scalar.py`` for one state per channel, ``triton_kernels_states.py`` for several, and
``triton_kernels_gradients.py`` for the backward pass of both. Kernels gather tokens in place. Sums across programs
have a fixed order, so two runs agree bit for bit.

Walks are summed by PyTorch: programs that add to one output would need a fixed order (see ``docs/benchmarks.md``).

``order`` and ``source`` are not checked: an entry outside the tokens reads or writes foreign memory.

Launches depend only on shapes, strides and dtypes. We compute them once for each combination and cache them as
:class:`_Plan`. Block sizes follow fixed rules: autotuning would stall the start of a training.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Optional

import torch
from torch import Tensor

from ..triton_launcher import launch
from .inputs import CHUNK_LENGTH, ScanInputs, num_chunks

SINGLE_PASS = False
"""Whether one state per channel is scanned in a single pass, whose programs wait for earlier programs.

It reads ``u`` and ``delta`` once instead of twice. It has not run on a GPU yet, where it could hang.
"""

# Steps that a thread loads ahead.
_STEPS = 8
# Most steps of a thread in the kernels for one state; fewer if the GPU would be idle otherwise.
_LONGEST_RUN = 128
# Threads (one state), or warps (several states), that fill a GPU of about 130 multiprocessors.
_THREADS_WANTED, _WARPS_WANTED = 36000, 2048
# Threads per program of the kernels for one state.
_THREADS = 256
# Single pass: steps that a thread holds in registers; threads per program, so few that two programs share a
# multiprocessor and one loads while the other computes; tiles per published block.
_TILE_STEPS, _TILE_THREADS, _BLOCK = 32, 128, 16
# Most states of a channel that a thread holds in registers.
_MOST_STATES = 16
# ``gradients``: channels per thread, and threads side by side along the channels.
_GRADIENT_CHANNELS, _GRADIENT_LANES = 2, 4
# ``hand_over``: groups of ``_STEPS`` spans, and columns.
_GROUPS, _COLUMNS = 32, 8
# Weights per program of ``weights_by_step`` and ``weights_by_token``.
_WEIGHTS = 2048


def forward(inputs: ScanInputs) -> tuple[Tensor, Tensor]:
    """Run the scan: see :func:`mmvssm.ops.selective_scan.pytorch.forward`."""
    inputs = inputs.for_each_walk()
    plan = _cached_plan(_plan_forward, inputs)
    tensors = plan.with_contiguous(inputs._asdict())
    u = inputs.u
    y = u.new_empty(plan.shape)
    states = u.new_empty(plan.states_shape, dtype=plan.dtype)
    tensors.update(y=y, states=states)
    _run(plan, tensors, u)
    return y.sum(2) if inputs.sum_walks else y, states


def backward(
    grad_y: Tensor, inputs: ScanInputs, states: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Differentiate the scan: see :func:`mmvssm.ops.selective_scan.pytorch.backward`."""
    shapes = inputs.u.shape, inputs.delta.shape
    inputs = inputs.for_each_walk()
    u, delta, A, B, C, D, delta_bias, _, _, gap, rest, *_ = inputs
    plan = _cached_plan(_plan_backward, inputs, grad_y)
    tensors = plan.with_contiguous({**inputs._asdict(), "dy": grad_y})
    tensors["states"] = states
    if states.shape[2] == 1:
        tensors["adjoints"] = torch.zeros_like(states)
    for name, x in (("du", u), ("ddelta", delta), ("dB", B), ("dC", C)):
        tensors[name] = x.new_empty(x.shape)
    tensors["dA"] = dA = states.new_empty(states.shape)
    of_chunks = {}
    for name, x in (("dD", D), ("ddelta_bias", delta_bias), ("drest", rest)):
        tensors[name] = of_chunks[name] = None
        if x is not None:
            tensors[name] = of_chunks[name] = states.new_empty(states.shape[:-1])
    if rest is not None and gap is None:
        of_chunks["drest"].zero_()
    _run(plan, tensors, u)
    return (
        *(tensors[name].sum_to_size(shape) for name, shape in zip(("du", "ddelta"), shapes)),
        *(_sum_chunks(dA, A), tensors["dB"], tensors["dC"]),
        *(
            u.new_empty(0) if x is None else _sum_chunks(parts, x)
            for parts, x in zip(of_chunks.values(), (D, delta_bias, rest))
        ),
    )


def _sum_chunks(parts: Tensor, like: Tensor) -> Tensor:
    return parts.sum((0, 2)).to(like.dtype)


# ---------------------------------------------------------------------------------------- plans of launches


class _Launch(NamedTuple):
    """A kernel launch without its tensors."""

    kernel: Any
    grid: tuple[int, ...]
    values: dict[str, Any]
    tensors: dict[str, str]  # name of the kernel's argument: name of the tensor
    num_warps: int


class _Plan(NamedTuple):
    """The launches of a forward or backward pass and the tensors that they need."""

    shape: tuple[int, ...]
    states_shape: tuple[int, ...]
    dtype: torch.dtype  # of the states and the workspace
    copied: tuple[str, ...]  # inputs that have to be made contiguous
    workspace: dict[str, tuple[int, ...]]
    launches: list[_Launch]
    flags: Optional[tuple[int, ...]]  # shape of the single pass's flags: int64, initially zero

    def with_contiguous(self, tensors: dict[str, Any]) -> dict[str, Any]:
        for name in self.copied:
            tensors[name] = tensors[name].contiguous()
        return tensors


_MAX_PLANS = 1024
_plans: dict[tuple, _Plan] = {}


def _cached_plan(make_plan: Callable[..., _Plan], inputs: ScanInputs, *others: Tensor) -> _Plan:
    key = (make_plan, SINGLE_PASS, inputs.signature(), *((x.stride(), x.dtype) for x in others))
    found = _plans.get(key)
    if found is None:
        if len(_plans) >= _MAX_PLANS:
            _plans.clear()
        found = _plans[key] = make_plan(inputs, *others)
    return found


def _run(plan: _Plan, tensors: dict[str, Any], u: Tensor) -> None:
    for name, shape in plan.workspace.items():
        tensors[name] = u.new_empty(shape, dtype=plan.dtype)
    if plan.flags is not None:
        tensors["flags"] = u.new_zeros(plan.flags, dtype=torch.int64)
    for kernel, grid, values, names, num_warps in plan.launches:
        arguments = values.copy()
        for argument, name in names.items():
            arguments[argument] = tensors[name]
        launch(kernel, grid, arguments, num_warps=num_warps, device=u.device)


class _PlanBuilder:
    """Collects the launches of a pass, their arguments and their workspace."""

    def __init__(self, inputs: ScanInputs, **others: Tensor) -> None:
        self.inputs = inputs
        batch, self.length, self.walks, self.channels = inputs.u.shape
        self.images, self.states = batch, inputs.A.shape[-1]
        self.chunks = num_chunks(self.length)
        self.copied, self.workspace, self.launches, self.flags = [], {}, [], None
        self.values = dict(
            **dict(length=self.length, walks=self.walks, channels=self.channels),
            **dict(chunks=self.chunks, N=self.states, CHUNK=CHUNK_LENGTH, STEPS=_STEPS),
            **dict(SOFTPLUS=inputs.delta_softplus, ALIGNED=self.length % _STEPS == 0),
        )
        tokens = dict(u=inputs.u, delta=inputs.delta, B=inputs.B, C=inputs.C, **others)
        for name, x in tokens.items():
            # Kernels need adjacent channels, and strides between tokens that fit 31 bits in bytes.
            adjacent = x.stride(-1) == 1 or x.shape[-1] == 1
            x = self._contiguous_if_needed(name, x, adjacent and x.stride(1) * x.itemsize < 2**31)
            self._set_strides(name, x.stride(0), x.stride(1) * x.itemsize, x.stride(2))
        for name in ("A", "D", "delta_bias", "rest"):
            x = getattr(inputs, name)
            if x is not None:
                x = self._contiguous_if_needed(name, x, x[0].is_contiguous())
            self.values[f"{name}_k"] = 0 if x is None else x.stride(0)
        for name in ("order", "source", "gap"):
            x = getattr(inputs, name)
            if x is not None:
                x = self._contiguous_if_needed(name, x, x.stride(-1) == 1)
            self.values[f"{name}_b"] = x.stride(0) if x is not None and x.dim() == 3 else 0
            self.values[f"{name}_k"] = 0 if x is None else x.stride(-2)

    def _contiguous_if_needed(self, name: str, x: Tensor, usable: bool) -> Tensor:
        """Return ``x`` if its strides are usable, else note the copy and return a tensor with the copy's strides."""
        if usable:
            return x
        self.copied.append(name)
        return torch.empty(x.shape, dtype=x.dtype, device="meta")

    def _set_strides(self, name: str, *strides: int) -> None:
        self.values.update(zip((f"{name}_b", f"{name}_l", f"{name}_k"), strides))

    def strides_of(self, name: str, as_name: str) -> dict[str, int]:
        """Return the strides of tensor ``name`` for the kernel's argument ``as_name``."""
        return {f"{as_name}_{dim}": self.values[f"{name}_{dim}"] for dim in "blk"}

    def need(self, **shapes: tuple[int, ...]) -> None:
        self.workspace.update(shapes)

    def launch(
        self,
        kernel: Any,
        grid: tuple[int, ...],
        threads: int,
        renamed: Optional[dict[str, str]] = None,
        **values: Any,
    ) -> None:
        """Add a launch. Arguments without a value are tensors; ``renamed`` maps arguments to tensors' names."""
        values, renamed = {**self.values, **values}, renamed or {}
        tensors = {x: renamed.get(x, x) for x in kernel.arg_names if x not in values}
        for argument, name in list(tensors.items()):
            if getattr(self.inputs, name, self) is None:
                del tensors[argument]
        values = {x: values.get(x) for x in kernel.arg_names}  # in the kernel's order
        self.launches.append(_Launch(kernel, grid, values, tensors, max(1, threads // 32)))

    def build(self) -> _Plan:
        inputs = self.inputs
        return _Plan(
            tuple(inputs.u.shape),
            inputs.states_shape,
            inputs.accumulation_dtype,
            tuple(self.copied),
            self.workspace,
            self.launches,
            self.flags,
        )


def _plan_forward(inputs: ScanInputs) -> _Plan:
    plan = _PlanBuilder(inputs)
    if inputs.A.shape[-1] > 1:
        _plan_many_states(plan)
    elif SINGLE_PASS and inputs.accumulation_dtype == torch.float32:  # its flags hold float32
        _plan_single_pass(plan)
    else:
        _plan_one_state(plan)
    return plan.build()


def _plan_single_pass(plan: _PlanBuilder) -> None:
    from .triton_kernels_scalar import single_pass

    lanes = min(32, _power_of_2(plan.channels))
    steps = _TILE_STEPS
    groups = min(_TILE_THREADS // lanes, _power_of_2(_parts(plan.length, steps)))
    tiles = _parts(plan.length, groups * steps)
    walks = plan.images * plan.walks
    plan.flags = (walks, tiles + tiles // _BLOCK, 2, plan.channels)
    fold = max(1, 2 * _BLOCK // groups)
    grid = (walks * tiles, _parts(plan.channels, lanes))
    tile = dict(GROUPS=groups, LANES=lanes, STEPS=steps, FOLD=fold, BLOCK=_BLOCK, tiles=tiles)
    tile["ALIGNED"] = plan.length % steps == 0
    y_l = plan.walks * plan.channels * plan.inputs.u.itemsize
    plan.launch(single_pass, grid, groups * lanes, **tile, y_l=y_l)


def _plan_one_state(plan: _PlanBuilder) -> None:
    from . import triton_kernels_scalar as kernels

    lanes = min(32, _power_of_2(plan.channels))
    blocks = _parts(plan.channels, lanes)
    walks = plan.images * plan.walks
    # Runs are as long as the wanted number of threads allows.
    steps = walks * blocks * lanes * plan.length // _THREADS_WANTED // _STEPS * _STEPS
    steps = min(max(steps, _STEPS), _LONGEST_RUN)
    runs = _parts(plan.length, steps)
    groups = min(_THREADS // lanes, _power_of_2(runs))
    spans = _parts(runs, groups)
    tile = dict(GROUPS=groups, LANES=lanes, steps=steps, runs=runs, spans=spans)
    unused = dict(ends=None, keeps=None)
    if spans > 1:
        unused = {}
        plan.need(ends=(walks, runs, plan.channels), keeps=(walks, runs, plan.channels))
        values = dict(**tile, ADJOINT=False, **plan.strides_of("u", "values"))
        values.update(plan.strides_of("B", "weights"))
        renamed = dict(values="u", weights="B")
        grid = (walks * (spans - 1), blocks)
        plan.launch(kernels.run_ends, grid, groups * lanes, renamed, **values)
    y_l = plan.walks * plan.channels * plan.inputs.u.itemsize
    grid = (walks * spans, blocks)
    plan.launch(kernels.outputs, grid, groups * lanes, **tile, **unused, y_l=y_l, FOLD=4)


def _plan_many_states(plan: _PlanBuilder) -> None:
    from . import triton_kernels_states as kernels

    tile = _states_tile(plan)
    blocks = _parts(plan.channels, tile["LANES"])
    walks = plan.images * plan.walks
    # As few spans as fill a GPU; one if the walks nearly fill it already.
    spans = 1
    if 2 * walks * blocks < _WARPS_WANTED:
        spans = min(plan.chunks, _parts(_WARPS_WANTED, walks * blocks))
    steps = _parts(plan.chunks, spans) * CHUNK_LENGTH
    spans = _parts(plan.length, steps)
    values = dict(**tile, steps=steps, spans=spans, ADJOINT=False, **plan.strides_of("u", "values"))
    unused = dict(entries=None)
    if spans > 1:
        unused = {}
        shape = (plan.images, plan.walks, spans, plan.channels)
        plan.need(ends=(*shape, plan.states), times=shape, entries=(*shape, plan.states))
        together = 2 if _walks_decay_alike(plan.inputs) else 1
        grid = (walks // together * spans, blocks)
        no_outputs = dict(OUTPUTS=False, C=None, D=None, entries=None, y=None, y_l=0)
        no_outputs["WALKS"] = together
        plan.launch(kernels.sweep, grid, 32, dict(values="u"), **values, **no_outputs)
        _hand_over(plan, "entries", spans, backwards=False)
    values.update(**unused, WALKS=1, OUTPUTS=True, times=None)
    values["y_l"] = plan.walks * plan.channels * plan.inputs.u.itemsize
    grid = (walks * spans, blocks)
    plan.launch(kernels.sweep, grid, 32, dict(values="u", ends="states"), **values)


def _walks_decay_alike(inputs: ScanInputs) -> bool:
    """Whether walks form pairs in which everything that decays depend on has stride 0."""
    along_walks = [inputs.delta.stride(2), inputs.A.stride(0)]
    tokens = inputs.order if inputs.source is None else inputs.source
    along_walks += [x.stride(-2) for x in (tokens, inputs.gap) if x is not None]
    along_walks += [x.stride(0) for x in (inputs.delta_bias, inputs.rest) if x is not None]
    return inputs.u.shape[2] % 2 == 0 and not any(along_walks)


def _plan_backward(inputs: ScanInputs, grad_y: Tensor) -> _Plan:
    from . import triton_kernels_gradients as kernels

    plan = _PlanBuilder(inputs, dy=grad_y)
    walks, states = plan.images * plan.walks, plan.states
    if plan.chunks > 1:
        _adjoint_ends(plan)
        plan.need(adjoints=inputs.states_shape)
        _hand_over(plan, "adjoints", plan.chunks, backwards=True)

    channels = min(_GRADIENT_CHANNELS, _parts(plan.channels, _GRADIENT_LANES))
    turns = _parts(plan.channels, channels * _GRADIENT_LANES)
    # Each block of channels writes its part of dB and dC; all parts take at most the memory of one image's u.
    blocks = min(turns, max(1, plan.channels // (2 * states * plan.images)))
    blocks = min(blocks, _parts(_WARPS_WANTED, walks * plan.chunks))
    rounds = _parts(turns, blocks)
    blocks = _parts(turns, rounds)
    by_step = (plan.images, plan.walks, plan.length, states)
    plan.need(by_step=(2, *by_step), parts=(2, blocks, *by_step))
    index = "order" if inputs.source is None else "source"
    index_strides = {f"index_{dim}": plan.values[f"{index}_{dim}"] for dim in "bk"}
    columns = _power_of_2(states)
    tile = max(1, _WEIGHTS // columns)
    moved = dict(
        **dict(tiles=_parts(plan.length, tile), ROWS=tile, COLUMNS=columns),
        **dict(half=walks * plan.length * states, blocks=blocks, rounds=rounds),
        **index_strides,
    )
    grid = (walks * moved["tiles"],)
    plan.launch(kernels.weights_by_step, grid, 128, dict(index=index), **moved)
    plan.launch(
        kernels.gradients,
        (walks * plan.chunks, blocks),
        32,
        **dict(moved, CHANNELS=channels, LANES=_GRADIENT_LANES, GROUPS=CHUNK_LENGTH // _STEPS),
        du_l=plan.walks * plan.channels * inputs.u.itemsize,
        ddelta_l=plan.walks * plan.channels * inputs.delta.itemsize,
    )
    plan.launch(kernels.weights_by_token, grid, 128, dict(index=index), **moved)
    return plan.build()


def _adjoint_ends(plan: _PlanBuilder) -> None:
    """Launch the kernel that finds ``ends`` and ``times`` of every chunk."""
    from . import triton_kernels_scalar, triton_kernels_states

    walks = plan.images * plan.walks
    shape = (plan.images, plan.walks, plan.chunks, plan.channels)
    plan.need(ends=(*shape, plan.states), times=shape)
    values = dict(steps=CHUNK_LENGTH, ADJOINT=True, **plan.strides_of("dy", "values"))
    if plan.states > 1:
        tile = _states_tile(plan)
        together = 2 if _walks_decay_alike(plan.inputs) else 1
        grid = (walks // together * plan.chunks, _parts(plan.channels, tile["LANES"]))
        values.update(**tile, **plan.strides_of("C", "B"), spans=plan.chunks, WALKS=together)
        values.update(OUTPUTS=False, C=None, D=None, entries=None, y=None, y_l=0)
        plan.launch(triton_kernels_states.sweep, grid, 32, dict(values="dy", B="C"), **values)
        return
    lanes = min(32, _power_of_2(plan.channels))
    groups = min(_THREADS // lanes, _power_of_2(plan.chunks))
    spans = _parts(plan.chunks, groups)
    grid = (walks * spans, _parts(plan.channels, lanes))
    values.update(GROUPS=groups, LANES=lanes, runs=plan.chunks, spans=spans)
    values.update(plan.strides_of("C", "weights"))
    renamed = dict(values="dy", weights="C", keeps="times")
    plan.launch(triton_kernels_scalar.run_ends, grid, groups * lanes, renamed, **values)


def _hand_over(plan: _PlanBuilder, entries: str, spans: int, backwards: bool) -> None:
    """Launch the kernel that turns ``ends`` and ``times`` of spans into the tensor ``entries``."""
    from .triton_kernels_gradients import hand_over

    columns = plan.channels * plan.states
    grid = (plan.images * plan.walks, _parts(columns, _COLUMNS))
    values = dict(columns=columns, spans=spans, BACKWARDS=backwards)
    values.update(GROUPS=_GROUPS, COLUMNS=_COLUMNS)
    plan.launch(hand_over, grid, _GROUPS * _COLUMNS, dict(entries=entries), **values)


def _states_tile(plan: _PlanBuilder) -> dict[str, int]:
    """Size a warp's tile: up to 64 channels of up to ``_MOST_STATES`` states, fewer channels for more states."""
    rows = _power_of_2(_parts(plan.states, _MOST_STATES))
    lanes = 64 if rows == 1 else max(1, 32 // rows)
    lanes = min(lanes, _power_of_2(plan.channels))
    return dict(ROWS=rows, STATES=_parts(plan.states, rows), LANES=lanes)


def _parts(size: int, part: int) -> int:
    return -(-size // part)


def _power_of_2(x: int) -> int:
    """Smallest power of 2 that is at least ``x``."""
    return 1 << (x - 1).bit_length()
