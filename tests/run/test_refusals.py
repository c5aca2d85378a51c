"""Settings, checkpoints and work dirs that tools/train.py and tools/test.py reject.

Each row is a case, its arguments, and words of the error message. A refusal must change no file and make no work dir.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
from collections import OrderedDict
from copy import deepcopy
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
import torch
import yaml

pytest.importorskip("mmdet")
pytest.importorskip("mmseg")

from mmengine.config import Config
from mmengine.registry import init_default_scope

from mmvssm.errors import UserError
from mmvssm.run import checkpoints
from mmvssm.run.settings import (
    SettingsAction,
    check_options,
    check_types,
    check_values,
    drop_refused,
    spread_dicts,
)
from mmvssm.run.setup import build_model
from mmvssm.run.test import _plain
from support import tiny_configs
from support.tool_runs import call, sentence_of_refusal

# --cfg-options that are refused: (option, words of the error).
OPTIONS = [
    ("train_datalader.batch_size=2", "unknown setting; the nearest is train_dataloader"),
    ("train_dataloader.batchsize=2", "the nearest is train_dataloader.batch_size"),
    ("train_dataloader.num_worker=2", "the nearest is train_dataloader.num_workers"),
    ("model.backbone.drop_path_rat=0.1", "the nearest is model.backbone.drop_path_rate"),
    ("model.decode_head.num_clases=3", "the nearest is model.decode_head.num_classes"),
    ("model.decode_head.loss_decode.loss_wieght=2", "the nearest is model.decode_head.loss_decode.loss_weight"),
    ("randomnes.seed=1", "the nearest is randomness"),
    ("train_cfg.max_iter=3", "the nearest is train_cfg.max_iters"),
    ("optim_wrapper.optimiser.lr=1", "the nearest is optim_wrapper.optimizer"),
    ("optim_wrapper.optimizer.beta=1", "the nearest is optim_wrapper.optimizer.betas"),
    ("test_evaluator.iou_metric=mIoU", "the nearest is test_evaluator.iou_metrics"),
    ("param_scheduler.0.ned=4", "the nearest is param_scheduler.0.end"),
    ("param_scheduler.9.end=4", "param_scheduler is a list of 2; its elements are"),
    ("custom_hooks.0.priority=4", "custom_hooks is an empty list; give all of it"),
    ("param_scheduler.first.end=4", "param_scheduler is a list of 2; its elements are"),
    ("train_dataloader.dataset.pipeline.4.prop=1", "the nearest is train_dataloader.dataset.pipeline.4.prob"),
    ("train_dataloader.batch_size.x=1", "train_dataloader.batch_size is 2 in the config and has no settings"),
    ("lr=0.1", "the nearest is optim_wrapper.optimizer.lr"),
    ("optim_wrapper.loss_scale=512", "optim_wrapper.loss_scale: unknown setting"),
    ("batch_size=2", "the nearest is train_dataloader.batch_size"),
    ("max_iters=3", "max_iters has no effect: it is a variable that the config file"),
    ("max_iters=3", "set param_scheduler.1.end, train_cfg.max_iters"),
    ("image_size=32", "test_dataloader.dataset.pipeline.1.scale"),
    ("image_size=32", "train_dataloader.dataset.pipeline.3.crop_size"),
    ("image_size=32", "image_size has no effect: it is a variable that the config file"),
    ("train_dataloader.batch_size=two", "this is 2 in the config; give a number"),
    ("train_dataloader.batch_size=0", "train_dataloader.batch_size is 0; it must be a whole number of at least 1"),
    ("train_dataloader.batch_size=2.5", "train_dataloader.batch_size is 2.5"),
    ("train_dataloader.batch_size=2,3", "train_dataloader.batch_size is [2, 3]"),
    ("train_cfg.max_iters=-1", "train_cfg.max_iters is -1"),
    ("train_cfg.val_interval=2.5", "train_cfg.val_interval is 2.5; it must be a whole number"),
    ("train_dataloader.persistent_workers=maybe", "this is False in the config; give True or False"),
    ("model.backbone.out_indices=(0,1", "the value cannot be read"),
    ("model.backbone.drop_path_rate", "options are KEY=VALUE, without spaces"),
    ("=3", "options are KEY=VALUE, without spaces"),
    ("custom_hooks=[{type:EMAHook}]", "the value cannot be read; a dict is \"dict(type='SGD', lr=0.01)\""),
    ("custom_hooks=[dict(type=print('x'))]", "the value cannot be read; a dict is"),
    ("custom_hooks=[dict(**{'type': 'EMAHook'})]", "the value cannot be read"),
    ("custom_hooks=[{" + "[" * 999, "the value cannot be read"),
    ("optim_wrapper.optimizer=dict(type='SGD', momentom=1)", "optim_wrapper.optimizer.momentom: unknown setting"),
    ("custom_hooks=[dict(type='EMAHok')]", "custom_hooks.0.type='EMAHok' is not registered; the nearest is"),
    ("model.backbone.type=mmvssm.GroupMambo", "the nearest is 'mmvssm.GroupMamba'"),
    ("model.type=EncoderDecodr", "the nearest is 'EncoderDecoder'"),
    ("optim_wrapper.optimizer.type=Lion", "'Lion' is of a package that is not installed; pip install lion-pytorch"),
    ("optim_wrapper.optimizer.type=PagedAdamW8bit", "pip install bitsandbytes"),
    ("optim_wrapper.optimizer.type=AdamV", "optim_wrapper.optimizer.type='AdamV' is not registered; the nearest is"),
    ("train_dataloader.dataset.pipeline.4.type=RandomFlap", "the nearest is 'RandomFlip'"),
    ("param_scheduler.0.type=LinearRL", "the nearest is 'LinearLR'"),
    ("param_scheduler.1.end=4", "param_scheduler.1 begins at 50 and ends at 4; the end must be later"),
    ("test_evaluator.type=IoUMetrics", "the nearest is 'IoUMetric'"),
    ("default_hooks.checkpoint.type=CheckpointHok", "the nearest is 'CheckpointHook'"),
]  # fmt: skip
# The same for the whole tool: what each of its checks refuses.
OPTIONS_OF_THE_TOOL = [
    ("=3", "options are KEY=VALUE, without spaces"),
    ("train_dataloader.batchsize=2", "the nearest is train_dataloader.batch_size"),
    ("model.type=EncoderDecodr", "the nearest is 'EncoderDecoder'"),
    ("train_dataloader.batch_size=0", "train_dataloader.batch_size is 0; it must be a whole number of at least 1"),
    ("model.backbone.arch=huge", "huge"),
    ("runner_type=FlexibleRunner", "runner_type=FlexibleRunner is not supported: "),
    ("default_scope=mmfoo", "is not a config for mmdet or mmseg"),
]  # fmt: skip

EXTRA = """
custom_hooks = [dict(type="SyncBuffersHook")]
model = dict(
    test_cfg=dict(mode="whole"),
    decode_head=dict(norm_cfg=dict(_delete_=True, type="BN")),
    extra=dict(stage1=dict(num_blocks=4)),
)
"""
# Options that the config lacks and a constructor takes, or that change what the config has.
TAKEN = [
    "model.backbone.init_cfg.type=Constant model.backbone.init_cfg.val=0 model.backbone.init_cfg.layer=Conv9d",
    "model.backbone.frozen_stages=1",
    "model.decode_head.dropout_ratio=0.5",  # of a base class's constructor
    "load_from=None",
    "randomness.seed=3",
    "train_dataloader.prefetch_factor=None",
    "optim_wrapper.accumulative_counts=1",
    "default_hooks.checkpoint.save_last=False",
    "find_unused_parameters=True",
    "custom_hooks.0.priority=VERY_LOW",
    "param_scheduler.0.convert_to_iter_based=True",
    "check_data=False",
    "train_cfg.val_interval=9.0",
    "runner_type=Runner",
    "optim_wrapper.type=AmpOptimWrapper optim_wrapper.loss_scale=512",
    "param_scheduler.0.end=2",
    "model.neck._delete_=True model.neck.type=Feature2Pyramid model.neck.embed_dim=16",
]
# Options that no constructor confirms: (option, the name that it may be a slip of).
UNCHECKED = [
    ("model.test_cfg.crop_size=(8,8)", None),
    ("model.test_cfg.mod=whole", "model.test_cfg.mode"),
    ("model.backbone.arch.depth=1", "model.backbone.arch.depths"),
    ("model.decode_head.norm_cfg.requires_grad=False", None),  # which mmcv takes out
    ("model.decode_head.loss_decode.bg_cls_weight=0.1", None),  # which DETR's head takes out
    ("model.extra.stage2.num_blocks=4", None),
    ("train_dataloader.dataset.data_prefix.img_path2=b", "train_dataloader.dataset.data_prefix.img_path"),
    ("randomness.sed=1", "randomness.seed"),
    ("randomness.deterministic=True", None),
    ("optim_wrapper.clip_grad.norm_type=2", None),
    ("optim_wrapper.paramwise_cfg.bias_lr=1", None),
    ("optim_wrapper.paramwise_cfg.custom_keys.decode_head.lr_mult=2.0", None),
    ("env_cfg.dist_cfg.timeout=60", None),
    ("default_hooks.chekpoint.interval=1", "default_hooks.checkpoint"),
    ("default_hooks.checkpoint.save_bst=mIoU", "default_hooks.checkpoint.save_best"),
    ("default_hooks.checkpoint.kwargs=1", None),
    ("own_setting=1", None),
]  # fmt: skip


def test_a_path_that_exists_is_taken_as_it_is(in_folder):
    """mmengine drops spaces and makes a list of what has commas."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--cfg-options", nargs="+", action=SettingsAction)
    path = str(in_folder / "my runs, 1" / "epoch_1.pth")
    arguments = ["--cfg-options", f"load_from={path}", "sizes=1, 2", "lr=0.1"]
    read = parser.parse_args(arguments).cfg_options
    assert read == dict(load_from=path.replace(" ", "").split(","), sizes=[1, 2], lr=0.1)
    Path(path).parent.mkdir()
    Path(path).touch()
    assert parser.parse_args(arguments).cfg_options == {**read, "load_from": path}


