"""Every classification config builds, has the published size, and trains for a step."""

import ast
import math
import re
import runpy
from copy import deepcopy
from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.optim import build_optim_wrapper
from mmengine.registry import DATASETS, TRANSFORMS, DefaultScope

from mmvssm.analysis.flops import count
from mmvssm.registry import MODELS
from mmvssm.run.settings import check_types, check_values
from support.pretraining import require_mmpretrain

require_mmpretrain()
from mmpretrain.structures import DataSample  # noqa: E402

REPO = Path(__file__).parents[3]
CONFIGS = REPO / "configs"
IMAGENET = {
    # With their heads: design figures of both papers' backbones, and 1000 classes.
    "groupmamba_imagenet": 22_912_917,
    "groupmamba_small_imagenet": 34_268_555,
    "groupmamba_base_imagenet": 56_637_838,
    "groupmamba_distilled_imagenet": 23_361_917,
    "groupmamba_small_distilled_imagenet": 34_781_555,
    "groupmamba_base_distilled_imagenet": 57_150_838,
    "plainmamba_imagenet": 7_358_656 + 193_000,
    "plainmamba_l2_imagenet": 25_760_832 + 385_000,
    "plainmamba_l3_imagenet": 50_507_456 + 449_000,
    "plainmamba_pruned_imagenet": 7_358_656 + 193_000,
    "plainmamba_pruned_release_imagenet": 7_358_656 + 193_000,
    "plainmamba_l2_pruned_imagenet": 25_760_832 + 385_000,
    "plainmamba_l3_pruned_imagenet": 50_507_456 + 449_000,
    "spatialmamba_imagenet": 26_748_862,
    "spatialmamba_small_imagenet": 43_074_280,
    "spatialmamba_base_imagenet": 95_745_592,
    "vim_imagenet": 7_148_008,
    "vim_small_imagenet": 25_796_584,
    "vim_base_imagenet": 97_598_440,
    "vim_plus_imagenet": 7_148_008 + (27**2 - 14**2) * 192,
    "vim_small_plus_imagenet": 25_796_584 + (27**2 - 14**2) * 384,
    "vim_pruned_imagenet": 7_148_008,
    "vim_small_pruned_imagenet": 25_796_584,
    "vmamba_imagenet": 30_249_064,
    "vmamba_small_imagenet": 50_147_752,
    "vmamba_base_imagenet": 88_557_800,
}
CIFAR10 = [
    *(
        "groupmamba_cifar10",
        "groupmamba_distilled_cifar10",
        "resnet18_cifar10",
        "resnet18_cutmix_cifar10",
    ),
    *("resnet_small_cifar10", "resnet_small_distilled_cifar10"),
    *("plainmamba_cifar10", "plainmamba_pruned_cifar10", "vim_cifar10", "vim_pruned_cifar10"),
]
# The smallest of each kind; the others differ by numbers alone.
QUICK = {"plainmamba_pruned_imagenet", "groupmamba_distilled_imagenet"}


@pytest.fixture(autouse=True)
def scope():
    with DefaultScope.overwrite_default_scope("mmpretrain"):
        yield


def load(name):
    return Config.fromfile(CONFIGS / f"{name}.py")


def build(cfg, **settings):
    model = dict(deepcopy(cfg.model), data_preprocessor=deepcopy(cfg.data_preprocessor), **settings)
    return MODELS.build(model)


def step(cfg, model, size, images):
    """One training step on images of noise; the loss before and after it."""
    model.train()
    wrapper = build_optim_wrapper(model, deepcopy(cfg.optim_wrapper))
    classes = model.head.num_classes
    data = dict(
        inputs=[torch.randint(0, 255, (3, size, size)) for _ in range(images)],
        data_samples=[DataSample().set_gt_label(i % classes) for i in range(images)],
    )
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    log = model.train_step(data, wrapper)
    unmoved = [name for name, p in model.named_parameters() if torch.equal(before[name], p)]
    return {name: value.item() for name, value in log.items()}, unmoved


