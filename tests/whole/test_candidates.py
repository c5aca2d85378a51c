"""tools/experiments/candidates.py: other importances, and a dense teacher."""

import pytest
import torch

pytest.importorskip("mmdet")
pytest.importorskip("mmseg")

import candidates
from dense_arms import ARMS, DEFAULT
from dense_campaign import DATA_SETS, config_of
from mmengine.registry import init_default_scope
from mmengine.structures import PixelData
from mmseg.structures import SegDataSample

from mmvssm.models import PlainMamba, TokenRestoration
from mmvssm.registry import MODELS

MINI = dict(
    embed_dims=16,
    num_layers=6,
    patch_size=8,
    num_convs_patch_embed=1,
    layers_with_dwconv=(0,),
    d_state=4,
)
PRUNING = dict(layers=(1, 3), keep_ratio=0.5)


def pair(**settings):
    """A candidate and PlainMamba with the same weights."""
    torch.manual_seed(0)
    candidate = candidates.CandidatePlainMamba(MINI, 64, pruning=PRUNING, **settings).eval()
    plain = PlainMamba(MINI, 64, pruning=PRUNING).eval()
    plain.load_state_dict(candidate.state_dict())
    return candidate, plain


def test_without_a_candidate_s_settings_it_is_plain_mamba():
    x = torch.randn(2, 3, 64, 80)
    (actual,), (expected,) = (model(x) for model in pair())
    assert torch.equal(actual.tokens, expected.tokens)
    assert torch.equal(actual.positions, expected.positions)


@pytest.mark.parametrize("score", candidates.SCORES)
def test_other_scores_keep_other_tokens(score):
    x = torch.randn(2, 3, 64, 80)
    (actual,), (expected,) = (model(x) for model in pair(score=score))
    assert actual.tokens.shape == expected.tokens.shape
    assert not torch.equal(actual.positions, expected.positions)
    with pytest.raises(ValueError, match="unknown score 'none'; known are"):
        pair(score="none")


def test_the_update_is_what_a_layer_adds():
    model, _ = pair(score="update")
    states = list(model.walk_layers(torch.randn(2, 3, 64, 80)))
    added = (states[1].tokens - states[0].tokens).norm(dim=-1)
    torch.testing.assert_close(states[1].importance, added, atol=1e-4, rtol=1e-4)


def test_units_stay_together():
    model, _ = pair(unit=2)
    states = list(model.walk_layers(torch.randn(1, 3, 64, 64)))
    kept = torch.zeros(64).scatter(0, states[2].pruned.positions[0], 1.0)
    assert set(torch.nn.functional.avg_pool2d(kept.view(1, 8, 8), 2).unique().tolist()) == {0, 1}


def test_spread_tokens_leave_no_square_without_one():
    model, plain = pair(spread=True)
    x = torch.randn(2, 3, 64, 64)
    x[1, :, 48:] = 0  # padding
    for found, by_rank in zip(model.walk_layers(x), plain.walk_layers(x)):
        if found.pruned is None:
            continue
        kept, ranked = found.pruned.positions, by_rank.pruned.positions
        assert kept.shape == ranked.shape and not torch.equal(kept, ranked)
        counts = torch.zeros(2, 64).scatter(1, kept, 1.0).view(2, 1, 8, 8)
        squares = torch.nn.functional.max_pool2d(counts, 2)  # 16, for 32 and 16 tokens
        assert squares[0].all() and squares[1, 0, :3].all()
        assert counts[1, 0, 6:].sum() == 0  # padding goes first


def test_the_best_of_each_square_come_first():
    importance = torch.arange(12.0)[None]
    best = candidates._best_of_squares_first(importance, None, (3, 4), 3)
    assert best.topk(3).indices.tolist() == [[11, 10, 9]] and best[0].topk(2).values.min() > 11
    importance[0, [3, 7, 11]] = -torch.inf  # padding
    best = candidates._best_of_squares_first(importance, None, (3, 4), 2)
    assert best.topk(4).indices.sort().values.tolist() == [[5, 6, 9, 10]]
    assert best[0, [3, 7, 11]].tolist() == [-torch.inf] * 3