@pytest.fixture
def tiny(config):
    """Writes tiny.py, the segmenter's config with ``extra`` merged into it."""

    def write(extra=""):
        config(tiny_configs.SEGMENTER, name="base.py")
        return config("_base_ = ['base.py']\n", extra)

    return write


@pytest.fixture
def refused(capsys):
    def call_and_read(*arguments):
        sentence = sentence_of_refusal(capsys, *arguments)
        assert sentence.isprintable() and len(sentence) < 600
        return sentence

    return call_and_read


@cache
def tiny_config(extra):
    """The segmenter's config as the tools read it, which takes longer than to check it."""
    with TemporaryDirectory() as folder:
        Path(folder, "base.py").write_text(tiny_configs.SEGMENTER)
        Path(folder, "tiny.py").write_text(f"_base_ = ['base.py']\n{extra}")
        return Config.fromfile(Path(folder, "tiny.py"))


def check(*options, extra=EXTRA, **settings):
    """Check ``--cfg-options`` as setup.open_config does; return the unconfirmed keys."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--cfg-options", nargs="+", action=SettingsAction)
    options = parser.parse_args(["--cfg-options", *options]).cfg_options
    cfg = deepcopy(tiny_config(extra))
    options = spread_dicts(cfg, options)
    unchecked = check_options(cfg, options, **settings)
    list(drop_refused(cfg, options))
    cfg.merge_from_dict(options)
    check_types(cfg)
    check_values(cfg)
    return unchecked


TO_REFUSE = "model = dict(test_cfg=dict(mode='whole'))\ncustom_hooks = []\n"


@pytest.mark.parametrize(("option", "said"), OPTIONS, ids=[option for option, _ in OPTIONS])
def test_option_that_has_no_effect(option, said):
    with pytest.raises(UserError) as caught:
        check(option, extra=TO_REFUSE)
    message = str(caught.value)
    assert said in message and message.isprintable() and len(message) < 600


@pytest.mark.parametrize(("option", "said"), OPTIONS_OF_THE_TOOL)
def test_option_that_the_tool_refuses(tiny, refused, option, said):
    assert said in refused("train.py", tiny(), "--cfg-options", option)


def test_a_schedule_that_cannot_be_built(tiny, capsys):
    with pytest.raises(SystemExit):
        call(
            "train.py",
            tiny(),
            "--work-dir",
            "run",
            "--cfg-options",
            "param_scheduler.0.start_factor=2",
        )
    sentence, _ = capsys.readouterr().err.splitlines()
    assert sentence.startswith(
        "error: cannot set up the schedule (param_scheduler): Starting multiplicative"
    )


DICTS = {  # what the segmenter's config has then, by path
    "custom_hooks=[dict(type='EMAHook', momentum=1e-3), {'type': 'SyncBuffersHook'}]": {
        "custom_hooks.0.momentum": 1e-3,
        "custom_hooks.1.type": "SyncBuffersHook",
    },
    "optim_wrapper.optimizer=dict(type='SGD', momentum=0.9)": {
        "optim_wrapper.optimizer.momentum": 0.9,
        "optim_wrapper.optimizer.weight_decay": 0.01,
        "optim_wrapper.optimizer.betas": None,
    },
    "optim_wrapper.paramwise_cfg=dict(custom_keys={'a.b': dict(lr_mult=2)})": {
        "optim_wrapper.paramwise_cfg.norm_decay_mult": 0.0,
    },
    "model.auxiliary_head=dict(_delete_=True, type='FCNHead')": {
        "model.auxiliary_head": dict(type="FCNHead")
    },
    "test_cfg=dict(type='TestLoop', fp16=True)": {"test_cfg.fp16": True},
    "load_from=None": {"load_from": None},
    "resume={'a': -1}": {"resume": {"a": -1}},
}


@pytest.mark.parametrize("option", DICTS)
def test_dicts_are_merged_as_in_a_config_file(option):
    parser = argparse.ArgumentParser()
    parser.add_argument("--cfg-options", nargs="+", action=SettingsAction)
    cfg = deepcopy(tiny_config(EXTRA))
    options = spread_dicts(cfg, parser.parse_args(["--cfg-options", option]).cfg_options)
    check_options(cfg, options)
    list(drop_refused(cfg, options))
    cfg.merge_from_dict(options)
    for path, expected in DICTS[option].items():
        node = cfg
        for part in path.split("."):
            node = node[int(part)] if part.isdigit() else node.get(part)
        assert node == expected, path


def test_another_optimizer_drops_what_it_does_not_take():
    cfg = deepcopy(tiny_config(EXTRA))
    options = {"optim_wrapper.optimizer.type": "SGD", "optim_wrapper.optimizer.lr": 0.1}
    (line,) = drop_refused(cfg, options)
    assert line == "optim_wrapper.optimizer.type=SGD drops betas, which SGD does not take"
    assert "betas" not in cfg.optim_wrapper.optimizer
    assert list(drop_refused(cfg, {"optim_wrapper.optimizer.type": "Adam"})) == []


class StoppedError(Exception):
    """Ends a run where its settings have been accepted."""


@pytest.mark.parametrize("options", TAKEN)
def test_option_that_something_reads(options):
    assert check(*options.split()) == []


@pytest.mark.parametrize(("option", "similar"), UNCHECKED)
def test_option_that_nothing_confirms_is_reported(option, similar):
    key = option.partition("=")[0]
    assert check(option) == [f"{key} (did you mean {similar}?)" if similar else key]


def test_the_tool_accepts_and_reports_options(tiny, capsys, monkeypatch):
    def stop(*_):
        raise StoppedError

    monkeypatch.setattr("mmvssm.run.train.prepare_data", stop)
    options = ["model.test_cfg.crop_size=(8,8)", "optim_wrapper.loss_scale=512", "randomness.sed=1"]
    with pytest.raises(StoppedError):
        call("train.py", tiny(), "--amp", "--cfg-options", *options)
    report = "model.test_cfg.crop_size, randomness.sed (did you mean randomness.seed?)"
    line = f"Not in the config, passed on unchecked: {report}\n"
    assert capsys.readouterr().out.count(line) == 1


@pytest.mark.parametrize("option", ["loss_scale=512", "dtype=bfloat16"])
def test_amp_makes_its_own_settings_known(option):
    assert check(f"optim_wrapper.{option}", amp=True) == []


def test_amp_knows_no_more_than_its_settings():
    with pytest.raises(UserError, match=r"the nearest is optim_wrapper\.loss_scale"):
        check("optim_wrapper.loss_scal=512", amp=True)


@pytest.mark.parametrize("path", tiny_configs.DENSE, ids=lambda p: p.stem)
def test_configs_that_come_along_are_not_refused(in_folder, path):
    cfg = Config.fromfile(path)
    init_default_scope(cfg.default_scope)
    check_types(cfg)
    check_values(cfg)


def transforms(*pipeline):
    return dict(
        train_dataloader=dict(dataset=dict(type="RepeatDataset", dataset=dict(pipeline=pipeline)))
    )


BLUR = dict(type="OneOf", transforms=[dict(type="Blur", blur_limit=3)])
# Each has a ``type`` that no registry knows, as configs of mmdet, mmseg and mmengine have it.
OTHERS_TYPES = {
    "albumentations": transforms(
        dict(type="Albu", transforms=[BLUR], bbox_params=dict(type="BboxParams", format="coco"))
    ),
    "albumentations within mmcv's choice": transforms(
        dict(type="RandomChoice", transforms=[[dict(type="Albu", transforms=[BLUR])]])
    ),
    "dqs_cfg of DDQ": dict(model=dict(type="DDQDETR", dqs_cfg=dict(type="nms", iou_threshold=0.8))),
    "test_cfg of a detector": dict(model=dict(test_cfg=dict(rcnn=dict(nms=dict(type="soft_nms"))))),
    "roi_layer of a head": dict(
        model=dict(roi_head=dict(bbox_roi_extractor=dict(roi_layer=dict(type="RoIAlign"))))
    ),
    "adapt_cfg of Cascade RPN": dict(
        model=dict(rpn_head=dict(stages=[dict(adapt_cfg=dict(type="dilation", dilation=3))]))
    ),
    "same_up_trans of FPG": dict(
        model=dict(neck=[dict(type="FPG", same_up_trans=dict(type="conv", kernel_size=3))])
    ),
    "clip_grad": dict(optim_wrapper=dict(clip_grad=dict(type="value", clip_value=1))),
    "a profiler's trace": dict(
        custom_hooks=[dict(type="ProfilerHook", on_trace_ready=dict(type="tb_trace"))]
    ),
}


@pytest.mark.parametrize("settings", OTHERS_TYPES.values(), ids=OTHERS_TYPES)
def test_types_that_only_their_reader_knows_are_left_to_it(in_folder, settings):
    init_default_scope("mmdet")
    check_types(Config(settings))


@pytest.mark.parametrize(
    ("settings", "where"),
    [
        (
            transforms(dict(type="RandomChoice", transforms=[[dict(type="Resise")]])),
            "train_dataloader.dataset.dataset.pipeline.0.transforms.0.0",
        ),
        (dict(tta_pipeline=[dict(type="Resise")]), "tta_pipeline.0"),
        (dict(custom_hooks=[dict(type="Resise")]), "custom_hooks.0"),
        (dict(val_evaluator=[dict(type="Resise")]), "val_evaluator.0"),
        (dict(visualizer=dict(vis_backends=[dict(type="Resise")])), "visualizer.vis_backends.0"),
        (
            dict(train_dataloader=dict(dataset=dict(datasets=[dict(type="Resise")]))),
            "train_dataloader.dataset.datasets.0",
        ),
    ],
)
def test_types_that_registries_build_are_checked_wherever_they_are(in_folder, settings, where):
    init_default_scope("mmdet")
    with pytest.raises(UserError) as caught:
        check_types(Config(settings))
    assert str(caught.value).startswith(f"{where}.type='Resise' is not registered; the nearest is")


def test_a_type_deep_in_a_model_is_told_when_it_is_built(tiny):
    cfg = Config.fromfile(
        tiny("model = dict(decode_head=dict(loss_decode=dict(type='DiceLos')))\n")
    )
    init_default_scope(cfg.default_scope)
    check_types(cfg)
    with pytest.raises(UserError) as caught:
        build_model(cfg)
    sentence = str(caught.value)
    assert sentence.startswith("cannot build the model: type='DiceLos' is not registered")
    assert "the nearest is 'DiceLoss'" in sentence and "https" not in sentence


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("tinny.py", "there is no config file tinny.py; did you mean tiny.py?"),
        ("configs/groupmamba_upernet_shape.py", "groupmamba_upernet_shapes.py?"),
        ("plainmamba_maskrcn_coco.py", "plainmamba_maskrcnn_coco.py?"),
        ("zzz.py", "there is no config file zzz.py"),
    ],
)
def test_config_name(tiny, refused, name, said):
    tiny()
    assert said in refused("train.py", name)


@pytest.mark.parametrize(
    ("tool", "name"),
    [
        ("train.py", "train_dataloader"),
        ("train.py", "train_cfg"),
        ("train.py", "optim_wrapper"),
        ("test.py", "test_dataloader"),
        ("test.py", "test_cfg"),
        ("test.py", "test_evaluator"),
    ],
)
def test_config_that_lacks_a_part(tiny, refused, tool, name):
    arguments = [tool, tiny(f"{name} = None\n"), *(["absent.pth"] * (tool == "test.py"))]
    assert f"tiny.py lacks {name}, which this tool needs" in refused(*arguments)


@pytest.mark.parametrize("text", ["model = dict(", "model = undefined\n", "model = 1 / 0\n"])
def test_config_that_cannot_be_read(in_folder, refused, text):
    Path("broken.py").write_text(text)
    assert "cannot read the config broken.py" in refused("train.py", "broken.py")


# --- init_cfg ---------------------------------------------------------------------------------------


def pretrained(name="a.pth", **settings):
    init_cfg = dict(type="Pretrained", checkpoint=name, **settings)
    return f"model = dict(backbone=dict(init_cfg={init_cfg!r}))\n"


def weights(trained, change=lambda key: key, keep=lambda key: True):
    """Weights of the trained model under changed names."""
    old = torch.load(trained / "iter_2.pth", weights_only=True)["state_dict"]
    new = OrderedDict((change(key), value) for key, value in old.items() if keep(key))
    torch.save({"state_dict": new}, "a.pth")


def of_backbone(key):
    return key.startswith("backbone.")


def without_backbone(key):
    return key.removeprefix("backbone.")


def same(key):
    return key


def in_wrapper(key):
    return f"module.{key}"


def stem_without_backbone(key):
    return key if ".0.embed." not in key else without_backbone(key)


def other_name(key):
    return f"{key}_"


PREFIX = {"prefix": "backbone."}
INIT_CFGS = [
    # (case, how weights are called, which there are, settings of init_cfg, words of the sentence)
    (
        *("another prefix", same, of_backbone, {"prefix": "encoder."}),
        "with prefix='encoder.'; with prefix='backbone.' ",
    ),
    ("prefix of a wrapper", in_wrapper, of_backbone, PREFIX, "with prefix='module.backbone.' "),
    ("prefix where none is due", without_backbone, of_backbone, PREFIX, "with no prefix "),
    ("few match", stem_without_backbone, of_backbone, {}, "with prefix='backbone.' "),
    ("other names", other_name, of_backbone, PREFIX, "none would with any prefix"),
    ("no weights at all", same, lambda key: False, {}, "model.backbone.init_cfg: 0 of its "),
]


@pytest.mark.parametrize(
    ("change", "keep", "settings", "said"),
    [row[1:] for row in INIT_CFGS],
    ids=[row[0] for row in INIT_CFGS],
)
def test_init_cfg_that_loads_nothing(tiny, trained, refused, change, keep, settings, said):
    tiny(pretrained(**settings))
    weights(trained, change, keep)
    sentence = refused("train.py", "tiny.py")
    assert said in sentence and "of its" in sentence and "weights match a.pth" in sentence


def test_init_cfg_needs_no_prefix_for_a_backbone(tiny, trained, capsys):
    """A backbone knows its names with ``backbone.`` before them, too."""
    tiny(pretrained())
    weights(trained, keep=of_backbone)
    call("train.py", "tiny.py", "--work-dir", "out")
    assert "weights come from" not in capsys.readouterr().out  # which would say that some do not
    assert Path("out/iter_2.pth").exists()


def test_init_cfg_deeper_in_the_model_and_absent_file(tiny, trained, refused):
    tiny("model = dict(decode_head=dict(init_cfg=[dict(type='Pretrained', checkpoint='a.pth')]))\n")
    assert "there is no checkpoint file a.pth" in refused("train.py", "tiny.py")
    weights(trained)
    sentence = refused("train.py", "tiny.py")
    assert "model.decode_head.init_cfg: 0 of its" in sentence
    assert "with prefix='decode_head.'" in sentence


def test_init_cfg_of_the_model_itself_without_a_file(tiny, refused):
    tiny("model = dict(init_cfg=dict(type='Pretrained', checkpoint=3))\n")
    assert "model.init_cfg needs the checkpoint's file name" in refused("train.py", "tiny.py")


def test_downloaded_init_cfg_is_judged_too(tiny, trained, refused, monkeypatch):
    tiny(pretrained("https://example.org/a.pth", prefix="encoder."))
    weights(trained)
    monkeypatch.setattr(
        "mmengine.runner.checkpoint.load_url",
        lambda *_, **__: torch.load("a.pth", weights_only=True),
    )
    assert "with prefix='backbone.' " in refused("train.py", "tiny.py")


def test_init_cfg_that_fits_in_part_trains_and_is_said(tiny, trained, capsys):
    tiny(pretrained(prefix="backbone."))
    weights(trained, keep=lambda key: of_backbone(key) and ".stages.3." not in key)
    call("train.py", "tiny.py", "--work-dir", "out")
    line = next(text for text in capsys.readouterr().out.splitlines() if "init_cfg" in text)
    assert "weights come from a.pth" in line and "stages.3." in line
    assert Path("out/iter_2.pth").exists()


def test_resume_with_nothing_to_resume_starts_from_load_from(tiny, trained, capsys):
    """As without --resume: cluster jobs that always pass --resume would otherwise ignore the weights."""
    tiny()
    weights(trained)
    options = [
        "--cfg-options",
        "load_from=a.pth",
        "optim_wrapper.optimizer.lr=0",
        "train_cfg.max_iters=1",
    ]
    call("train.py", "tiny.py", "--work-dir", "out", "--resume", *options)
    assert "There is no checkpoint in out; training starts from a.pth" in capsys.readouterr().out
    before, after = (
        torch.load(path, weights_only=True)["state_dict"] for path in ("a.pth", "out/iter_1.pth")
    )
    assert torch.equal(before["decode_head.conv_seg.weight"], after["decode_head.conv_seg.weight"])


def test_load_from_says_how_much_it_has(tiny, trained, refused, capsys):
    tiny()
    weights(trained, keep=of_backbone)
    call("train.py", "tiny.py", "--work-dir", "out", "--cfg-options", "load_from=a.pth")
    assert "Starting from a.pth: " in capsys.readouterr().out
    weights(trained, without_backbone, of_backbone)
    assert "none of the weights in a.pth fits" in refused(
        "train.py", "tiny.py", "--cfg-options", "load_from=a.pth"
    )


# --- classes, resuming, work dirs -------------------------------------------------------------------

NAMES = ("background", "disk", "square", "triangle", "star", "ring")


def classes(names):
    data = f"dataset=dict(metainfo=dict(classes={tuple(names)!r}))"
    return "".join(f"{part}_dataloader = dict({data})\n" for part in ("train", "val", "test"))


SWAPPED = (NAMES[0], NAMES[2], NAMES[1], *NAMES[3:])
RENAMED = (*NAMES[:-1], "torus")


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (SWAPPED, "in another order (it has disk where this data set has square)"),
        (RENAMED, "was trained on other classes: 6 (background, disk, square, ...)"),
    ],
    ids=["reordered", "renamed"],
)
def test_other_classes(tiny, trained, refused, names, said):
    tiny(classes(names) + "train_cfg = dict(max_iters=3, val_interval=9)\n")
    checkpoint = trained / "iter_2.pth"
    assert said in refused("train.py", "tiny.py", "--resume", checkpoint)
    assert said in refused("test.py", "tiny.py", checkpoint)


@pytest.fixture
def used(trained, in_folder):
    """A copy of the trained run's work dir."""
    shutil.copytree(trained, "out")
    return Path("out")


