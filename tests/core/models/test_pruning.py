import pickle

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from mmvssm.models.pruning import (
    METRICS,
    PrunedTokens,
    PruningError,
    TokenPruning,
    drop_tokens,
    merge,
    packed_grid,
    padding_tokens,
    select,
    similarity_to_neighbors,
    take,
)


def pruning(**settings):
    return TokenPruning.of(dict(layers=[2, 5], keep_ratio=0.5) | settings, num_layers=8)


@pytest.mark.parametrize(
    "settings, words",
    [
        (dict(keep_ratio=0), r"keep_ratio must be in \(0, 1\]; got 0"),
        (dict(keep_ratio=1.5), r"keep_ratio must be in \(0, 1\]; got 1.5"),
        (dict(keep_ratio=[0.5, -0.1]), r"keep_ratio must be in \(0, 1\]; got \[0.5, -0.1\]"),
        (dict(keep_ratio=float("nan")), r"keep_ratio must be in \(0, 1\]; got nan"),
        (dict(keep_ratio=[0.5]), "as many as there are layers, 2; got 1"),
        (dict(keep_ratio=[0.5] * 3), "as many as there are layers, 2; got 3"),
        (
            dict(layers=[5, 2]),
            r"increasing numbers from 0 to 6, the last layer but one; got \[5, 2\]",
        ),
        (dict(layers=[2, 2]), r"increasing numbers from 0 to 6.*got \[2, 2\]"),
        (dict(layers=[2, 7]), r"increasing numbers from 0 to 6.*got \[2, 7\]"),
        (dict(layers=[-1, 2]), r"increasing numbers from 0 to 6.*got \[-1, 2\]"),
        (dict(layers=[]), r"increasing numbers from 0 to 6.*got \[\]"),
        (dict(metric="max"), "unknown metric 'max'; known are 'clip', 'value', 'l1', 'l2'"),
        (dict(alignment="align"), "unknown alignment 'align'; known are 'decay', 'hold', 'none'"),
        (dict(reduction="melt"), "unknown reduction 'melt'; known are 'prune', 'merge'"),
        (dict(reduction="merge", keep_ratio=0.4), "keep_ratio must be at least 0.5; got 0.4"),
        (dict(rejoin=6), "rejoin must be a layer from 7 to 7, .* got 6"),
        (dict(rejoin=8), "rejoin must be a layer from 7 to 7, .* got 8"),
        (dict(ratio=1), r"expected a dict with layers and keep_ratio, .* got the keys"),
    ],
)
def test_bad_settings(settings, words):
    with pytest.raises(ValueError, match=words) as caught:
        pruning(**settings)
    assert str(caught.value).count("\n") == 0


