"""The selective scan on CUDA GPUs: what is launched, in how many programs, and with what.

:func:`forward` and :func:`backward` keep the contract of ``pytorch.py``. The mathematics is in the kernels' modules:
``triton_kernels_scalar.py`` for one state per channel, ``triton_kernels_states.py`` for several, and
``triton_kernels_gradients.py`` for the backward pass of both. Tokens are read where they are, and what is added up
across programs is added up in a fixed order: two runs agree bit for bit.

``order`` and ``source`` are not checked: an entry outside the tokens reads or writes memory that is not the tensor's.

All that follows from shapes, strides and dtypes is worked out once for each of them, and kept as :class:`_Launch`es.
Block sizes follow by fixed rules: tuning by trial would stall the start of a training.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Optional

import torch
from torch import Tensor

from ..triton_launcher import launch
from .inputs import CHUNK_LENGTH, ScanInputs, num_chunks

SINGLE_PASS = False
"""Whether to scan one state per channel in a single pass, whose programs wait for the ones before them.

It reads ``u`` and ``delta`` once instead of twice, and has not run on a GPU yet, where it could hang.
"""

# Steps that a thread loads before it works on them.
_STEPS = 8
# Steps that a thread of the kernels for one state goes through, at most: fewer where that leaves a GPU empty.
_LONGEST_RUN = 128
# Threads, and warps with several states each, that fill a GPU of about 130 multiprocessors.
_THREADS_WANTED, _WARPS_WANTED = 36000, 2048
# Threads of a program of the kernels for one state.
_THREADS = 256
# Of the single pass: steps that a thread holds in registers; threads of a program, few enough for two programs to share
# a multiprocessor, so that one loads while the other works; and tiles that announce together what they do.
_TILE_STEPS, _TILE_THREADS, _BLOCK = 32, 128, 16
# States of a channel that a thread holds in registers, at most.
_MOST_STATES = 16
# Of the tile of ``gradients``: channels that a thread works on, and channels side by side.
_GRADIENT_CHANNELS, _GRADIENT_LANES = 2, 4
# Of the tile of ``hand_over``: spans, in groups of ``_STEPS``, and columns.
_GROUPS, _COLUMNS = 32, 8
# Weights that a program of ``weights_by_step`` and ``weights_by_token`` moves.
_WEIGHTS = 2048


def forward(inputs: ScanInputs) -> tuple[Tensor, Tensor]:
    """Run the scan: see :func:`mmvssm.ops.selective_scan.pytorch.forward`."""
    prepared = _prepared(_prepare_forward, inputs)
    tensors = prepared.lay_out(inputs._asdict())
    u = inputs.u
    y = u.new_empty(prepared.shape)
    states = u.new_empty(prepared.states_shape, dtype=prepared.dtype)
    tensors.update(y=y, states=states)
    _run(prepared, tensors, u)
    return y, states


def backward(
    grad_y: Tensor, inputs: ScanInputs, states: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Differentiate the scan: see :func:`mmvssm.ops.selective_scan.pytorch.backward`."""
    u, delta, A, B, C, D, delta_bias, _, _, gap, rest, _ = inputs
    prepared = _prepared(_prepare_backward, inputs, grad_y)
    tensors = prepared.lay_out({**inputs._asdict(), "dy": grad_y})
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
    _run(prepared, tensors, u)
    return (
        *(tensors["du"], tensors["ddelta"], _sum_chunks(dA, A), tensors["dB"], tensors["dC"]),
        *(
            u.new_empty(0) if x is None else _sum_chunks(parts, x)
            for parts, x in zip(of_chunks.values(), (D, delta_bias, rest))
        ),
    )


def _sum_chunks(parts: Tensor, like: Tensor) -> Tensor:
    return parts.sum((0, 2)).to(like.dtype)


# -------------------------------------------------------------------------------------------- prepared once


class _Launch(NamedTuple):
    """A kernel, its grid, all its arguments but tensors, and which tensor of the pass each other argument is."""

    kernel: Any
    grid: tuple[int, ...]
    values: dict[str, Any]
    tensors: dict[str, str]
    num_warps: int