def test_reordered_categories_of_a_resumed_work_dir(tiny, used, refused):
    tiny(classes(SWAPPED) + "train_cfg = dict(max_iters=3, val_interval=9)\n")
    assert "in another order" in refused("train.py", "tiny.py", "--work-dir", used, "--resume")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((), "out holds the checkpoints of an earlier run (best_mIoU_iter_2.pth, iter_1.pth, iter_2.pth)"),
        (("--cfg-options", "load_from=out/iter_1.pth"), "out holds the checkpoints of an earlier run"),
        (("--resume", "ELSEWHERE"), "out holds the checkpoints of an earlier run"),
        (("--resume", "--cfg-options", "train_cfg.max_iters=1"), "has done 2 iterations, more than"),
    ],
    ids=["again", "load_from", "resume of another", "fewer iterations than done"],
)  # fmt: skip
def test_used_work_dir(tiny, used, trained, refused, arguments, said):
    arguments = [str(trained / "iter_2.pth") if a == "ELSEWHERE" else a for a in arguments]
    assert said in refused("train.py", tiny(), "--work-dir", used, *arguments)


def test_best_checkpoint_alone_is_a_used_work_dir(tiny, used, refused):
    for name in ("iter_1.pth", "iter_2.pth", "last_checkpoint"):
        (used / name).unlink()
    (used / "best_mIoU_iter_2.pth").touch()
    tiny()
    for arguments in ((), ("--resume",)):
        sentence = refused("train.py", "tiny.py", "--work-dir", used, *arguments)
        assert "(best_mIoU_iter_2.pth) and none that --resume could resume from" in sentence
        assert "load_from=out/best_mIoU_iter_2.pth to start from those weights" in sentence