def test_the_promised_configs_are_there():
    names = {path.stem for path in CONFIGS.glob("*.py")}
    found = {name for name in names if name.endswith(("_imagenet", "_cifar10"))}
    assert found == {*IMAGENET, *CIFAR10}


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n in QUICK else pytest.mark.nightly) for n in IMAGENET]
)
def test_imagenet(name):
    """The published number of parameters, and a step on images of 224x224 that changes all of them."""
    torch.manual_seed(0)
    cfg = load(name)
    distilled = "distilled" in name
    if distilled:  # RegNetY-16GF itself would take longer than all the students
        assert cfg.model.teacher.model_name == "regnety_160.deit_in1k"
        assert (cfg.model.head.distillation, cfg.model.head.distillation_weight) == ("hard", 0.5)
        cfg.model.teacher = dict(type="TimmClassifier", model_name="resnet10t", pretrained=False)
        pytest.importorskip("timm")
    cfg.model.backbone.drop_path_rate = 0.0  # which would leave out whole layers of so few images
    model = build(cfg)
    assert sum(p.numel() for p in model.parameters()) == IMAGENET[name]
    cfg.optim_wrapper.optimizer.lr = 1e-3
    logged, unmoved = step(cfg, model, 224, 2)
    assert all(map(math.isfinite, logged.values()))
    assert logged["loss"] == pytest.approx(math.log(1000), abs=2.0)
    # A scan of one token, the class block's, knows no decay; a norm undoes a scale; and a ReLU may be closed for both.
    spared = ("neck.mixer.scan.A_log", "neck.mixer.skip_scale", "affinity.0.bias")
    assert not [name for name in unmoved if not name.endswith(spared)]


@pytest.mark.parametrize("name", [*IMAGENET, *CIFAR10])
def test_the_tools_take_them(name):
    cfg = load(name)
    check_types(cfg)
    check_values(cfg)
    text = ast.get_docstring(ast.parse((CONFIGS / f"{name}.py").read_text()))
    for other in re.findall(r"[\w/]+\.py", text):
        published = other in ("train.py", "config.py")
        assert published or (REPO / other).exists() or (CONFIGS / other).exists()


@pytest.mark.parametrize(
    "name", [n for n in IMAGENET if "pruned" not in n and not n.endswith("plus_imagenet")]
)
def test_recipes_of_imagenet(name):
    cfg = load(name)
    decay, warm_up_epochs, momentum = 0.05, 20, 1e-4
    if name.startswith("vim"):
        decay, warm_up_epochs, momentum = 0.1 if name == "vim_imagenet" else 0.05, 5, 4e-5
    optimizer = cfg.optim_wrapper.optimizer
    assert (optimizer.type, optimizer.lr, optimizer.weight_decay) == ("AdamW", 1e-3, decay)
    assert cfg.auto_scale_lr.base_batch_size == 1024 == 8 * cfg.train_dataloader.batch_size
    warm_up, annealing = cfg.param_scheduler
    assert warm_up.end == annealing.begin == warm_up_epochs and cfg.train_cfg.max_epochs == 300
    loss = cfg.model.head.loss
    assert (loss.label_smooth_val, loss.mode) == (0.1, "original")
    assert loss.type == "mmpretrain.LabelSmoothLoss"
    averages = [hook for hook in cfg.custom_hooks if hook.type == "mmpretrain.EMAHook"]
    assert [hook.momentum for hook in averages] == (
        [] if name == "plainmamba_imagenet" else [momentum]
    )
    # BatchNorm's statistics belong to the weights: beside averaged ones the last step's are of another model.
    assert all(hook.get("update_buffers") for hook in averages)


@pytest.mark.parametrize(
    "name",
    [
        "vim_plus_imagenet",
        "vim_small_plus_imagenet",
        "vim_pruned_imagenet",
        "vim_small_pruned_imagenet",
    ],
)
def test_fine_tuning_of_vim_as_published(name):
    cfg = load(name)
    optimizer, (schedule,) = cfg.optim_wrapper.optimizer, cfg.param_scheduler
    assert (optimizer.lr, optimizer.weight_decay, schedule.type) == (1e-5, 1e-8, "ConstantLR")
    assert (schedule.factor, cfg.train_cfg.max_epochs) == (1.0, 30)
    assert cfg.load_from == f"mmvssm://vim_{'small' if 'small' in name else 'tiny'}"


