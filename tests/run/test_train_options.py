"""Options of tools/train.py that change how a run starts."""

import json
import re
from pathlib import Path

import pytest
from mmengine.config import Config
from mmengine.registry import HOOKS

pytest.importorskip("mmseg")

from mmvssm.errors import UserError
from mmvssm.run.image_size import set_image_size
from mmvssm.run.options import stop_early, use_amp
from mmvssm.run.pretrained import start_from_scratch
from support.tiny_configs import SEGMENTER
from support.tool_runs import call, sentence_of_refusal


def test_rates_are_scaled_from_the_config_s_own_batch_and_persistent_workers_need_workers(
    config, capsys
):
    path = config(SEGMENTER, "\ntrain_dataloader['persistent_workers'] = True\n")
    call("train.py", path, "--work-dir", "run", "--auto-scale-lr")
    said = capsys.readouterr().out
    assert "Learning rates times 0.25: 2 images a step, and the config's rates are for 8" in said
    saved = Config.fromfile("run/tiny.py")
    assert not saved.train_dataloader.persistent_workers
    (log,) = Path("run").glob("*/vis_data/scalars.json")
    first = json.loads(log.read_text().splitlines()[0])
    unscaled = saved.optim_wrapper.optimizer.lr
    assert first["base_lr"] < unscaled / 4 + 1e-12


def test_from_scratch_drops_what_a_config_starts_from(config, capsys):
    start = "\nmodel['backbone']['init_cfg'] = dict(type='Pretrained', checkpoint='absent.pth')\n"
    path = config(SEGMENTER, start)
    with pytest.raises(SystemExit):
        call("train.py", path, "--work-dir", "refused")
    assert "there is no checkpoint file absent.pth" in capsys.readouterr().err
    call("train.py", path, "--work-dir", "run", "--from-scratch")
    assert "starts from random weights; not loaded: absent.pth" in capsys.readouterr().out
    assert Config.fromfile("run/tiny.py").model.backbone.init_cfg is None


def test_every_kind_of_start_is_dropped():
    pretrained = dict(type="Pretrained", checkpoint="a.pth")
    model = dict(
        type="X",
        pretrained="b.pth",
        backbone=dict(init_cfg=dict(pretrained)),
        neck=[
            dict(init_cfg=dict(type="Xavier")),
            dict(init_cfg=dict(pretrained, checkpoint="c.pth")),
        ],
    )
    cfg = Config(dict(model=model, load_from="d.pth"))
    line = start_from_scratch(cfg)
    assert line.endswith("not loaded: b.pth, a.pth, c.pth, d.pth")
    assert cfg.load_from is None and cfg.model.pretrained is None
    assert cfg.model.neck[0].init_cfg.type == "Xavier" and cfg.model.neck[1].init_cfg is None
    assert start_from_scratch(cfg).endswith("its config names no pretrained ones")


# --------------------------------------------------------------------------- short options

BF16 = "torch.cuda.is_bf16_supported"
SHORT = {  # what is given: what changes in the saved config
    ("--batch-size", 4): dict(train_dataloader=dict(batch_size=4)),
    ("--lr", 0.5): dict(optim_wrapper=dict(optimizer=dict(lr=0.5))),
    ("--layer-decay", 0.5): dict(
        optim_wrapper=dict(
            constructor="mmvssm.LayerDecayOptimWrapperConstructor",
            paramwise_cfg=dict(layer_decay_rate=0.5),
        )
    ),
}


def differs_in(before, after):
    """The settings of ``after`` that ``before`` lacks or has otherwise."""
    if not isinstance(after, dict) or not isinstance(before, dict):
        return after
    pairs = {key: (before.get(key), value) for key, value in after.items()}
    return {key: differs_in(b, a) for key, (b, a) in pairs.items() if b != a}


@pytest.mark.parametrize("given", SHORT, ids=str)
def test_a_short_option_changes_its_settings_alone(config, given):
    path = config(SEGMENTER)
    call("train.py", path, "--work-dir", "run", *given)
    before, after = (
        {
            k: v
            for k, v in Config.fromfile(f).to_dict().items()
            if k in ("optim_wrapper", "train_dataloader")
        }
        for f in (path, "run/tiny.py")
    )
    for cfg in (before, after):  # which every run of ours sets
        cfg["train_dataloader"] = {"batch_size": cfg["train_dataloader"]["batch_size"]}
    assert differs_in(before, after) == SHORT[given]