def test_checkpoints_of_another_name_are_a_used_work_dir(tiny, used, refused, capsys):
    """``filename_tmpl``, and ``out_dir``; what is resumed from there is the run itself."""
    (used / "iter_1.pth").unlink()
    (used / "iter_2.pth").rename(used / "step-2.pth")
    (used / "best_mIoU_iter_2.pth").unlink()
    (used / "last_checkpoint").write_text(str(used / "step-2.pth"))
    said = "out holds the checkpoints of an earlier run ("
    assert f"{said}out/step-2.pth)" in refused("train.py", tiny(), "--work-dir", used)
    Path("weights").mkdir()
    (used / "step-2.pth").rename("weights/step-2.pth")
    (used / "last_checkpoint").write_text("weights/step-2.pth")
    assert f"{said}weights/step-2.pth)" in refused("train.py", "tiny.py", "--work-dir", used)
    call("train.py", "tiny.py", "--work-dir", used, "--resume")
    assert "Resuming from weights/step-2.pth" in capsys.readouterr().out


def test_resuming_reads_the_checkpoint_once(tiny, used, monkeypatch):
    """Once before the runner does."""
    reads = []

    def count(load):
        def counting(path, *args, **kwargs):
            reads.append(str(path))
            return load(path, *args, **kwargs)

        return counting

    def stop(*_):
        raise StoppedError

    load = checkpoints.load_checkpoint_safely
    monkeypatch.setattr(checkpoints, "load_checkpoint_safely", count(load))
    monkeypatch.setattr("mmvssm.run.train.build_runner", stop)
    with pytest.raises(StoppedError):
        call("train.py", tiny(), "--work-dir", used, "--resume")
    assert reads == ["out/iter_2.pth"]