@given(st.integers(1, 5000), st.integers(1, 100))
def test_number_of_kept_tokens_is_rounded_up(num_tokens, percent):
    kept = pruning(keep_ratio=percent / 100).num_kept(2, num_tokens)
    assert kept == -(-num_tokens * percent // 100)


def test_only_pruning_layers_prune():
    both = pruning(keep_ratio=[0.5, 0.25])
    assert [both.num_kept(i, 100) for i in range(8)] == [100, 100, 50, 100, 100, 25, 100, 100]


@pytest.mark.parametrize("metric", METRICS)
def test_nothing_is_learned_by_importance(metric):
    y = torch.randn(2, 5, 3, requires_grad=True)
    assert not pruning(metric=metric).importance(y).requires_grad


def test_progress_matters_in_training_only():
    gradual = pruning(keep_ratio=0.6)
    for progress, training_ratio in ((0.0, 1.0), (0.5, 0.8), (1.0, 0.6)):
        gradual.progress = progress
        assert gradual.training_keep_ratio() == pytest.approx(training_ratio)
        assert gradual.num_kept(2, 1000, training=True) == 1000 * training_ratio
        assert gradual.num_kept(2, 1000) == 600


@given(
    scores=st.lists(st.integers(0, 3), min_size=1, max_size=30),
    share=st.floats(0, 1),
)
def test_selection_is_by_importance_then_position(scores, share):
    count = max(1, round(share * len(scores)))
    importance = torch.tensor([scores, scores[::-1]], dtype=torch.float32)
    kept, dropped = select(importance, count)
    for row, kept_here, dropped_here in zip(importance.tolist(), kept, dropped):
        ranked = sorted(range(len(row)), key=lambda i: (-row[i], i))
        assert kept_here.tolist() == sorted(ranked[:count])
        assert dropped_here.tolist() == sorted(ranked[count:])


def test_take_with_gradient():
    x = torch.randn(2, 5, 3, requires_grad=True)
    index = torch.tensor([[4, 0], [1, 2]])
    y = take(x, index)
    assert torch.equal(y, torch.stack([x[0, [4, 0]], x[1, [1, 2]]]))
    y.sum().backward()
    assert x.grad[:, :, 0].tolist() == [[1, 0, 0, 0, 1], [0, 1, 1, 0, 0]]


def test_leaving_twice():
    tokens = torch.arange(5.0).view(1, 5, 1)
    once = drop_tokens(tokens, None, (1, 5), torch.tensor([[0, 2, 4]]), torch.tensor([[1, 3]]))
    twice = drop_tokens(once.tokens + 10, once, (1, 5), torch.tensor([[0, 2]]), torch.tensor([[1]]))
    assert twice.tokens.flatten().tolist() == [10, 14]
    assert twice.positions.tolist() == [[0, 4]]
    assert twice.departed.flatten().tolist() == [1, 3, 12]
    assert twice.departed_positions.tolist() == [[1, 3, 2]]


@given(st.integers(1, 40), st.integers(1, 40), st.floats(0.05, 1))
def test_packed_grid(height, width, share):
    num_tokens = max(1, round(share * height * width))
    try:
        rows, columns = packed_grid(num_tokens, (height, width))
    except ValueError as error:
        assert "alignment='none' cannot pack" in str(error)
        return
    assert rows * columns == num_tokens
    assert 0.4999 <= (rows / columns) / (height / width) <= 2.0001


def test_grids_that_pack_exactly():
    assert packed_grid(100, (14, 14)) == (10, 10)
    assert packed_grid(96, (14, 14)) == (8, 12)
    assert packed_grid(98, (28, 14)) == (14, 7)
    with pytest.raises(ValueError, match="cannot pack the 97 tokens kept of a 14x14 grid"):
        packed_grid(97, (14, 14))


def pruned_tokens():
    tokens = torch.randn(2, 3, 4)
    positions = torch.tensor([[0, 1, 2], [1, 2, 3]])
    rest = torch.tensor([[3], [0]])
    return PrunedTokens(tokens, positions, (2, 2), torch.randn(2, 1, 4), rest)


@pytest.mark.parametrize(
    "use",
    [
        lambda x: x.shape,
        lambda x: torch.add(x, 1),
        lambda x: torch.cat([x, x]),
        lambda x: F.conv2d(x, torch.zeros(1, 4, 1, 1)),
        lambda x: torch.nn.Conv2d(4, 4, 1)(x),
        lambda x: torch.nn.ConvTranspose2d(4, 4, 2)(x),
        lambda x: F.interpolate(x, scale_factor=2),
    ],
    ids=["shape", "add", "cat", "conv2d", "Conv2d", "ConvTranspose2d", "interpolate"],
)
def test_used_as_a_map_it_says_what_is_missing(use):
    with pytest.raises(PruningError, match=r"TokenRestoration'\) before other necks"):
        use(pruned_tokens())


@pytest.mark.parametrize("neck", ["mmdet.FPN", "mmseg.Feature2Pyramid"])
def test_necks_that_come_without_restoration_say_so(neck):
    scope = neck.split(".")[0]
    pytest.importorskip(scope)
    from mmengine.registry import MODELS

    settings = dict(
        {
            "mmdet.FPN": dict(in_channels=[4] * 4, out_channels=4, num_outs=4),
            "mmseg.Feature2Pyramid": dict(
                embed_dim=4, rescales=[4, 2, 1, 0.5], norm_cfg=dict(type="BN")
            ),
        }[neck],
        type=neck,
    )
    with pytest.raises(PruningError, match="TokenRestoration"):
        MODELS.build(settings)((pruned_tokens(),) * 4)


def test_survives_pickling():
    x = pruned_tokens()
    assert torch.equal(pickle.loads(pickle.dumps(x)).tokens, x.tokens)


def test_hasattr_answers():
    x = pruned_tokens()
    assert hasattr(x, "tokens") and not hasattr(x, "shape") and not hasattr(x, "__len__")
    assert getattr(x, "dtype", None) is None
    with pytest.raises(PruningError, match=r"^PrunedTokens has no 'dtype'\. .*TokenRestoration"):
        _ = x.dtype


def test_equal_if_the_same():
    x = pruned_tokens()
    other = PrunedTokens(x.tokens, x.positions, x.grid, x.departed, x.departed_positions)
    assert x == x and x != other
    assert other not in [x] and len({x, other}) == 2


def test_to_moves_all_and_converts_values():
    x = pruned_tokens()
    narrow = x.to(torch.bfloat16)
    assert narrow.tokens.dtype == narrow.departed.dtype == torch.bfloat16
    assert narrow.positions.dtype == narrow.departed_positions.dtype == torch.int64
    assert narrow.grid == x.grid and torch.equal(narrow.tokens, x.tokens.bfloat16())
    moved = x.to("meta", torch.float64)
    tensors = (moved.tokens, moved.positions, moved.departed, moved.departed_positions)
    assert all(tensor.is_meta for tensor in tensors)
    assert moved.departed.dtype == torch.float64 and moved.positions.dtype == torch.int64


def test_padding_is_what_is_zero_below_and_to_the_right():
    x = torch.zeros(4, 3, 10, 13)
    x[0] = torch.randn(3, 10, 13)  # fills the batch's size
    x[1, :, :4, :9] = torch.randn(3, 4, 9)
    x[2, 1, 8, 12] = 1  # a single pixel that is not zero, in one channel
    padding = padding_tokens(x, 4, (3, 4)).view(4, 3, 4)
    assert not padding[0].any()
    assert (~padding[1]).int().tolist() == [[1, 1, 1, 0], [0, 0, 0, 0], [0, 0, 0, 0]]
    assert not padding[2].any()
    assert padding[3].all()


# ------------------------------------------------------------------------------- the baselines


def test_random_choice_repeats_itself_in_evaluation_only():
    chosen = pruning(metric="random")
    y = torch.randn(3, 40, 4)
    first, second = chosen.importance(y), chosen.importance(-y)
    assert torch.equal(first, second) and torch.equal(first[0], first[2])
    torch.manual_seed(0)
    first, second = (chosen.importance(y, training=True) for _ in range(2))
    assert not torch.equal(first, second) and not torch.equal(first[0], first[2])
    torch.manual_seed(0)
    assert torch.equal(first, chosen.importance(y, training=True))


def walk(positions, grid, through_rows):
    """Positions in the order in which a snake through the whole grid comes to them."""
    height, width = grid
    cells = [(r, c) for r in range(height) for c in range(width)[:: -1 if r % 2 else 1]]
    if not through_rows:
        cells = [(r, c) for c in range(width) for r in range(height)[:: -1 if c % 2 else 1]]
    return [r * width + c for r, c in cells if r * width + c in positions]


def matching(tokens, positions, grid, absent):
    """similarity_to_neighbors for one image, step by step."""
    rows, columns = walk(positions, grid, True), walk(positions, grid, False)
    moving = set(rows[1::2])
    importance, target = [], []
    for i, position in enumerate(positions):
        best, joined = (2.0 if position in moving else 3.0), i
        for order in (rows, columns):
            rank = order.index(position)
            for other in order[max(rank - 1, 0) : rank + 2]:
                j = positions.index(other)
                if position not in moving or other in moving or absent[j]:
                    continue
                turned = -F.cosine_similarity(tokens[i], tokens[j], dim=0).item()
                if turned < best:
                    best, joined = turned, j
        importance.append(best)
        target.append(joined)
    return importance, target


@pytest.mark.parametrize("grid", [(4, 5), (3, 3), (1, 6), (5, 1), (1, 1)])
@pytest.mark.parametrize("share", [1.0, 0.6])
def test_matching_of_neighbours(grid, share):
    torch.manual_seed(0)
    cells = grid[0] * grid[1]
    count = -(-int(cells * share * 10) // 10) or 1
    positions = torch.stack([torch.randperm(cells)[:count].sort().values for _ in range(3)])
    tokens, absent = torch.randn(3, count, 4), torch.rand(3, count) < 0.2
    given = None if count == cells else positions
    importance, target = similarity_to_neighbors(tokens, given, grid, absent)
    for b in range(3):
        expected = matching(tokens[b], positions[b].tolist(), grid, absent[b])
        torch.testing.assert_close(importance[b], torch.tensor(expected[0]), atol=1e-6, rtol=0)
        assert target[b].tolist() == expected[1]
    if (
        given is None
    ):  # those that may join another are the black squares of a chessboard, the others the white
        row, column = positions // grid[1], positions % grid[1]
        black = (row + column) % 2 == 1
        assert (importance[~black] == 3).all() and (importance[black] <= 2).all()


def test_merging_keeps_sums():
    tokens = torch.randn(1, 6, 3, dtype=torch.float64, requires_grad=True)
    sizes = torch.tensor([[1.0, 2.0, 1.0, 3.0, 1.0, 1.0]], dtype=torch.float64)
    target = torch.tensor([[0, 0, 0, 4, 4, 5]])
    leaving = torch.tensor([[1, 2, 3]])
    merged, weights = merge(tokens, sizes, leaving, target)
    stay = torch.tensor([0, 4, 5])
    assert weights[0, stay].tolist() == [4, 4, 1]
    first = (tokens[0, 0] + 2 * tokens[0, 1] + tokens[0, 2]) / 4
    torch.testing.assert_close(merged[0, 0], first)
    torch.testing.assert_close(merged[0, 4], (3 * tokens[0, 3] + tokens[0, 4]) / 4)
    assert torch.equal(merged[0, [1, 2, 3, 5]], tokens[0, [1, 2, 3, 5]])
    whole = (tokens[0] * sizes[0, :, None]).sum(0)
    torch.testing.assert_close((merged[0, stay] * weights[0, stay, None]).sum(0), whole)
    merged[0, stay].sum().backward()
    assert (tokens.grad != 0).all()