# For a config and a size: what some of its settings are then, by path.
TEST_SCALE = "test_dataloader.dataset.pipeline.1.scale"
SIZES = {
    ("groupmamba_maskrcnn_coco", 667): {
        TEST_SCALE: (667, 400),
        "train_dataloader.dataset.pipeline.2.scale": (667, 400),
    },
    ("groupmamba_upernet_ade20k", 256): {
        TEST_SCALE: (1024, 256),
        "train_dataloader.dataset.pipeline.2.scale": (1024, 256),
        "train_dataloader.dataset.pipeline.3.crop_size": (256, 256),
        "model.data_preprocessor.size": (256, 256),
        "tta_pipeline.1.transforms.0.0.scale": (512, 128),
    },
    ("groupmamba_upernet_shapes", 320): {
        TEST_SCALE: (320, 320),
        "train_dataloader.dataset.pipeline.2.ratio_range": (0.8, 1.25),
        "prepare_data.image_size": 320,
    },
    ("plainmamba_pruned_maskrcnn_shapes", 160): {TEST_SCALE: (160, 160)},
}


@pytest.mark.parametrize(("given", "expected"), SIZES.items(), ids=[name for name, _ in SIZES])
def test_an_image_size_reaches_every_part(given, expected):
    name, size = given
    cfg = Config.fromfile(Path(__file__).parents[2] / f"configs/{name}.py")
    line = set_image_size(cfg, size)
    assert line.startswith(f"--image-size {size}: sizes times ") and "test_dataloader" in line
    for path, value in expected.items():
        node = cfg
        for part in path.split("."):
            node = node[int(part)] if part.isdigit() else node[part]
        assert node == value, path


def test_what_several_loaders_share_is_scaled_once_and_a_window_too():
    step = dict(type="Resize", scale=(100, 50))
    loader = dict(dataset=dict(type="X", pipeline=[step]))
    model = dict(test_cfg=dict(mode="slide", crop_size=(50, 50), stride=(25, 25)))
    ranges = [dict(type="BatchSyncRandomResize", random_size_range=(50, 80))]
    model["data_preprocessor"] = dict(batch_augments=ranges)
    switch = dict(
        type="PipelineSwitchHook", switch_epoch=50, switch_pipeline=[dict(type="Y", size=(100, 50))]
    )
    cfg = Config(dict(default_scope="mmseg", model=model, custom_hooks=[switch]))
    cfg.val_dataloader = cfg.test_dataloader = Config(dict(x=loader)).x
    set_image_size(cfg, 200)
    assert cfg.test_dataloader.dataset.pipeline[0].scale == (200, 100)
    assert cfg.model.test_cfg == dict(mode="slide", crop_size=(100, 100), stride=(50, 50))
    assert cfg.model.data_preprocessor.batch_augments[0].random_size_range == (100, 160)
    assert cfg.custom_hooks[0].switch_epoch == 50
    assert cfg.custom_hooks[0].switch_pipeline[0].size == (200, 100)


def test_an_image_size_needs_a_size_to_change():
    cfg = Config(
        dict(default_scope="mmseg", model={}, test_dataloader=dict(dataset=dict(type="X")))
    )
    with pytest.raises(UserError, match="no pipeline of the config resizes or crops its images"):
        set_image_size(cfg, 64)


def test_a_run_with_another_image_size(config, capsys):
    call("train.py", config(SEGMENTER), "--work-dir", "run", "--image-size", "48")
    saved = Config.fromfile("run/tiny.py")
    assert saved.train_dataloader.dataset.pipeline[3].crop_size == (48, 48)


def test_another_batch_says_whose_rates_these_are(config, capsys):
    call("train.py", config(SEGMENTER), "--work-dir", "run", "--batch-size", "4")
    said = capsys.readouterr().out
    assert "rates are for 8 images a step, and there are 4: --auto-scale-lr scales them" in said


