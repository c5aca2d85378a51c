"""Every config loads, is consistent, builds, trains, and has the optimizer settings of its recipe."""

import ast
import re
from copy import deepcopy
from functools import cache
from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from mmengine.registry import MODELS, TRANSFORMS, DefaultScope
from torch import nn

import mmvssm.registry
from mmvssm.errors import UserError
from mmvssm.models.weights import VARIABLE, drop_pretrained
from mmvssm.models.weights_table import find_model
from support.tiny_configs import DENSE, OTHER_HEADS

CONFIGS = Path(__file__).parents[2] / "configs"
NAMES = [path.stem for path in DENSE]
SHAPES = [
    f"{backbone}_{method}_shapes"
    for backbone in ("groupmamba", "plainmamba", "plainmamba_pruned", "spatialmamba", "vmamba")
    for method in ("maskrcnn", "upernet")
]
SHAPES += [f"vim{pruned}_upernet_shapes" for pruned in ("", "_pruned")]
SHAPES += [f"plainmamba_adapter{pruned}_maskrcnn_shapes" for pruned in ("", "_pruned")]
REAL = ["groupmamba_fasterrcnn_bccd", "groupmamba_upernet_camvid"]  # small models for real images
TRAINED_IN_EVERY_RUN = {
    "groupmamba_maskrcnn_shapes",
    "plainmamba_adapter_pruned_maskrcnn_shapes",
    "vim_pruned_upernet_shapes",
    "vmamba_upernet_shapes",
}
OTHERS = [f"{backbone}_{head}_shapes" for backbone, head in OTHER_HEADS]
SHAPES += OTHERS
LIBRARIES = {
    **dict.fromkeys(("maskrcnn", "fasterrcnn", "retinanet", "rtmdet"), "mmdet"),
    **dict.fromkeys(("upernet", "segformer", "mask2former"), "mmseg"),
}
BACKBONES = {  # by how a name begins, the longest first
    "plainmamba_adapter": "PlainMamba-Adapter",
    "plainmamba": "PlainMamba",
    "groupmamba": "GroupMamba",
    "spatialmamba": "Spatial-Mamba",
    "vmamba": "VMamba",
    "vim": "Vim",
}


read = cache(Config.fromfile)  # mmengine reads dozens of files for each that is inherited


def load(name):
    scope = next(scope for method, scope in LIBRARIES.items() if f"_{method}_" in name)
    library = pytest.importorskip(scope)
    cfg = deepcopy(read(CONFIGS / f"{name}.py"))
    assert cfg.default_scope == scope == library.__name__
    return cfg


def use_scope(cfg):
    """Register the library's modules and make its scope the current one."""
    if cfg.default_scope == "mmdet":
        from mmdet.utils import register_all_modules
    else:
        from mmseg.utils import register_all_modules
    register_all_modules(init_default_scope=False)
    return DefaultScope.overwrite_default_scope(cfg.default_scope)


def without_scopes(value):
    """A config without the scopes that mmengine notes in what it inherits."""
    if isinstance(value, dict):
        return {key: without_scopes(x) for key, x in value.items() if key != "_scope_"}
    if isinstance(value, (list, tuple)):
        return [without_scopes(x) for x in value]
    return value


def build(cfg):
    with use_scope(cfg):
        return MODELS.build(cfg.model)


def build_optimizer(cfg, model):
    from mmengine.optim import build_optim_wrapper

    with use_scope(cfg):
        return build_optim_wrapper(model, cfg.optim_wrapper).optimizer


def is_large(name):
    return name not in SHAPES + REAL


def with_large_marked_slow(names):
    return [pytest.param(n, marks=pytest.mark.slow if is_large(n) else ()) for n in names]


