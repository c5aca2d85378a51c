"""Blueprints of models: what is written, and what reading it gives back."""

import pytest
from mmengine.config import Config

from mmvssm.models.blueprint import read_blueprint, write_blueprint

MODEL = dict(
    type="A",
    pretrained="x.pth",
    init_cfg=dict(type="Pretrained", checkpoint="x.pth"),
    backbone=dict(
        type="B",
        out_indices=(0, 1),
        depths=[1, 2],
        ratios={3: 0.5, 7: 0.25},
        drop_path_rate=0.1,
        init_values=1e-5,
        norm=None,
        with_cp=False,
        teacher_ckpt="x.pth",
    ),
    train_cfg=dict(assigner=dict(type="C")),
)
READING = dict(type="LoadImageFromFile", imdecode_backend="cv2", backend_args=None)


def config(**changes):
    pipeline = [READING, dict(type="Resize", scale=(4, 6))]
    wrapped = dict(type="Repeat", dataset=dict(type="D", data_root="x", pipeline=pipeline))
    parts = dict(
        default_scope="mmdet",
        model=MODEL,
        data_preprocessor=dict(type="P", mean=[1.5], batch_augments=[dict(type="Mix")]),
        test_dataloader=dict(dataset=wrapped),
        train_dataloader=dict(batch_size=3),
        train_cfg=dict(type="EpochBasedTrainLoop", max_epochs=12),
    )
    return Config({**parts, **changes})


def test_what_is_read_is_what_was_written():
    cfg = config()
    found = read_blueprint(write_blueprint(cfg))
    backbone = {k: v for k, v in MODEL["backbone"].items() if k != "teacher_ckpt"}
    assert found["model"] == dict(
        type="A",
        backbone=backbone,
        train_cfg=None,
        data_preprocessor=dict(type="P", mean=[1.5], batch_augments=None),
    )
    assert isinstance(found["model"]["backbone"]["out_indices"], tuple)
    assert found["pipeline"] == [
        dict(type="LoadImageFromFile", imdecode_backend="cv2"),
        dict(type="Resize", scale=(4, 6)),
    ]
    assert (found["batch_size"], found["schedule"]) == (3, dict(max_epochs=12))
    assert "init_cfg" in cfg.model  # which goes on training


def test_without_data_there_is_no_pipeline():
    cfg = config(test_dataloader=None, train_dataloader=None, train_cfg=None)
    found = read_blueprint(write_blueprint(cfg))
    assert (found["pipeline"], found["batch_size"], found["schedule"]) == ([], None, {})


@pytest.mark.parametrize("value", [dict, 1j, {1, 2}, b"x"], ids=repr)
def test_only_text_and_numbers_can_be_written(value):
    with pytest.raises(TypeError, match="cannot be written as text"):
        write_blueprint(config(model=dict(type="A", part=value)))
