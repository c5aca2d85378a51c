import pytest
import torch
from mmengine.config import Config
from mmengine.registry import MODELS, DefaultScope

from mmvssm.models import TokenRestoration
from mmvssm.models.pruning import PrunedTokens

GRID = (3, 4)


@pytest.fixture
def pruned():
    """Two images of a 3 x 4 grid, 5 tokens kept of each."""
    generator = torch.Generator().manual_seed(0)
    order = torch.rand(2, 12, generator=generator).argsort(-1)
    kept, left = order[:, :5].sort(-1).values, order[:, 5:]  # they left in no particular order
    tokens = torch.randn(2, 12, 6, generator=generator).requires_grad_()
    return PrunedTokens(tokens[:, :5], kept, GRID, tokens[:, 5:], left)


def fill_by_hand(x, fill):
    maps = torch.zeros(2, 6, *GRID)
    for b in range(2):
        for places, values in ((x.positions, x.tokens), (x.departed_positions, x.departed)):
            for place, value in zip(places[b].tolist(), values[b]):
                inside = values is x.tokens
                maps[b, :, place // 4, place % 4] = value if inside else fill(value)
    return maps


@pytest.mark.parametrize(
    "fill, expected", [("last", lambda v: v), ("zero", lambda v: torch.zeros_like(v))]
)
def test_fills(pruned, fill, expected):
    (maps,) = TokenRestoration(fill)((pruned,))
    assert maps.is_contiguous()
    assert torch.equal(maps, fill_by_hand(pruned, expected))


def test_mask_token(pruned):
    neck = TokenRestoration("mask_token", in_channels=6)
    (maps,) = neck((pruned,))
    assert torch.equal(maps, fill_by_hand(pruned, lambda v: neck.mask_tokens[0]))
    maps.sum().backward()
    assert neck.mask_tokens[0].grad.tolist() == [14.0] * 6  # 7 of 12 places in two images


def test_gradients_reach_kept_and_departed_tokens(pruned):
    (maps,) = TokenRestoration()((pruned,))
    weights = torch.randn_like(maps)
    kept, left = torch.autograd.grad((maps * weights).sum(), [pruned.tokens, pruned.departed])
    by_place = weights.flatten(2).transpose(1, 2)
    for b in range(2):
        assert torch.equal(kept[b], by_place[b, pruned.positions[b]])
        assert torch.equal(left[b], by_place[b, pruned.departed_positions[b]])


@pytest.mark.parametrize("fill", ["last", "zero", "mask_token"])
def test_refinement_starts_as_the_identity_and_changes_filled_places_only(pruned, fill):
    plain = TokenRestoration(fill, in_channels=[6])
    refined = TokenRestoration(fill, refine=True, in_channels=[6])
    refined.load_state_dict(plain.state_dict(), strict=False)
    (expected,), (actual,) = plain((pruned,)), refined((pruned,))
    assert torch.equal(actual, expected)

    conv = refined.refiners[0]
    torch.nn.init.normal_(conv.weight)
    absent = (
        torch.ones(2, 12, dtype=torch.bool).scatter(1, pruned.positions, False).view(2, 1, *GRID)
    )
    (actual,) = refined((pruned,))
    torch.testing.assert_close(actual, torch.where(absent, expected + conv(expected), expected))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    "settings",
    [
        dict(),
        dict(fill="zero"),
        dict(fill="mask_token", in_channels=6),
        dict(refine=True, in_channels=[6, 6]),
        dict(fill="mask_token", refine=True, in_channels=[6, 6]),
    ],
)
def test_dense_maps_pass_unchanged(settings, training):
    neck = TokenRestoration(**settings).train(training)
    if neck.refiners is not None:
        torch.nn.init.normal_(neck.refiners[0].weight)
    maps = (torch.randn(2, 6, 3, 4), torch.randn(2, 6, 3, 4))
    for restored, dense in zip(neck(maps), maps):
        assert torch.equal(restored, dense)


def test_every_parameter_takes_part_in_training_where_nothing_was_pruned():
    """Distributed training waits for the gradients of all parameters, and a warm-up starts with nothing pruned."""
    neck = TokenRestoration("mask_token", refine=True, in_channels=[6, 6]).train()
    sum(y.sum() for y in neck((torch.randn(2, 6, 3, 4),) * 2)).backward()
    assert all(p.grad is not None and not p.grad.any() for p in neck.parameters())


def test_several_outputs_some_of_them_dense(pruned):
    dense = torch.randn(2, 6, *GRID)
    first, second = TokenRestoration()((dense, pruned))
    assert first is dense
    assert torch.equal(second, fill_by_hand(pruned, lambda v: v))


@pytest.mark.parametrize(
    "settings, words",
    [
        (dict(fill="first"), "unknown fill 'first'; known are 'last', 'zero', 'mask_token'"),
        (dict(fill="mask_token"), "need in_channels"),
        (dict(refine=True), "need in_channels"),
    ],
)
def test_bad_settings(settings, words):
    with pytest.raises(ValueError, match=words):
        TokenRestoration(**settings)


def test_another_number_of_outputs(pruned):
    with pytest.raises(ValueError, match="in_channels names 2 inputs, but the backbone has 1"):
        TokenRestoration(refine=True, in_channels=[6, 6])((pruned,))


