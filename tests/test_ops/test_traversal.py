import torch
from hypothesis import given
from hypothesis import strategies as st

from mmvssm.ops import cross_traversal


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