class _Prepared(NamedTuple):
    """A pass. ``workspace``: tensors in the dtype of the states. ``copied``: inputs whose elements lie unfavourably.

    ``board``: of the single pass, in 64-bit integers that are zero before.
    """

    shape: tuple[int, ...]
    states_shape: tuple[int, ...]
    dtype: torch.dtype
    copied: tuple[str, ...]
    workspace: dict[str, tuple[int, ...]]
    launches: list[_Launch]
    board: Optional[tuple[int, ...]]

    def lay_out(self, tensors: dict[str, Any]) -> dict[str, Any]:
        for name in self.copied:
            tensors[name] = tensors[name].contiguous()
        return tensors


_MOST_KEPT = 1024
_kept: dict[tuple, _Prepared] = {}


def _prepared(prepare: Callable[..., _Prepared], inputs: ScanInputs, *others: Tensor) -> _Prepared:
    key = (prepare, SINGLE_PASS, inputs.signature(), *((x.stride(), x.dtype) for x in others))
    found = _kept.get(key)
    if found is None:
        if len(_kept) >= _MOST_KEPT:
            _kept.clear()
        found = _kept[key] = prepare(inputs, *others)
    return found


def _run(prepared: _Prepared, tensors: dict[str, Any], u: Tensor) -> None:
    for name, shape in prepared.workspace.items():
        tensors[name] = u.new_empty(shape, dtype=prepared.dtype)
    if prepared.board is not None:
        tensors["board"] = u.new_zeros(prepared.board, dtype=torch.int64)
    for kernel, grid, values, names, num_warps in prepared.launches:
        arguments = values.copy()
        for argument, name in names.items():
            arguments[argument] = tensors[name]
        launch(kernel, grid, arguments, num_warps=num_warps, device=u.device)