@pytest.mark.slow
@pytest.mark.parametrize(
    "size, gflops, reduction",
    [
        ("", 3.01, 0.4),
        pytest.param("_l2", 8.07, 0.4, marks=pytest.mark.nightly),
        pytest.param("_l3", 14.43, 0.4, marks=pytest.mark.nightly),
    ],
)
def test_flops_of_the_pruned_ones(size, gflops, reduction):
    found = []
    for kind in ("", "_pruned"):
        model = build(load(f"plainmamba{size}{kind}_imagenet")).eval()
        cost = count(model, lambda m=model: m(torch.zeros(1, 3, 224, 224)))
        found.append(cost["backbone"].flops / 1e9)
    assert found[0] == pytest.approx(gflops, rel=0.01)
    assert 1 - found[1] / found[0] >= reduction
    cfg = load(f"plainmamba{size}_pruned_imagenet")
    assert cfg.train_cfg.max_epochs == 30
    (warm_up,) = cfg.custom_hooks
    assert warm_up.type == "mmvssm.KeepRatioWarmup"
    assert warm_up.num_iters == pytest.approx(10 * 1281167 / 1024, rel=0.01)


@pytest.mark.parametrize("name", CIFAR10)
def test_cifar10(name):
    torch.manual_seed(0)
    cfg = load(name)
    if "distilled" in name:
        cfg.model.teacher_checkpoint = None
    logged, _ = step(cfg, build(cfg), 32, 4)
    assert all(map(math.isfinite, logged.values()))


@pytest.mark.parametrize("loader", ["train_dataloader", "test_dataloader"])
def test_cifar10_recipes_see_the_whole_of_larger_images(loader):
    """Not a corner of 32x32 pixels; and images of that size as they are."""
    steps = [TRANSFORMS.build(t) for t in load("groupmamba_cifar10")[loader].dataset.pipeline]
    for size in ((32, 32), (200, 260)):
        image = np.random.RandomState(0).randint(0, 255, (*size, 3), np.uint8)
        resized = steps[1](dict(img=image, img_shape=size))["img"]
        assert min(resized.shape[:2]) == 32 and (size != (32, 32) or (resized == image).all())
        assert steps[2](dict(img=resized, img_shape=resized.shape[:2]))["img"].shape == (32, 32, 3)


def test_flops_of_the_small_pruned_one():
    """Near those of the pruning paper, 41.6 % fewer, so that accuracies can be compared."""
    tool = runpy.run_path(str(CONFIGS.parent / "tools/analysis_tools/get_flops.py"))
    found = []
    for kind in ("", "_pruned"):
        model = build(load(f"plainmamba{kind}_cifar10")).eval()
        assert tool["default_shape"](model) == (224, 224)
        cost = count(model, lambda m=model: tool["run_once"](m, torch.rand(1, 3, 32, 32)))
        found.append(cost["total"].flops)
    assert 0.40 <= 1 - found[1] / found[0] <= 0.44


@pytest.mark.parametrize("name", ["groupmamba_imagenet", *CIFAR10])
def test_can_be_inherited_by_name(name, tmp_path):
    """Data sets, transforms and hooks are then found as they are in the config itself."""
    (tmp_path / "inheriting.py").write_text(f"_base_ = 'mmvssm::{name}.py'\n")
    cfg = Config.fromfile(tmp_path / "inheriting.py")
    if "distilled" in name:
        cfg.model.teacher_checkpoint = None
    model = build(cfg)
    model.init_weights()
    for loader in ("train_dataloader", "val_dataloader", "test_dataloader"):
        dataset = deepcopy(cfg[loader].dataset)
        for transform in dataset.pipeline:
            name = transform.type.removeprefix("mmpretrain.")
            assert type(TRANSFORMS.build(transform)).__name__ == name
        assert DATASETS.build(dict(dataset, lazy_init=True)).metainfo["classes"]


def test_the_release_s_fine_tuning():
    """As in the code release of the pruning paper: constant rate, averaged weights, pruned from the start."""
    cfg = load("plainmamba_pruned_release_imagenet")
    optimizer = cfg.optim_wrapper.optimizer
    assert (optimizer.lr, optimizer.weight_decay, cfg.train_cfg.max_epochs) == (1e-5, 1e-8, 30)
    assert cfg.auto_scale_lr.base_batch_size == 512 == 8 * cfg.train_dataloader.batch_size
    (hook,) = cfg.custom_hooks
    assert (hook.type, hook.momentum) == ("mmpretrain.EMAHook", pytest.approx(1 - 0.99996))
    assert cfg.model.backbone.drop_path_rate == 0.0 and cfg.load_from == "mmvssm://plainmamba_l1"