def test_the_promised_configs_are_there():
    recipes = ("maskrcnn_coco", "upernet_ade20k")
    promised = {f"groupmamba{size}_{r}" for size in ("", "_small", "_base") for r in recipes}
    promised |= {
        f"plainmamba{size}{pruned}_{recipe}"
        for size in ("", "_l2", "_l3")
        for pruned in ("", "_pruned")
        for recipe in recipes
    }
    sizes = ("", "_small", "_base")
    for model in ("spatialmamba", "vmamba"):
        promised |= {f"{model}{size}_{recipe}" for size in sizes for recipe in recipes}
        promised |= {f"{model}{size}_maskrcnn_3x_coco" for size in sizes[:2]}
    for size in ("", "_l2", "_l3"):
        promised |= {f"plainmamba{size}_upernet_published_ade20k"}
        promised |= {
            f"plainmamba_adapter{size}_{method}_coco"
            for method in ("maskrcnn", "retinanet", "pruned_maskrcnn")
        }
    promised |= {f"vim{variant}_upernet_ade20k" for variant in ("", "_small", "_small_pruned")}
    for backbone, head in OTHER_HEADS:
        data = "ade20k" if LIBRARIES[head.split("_")[-1]] == "mmseg" else "coco"
        promised.add(f"{backbone}_{head}_{data}")
    assert set(NAMES) == promised | set(SHAPES) | set(REAL)


@pytest.mark.parametrize("name", NAMES)
class TestText:
    """Checks of a config without building the model."""

    def test_channels_agree(self, name):
        model = load(name).model
        arch = model.backbone.arch
        if isinstance(arch, str):
            arch = mmvssm.registry.MODELS.get(model.backbone.type).arch_settings[arch]
        widths = arch["embed_dims"]
        if model.backbone.type == "mmvssm.PlainMambaAdapter":
            widths, necks = [widths] * 4, [model.neck]
        elif "_published_" in name:  # four maps of the same stride enter the head
            widths, necks = [widths] * len(model.backbone.out_indices), []
            assert model.neck is None and len(widths) == 4
        elif isinstance(widths, int):  # a plain backbone, whose maps a neck makes into a pyramid
            restoration, pyramid, *necks = model.neck
            assert restoration.type == "mmvssm.TokenRestoration"
            assert (pyramid.type, pyramid.in_channels) == ("mmvssm.FeaturePyramid", widths)
            with torch.device("meta"):
                backbone = MODELS.build({**model.backbone, "init_cfg": None})
            assert len(backbone.out_strides) in (1, len(pyramid.rescales))
            strides = [backbone.out_strides[0] / r for r in pyramid.rescales]
            assert strides == [4, 8, 16, 32][-len(strides) :]
            widths = [widths] * len(strides)
        else:
            widths = [widths[i] for i in model.backbone.get("out_indices", range(4))]
            necks = [model.neck] if "neck" in model else []
        if necks:
            (neck,) = necks
            assert list(neck.in_channels) == widths
            head = model.get("rpn_head") or model.bbox_head
            assert neck.out_channels == head.in_channels
        else:
            assert list(model.decode_head.in_channels) == widths
            if model.get("auxiliary_head"):
                assert model.auxiliary_head.in_channels == widths[model.auxiliary_head.in_index]
            else:
                assert any(head in name for head in ("segformer", "mask2former"))

    def test_prunes_if_its_name_says_so(self, name):
        cfg = load(name)
        hooks = [hook.type for hook in cfg.get("custom_hooks") or []]
        pruned = "_pruned_" in name
        assert (cfg.model.backbone.get("pruning") is not None) == pruned
        assert ("mmvssm.KeepRatioWarmup" in hooks) == pruned
        if pruned and is_large(name):
            assert cfg.model.backbone.pruning == cfg.model.backbone.arch

    def test_starts_where_the_papers_start(self, name, monkeypatch, tmp_path):
        cfg = load(name)
        assert cfg.model.get("pretrained") is None
        init_cfg = cfg.model.backbone.get("init_cfg")
        if not is_large(name):
            assert not init_cfg
            return
        backbone = cfg.model.backbone
        published = find_model(init_cfg.checkpoint.removeprefix("mmvssm://"))
        kind = backbone.type.removeprefix("mmvssm.").removesuffix("Adapter")
        assert (published.backbone, published.arch) == (kind, backbone.arch)
        assert published.task == "classification" and init_cfg.prefix == "backbone."
        monkeypatch.setenv(VARIABLE, str(tmp_path))
        (tmp_path / f"{published.name}.pth").write_text("no weights")
        with pytest.raises(UserError, match=rf"{published.name}\.pth is not a readable PyTorch"):
            build(cfg).backbone.init_weights()
        assert list(drop_pretrained(cfg.model)) == [init_cfg.checkpoint]

    def test_can_be_inherited_by_name(self, name, tmp_path):
        """Building a pipeline must also find the transforms then."""
        (tmp_path / "inheriting.py").write_text(f"_base_ = 'mmvssm::{name}.py'\n")
        cfg, direct = Config.fromfile(tmp_path / "inheriting.py"), load(name)
        assert without_scopes(cfg.to_dict()) == without_scopes(direct.to_dict())
        pipelines = [
            cfg[f"{split}_dataloader"].dataset.pipeline for split in ("train", "val", "test")
        ]
        with use_scope(cfg):
            for transform in sum(pipelines, cfg.get("tta_pipeline", [])):
                built = TRANSFORMS.build(transform)
                assert type(built).__name__ == transform.type

    def test_says_what_it_is(self, name):
        text = ast.get_docstring(ast.parse((CONFIGS / f"{name}.py").read_text()))
        backbone = next((title for start, title in BACKBONES.items() if name.startswith(start)), "")
        assert backbone, f"add the backbone of {name} to BACKBONES"
        if is_large(name):
            arch = load(name).model.backbone.arch
            assert f"{backbone}-{dict(tiny='T', small='S', base='B').get(arch, arch)}" in text
        elif name in REAL:
            assert name.rpartition("_")[2] in text.lower()
        else:
            assert "generated data set" in text
        assert ("pruned" in text) == ("_pruned_" in name)
        for other in re.findall(r"recipe of (\w+\.py)", text):
            assert (CONFIGS / other).exists()


