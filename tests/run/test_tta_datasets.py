"""Check that test-time augmentation reaches the data sets inside wrappers, at their scale."""

from copy import deepcopy

import pytest
from mmengine.config import Config

from mmvssm.errors import UserError
from mmvssm.run.test import _use_tta


def test_test_time_augmentation_reaches_every_concatenated_data_set():
    parts = [dict(type="A", pipeline=[]), dict(type="B", pipeline=[])]
    dataset = dict(type="RepeatDataset", dataset=dict(type="ConcatDataset", datasets=parts))
    cfg = Config(
        dict(
            default_scope="mmseg",
            model=dict(type="M"),
            tta_model=dict(type="T"),
            tta_pipeline=[dict(type="Views")],
            test_dataloader=dict(dataset=dataset),
        )
    )
    _use_tta(cfg)
    for part in cfg.test_dataloader.dataset.dataset.datasets:
        assert part.pipeline == cfg.tta_pipeline


def _segmenter(tested, scales, **settings):
    views = [
        [dict(type="mmseg.Resize", scale=scale) for scale in scales],
        [dict(type="RandomFlip")],
    ]
    steps = [dict(type="LoadImageFromFile"), dict(type="Resize", scale=tested)]
    return Config(
        dict(
            default_scope="mmseg",
            model=dict(type="M"),
            tta_model=dict(type="T"),
            tta_pipeline=[dict(type="TestTimeAug", transforms=views)],
            test_dataloader=dict(dataset=dict(type="A", pipeline=steps)),
            **settings,
        )
    )


@pytest.mark.parametrize(
    ("tested", "expected"),
    [
        ((160, 160), [(120, 120), (160, 160), (200, 200)]),
        ((320, 320), [(240, 240), (320, 320), (400, 400)]),
        (320, [(240, 240), (320, 320), (400, 400)]),
        ((2048, 512), [(1536, 384), (2048, 512), (2560, 640)]),
    ],
)
def test_views_follow_a_changed_test_scale(tested, expected):
    cfg = _segmenter(tested, [(120, 120), (160, 160), (200, 200)], img_ratios=[0.75, 1.0, 1.25])
    inherited = deepcopy(cfg.tta_pipeline)
    _use_tta(cfg)
    views = cfg.test_dataloader.dataset.pipeline[0].transforms[0]
    assert [tuple(view.scale) for view in views] == expected
    assert cfg.tta_pipeline == inherited


@pytest.mark.parametrize(
    "settings", [{}, dict(img_ratios=[1.0, 2.0])], ids=["no ratios", "own scales"]
)
def test_views_of_another_test_are_refused(settings):
    cfg = _segmenter((320, 320), [(120, 120), (161, 161)], **settings)
    with pytest.raises(
        UserError, match=r"resizes to \(320, 320\), and tta_pipeline to \(120, 120\)"
    ):
        _use_tta(cfg)


def test_views_that_scale_each_picture_are_left_alone():
    cfg = _segmenter((320, 320), [])
    cfg.tta_pipeline[0].transforms[0] = [dict(type="Resize", scale_factor=0.5)]
    _use_tta(cfg)
    assert cfg.test_dataloader.dataset.pipeline == cfg.tta_pipeline