class _Preparation:
    """Collects the launches of a pass and what they are given."""

    def __init__(self, inputs: ScanInputs, **others: Tensor) -> None:
        self.inputs = inputs
        batch, self.length, self.walks, self.channels = inputs.u.shape
        self.images, self.states = batch, inputs.A.shape[-1]
        self.chunks = num_chunks(self.length)
        self.copied, self.workspace, self.launches, self.board = [], {}, [], None
        self.values = dict(
            **dict(length=self.length, walks=self.walks, channels=self.channels),
            **dict(chunks=self.chunks, N=self.states, CHUNK=CHUNK_LENGTH, STEPS=_STEPS),
            **dict(SOFTPLUS=inputs.delta_softplus, ALIGNED=self.length % _STEPS == 0),
        )
        tokens = dict(u=inputs.u, delta=inputs.delta, B=inputs.B, C=inputs.C, **others)
        for name, x in tokens.items():
            # Channels side by side, and strides between tokens whose bytes 32 bits can count.
            adjacent = x.stride(-1) == 1 or x.shape[-1] == 1
            x = self._favourable(name, x, adjacent and x.stride(1) * x.itemsize < 2**31)
            self._set_strides(name, x.stride(0), x.stride(1) * x.itemsize, x.stride(2))
        for name in ("A", "D", "delta_bias", "rest"):
            x = getattr(inputs, name)
            if x is not None:
                x = self._favourable(name, x, x[0].is_contiguous())
            self.values[f"{name}_k"] = 0 if x is None else x.stride(0)
        for name in ("order", "source", "gap"):
            x = getattr(inputs, name)
            if x is not None:
                x = self._favourable(name, x, x.stride(-1) == 1)
            self.values[f"{name}_b"] = x.stride(0) if x is not None and x.dim() == 3 else 0
            self.values[f"{name}_k"] = 0 if x is None else x.stride(-2)

    def _favourable(self, name: str, x: Tensor, adjacent: bool) -> Tensor:
        if adjacent:
            return x
        self.copied.append(name)
        return torch.empty(x.shape, dtype=x.dtype, device="meta")

    def _set_strides(self, name: str, *strides: int) -> None:
        self.values.update(zip((f"{name}_b", f"{name}_l", f"{name}_k"), strides))

    def strides_of(self, name: str, as_name: str) -> dict[str, int]:
        """The strides of one tensor under another's name."""
        return {f"{as_name}_{dim}": self.values[f"{name}_{dim}"] for dim in "blk"}

    def need(self, **shapes: tuple[int, ...]) -> None:
        self.workspace.update(shapes)

    def launch(
        self,
        kernel: Any,
        grid: tuple[int, ...],
        threads: int,
        renamed: dict[str, str],
        **values: Any,
    ) -> None:
        """Note a launch. An argument that no value is known of is a tensor, under its own name or ``renamed``."""
        values = {**self.values, **values}
        tensors = {x: renamed.get(x, x) for x in kernel.arg_names if x not in values}
        for argument, name in list(tensors.items()):
            if getattr(self.inputs, name, self) is None:
                del tensors[argument]
        values = {x: values.get(x) for x in kernel.arg_names}  # in the kernel's order
        self.launches.append(_Launch(kernel, grid, values, tensors, max(1, threads // 32)))

    def done(self) -> _Prepared:
        inputs = self.inputs
        return _Prepared(
            tuple(inputs.u.shape),
            inputs.states_shape,
            inputs.accumulation_dtype,
            tuple(self.copied),
            self.workspace,
            self.launches,
            self.board,
        )


def _prepare_forward(inputs: ScanInputs) -> _Prepared:
    prepare = _forward_states
    if inputs.A.shape[-1] == 1:
        # What is announced to later programs is float32.
        single = SINGLE_PASS and inputs.accumulation_dtype == torch.float32
        prepare = _forward_single_pass if single else _forward_scalar
    return prepare(_Preparation(inputs)).done()


def _forward_single_pass(pass_: _Preparation) -> _Preparation:
    from .triton_kernels_scalar import single_pass

    lanes = min(32, _power_of_2(pass_.channels))
    steps = _TILE_STEPS
    groups = min(_TILE_THREADS // lanes, _power_of_2(_parts(pass_.length, steps)))
    tiles = _parts(pass_.length, groups * steps)
    walks = pass_.images * pass_.walks
    pass_.board = (walks, tiles + tiles // _BLOCK, 2, pass_.channels)
    fold = max(1, 2 * _BLOCK // groups)
    pass_.launch(
        *(single_pass, (walks * tiles, _parts(pass_.channels, lanes)), groups * lanes, {}),
        **dict(GROUPS=groups, LANES=lanes, STEPS=steps, FOLD=fold, BLOCK=_BLOCK, tiles=tiles),
        **dict(ALIGNED=pass_.length % steps == 0),
        y_l=pass_.walks * pass_.channels * pass_.inputs.u.itemsize,
    )
    return pass_


def _forward_scalar(pass_: _Preparation) -> _Preparation:
    from . import triton_kernels_scalar as kernels

    lanes = min(32, _power_of_2(pass_.channels))
    blocks = _parts(pass_.channels, lanes)
    walks = pass_.images * pass_.walks
    # As long a run for every thread as leaves threads enough.
    steps = walks * blocks * lanes * pass_.length // _THREADS_WANTED // _STEPS * _STEPS
    steps = min(max(steps, _STEPS), _LONGEST_RUN)
    runs = _parts(pass_.length, steps)
    groups = min(_THREADS // lanes, _power_of_2(runs))
    spans = _parts(runs, groups)
    tile = dict(GROUPS=groups, LANES=lanes, steps=steps, runs=runs, spans=spans)
    spare = dict(ends=None, keeps=None)
    if spans > 1:
        spare = {}
        pass_.need(ends=(walks, runs, pass_.channels), keeps=(walks, runs, pass_.channels))
        pass_.launch(
            *(kernels.run_ends, (walks * (spans - 1), blocks), groups * lanes),
            dict(values="u", weights="B"),
            **pass_.strides_of("u", "values"),
            **pass_.strides_of("B", "weights"),
            **dict(tile, ADJOINT=False),
        )
    y_l = pass_.walks * pass_.channels * pass_.inputs.u.itemsize
    pass_.launch(
        *(kernels.outputs, (walks * spans, blocks), groups * lanes, {}),
        **dict(tile, **spare, y_l=y_l, FOLD=4),
    )
    return pass_


def _forward_states(pass_: _Preparation) -> _Preparation:
    from . import triton_kernels_states as kernels

    tile = _states_tile(pass_)
    blocks = _parts(pass_.channels, tile["LANES"])
    walks = pass_.images * pass_.walks
    # As few spans as fill a GPU; where walks nearly do that on their own, one.
    spans = 1
    if 2 * walks * blocks < _WARPS_WANTED:
        spans = min(pass_.chunks, _parts(_WARPS_WANTED, walks * blocks))
    steps = _parts(pass_.chunks, spans) * CHUNK_LENGTH
    spans = _parts(pass_.length, steps)
    values = dict(steps=steps, spans=spans, ADJOINT=False, **pass_.strides_of("u", "values"))
    entries = dict(entries=None)
    if spans > 1:
        entries = {}
        shape = (pass_.images, pass_.walks, spans, pass_.channels)
        pass_.need(ends=(*shape, pass_.states), times=shape, entries=(*shape, pass_.states))
        together = 2 if _walks_decay_alike(pass_.inputs) else 1
        pass_.launch(
            *(kernels.sweep, (walks // together * spans, blocks), 32, dict(values="u")),
            **dict(values, **tile, WALKS=together, OUTPUTS=False),
            **dict(C=None, D=None, entries=None, y=None, y_l=0),
        )
        _hand_over(pass_, "ends", "times", "entries", spans, backwards=False)
    y_l = pass_.walks * pass_.channels * pass_.inputs.u.itemsize
    pass_.launch(
        *(kernels.sweep, (walks * spans, blocks), 32, dict(values="u", ends="states")),
        **dict(values, **tile, **entries, WALKS=1, OUTPUTS=True, times=None, y_l=y_l),
    )
    return pass_


def _walks_decay_alike(inputs: ScanInputs) -> bool:
    """Whether walks go in pairs that share all that decays depend on, by strides of 0."""
    along_walks = [inputs.delta.stride(2), inputs.A.stride(0)]
    tokens = inputs.order if inputs.source is None else inputs.source
    along_walks += [x.stride(-2) for x in (tokens, inputs.gap) if x is not None]
    along_walks += [x.stride(0) for x in (inputs.delta_bias, inputs.rest) if x is not None]
    return inputs.u.shape[2] % 2 == 0 and not any(along_walks)


def _prepare_backward(inputs: ScanInputs, grad_y: Tensor) -> _Prepared:
    from . import triton_kernels_gradients as kernels

    pass_ = _Preparation(inputs, dy=grad_y)
    walks, states = pass_.images * pass_.walks, pass_.states
    if pass_.chunks > 1:
        _adjoint_ends(pass_)
        pass_.need(adjoints=inputs.states_shape)
        _hand_over(pass_, "ends", "times", "adjoints", pass_.chunks, backwards=True)

    channels = min(_GRADIENT_CHANNELS, _parts(pass_.channels, _GRADIENT_LANES))
    turns = _parts(pass_.channels, channels * _GRADIENT_LANES)
    # Blocks of channels leave parts of dB and dC: no more of them than take the memory of one image's u.
    blocks = min(turns, max(1, pass_.channels // (2 * states * pass_.images)))
    blocks = min(blocks, _parts(_WARPS_WANTED, walks * pass_.chunks))
    rounds = _parts(turns, blocks)
    blocks = _parts(turns, rounds)
    by_step = (pass_.images, pass_.walks, pass_.length, states)
    pass_.need(by_step=(2, *by_step), parts=(2, blocks, *by_step))
    index = "order" if inputs.source is None else "source"
    index_strides = {f"index_{dim}": pass_.values[f"{index}_{dim}"] for dim in "bk"}
    columns = _power_of_2(states)
    tile = max(1, _WEIGHTS // columns)
    moved = dict(
        **dict(tiles=_parts(pass_.length, tile), ROWS=tile, COLUMNS=columns),
        **dict(half=walks * pass_.length * states, blocks=blocks, rounds=rounds),
        **index_strides,
    )
    grid = (walks * moved["tiles"],)
    pass_.launch(kernels.weights_by_step, grid, 128, dict(index=index), **moved)
    pass_.launch(
        *(kernels.gradients, (walks * pass_.chunks, blocks), 32, {}),
        **moved,
        **dict(CHANNELS=channels, LANES=_GRADIENT_LANES, GROUPS=CHUNK_LENGTH // _STEPS),
        **dict(du_l=pass_.walks * pass_.channels * inputs.u.itemsize),
        **dict(ddelta_l=pass_.walks * pass_.channels * inputs.delta.itemsize),
    )
    pass_.launch(kernels.weights_by_token, grid, 128, dict(index=index), **moved)
    return pass_.done()


def _adjoint_ends(pass_: _Preparation) -> None:
    """``ends`` and ``times`` of every chunk."""
    from . import triton_kernels_scalar, triton_kernels_states

    walks = pass_.images * pass_.walks
    shape = (pass_.images, pass_.walks, pass_.chunks, pass_.channels)
    pass_.need(ends=(*shape, pass_.states), times=shape)
    values = dict(steps=CHUNK_LENGTH, ADJOINT=True, **pass_.strides_of("dy", "values"))
    if pass_.states > 1:
        tile = _states_tile(pass_)
        together = 2 if _walks_decay_alike(pass_.inputs) else 1
        grid = (walks // together * pass_.chunks, _parts(pass_.channels, tile["LANES"]))
        pass_.launch(
            *(triton_kernels_states.sweep, grid, 32, dict(values="dy", B="C")),
            **dict(values, **tile, spans=pass_.chunks, WALKS=together, OUTPUTS=False),
            **dict(C=None, D=None, entries=None, y=None, y_l=0),
            **pass_.strides_of("C", "B"),
        )
        return
    lanes = min(32, _power_of_2(pass_.channels))
    groups = min(_THREADS // lanes, _power_of_2(pass_.chunks))
    spans = _parts(pass_.chunks, groups)
    pass_.launch(
        triton_kernels_scalar.run_ends,
        (walks * spans, _parts(pass_.channels, lanes)),
        groups * lanes,
        dict(values="dy", weights="C", keeps="times"),
        **dict(values, GROUPS=groups, LANES=lanes, runs=pass_.chunks, spans=spans),
        **pass_.strides_of("C", "weights"),
    )


def _hand_over(
    pass_: _Preparation, ends: str, times: str, entries: str, spans: int, backwards: bool
) -> None:
    from .triton_kernels_gradients import hand_over

    columns = pass_.channels * pass_.states
    pass_.launch(
        hand_over,
        (pass_.images * pass_.walks, _parts(columns, _COLUMNS)),
        _GROUPS * _COLUMNS,
        dict(ends=ends, times=times, entries=entries),
        **dict(columns=columns, spans=spans, BACKWARDS=backwards),
        **dict(GROUPS=_GROUPS, COLUMNS=_COLUMNS),
    )


def _states_tile(pass_: _Preparation) -> dict[str, int]:
    """Up to 64 channels of up to ``_MOST_STATES`` states in one warp; of more states, fewer channels."""
    rows = _power_of_2(_parts(pass_.states, _MOST_STATES))
    lanes = 64 if rows == 1 else max(1, 32 // rows)
    lanes = min(lanes, _power_of_2(pass_.channels))
    return dict(ROWS=rows, STATES=_parts(pass_.states, rows), LANES=lanes)


def _parts(size: int, part: int) -> int:
    return -(-size // part)


def _power_of_2(x: int) -> int:
    """The smallest that is not less."""
    return 1 << (x - 1).bit_length()
