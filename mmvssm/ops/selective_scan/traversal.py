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


START, RIGHT, LEFT, UP, DOWN = range(5)
"""How a step of a continuous walk arrived at its position (PlainMamba, "Direction-Aware Updating")."""


class SnakeWalks(NamedTuple):
    """Four continuous walks, and how each of them arrived.

    Attributes:
        traversal: The walks.
        arrival: int64 ``(4, L)`` or ``(B, 4, L)``: for each token, how the step that reads this
            token's ``B`` arrived at its position: one of :data:`START`, :data:`RIGHT`,
            :data:`LEFT`, :data:`UP`, :data:`DOWN`.
    """

    traversal: Traversal
    arrival: Tensor


def snake_walks(
    height: int,
    width: int,
    positions: Optional[Tensor] = None,
    *,
    raster_source: bool = True,
    with_gaps: bool = True,
    device: Optional[torch.device] = None,
) -> SnakeWalks:
    """Four continuous walks over a grid, or over what is left of it (PlainMamba, "Continuous 2D Scanning").

    Walk 0 goes by rows from the top left, rightwards in the first row, leftwards in the second and so on; walk 2 goes
    by columns from the top left, downwards in the first; walks 1 and 3 are walks 0 and 2 backwards.

    Where positions are absent, each walk visits the others in the order of the full grid's walk, and a step's arrival
    is that of the full grid's walk too.

    Args:
        height: Rows of the grid.
        width: Columns of the grid.
        positions: Which positions there are tokens for, counted row by row: integers ``(B, L)``, increasing; by
            default for all.
        raster_source: Whether step ``t`` reads ``delta``, ``B`` and ``C`` from the ``t``-th token in memory, as the
            published PlainMamba does, instead of from the token that it visits.
        with_gaps: Whether to count absent positions between steps.
        device: Where the walks are wanted if there are no positions.

    Returns:
        Walks over tokens numbered as in ``positions``: ``(4, height * width)`` of all positions, which have no gaps,
        or ``(B, 4, L)``.
    """
    everywhere = positions is None
    if everywhere:
        positions = torch.arange(height * width, device=device)[None]
    length = height * width
    row = positions // width
    column = positions - row * width

    by_rows, at_row_start, at_row_end = _back_and_forth(row, column, width)
    by_columns, at_column_start, at_column_end = _back_and_forth(column, row, height)
    steps = torch.stack([by_rows, length - 1 - by_rows, by_columns, length - 1 - by_columns], 1)
    odd_row, odd_column = row % 2 == 1, column % 2 == 1
    arrivals = torch.stack(
        [
            torch.where(at_row_start, DOWN, torch.where(odd_row, LEFT, RIGHT)),
            torch.where(at_row_end, UP, torch.where(odd_row, RIGHT, LEFT)),
            torch.where(at_column_start, RIGHT, torch.where(odd_column, UP, DOWN)),
            torch.where(at_column_end, LEFT, torch.where(odd_column, DOWN, UP)),
        ],
        1,
    ).masked_fill(steps == 0, START)  # (B, 4, L), by token

    steps, order = steps.to(torch.int32).sort(-1)
    gap = source = None
    if with_gaps and not everywhere:
        before = torch.nn.functional.pad(steps[..., :-1], (1, 0), value=-1)
        gap = steps - before - 1
    if raster_source:
        arrivals = arrivals.gather(-1, order)  # the t-th token in memory is read by step t
        source = torch.arange(order.shape[-1], dtype=torch.int32, device=order.device)
        source = source.expand(order.shape[1:])
    order = order.to(torch.int32)
    if everywhere:
        return SnakeWalks(Traversal(order[0], source), arrivals[0])
    if source is not None:
        source = source.expand(order.shape)
    return SnakeWalks(Traversal(order, source, gap), arrivals)


def _back_and_forth(line: Tensor, place: Tensor, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """The step at which a walk along lines of ``size`` places, every other one backwards, visits a place.

    Returns:
        The step, and whether it is the first and the last one on its line.
    """
    along = torch.where(line % 2 == 1, size - 1 - place, place)
    return line * size + along, along == 0, along == size - 1