def test_a_mean_over_layers_covers_those_since_the_last_pruning():
    model, plain = pair(over_layers=True)
    x = torch.randn(2, 3, 64, 80)
    states = list(model.walk_layers(x))
    single = list(plain.walk_layers(x))
    layout = plain.dense_layout((8, 10), x.device)
    _, y = plain.layers[0](plain.embed(x).tokens, layout)
    first = plain.pruning.importance(y)
    expected = (first + single[1].importance) / 2
    torch.testing.assert_close(states[1].importance, expected, atol=1e-5, rtol=1e-4)


def budget(count):
    """Maps of images by a shared budget, and the dense model's, restored after the usual pruning, of each image."""
    torch.manual_seed(0)
    settings = dict(pruning=PRUNING, out_indices=(0, 2, 4, 5))
    shared = candidates.BudgetCandidate(MINI, 64, **settings).eval()
    plain = PlainMamba(MINI, 64, **settings).eval()
    plain.load_state_dict(shared.state_dict())
    x = torch.randn(count, 3, 64, 80)
    return shared, x, shared(x), TokenRestoration()(plain(x))


def test_one_image_has_the_whole_budget():
    _, _, actual, expected = budget(1)
    for a, e in zip(actual, expected):
        torch.testing.assert_close(a, e)


def test_images_share_a_budget(monkeypatch):
    model, x, _, _ = budget(3)
    x[0] = x[0].mean((1, 2), keepdim=True)  # nothing to see there
    counts = []
    layout = model.pruned_layout
    monkeypatch.setattr(
        model,
        "pruned_layout",
        lambda pruned: counts.append(pruned.tokens.shape[1]) or layout(pruned),
    )
    maps = model(x)
    first, second = counts[:3], counts[3:]
    assert sum(first) == 3 * 40 and sum(second) == 3 * 20  # of 80 tokens each
    assert len(set(first)) > 1 and min(first) >= 8
    assert [m.shape for m in maps] == [(3, 16, 8, 10)] * 4
    sum(m.square().mean() for m in model.train()(x)).backward()
    assert all(p.grad is not None for p in model.layers.parameters())


@pytest.mark.slow
def test_a_student_learns_the_maps_of_its_dense_self(tmp_path):
    cfg = config_of(DATA_SETS["camvid"], "pruned, taught")
    assert ARMS["pruned, taught"].options["model.backbone.pruning"] == DEFAULT
    init_default_scope(cfg.default_scope)
    dense = MODELS.build(config_of(DATA_SETS["camvid"], "PlainMamba").model)
    torch.save(dense.state_dict(), tmp_path / "dense.pth")
    found = {}
    for name, pruning in (("dense", None), ("pruned", DEFAULT)):
        settings = dict(cfg.model, teacher=str(tmp_path / "dense.pth"), logit_weight=1.0)
        settings["backbone"] = dict(cfg.model.backbone, pruning=pruning)
        student = MODELS.build(settings)
        student.init_weights()
        student.load_state_dict(dense.state_dict())  # the teacher is no part of it
        student.eval()  # BatchNorm as in the teacher
        samples = [SegDataSample(metainfo=dict(img_shape=(64, 96))) for _ in range(2)]
        for sample in samples:
            sample.gt_sem_seg = PixelData(data=torch.zeros(1, 64, 96, dtype=torch.long))
        torch.manual_seed(0)
        found[name] = student.loss(torch.randn(2, 3, 64, 96), samples)
    for key in ("loss_maps", "loss_logits"):
        assert found["dense"][key].item() == pytest.approx(0, abs=1e-6)
        assert found["pruned"][key].item() > 1e-4 and found["pruned"][key].requires_grad