def test_mmsegs_configs_are_found_whatever_it_is_installed_as(monkeypatch):
    """The forks' distribution is called onedl-mmsegmentation, and their mmengine asks for mmsegmentation."""
    pytest.importorskip("mmseg")
    for place in ("mmengine.config.config", "mmvssm.packaged_configs"):
        monkeypatch.setattr(f"{place}.is_installed", lambda name: name != "mmsegmentation")
    cfg = Config.fromfile(CONFIGS / "groupmamba_upernet_ade20k.py")
    assert without_scopes(cfg.to_dict()) == without_scopes(
        load("groupmamba_upernet_ade20k").to_dict()
    )


def test_what_lacks_is_named_as_pip_knows_it(monkeypatch):
    for place in ("mmengine.config.config", "mmvssm.packaged_configs"):
        monkeypatch.setattr(f"{place}.is_installed", lambda name: False)
    with pytest.raises(ModuleNotFoundError, match="mmsegmentation is not installed"):
        Config.fromfile(CONFIGS / "groupmamba_upernet_ade20k.py")


class TestRecipes:
    @pytest.mark.parametrize("name", [n for n in NAMES if n.endswith("maskrcnn_coco")])
    def test_maskrcnn_coco(self, name):
        cfg = load(name)
        assert cfg.train_cfg.max_epochs == 12
        assert cfg.param_scheduler[1].milestones == [8, 11]
        assert cfg.train_pipeline[2].scale == (1333, 800)
        assert cfg.optim_wrapper.optimizer.type == "AdamW"
        assert (cfg.optim_wrapper.optimizer.lr, cfg.optim_wrapper.optimizer.weight_decay) == (
            1e-4,
            0.05,
        )
        assert cfg.auto_scale_lr.base_batch_size == 16

    @pytest.mark.parametrize(("backbone", "head"), OTHER_HEADS)
    def test_other_heads_train_as_mask_rcnn_and_upernet_do(self, backbone, head):
        segments = LIBRARIES[head.split("_")[-1]] == "mmseg"
        first, data = ("upernet", "ade20k") if segments else ("maskrcnn", "coco")
        cfg, known = (load(f"{backbone}_{name}_{data}") for name in (head, first))
        parts = ["train_cfg", "param_scheduler", "optim_wrapper", "auto_scale_lr"]
        if head == "mask2former":  # mmseg's recipe: the same length and batch
            assert cfg.train_cfg.max_iters == known.train_cfg.max_iters
            assert cfg.optim_wrapper.optimizer.lr == 1e-4
            parts = ["auto_scale_lr"]
        if head == "rtmdet":  # which shares weights
            assert cfg.optim_wrapper.paramwise_cfg.pop("bypass_duplicate")
        for part in parts:
            assert without_scopes(cfg[part]) == without_scopes(known[part]), part
        assert cfg.train_dataloader.batch_size == known.train_dataloader.batch_size
        save_best = cfg.default_hooks.checkpoint.save_best
        assert save_best == known.default_hooks.checkpoint.save_best

    @pytest.mark.parametrize("name", SHAPES)
    def test_scaling_learning_rates_starts_from_the_config_s_own_batch(self, name):
        cfg = load(name)
        assert cfg.auto_scale_lr.base_batch_size == cfg.train_dataloader.batch_size

    @pytest.mark.parametrize("name", [n for n in NAMES if n.endswith("upernet_ade20k")])
    def test_upernet_ade20k(self, name):
        cfg = load(name)
        iterations, rate, decay, batch = 160_000, 6e-5, 0.01, 16
        if name.startswith("vim"):  # the published script's
            iterations, batch = 60_000, 32
            rate, decay = (1e-4, 0.05) if "small" in name else (2e-4, 0.1)
        assert cfg.train_cfg.max_iters == cfg.param_scheduler[1].end == iterations
        assert cfg.param_scheduler[0].end == cfg.param_scheduler[1].begin == 1500
        assert cfg.optim_wrapper.optimizer.type == "AdamW"
        optimizer = cfg.optim_wrapper.optimizer
        assert (optimizer.lr, optimizer.weight_decay) == (rate, decay)
        assert cfg.model.decode_head.num_classes == cfg.model.auxiliary_head.num_classes == 150
        assert cfg.auto_scale_lr.base_batch_size == batch

    def test_ade20k_augmentation_scales_the_single_scale_test(self):
        cfg = load("groupmamba_upernet_ade20k")
        (augmentation,) = (t for t in cfg.tta_pipeline if t.type == "TestTimeAug")
        resizes, flips, *_ = augmentation.transforms
        assert cfg.test_pipeline[1].scale in [resize.scale for resize in resizes]
        assert len(resizes) == 6
        assert [flip.prob for flip in flips] == [0.0, 1.0]
        assert cfg.tta_model.type == "SegTTAModel"

    @pytest.mark.parametrize("name", SHAPES)
    def test_shapes_knows_the_generator(self, name):
        from mmvssm.datasets import ShapesGenerator
        from mmvssm.datasets.shapes import CLASSES

        cfg = load(name)
        generator = mmvssm.registry.TASK_UTILS.build(cfg.prepare_data)
        assert isinstance(generator, ShapesGenerator)
        assert generator.image_size == cfg.image_size
        for loader in (cfg.train_dataloader, cfg.val_dataloader, cfg.test_dataloader):
            assert Path(loader.dataset.data_root).absolute() == generator.root
            classes = loader.dataset.metainfo.classes
            assert classes[-5:] == CLASSES
            assert len(classes) == cfg.num_classes == len(loader.dataset.metainfo.palette)


