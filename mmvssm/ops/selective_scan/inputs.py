"""Arguments of the selective scan: names, order, shapes and checks, all in this one module."""

from __future__ import annotations

from typing import NamedTuple, Optional

import torch
from torch import Tensor

from .. import backend

CHUNK_LENGTH = 64
"""Steps between two states saved for the backward pass."""

INDICES = ("order", "source", "gap")
"""Integer arguments: the fields of a :class:`~.traversal.Traversal`."""

PARAMETERS = ("A", "D", "delta_bias", "rest")
"""Arguments per walk instead of per token; autocast does not convert them."""

SCHEMA = (
    "Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? delta_bias, "
    "Tensor? order, Tensor? source, Tensor? gap, Tensor? rest, bool delta_softplus"
)
"""The fields of :class:`ScanInputs` but ``sum_walks`` as a PyTorch operator schema."""

DIFFERENTIABLE = ("u", "delta", "A", "B", "C", "D", "delta_bias", "rest")
"""Arguments that have gradients, in the order that the backward pass returns."""


def num_chunks(length: int) -> int:
    """Number of states saved along a walk of ``length`` steps."""
    return (length + CHUNK_LENGTH - 1) // CHUNK_LENGTH


_MOST_STATES = 2**20  # the CPU kernel counts them, times the steps of a chunk, in an int
_MOST_PASSED = 1024
_passed: set[tuple] = set()


class ScanInputs(NamedTuple):
    """Arguments of a backend; :func:`~.naive.selective_scan_naive` describes them."""

    u: Tensor
    delta: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    D: Optional[Tensor] = None
    delta_bias: Optional[Tensor] = None
    order: Optional[Tensor] = None
    source: Optional[Tensor] = None
    gap: Optional[Tensor] = None
    rest: Optional[Tensor] = None
    delta_softplus: bool = True
    sum_walks: bool = False

    @property
    def accumulation_dtype(self) -> torch.dtype:
        """The dtype of the state: float64 if any of ``u``, ``delta``, ``A``, ``B`` and ``C`` is, else float32."""
        return backend.accumulation_dtype(*self[:5])

    @property
    def states_shape(self) -> tuple[int, ...]:
        """Shape ``(B, K, S, D, N)`` of the states saved for the backward pass."""
        batch, length, _, channels = self.u.shape
        walks, _, states = self.A.shape
        return batch, walks, num_chunks(length), channels, states

    @property
    def y_shape(self) -> tuple[int, ...]:
        """Shape ``(B, L, K, D)`` of the output, or ``(B, L, D)`` if the walks are summed."""
        batch, length, _, channels = self.u.shape
        walks = () if self.sum_walks else self.A.shape[:1]
        return batch, length, *walks, channels

    def for_each_walk(self) -> ScanInputs:
        """Return the same with ``u`` and ``delta (B, L, K, D)``, without a copy."""
        walks = self.A.shape[0]
        if self.u.shape[2] == self.delta.shape[2] == walks:
            return self
        u, delta = (x.expand(-1, -1, walks, -1) for x in (self.u, self.delta))
        return self._replace(u=u, delta=delta)

    def grad_of_each_walk(self, grad_y: Tensor) -> Tensor:
        """Return the gradient of each walk's output ``(B, L, K, D)``, given that of ``y``, without a copy."""
        if not self.sum_walks:
            return grad_y
        return grad_y[:, :, None].expand(-1, -1, self.A.shape[0], -1)

    def signature(self) -> tuple:
        """Hashable key of everything that checks and plans depend on: shapes, strides, dtypes and devices."""
        return tuple(
            (x.shape, x.stride(), x.dtype, x.device) if isinstance(x, Tensor) else x for x in self
        )

    def check_once(self) -> None:
        """Run :meth:`check` unless inputs with this signature have passed before."""
        if torch.compiler.is_compiling() or type(self.u) is not Tensor:  # shapes may be symbols
            self.check()
            return
        signature = self.signature()
        if signature not in _passed:
            self.check()
            if len(_passed) >= _MOST_PASSED:
                _passed.clear()
            _passed.add(signature)

    def check(self) -> None:
        """Check shapes, dtypes and devices.

        Raises:
            ValueError: If one does not fit; the message names the argument.
        """
        u, A, gap, rest = self.u, self.A, self.gap, self.rest
        if u.dim() != 4:
            raise ValueError(
                f"selective_scan: u must have shape (B, L, K, D), batch, token, walk, channel; got {tuple(u.shape)}."
            )
        if A.dim() != 3:
            raise ValueError(
                f"selective_scan: A must have shape (K, D, N), walk, channel, state; got {tuple(A.shape)}."
            )
        (batch, length, _, channels), (walks, _, states) = u.shape, A.shape
        if 0 in (batch, length, walks, channels, states):
            raise ValueError(
                f"selective_scan: every dimension must be at least 1; got u {tuple(u.shape)} and A {tuple(A.shape)}."
            )
        if states > _MOST_STATES:
            raise ValueError(f"selective_scan: A has {states} states; {_MOST_STATES} is the most.")
        expected = {
            "u": (batch, length, walks, channels),
            "delta": (batch, length, walks, channels),
            "A": (walks, channels, states),
            "B": (batch, length, walks, states),
            "C": (batch, length, walks, states),
            "D": (walks, channels),
            "delta_bias": (walks, channels),
            "rest": (walks, channels),
        }
        for name, shape in expected.items():
            tensor = getattr(self, name)
            if tensor is None:
                continue
            shared = name in ("u", "delta") and tensor.dim() == 4 and tensor.shape[2] == 1
            if tuple(tensor.shape) != ((batch, length, 1, channels) if shared else shape):
                raise ValueError(
                    f"selective_scan: {name} must have shape {shape} to go with u of shape {tuple(u.shape)} and A of "
                    f"shape {tuple(A.shape)}; got {tuple(tensor.shape)}."
                )
            if not tensor.is_floating_point():
                raise ValueError(
                    f"selective_scan: {name} must be floating point; got {tensor.dtype}."
                )
        for name in INDICES:
            index = getattr(self, name)
            if index is None:
                continue
            # By the number of dimensions: comparing B with K would fix B in an exported program.
            shape = (batch, walks, length)[-2:] if index.dim() == 2 else (batch, walks, length)
            if tuple(index.shape) != shape:
                raise ValueError(
                    f"selective_scan: traversal.{name} must have shape (K, L) = {(walks, length)} or (B, K, L) = "
                    f"{(batch, walks, length)}; got {tuple(index.shape)}."
                )
            if index.dtype != torch.int32:
                raise ValueError(
                    f"selective_scan: traversal.{name} must be int32; got {index.dtype}."
                )
        self.check_devices()
        if gap is not None and rest is None:
            raise ValueError(
                "selective_scan: traversal.gap needs rest, the step size at absent positions."
            )

    def check_devices(self) -> None:
        """Check that all tensors are on one device, since backends would read wrong memory on another.

        Raises:
            ValueError: If a tensor is on another device than ``u``; the message names it.
        """
        others = {f"traversal.{k}" if k in INDICES else k: v for k, v in zip(self._fields, self)}
        backend.check_devices("selective_scan", "u", self.u, others)