def test_resuming_says_what_is_different(tiny, used, capsys):
    tiny("train_cfg = dict(max_iters=3, val_interval=9)\n")
    (used / "iter_2.pth").write_bytes((used / "iter_2.pth").read_bytes()[:999])
    options = ("--cfg-options", "train_dataloader.batch_size=4")
    call("train.py", "tiny.py", "--work-dir", used, "--resume", *options)
    out = capsys.readouterr().out
    assert "out/iter_2.pth is damaged or incomplete and was skipped" in out
    assert "Resuming from out/iter_1.pth" in out
    assert "The run had a batch size of 2 and resumes with 4" in out
    assert (used / "iter_3.pth").exists()
    call("train.py", "tiny.py", "--work-dir", used, "--resume", *options)
    assert "has done 3 iterations, all that train_cfg.max_iters asks for" in capsys.readouterr().out


def test_nothing_left_to_resume(tiny, used, refused):
    for name in ("iter_1.pth", "iter_2.pth"):
        (used / name).write_bytes(b"torn")
    sentence = refused("train.py", tiny(), "--work-dir", used, "--resume")
    assert "none of the 2 checkpoints in out can be resumed from" in sentence


@pytest.mark.parametrize(
    ("option", "where", "said"),
    [
        ("--out", "file/maps", "file is a file, not a folder"),
        ("--out", "file", "this is a file, not a folder"),
        ("--out", "file/a.pkl", "file is a file, not a folder"),
        ("--out", "folder.pkl", "this is a folder, not a file"),
        ("--show-dir", "file/pictures", "file is a file, not a folder"),
    ],
)
def test_output_without_a_place(tiny, trained, refused, option, where, said):
    """Told before the evaluation, whose metrics would be lost."""
    Path("file").write_text("")
    Path("folder.pkl").mkdir()
    sentence = refused("test.py", tiny(), trained / "iter_2.pth", option, where)
    assert f"{option} {where}: " in sentence and said in sentence


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes everywhere")
def test_output_that_may_not_be_written(tiny, trained, refused, in_folder):
    (in_folder / "closed").mkdir(mode=0o500)
    sentence = refused("test.py", tiny(), trained / "iter_2.pth", "--out", "closed/maps")
    assert "closed cannot be written to" in sentence