def test_a_training_ends_when_its_metric_no_longer_improves(config, capsys):
    """With a rate of zero soon no validation is better than the ones before; BatchNorm's statistics still change."""
    longer = "\ntrain_cfg.update(max_iters=40, val_interval=1)\n"
    options = ("--early-stop", "1", "--lr", "0")
    call("train.py", config(SEGMENTER, longer), "--work-dir", "run", *options)
    assert "ends after 1 validations in a row without a better mIoU" in capsys.readouterr().out
    assert 1 < int(re.search(r"iter_(\d+)\.pth", Path("run/last_checkpoint").read_text())[1]) < 40


@pytest.mark.parametrize(
    "evaluator, best, metric, rule",
    [
        (dict(type="CocoMetric"), {}, "coco/bbox_mAP", "greater"),
        (dict(type="VOCMetric"), {}, "pascal_voc/mAP", "greater"),
        (dict(type="mmpretrain.Accuracy"), {}, "accuracy/top1", "greater"),
        ([dict(type="mmseg.IoUMetric")], dict(save_best="auto"), "mIoU", "greater"),
        (dict(type="Own"), dict(save_best="own/error", rule="less"), "own/error", "less"),
    ],
)
def test_which_metric_ends_a_training(evaluator, best, metric, rule):
    hooks = dict(checkpoint=dict(type="CheckpointHook", **best))
    cfg = Config(dict(val_evaluator=evaluator, default_hooks=hooks, custom_hooks=[dict(type="A")]))
    stop_early(cfg, 3)
    assert [hook.type for hook in cfg.custom_hooks] == ["A", "EarlyStoppingHook"]
    assert (cfg.custom_hooks[1].monitor, cfg.custom_hooks[1].patience) == (metric, 3)
    assert HOOKS.build(cfg.custom_hooks[1]).rule == rule


@pytest.mark.parametrize(
    "cfg, words",
    [
        (dict(val_evaluator=dict(type="Own")), "does not know the metric of Own; name it by"),
        (dict(val_evaluator=None), "--early-stop needs a validation"),
        (
            dict(
                val_evaluator=dict(type="Own"),
                default_hooks=dict(checkpoint=dict(save_best="own/value")),
            ),
            "does not know whether a greater own/value is better; set",
        ),
        (dict(val_evaluator=dict(type="Own"), default_hooks=dict(checkpoint=None)), "name it by"),
    ],
)
def test_a_metric_that_is_not_known(cfg, words):
    with pytest.raises(UserError, match=words):
        stop_early(Config(cfg), 3)


@pytest.mark.parametrize("name", ["wandb", "mlflow"])
def test_a_logger_s_package_is_named(config, capsys, monkeypatch, name):
    monkeypatch.setattr("mmvssm.run.options.find_spec", lambda module: None)
    sentence = sentence_of_refusal(
        capsys, "train.py", config(SEGMENTER), "--work-dir", "run", "--logger", name
    )
    assert sentence.endswith(
        f"--logger {name} needs a package that is not installed; pip install {name}"
    )


@pytest.mark.parametrize(
    "option",
    [
        *(("--batch-size", "0"), ("--early-stop", "x"), ("--amp-dtype", "half")),
        *(("--lr", "nan"), ("--lr", "-1"), ("--layer-decay", "1.5")),
    ],
)
def test_values_that_cannot_work(config, capsys, option):
    with pytest.raises(SystemExit):
        call("train.py", config(SEGMENTER), *option)
    assert f"argument {option[0]}: invalid" in capsys.readouterr().err


@pytest.mark.parametrize(
    "asked, has_bf16, in_config, dtype, scale",
    [
        (None, True, {}, "bfloat16", 1.0),
        (None, False, {}, "float16", "dynamic"),
        (None, True, dict(dtype="float16", loss_scale=8.0), "float16", 8.0),
        ("float16", True, {}, "float16", "dynamic"),
        ("bfloat16", True, dict(loss_scale="dynamic"), "bfloat16", 1.0),
    ],
)
def test_mixed_precision_on_a_gpu(monkeypatch, asked, has_bf16, in_config, dtype, scale):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr(BF16, lambda including_emulation: has_bf16 or including_emulation)
    cfg = Config(dict(optim_wrapper=dict(optimizer=dict(type="SGD"), **in_config)))
    use_amp(cfg, asked)
    assert cfg.optim_wrapper.type == "AmpOptimWrapper"
    assert (cfg.optim_wrapper.dtype, cfg.optim_wrapper.loss_scale) == (dtype, scale)