@pytest.mark.parametrize("keep_ratio", [0.5, 1.0])
@pytest.mark.parametrize("scope", ["mmdet", "mmseg"])
def test_composes_with_library_necks(scope, keep_ratio):
    pytest.importorskip("mmdet")
    pytest.importorskip("mmseg")
    arch = dict(
        embed_dims=16,
        num_layers=4,
        patch_size=16,
        num_convs_patch_embed=1,
        layers_with_dwconv=(0,),
        d_state=4,
    )
    settings = Config(
        dict(
            backbone=dict(type="mmvssm.PlainMamba", arch=arch, out_indices=(0, 1, 2, 3)),
            neck=[
                dict(type="mmvssm.TokenRestoration"),
                dict(
                    type="mmseg.Feature2Pyramid",
                    embed_dim=16,
                    rescales=[4, 2, 1, 0.5],
                    norm_cfg=dict(type="BN"),
                ),
                dict(type="mmdet.FPN", in_channels=[16] * 4, out_channels=8, num_outs=5),
            ],
        )
    )
    with DefaultScope.overwrite_default_scope(scope):
        torch.manual_seed(0)
        dense = MODELS.build(settings.backbone).eval()
        settings.backbone.pruning = dict(layers=(0, 1), keep_ratio=keep_ratio)
        backbone, neck = MODELS.build(settings.backbone).eval(), MODELS.build(settings.neck).eval()
    backbone.load_state_dict(dense.state_dict())
    x = torch.randn(2, 3, 96, 128)
    with torch.no_grad():
        maps = neck(backbone(x))
        if keep_ratio == 1:
            for restored, expected in zip(neck[0](backbone(x)), dense(x)):
                assert torch.equal(restored, expected)
            for a, e in zip(maps, neck[1:](dense(x))):
                assert torch.equal(a, e)
    assert [tuple(m.shape) for m in maps] == [
        (2, 8, 24, 32),
        (2, 8, 12, 16),
        (2, 8, 6, 8),
        (2, 8, 3, 4),
        (2, 8, 2, 2),
    ]


def test_mask_tokens_start_small():
    """Like ViT's mask tokens: a truncated normal distribution of standard deviation 0.02."""
    neck = TokenRestoration(in_channels=512, fill="mask_token")
    (token,) = neck.mask_tokens
    assert token.std().item() == pytest.approx(0.02, rel=0.2)


def test_an_output_without_its_tuple(pruned):
    for bare in (pruned, torch.randn(2, 6, 3, 4)):
        (found,), (expected,) = TokenRestoration()(bare), TokenRestoration()((bare,))
        assert torch.equal(found, expected)


def test_necks_within_are_those_of_a_list(pruned):
    """Also their initialisation."""
    pytest.importorskip("mmdet")
    later = [
        dict(
            type="mmvssm.FeaturePyramid", in_channels=6, rescales=(2, 1), norm_cfg=dict(type="BN")
        ),
        dict(
            type="FPN",
            in_channels=[6, 6],
            out_channels=4,
            num_outs=3,
            init_cfg=dict(type="Constant", layer="Conv2d", val=0.5),
        ),
    ]
    first = dict(type="mmvssm.TokenRestoration")
    with DefaultScope.overwrite_default_scope("mmdet"):
        listed, nested = MODELS.build([first, *later]), MODELS.build(dict(first, then=later))
    nested.init_weights()
    assert (nested.then[1].lateral_convs[0].conv.weight == 0.5).all()
    listed[1].load_state_dict(nested.then[0].state_dict())
    listed[2].load_state_dict(nested.then[1].state_dict())
    for found, expected in zip(nested((pruned,)), listed((pruned,))):
        assert torch.equal(found, expected)


def test_no_neck_within_adds_nothing():
    assert TokenRestoration(then=[]).then is None
    assert not TokenRestoration().state_dict()


def test_several_necks_in_mmpose():
    pytest.importorskip("mmpose.models", reason="mmpose drops lists of necks")
    from support.tiny_backbones import PLAIN

    codec = dict(type="UDPHeatmap", input_size=(64, 64), heatmap_size=(16, 16), sigma=2)
    pruning = dict(layers=(0, 1), keep_ratio=0.6)
    later = [
        dict(type="mmvssm.FeaturePyramid", in_channels=16, rescales=(4,), norm_cfg=dict(type="BN")),
        dict(type="FeatureMapProcessor", select_index=0),
    ]
    model = dict(
        type="TopdownPoseEstimator",
        backbone=dict(type="mmvssm.PlainMamba", arch=PLAIN, pruning=pruning),
        neck=dict(type="mmvssm.TokenRestoration", then=later),
        head=dict(
            type="HeatmapHead",
            in_channels=16,
            out_channels=3,
            deconv_out_channels=(),
            deconv_kernel_sizes=(),
            loss=dict(type="KeypointMSELoss"),
            decoder=codec,
        ),
    )
    with DefaultScope.overwrite_default_scope("mmpose"):
        model = MODELS.build(model)
    heatmaps = model.head(model.extract_feat(torch.randn(2, 3, 64, 64)))
    assert heatmaps.shape == (2, 3, 16, 16)
    heatmaps.square().mean().backward()
    assert not [name for name, p in model.named_parameters() if p.grad is None]