@pytest.mark.parametrize("name", with_large_marked_slow(NAMES))
class TestModel:
    def test_optimizer_spares_norms_and_scan_parameters(self, name):
        cfg = load(name)
        model = build(cfg)
        optimizer = build_optimizer(cfg, model)
        decay = {
            id(parameter): group["weight_decay"]
            for group in optimizer.param_groups
            for parameter in group["params"]
        }
        assert len(decay) == len(list(model.parameters()))

        if (
            name.startswith("plainmamba_adapter") or "_published_" in name
        ):  # by names alone, as published
            names = ["norm", "pos_embed", "A_log", "mixer.D", "direction_Bs"]
            names += ["bias", "level_embed"] if "adapter" in name else []
            for parameter_name, parameter in model.named_parameters():
                spares = any(part in parameter_name for part in names)
                assert (decay[id(parameter)] == 0) == spares, parameter_name
            return
        if name.startswith("vim"):
            for parameter_name, parameter in model.named_parameters():
                spares = parameter.dim() < 2 or "pos_embed" in parameter_name
                assert (decay[id(parameter)] == 0) == spares, parameter_name
            return
        norms = (nn.LayerNorm, nn.GroupNorm, nn.modules.batchnorm._BatchNorm)
        spared = {id(p) for m in model.modules() if isinstance(m, norms) for p in m.parameters()}
        if "mask2former" in name:  # whose embeddings are spared, and whose backbone learns slowly
            embeddings = re.compile("query_embed|query_feat|level_embed")
            embedded = {id(p) for n, p in model.named_parameters() if embeddings.search(n)}
            assert len(embedded) > 2
            spared |= embedded
            rates = {id(p): g["lr"] for g in optimizer.param_groups for p in g["params"]}
            for parameter_name, parameter in model.named_parameters():
                scale = 0.1 if is_large(name) and parameter_name.startswith("backbone.") else 1
                rate = cfg.optim_wrapper.optimizer.lr * scale
                assert rates[id(parameter)] == pytest.approx(rate), parameter_name
        named = dict(model.backbone.named_parameters())
        keys = cfg.optim_wrapper.paramwise_cfg.get("custom_keys", {})
        scans = {
            id(named[name])
            for name in model.backbone.no_weight_decay()
            if "direction_Bs" in keys or not name.endswith("direction_Bs")  # only some recipes do
        }
        if name.startswith(("spatialmamba", "vmamba")):  # whose published recipes spare norms alone
            scans = set()
        else:
            assert scans
        assert {id(p) for n, p in model.named_parameters() if "norm" in n} <= spared
        for parameter, value in decay.items():
            expected = (
                0.0 if parameter in spared | scans else cfg.optim_wrapper.optimizer.weight_decay
            )
            assert value == expected


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[pytest.mark.nightly] * (name not in TRAINED_IN_EVERY_RUN))
        for name in SHAPES
    ],
)
class TestShapes:
    @pytest.mark.slow
    def test_loss_falls(self, name, tmp_path, monkeypatch):
        """Eight steps on one batch, through the real pipeline and optimiser."""
        from mmengine.runner import Runner

        from mmvssm.datasets import ShapesGenerator

        cfg = load(name)
        root = ShapesGenerator(tmp_path / "shapes", 4, 1, cfg.image_size).ensure()
        cfg.train_dataloader.update(batch_size=4, num_workers=0)
        cfg.train_dataloader.dataset.data_root = str(root)
        torch.manual_seed(0)
        with use_scope(cfg):
            (batch,) = Runner.build_dataloader(
                dict(cfg.train_dataloader, sampler=dict(type="DefaultSampler", shuffle=False)),
                seed=0,
            )
            model = build(cfg).train()
            optimizer = build_optimizer(cfg, model)
            totals = []
            for _ in range(8):
                losses = model(**model.data_preprocessor(batch, True), mode="loss")
                total, _ = model.parse_losses(losses)
                optimizer.zero_grad()
                total.backward()
                optimizer.step()
                totals.append(total.item())
        if name in OTHERS:  # so that DistributedDataParallel needs no find_unused_parameters
            assert all(parameter.grad is not None for parameter in model.parameters())
        assert all(value == value for value in totals)
        assert min(totals[-2:]) < 0.8 * totals[0]
