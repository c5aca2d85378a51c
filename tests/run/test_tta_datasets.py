"""Check that test-time augmentation reaches the data sets inside wrappers."""

from mmengine.config import Config

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
