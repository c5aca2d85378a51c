"""The data check of a run: its switch on the command line, and the warnings that it prints."""

from core.datasets.test_data_check import (
    TRAIN,
    Reads,
    ann,
    checked,
    detector,
    image,
    instances,
    refusal,
)
from mmengine.registry import init_default_scope

from mmvssm.run.arguments import train_parser
from mmvssm.run.setup import prepare_data


def arguments(*extra):
    return train_parser().parse_args(["config.py", *map(str, extra)])


def test_reading_can_be_switched_off(tmp_path, monkeypatch, capsys):
    reads = Reads(monkeypatch)
    data = instances(tmp_path, image(b""))
    args = arguments("--data-root", data.root)
    init_default_scope("mmdet")
    assert "0.png is empty" in refusal(prepare_data, detector(), args, TRAIN, None)
    assert reads.take()
    args = arguments("--data-root", data.root, "--no-data-check")
    capsys.readouterr()
    prepare_data(detector(), args, TRAIN, None)
    (line,) = capsys.readouterr().out.splitlines()[1:]
    assert line.startswith("warning: images and label maps are not checked") and reads.take() == []
    cfg = detector()
    cfg.check_data = False
    assert checked(cfg, data.root) and reads.take() == []
    # Annotations, which mmdet reads whole in any case, are checked all the same.
    bad = instances(tmp_path / "bad", ann(area=None))
    args = arguments("--data-root", bad.root, "--no-data-check")
    assert "has no area" in refusal(prepare_data, detector(), args, TRAIN, None)


def test_warnings_are_lines_of_the_first_process(tmp_path, capsys):
    data = instances(tmp_path, ann(bbox=[2, 3, 0, 6]))
    init_default_scope("mmdet")
    prepare_data(detector(), arguments("--data-root", data.root), TRAIN, None)
    found, warning = capsys.readouterr().out.splitlines()
    assert "2 classes (cat, dog)" in found
    assert warning.startswith("warning: 1 of 4 annotations in ")


def test_a_size_of_generated_images_is_refused_for_images_that_exist(tmp_path):
    data = instances(tmp_path, lambda data: None)
    args = arguments("--data-root", data.root, "--cfg-options", "prepare_data.image_size=320")
    init_default_scope("mmdet")
    said = refusal(prepare_data, detector(), args, TRAIN, None)
    assert "--image-size changes their size in a training" in said
