"""The orders in which a grid of tokens is walked.

Tokens stay where they are in memory; a traversal only says which token each step of the scan visits.
"""

from __future__ import annotations

from typing import NamedTuple, Optional

import torch
from torch import Tensor


class Traversal(NamedTuple):
    """Which tokens ``K`` walks visit, step by step.

    Attributes:
        order: int32 ``(K, L)``, or ``(B, K, L)`` where images differ: the token whose value step ``t`` reads and
            whose output it writes. Each walk is a permutation of the ``L`` tokens.
        source: The token whose ``delta``, ``B`` and ``C`` step ``t`` reads, shaped like ``order``;
            None means ``order``. A permutation too: gradients are written where they were read from.
        gap: int32, shaped like ``order``: how many absent grid positions lie between step ``t - 1`` and ``t``; None
            means none anywhere.
    """

    order: Tensor
    source: Optional[Tensor] = None
    gap: Optional[Tensor] = None


def cross_traversal(height: int, width: int, device: Optional[torch.device] = None) -> Traversal:
    """Four walks over a grid: by rows, by columns, and both backwards (GroupMamba, section 3.2).

    Args:
        height: Rows of the grid.
        width: Columns of the grid.
        device: Where the order is wanted.

    Returns:
        A traversal with ``order (4, height * width)``; tokens are numbered row by row.
    """
    rows = torch.arange(height * width, dtype=torch.int32, device=device)
    columns = rows.view(height, width).t().reshape(-1)
    forward = torch.stack([rows, columns])
    return Traversal(torch.cat([forward, forward.flip(-1)]))
