"""Count parameters and floating-point operations as the vision Mamba papers do."""

from __future__ import annotations

from collections import Counter
from typing import Callable, NamedTuple

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode


class Cost(NamedTuple):
    """Parameters and FLOPs of one part of a model.

    Attributes:
        parameters: Number of parameters.
        flops: Operations of one run; a multiply-add counts once, the scan as ``9 L D N + L D`` per direction.
        scan_flops: The scan's share of ``flops``.
    """

    parameters: int
    flops: int
    scan_flops: int


def count(model: nn.Module, run: Callable[[], object]) -> dict[str, Cost]:
    """Count the operations of ``model`` during ``run``.

    Convolutions, matrix products, attention and the scan count; norms, activations and other element-wise work do not.

    Args:
        model: The model.
        run: Runs the model once; we call it without gradients.

    Returns:
        The cost of each child module that has any, by name, and of the whole model under ``'total'``.
    """
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        run()
    by_module = counter.get_flop_counts()

    def cost(part: nn.Module, name: str) -> Cost:
        counts = _counts_below(part, name, by_module)
        scan = sum(flops for op, flops in counts.items() if _is_scan(op))
        # PyTorch's counter counts a multiply-add as two operations.
        others = (sum(counts.values()) - scan) // 2
        return Cost(sum(p.numel() for p in part.parameters()), others + scan, scan)

    root = type(model).__name__
    costs = {name: cost(child, f"{root}.{name}") for name, child in model.named_children()}
    return {
        **{name: c for name, c in costs.items() if c.flops or c.parameters},
        "total": cost(model, "Global"),
    }


def _counts_below(part: nn.Module, name: str, by_module: dict) -> Counter:
    """Count operations by kind in ``part``, also where only its children were called, not its ``forward``."""
    if name in by_module:
        return Counter(by_module[name])
    children = part.named_children()
    return sum((_counts_below(c, f"{name}.{n}", by_module) for n, c in children), Counter())


def _is_scan(op: object) -> bool:
    return str(op).startswith("mmvssm.selective_scan")
