"""The pyramid is mmseg's where both exist, and leaves no parameter without a gradient where mmseg's would."""

import pytest
import torch
from mmengine.config import Config
from mmengine.model import revert_sync_batchnorm
from mmengine.registry import MODELS, DefaultScope

from mmvssm.models import FeaturePyramid
from support.tiny_backbones import PLAIN

BN = dict(type="BN")


@pytest.mark.parametrize("rescales", [(4, 2, 1, 0.5), (2, 1, 0.5, 0.25)])
@pytest.mark.parametrize("training", [True, False])
def test_four_maps_are_those_of_mmseg(rescales, training):
    pytest.importorskip("mmseg")
    from mmseg.models.necks import Feature2Pyramid

    torch.manual_seed(0)
    theirs = Feature2Pyramid(6, list(rescales), norm_cfg=BN).train(training)
    ours = FeaturePyramid(6, rescales, norm_cfg=BN).train(training)
    ours.load_state_dict(theirs.state_dict())
    assert list(ours.state_dict()) == list(theirs.state_dict())
    maps = [torch.randn(2, 6, 9, 12) for _ in rescales]
    for found, expected in zip(ours(maps), theirs(maps)):
        assert torch.equal(found, expected)


def test_the_norm_is_mmseg_s_by_default():
    assert isinstance(FeaturePyramid(6).upsample_4x[1], torch.nn.SyncBatchNorm)


@pytest.mark.parametrize("rescales", [(1,), (2, 1, 0.5), (0.5, 4), (4, 2, 1, 0.5, 0.25)])
def test_any_number_of_maps_from_one_or_as_many(rescales):
    neck = FeaturePyramid(6, rescales, norm_cfg=BN).eval()
    x = torch.randn(2, 6, 8, 12)
    expected = neck([x] * len(rescales))
    assert [tuple(m.shape[2:]) for m in expected] == [(8 * r, 12 * r) for r in rescales]
    for inputs in (x, (x,), [x]):
        for found, m in zip(neck(inputs), expected):
            assert torch.equal(found, m)


def test_each_map_may_have_channels_of_its_own():
    maps = [torch.randn(1, c, 4, 4) for c in (6, 8)]
    neck = FeaturePyramid((6, 8), (4, 2), norm_cfg=BN)
    assert [tuple(m.shape) for m in neck(maps)] == [(1, 6, 16, 16), (1, 8, 8, 8)]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (dict(rescales=(3, 1)), r"different numbers of 4, 2, 1, 0.5, 0.25; got \(3, 1\)"),
        (dict(rescales=(2, 2)), "different numbers"),
        (dict(rescales=()), "different numbers"),
        (dict(in_channels=(6, 6)), r"one for each of rescales, 4; got \[6, 6\]"),
    ],
)
def test_wrong_arguments_are_named(arguments, words):
    with pytest.raises(ValueError, match=words):
        FeaturePyramid(**{"in_channels": 6, **arguments})


def test_another_number_of_inputs_is_named():
    with pytest.raises(ValueError, match="rescales has 4 factors, which need one input or as many"):
        FeaturePyramid(6, norm_cfg=BN)([torch.zeros(1, 6, 4, 4)] * 3)


DETECTORS = {
    "retinanet": """
_base_ = ["mmdet::_base_/models/retinanet_r50_fpn.py"]
FPN = dict(type="FPN", in_channels=[16] * 3, out_channels=256, add_extra_convs="on_input", num_outs=5)
""",
    "rtmdet": """
_base_ = ["mmdet::rtmdet/rtmdet_tiny_8xb32-300e_coco.py"]
FPN = dict(
    type="CSPNeXtPAFPN", in_channels=[16] * 3, out_channels=16, num_csp_blocks=1, norm_cfg=dict(type="BN")
)
model = dict(
    backbone=dict(_delete_=True),
    bbox_head=dict(in_channels=16, feat_channels=16, anchor_generator=dict(strides=[8, 16, 32])),
)
""",
    "dino": """
_base_ = ["mmdet::dino/dino-4scale_r50_8xb2-12e_coco.py"]
FPN = dict(
    type="ChannelMapper", in_channels=[16] * 3, kernel_size=1, out_channels=256, num_outs=4,
    norm_cfg=dict(type="GN", num_groups=32), act_cfg=None,
)
model = dict(num_queries=30, encoder=dict(num_layers=1), decoder=dict(num_layers=1))
""",
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("out_indices", "pruning"), [((1, 2, 3), None), ((3,), dict(layers=(0, 1), keep_ratio=0.6))]
)
@pytest.mark.parametrize("name", DETECTORS)
def test_every_parameter_of_a_detector_with_three_maps_gets_a_gradient(name, out_indices, pruning):
    """Otherwise DistributedDataParallel would need find_unused_parameters."""
    pytest.importorskip("mmdet")
    from mmdet.testing._utils import demo_mm_inputs

    cfg = Config.fromstring(DETECTORS[name], file_format=".py")
    cfg.model.backbone = dict(
        type="mmvssm.PlainMamba", arch=PLAIN, out_indices=out_indices, pruning=pruning
    )
    pyramid = dict(type="mmvssm.FeaturePyramid", in_channels=16, rescales=(2, 1, 0.5), norm_cfg=BN)
    cfg.model.neck = [dict(type="mmvssm.TokenRestoration"), pyramid, cfg.FPN]
    torch.manual_seed(0)
    with DefaultScope.overwrite_default_scope("mmdet"):
        model = revert_sync_batchnorm(MODELS.build(cfg.model)).train()
        batch = demo_mm_inputs(2, [(3, 128, 128)] * 2, num_items=[3, 2], num_classes=80)
        batch = model.data_preprocessor(batch, True)
        losses = model.loss(batch["inputs"], batch["data_samples"])
    total, _ = model.parse_losses(losses)
    total.backward()
    assert total.isfinite()
    assert not [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
