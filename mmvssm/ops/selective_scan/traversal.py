"""Orders in which scans walk over a grid of tokens.

Tokens stay in place in memory; a traversal only lists the token that each step of a scan visits.
"""

from __future__ import annotations

from typing import NamedTuple, Optional

import torch
from torch import Tensor

from ..backend import check_positions


class Traversal(NamedTuple):
    """The tokens that ``K`` walks visit, step by step.

    Attributes:
        order: Token whose value step ``t`` reads and whose output it writes, int32 ``(K, L)``, or ``(B, K, L)`` where
            images differ. Each walk is a permutation of the ``L`` tokens.
        source: Token whose ``delta``, ``B`` and ``C`` step ``t`` reads, shaped like ``order``; None means ``order``.
            Also a permutation, since each gradient is written to the token that was read.
        gap: Number of absent grid positions between steps ``t - 1`` and ``t``, int32, shaped like ``order``; None
            means 0 for all steps.
    """

    order: Tensor
    source: Optional[Tensor] = None
    gap: Optional[Tensor] = None


def cross_traversal(height: int, width: int, device: Optional[torch.device] = None) -> Traversal:
    """Four walks over a grid: by rows, by columns, and both backwards (GroupMamba, section 3.2).

    Args:
        height: Rows of the grid.
        width: Columns of the grid.
        device: Device of the order.

    Returns:
        A traversal with ``order (4, height * width)``; tokens are numbered row by row.
    """
    rows = torch.arange(height * width, dtype=torch.int32, device=device)
    columns = rows.view(height, width).t().reshape(-1)
    forward = torch.stack([rows, columns])
    return Traversal(torch.cat([forward, forward.flip(-1)]))


def line_walks(
    length: int,
    positions: Optional[Tensor] = None,
    *,
    with_gaps: bool = True,
    device: Optional[torch.device] = None,
) -> Traversal:
    """Two walks over a full or pruned line, forwards and backwards (Vim, section 3.3).

    Args:
        length: Places on the line.
        positions: Those that have tokens: integers ``(B, L)``, increasing; by default all.
        with_gaps: Whether to count absent places between steps.
        device: Device of the walks if ``positions`` is None.

    Returns:
        Walks over tokens numbered as in ``positions``: ``(2, L)``, or ``(B, 2, L)`` where there are gaps.
    """
    count = length if positions is None else positions.shape[1]
    device = device if positions is None else positions.device
    forwards = torch.arange(count, dtype=torch.int32, device=device)
    order = torch.stack([forwards, forwards.flip(0)])
    if positions is None or not with_gaps:
        return Traversal(order)
    check_positions("line_walks", positions, length)
    steps = torch.stack([positions, length - 1 - positions.flip(1)], 1).to(torch.int32)
    before = torch.nn.functional.pad(steps[..., :-1], (1, 0), value=-1)
    return Traversal(order[None].expand(steps.shape[0], -1, -1), gap=steps - before - 1)


START, RIGHT, LEFT, UP, DOWN = range(5)
"""How a step of a continuous walk arrived at its position (PlainMamba, "Direction-Aware Updating")."""


class SnakeWalks(NamedTuple):
    """Four continuous walks and the direction of each step.

    Attributes:
        traversal: The walks.
        arrival: int64 ``(4, L)`` or ``(B, 4, L)``: for each token, the direction in which the step that reads this
            token's ``B`` arrived: :data:`START`, :data:`RIGHT`, :data:`LEFT`, :data:`UP` or :data:`DOWN`.
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
    """Four continuous walks over a full or pruned grid (PlainMamba, "Continuous 2D Scanning").

    Walk 0 goes by rows from the top left, rightwards in the first row, leftwards in the second and so on; walk 2 goes
    by columns from the top left, downwards in the first; walks 1 and 3 are walks 0 and 2 backwards.

    On a pruned grid, each walk skips the absent positions of the full grid's walk; a step keeps the arrival that it has
    in the full walk.

    Args:
        height: Rows of the grid.
        width: Columns of the grid.
        positions: Row-major grid positions that have tokens: integers ``(B, L)``, increasing; by default all.
        raster_source: Whether step ``t`` reads ``delta``, ``B`` and ``C`` from the ``t``-th token in memory, as the
            published PlainMamba does, instead of from the token that it visits.
        with_gaps: Whether to count absent positions between steps.
        device: Device of the walks if ``positions`` is None.

    Returns:
        Walks over tokens numbered as in ``positions``: ``(B, 4, L)``, or ``(4, height * width)`` without gaps if
        ``positions`` is None.
    """
    everywhere = positions is None
    if everywhere:
        positions = torch.arange(height * width, device=device)[None]
    length = height * width
    check_positions("snake_walks", positions, length)
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
    """Find the step at which a back-and-forth walk along lines of ``size`` places visits a place.

    Returns:
        The step, and whether it is the first and the last on its line.
    """
    along = torch.where(line % 2 == 1, size - 1 - place, place)
    return line * size + along, along == 0, along == size - 1