def test_what_json_has_no_number_for():
    metrics = {"a": np.float32("inf"), "b": [-float("inf"), float("nan")], "c": torch.ones(2)}
    plain = _plain(metrics)
    assert json.loads(json.dumps(plain, allow_nan=False)) == plain
    assert plain == {"a": None, "b": [None, None], "c": [1.0, 1.0]}


def test_the_config_in_the_work_dir_tests_what_was_trained(trained, in_folder):
    """The Makefile's targets do this, since their training may have any arguments."""
    call("test.py", trained / "tiny.py", trained / "iter_2.pth", "--work-dir", "tested")
    assert Path("tested/test_results.json").is_file()


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
def test_make_tests_with_the_trained_config():
    command = ["make", "--dry-run", "train", "train-seg", "train-pruned", "train-seg-pruned"]
    command += [f"PYTHON={sys.executable}", "WORK_DIRS=w", "ARGS=--data-root own"]
    done = subprocess.run(
        command, cwd=tiny_configs.CONFIGS.parent, capture_output=True, text=True, check=True
    )
    configs = re.findall(r"tools/train\.py configs/(\w+)\.py .*--data-root own", done.stdout)
    assert len(configs) == 4
    for config in configs:
        assert f"work=w/{config};" in done.stdout
        assert f"tools/test.py $work/{config}.py $checkpoint" in done.stdout


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes everywhere")
def test_work_dir_that_cannot_be_written(tiny, refused, in_folder):
    (in_folder / "closed").mkdir(mode=0o500)
    sentence = refused("train.py", tiny(), "--work-dir", "closed/out")
    assert "cannot write to the work dir closed/out" in sentence


