import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mmvssm.ops import cross_traversal, line_walks, neighbor_table, snake_walks


def test_cross_traversal_on_a_small_grid():
    """Tokens of a 2 x 3 grid are 0 1 2 / 3 4 5."""
    traversal = cross_traversal(2, 3)
    assert traversal.order.tolist() == [
        [0, 1, 2, 3, 4, 5],
        [0, 3, 1, 4, 2, 5],
        [5, 4, 3, 2, 1, 0],
        [5, 2, 4, 1, 3, 0],
    ]
    assert traversal.order.dtype == torch.int32
    assert traversal.source is None and traversal.gap is None


@given(height=st.integers(1, 12), width=st.integers(1, 12))
def test_each_walk_visits_each_token_once(height, width):
    order = cross_traversal(height, width).order
    expected = torch.arange(height * width, dtype=torch.int32).expand(4, -1)
    assert torch.equal(order.sort(-1).values, expected)


MOVES = {1: (0, 1), 2: (0, -1), 3: (-1, 0), 4: (1, 0)}  # right, left, up, down
SIZES = st.integers(1, 9)


def test_snake_walks_on_a_small_grid():
    """Tokens of a 2 x 3 grid are 0 1 2 / 3 4 5."""
    walks = snake_walks(2, 3, raster_source=False)
    order = [[0, 1, 2, 5, 4, 3], [3, 4, 5, 2, 1, 0], [0, 3, 4, 1, 2, 5], [5, 2, 1, 4, 3, 0]]
    by_step = [[0, 1, 1, 4, 2, 2], [0, 1, 1, 3, 2, 2], [0, 4, 1, 3, 1, 4], [0, 3, 2, 4, 2, 3]]
    assert walks.traversal.order.tolist() == order
    assert walks.traversal.source is None and walks.traversal.gap is None
    assert walks.arrival.gather(1, walks.traversal.order.long()).tolist() == by_step

    # As published, the t-th step reads B from the t-th token in memory.
    published = snake_walks(2, 3)
    assert published.traversal.order.tolist() == order
    assert published.traversal.source.tolist() == [[0, 1, 2, 3, 4, 5]] * 4
    assert published.arrival.tolist() == by_step


@given(height=SIZES, width=SIZES)
def test_snake_walks_are_continuous_and_know_how_they_arrive(height, width):
    walks = snake_walks(height, width)
    assert torch.equal(
        walks.traversal.order.sort(-1).values.long(), torch.arange(height * width).expand(4, -1)
    )
    assert torch.equal(walks.traversal.order[[1, 3]], walks.traversal.order[[0, 2]].flip(-1))
    for order, arrival in zip(walks.traversal.order.tolist(), walks.arrival.tolist()):
        assert arrival[0] == 0
        for previous, token, code in zip(order, order[1:], arrival[1:]):
            here, there = divmod(token, width), divmod(previous, width)
            assert (here[0] - there[0], here[1] - there[1]) == MOVES[code]


@given(height=SIZES, width=SIZES, seed=st.integers(0, 9), raster=st.booleans())
def test_walks_over_kept_positions_are_the_full_walks_without_the_others(
    height, width, seed, raster
):
    generator = torch.Generator().manual_seed(seed)
    count = int(torch.randint(1, height * width + 1, (), generator=generator))
    positions = torch.rand(2, height * width, generator=generator).argsort(-1)[:, :count]
    positions = positions.sort(-1).values
    full = snake_walks(height, width, raster_source=False)
    walks = snake_walks(height, width, positions, raster_source=raster)
    assert walks.traversal.order.dtype == walks.traversal.gap.dtype == torch.int32
    for b, kept in enumerate(positions.tolist()):
        for k, full_order in enumerate(full.traversal.order.tolist()):
            steps = [t for t, token in enumerate(full_order) if token in kept]
            order = [kept.index(full_order[t]) for t in steps]
            assert walks.traversal.order[b, k].tolist() == order
            gaps = [t - before - 1 for t, before in zip(steps, [-1, *steps])]
            assert walks.traversal.gap[b, k].tolist() == gaps
            by_step = [full.arrival[k, full_order[t]].item() for t in steps]
            source = list(range(count)) if raster else order
            assert walks.arrival[b, k, source].tolist() == by_step
            if raster:
                assert walks.traversal.source[b, k].tolist() == source
    assert snake_walks(height, width, positions, with_gaps=False).traversal.gap is None


def test_line_walks_go_both_ways_and_count_what_they_pass():
    assert line_walks(3).order.tolist() == [[0, 1, 2], [2, 1, 0]]
    pruned = line_walks(7, torch.tensor([[0, 1, 5], [2, 3, 6]]))
    assert pruned.order.tolist() == [[[0, 1, 2], [2, 1, 0]]] * 2
    assert pruned.gap.tolist() == [[[0, 0, 3], [1, 3, 0]], [[2, 0, 2], [0, 2, 0]]]
    assert pruned.gap.dtype == torch.int32 and pruned.source is None
    assert line_walks(7, torch.tensor([[0, 1, 5]]), with_gaps=False).order.shape == (2, 3)


@pytest.mark.parametrize("wrong", [[0, 0, 5], [3, 1, 5], [-1, 1, 5], [0, 1, 6]], ids=str)
@pytest.mark.parametrize(
    "use",
    [
        lambda positions: line_walks(6, positions),
        lambda positions: snake_walks(2, 3, positions),
        lambda positions: neighbor_table(positions, (2, 3), 3),
    ],
    ids=["line_walks", "snake_walks", "neighbor_table"],
)
def test_positions_that_are_no_part_of_the_grid(use, wrong):
    """The walks would miss tokens, or visit some twice."""
    use(torch.tensor([[0, 1, 5], [0, 4, 5]]))
    with pytest.raises(ValueError, match=r"positions must increase and lie in \[0, 6\)"):
        use(torch.tensor([[0, 1, 5], wrong]))