def test_work_dir_that_is_a_file(tiny, refused):
    Path("out").write_text("a file")
    sentence = refused("train.py", tiny(), "--work-dir", "out")
    assert "cannot write to the work dir out" in sentence


@pytest.mark.parametrize("tag", ["!!python/object/apply:os.mkdir", "!!python/object/new:os.mkdir"])
@pytest.mark.parametrize("plain", [[], ["--plain"]], ids=["ours", "plain"])
def test_a_yaml_config_runs_no_code(in_folder, capsys, tag, plain):
    (in_folder / "bad.yml").write_text(f"model:\n  type: {tag} [canary]\n")
    (in_folder / "c.yaml").write_text("_base_: ./bad.yml\ndefault_scope: mmseg\n")
    for name in ("bad.yml", "c.yaml"):
        with pytest.raises((SystemExit, yaml.YAMLError)):
            call("train.py", name, *plain)
        if not plain:
            error = capsys.readouterr().err
            assert error.startswith(
                f"error: cannot read the config {name}: could not determine a constructor"
            )
    assert not (in_folder / "canary").exists()


def test_a_yaml_config_may_have_tuples(in_folder):
    (in_folder / "c.yaml").write_text("size: !!python/tuple [1, 2]\n")
    assert Config.fromfile(in_folder / "c.yaml").size == (1, 2)
