"""tools/visualize_pruning.py: the picture, the numbers, and errors for bad input."""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("mmdet")
pytest.importorskip("mmseg")

import mmcv
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope

from mmvssm.analysis.flops import count
from mmvssm.analysis.pruning_view import (
    PruningLayer,
    draw_pruning,
    load_image,
    measure_saving,
    observe_pruning,
    patch_size_of,
)
from mmvssm.errors import UserError, run_tool

REPO = Path(__file__).resolve().parents[2]
TOOL = REPO / "tools" / "visualize_pruning.py"
SEGMENTER = "configs/plainmamba_pruned_upernet_shapes.py"
DETECTOR = "configs/plainmamba_pruned_maskrcnn_shapes.py"
PRUNING = "model.backbone.pruning"
RED, BLUE = (255, 0, 0), (0, 0, 255)


def build(config):
    torch.manual_seed(0)
    cfg = Config.fromfile(REPO / config)
    init_default_scope(cfg.default_scope)
    return cfg, MODELS.build(cfg.model).eval()


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A checkpoint of each model, and images."""
    folder = tmp_path_factory.mktemp("files")
    for name, config in (("segmenter", SEGMENTER), ("detector", DETECTOR)):
        _, model = build(config)
        torch.save({"state_dict": model.state_dict(), "meta": {}}, folder / f"{name}.pth")
    noise = np.random.default_rng(0).integers(0, 256, (80, 80, 3), dtype=np.uint8)
    mmcv.imwrite(noise, str(folder / "square.png"))
    halves = np.zeros((40, 80, 3), dtype=np.uint8)
    halves[:, :40], halves[:, 40:] = RED, BLUE
    mmcv.imwrite(halves[..., ::-1].copy(), str(folder / "halves.png"))
    (folder / "words.png").write_text("not an image")
    (folder / "damaged.pth").write_bytes((folder / "detector.pth").read_bytes()[:5000])
    return folder


@pytest.fixture
def visualize(monkeypatch, capsys):
    """Runs the tool in this process; returns exit code, standard output and error."""
    spec = importlib.util.spec_from_file_location("visualize_pruning", TOOL)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.chdir(REPO)

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", [str(TOOL), "--device", "cpu", *map(str, arguments)])
        code = 0
        try:
            run_tool(module.main)
        except SystemExit as stop:
            code = stop.code
        return (code, *capsys.readouterr())

    return run


@pytest.mark.parametrize("name, config", [("segmenter", SEGMENTER), ("detector", DETECTOR)])
def test_picture_and_numbers(visualize, files, tmp_path, name, config):
    out = tmp_path / "kept.png"
    arguments = (config, files / f"{name}.pth", files / "square.png", "--out", out)
    code, stdout, stderr = visualize(*arguments)
    assert code == 0, stderr

    picture = mmcv.imread(str(out))
    # Three columns and two rows of panels of 10 square inches, with margins, at 150 dots per inch.
    width, height = 3 * (10**0.5 + 0.3), 2 * (10**0.5 + 1.2) + 0.6
    np.testing.assert_allclose(picture.shape, (150 * height, 150 * width, 3), atol=1)
    for row in np.array_split(picture, 2, axis=0):
        for panel in np.array_split(row, 3, axis=1):
            assert len(np.unique(panel @ (1, 256, 65536))) > 20 and panel.std() > 20

    # 160 pixels are 20 tokens of 8; half of them leave, twice.
    assert "tokens 400 -> 200 -> 100 (25.0% reach the end)" in stdout
    _, pruned = build(config)
    _, dense = build(config)
    dense.backbone.pruning = None
    x = torch.rand(1, 3, 160, 160)
    flops = [
        count(m.backbone, lambda m=m: m.backbone(x))["total"].flops / 1e9 for m in (dense, pruned)
    ]
    assert f"{flops[0]:.3f} -> {flops[1]:.3f} GFLOPs (-{1 - flops[1] / flops[0]:.1%})" in stdout
    times = re.search(r"([\d.]+) -> ([\d.]+) ms \(([\d.]+) times as fast, best of (\d+)", stdout)
    before, after, factor, runs = map(float, times.groups())
    assert before > 0 and after > 0 and runs >= 5
    assert factor == pytest.approx(before / after, abs=0.02)
    # The forks say on import what they could not import themselves.
    assert sum("import OneDL" not in line for line in stdout.splitlines()) == 1


def test_runs_as_a_program(files, tmp_path):
    out = tmp_path / "kept.pdf"
    done = subprocess.run(
        [
            *(sys.executable, TOOL, SEGMENTER, files / "segmenter.pth", files / "square.png"),
            *("--out", out, "--device", "cpu"),
            *("--cfg-options", f"{PRUNING}.layers=2"),
        ],
        capture_output=True,
        text=True,
        cwd=REPO,
    )
    assert done.returncode == 0, done.stderr
    assert "tokens 400 -> 200 (50.0% reach the end)" in done.stdout
    assert out.read_bytes().startswith(b"%PDF")


def test_what_is_shown_is_what_the_backbone_does():
    _, model = build(SEGMENTER)
    backbone = model.backbone
    x = torch.randn(1, 3, 64, 90)
    layers = observe_pruning(backbone, x)
    assert [layer.index for layer in layers] == [1, 3]
    with torch.no_grad():
        outputs = backbone(x)
    remaining = np.ones((8, 12), dtype=bool)  # 90 pixels are 12 tokens of 8
    # The maps of layers 1, 3, 4 and 5: what leaves after a layer is missing from the next.
    for layer, output in zip(layers, outputs[1:]):
        np.testing.assert_array_equal(np.isfinite(layer.importance), remaining)
        np.testing.assert_array_equal(np.flatnonzero(layer.kept), output.positions[0].numpy())
        assert (layer.num_tokens, layer.num_kept) == (remaining.sum(), layer.kept.sum())
        assert layer.num_kept * 2 == layer.num_tokens
        dropped = remaining & ~layer.kept
        assert layer.importance[layer.kept].min() >= layer.importance[dropped].max()
        remaining = layer.kept


def test_measuring_leaves_the_backbone_as_it_was():
    _, model = build(SEGMENTER)
    pruning, x = model.backbone.pruning, torch.rand(1, 3, 64, 64)
    saving = measure_saving(model.backbone, x)
    assert model.backbone.pruning is pruning is not None
    assert 0 < saving.pruned_flops < saving.dense_flops


@pytest.mark.parametrize("config", [SEGMENTER, DETECTOR])
def test_image_as_testing_prepares_it(files, config):
    cfg, model = build(config)
    image, x = load_image(cfg, model, str(files / "halves.png"))
    # Scaled to fit 160x160; the detector pads heights and widths to multiples of 32.
    assert image.shape == (80, 160, 3) and image.dtype == np.uint8
    assert x.shape == (1, 3, 80 if config == SEGMENTER else 96, 160)
    assert tuple(image[0, 0]) == RED and tuple(image[0, -1]) == BLUE
    preprocessor = model.data_preprocessor
    expected = (torch.tensor(RED)[:, None, None] - preprocessor.mean) / preprocessor.std
    torch.testing.assert_close(x[0, :, :1, :1], expected)


def test_panels():
    image = np.random.default_rng(0).integers(0, 256, (30, 44, 3), dtype=np.uint8)
    importance = np.arange(24, dtype=np.float32).reshape(4, 6)
    first = PruningLayer(2, importance, importance >= 12)
    second = PruningLayer(5, np.where(first.kept, importance, np.nan), importance >= 20)
    figure = draw_pruning(image, [first, second], 8, "title")
    # Colour bars come after the six panels.
    (original, tokens, _), (departures, _, values) = np.array(figure.axes[:6]).reshape(2, 3)

    canvas = original.images[0].get_array()
    assert canvas.shape == (32, 48, 3)
    np.testing.assert_array_equal(canvas[:30, :44], image)
    mask = first.kept.repeat(8, 0).repeat(8, 1)
    shown = tokens.images[0].get_array()
    np.testing.assert_array_equal(shown[mask], canvas[mask])
    faded = shown[~mask]
    assert (np.ptp(faded, axis=-1) == 0).all() and faded.min() > 150 and faded.std() > 5
    assert tokens.get_title() == "after layer 2\n12 of 24 tokens kept"

    shown = values.images[0].get_array()
    np.testing.assert_array_equal(shown.mask, ~first.kept)
    np.testing.assert_array_equal(shown[first.kept], importance[first.kept])
    assert values.images[0].get_extent() == [-0.5, 47.5, 31.5, -0.5]
    stages = departures.images[0].get_array()
    assert [int((stages == n).sum()) for n in range(3)] == [12, 8, 4]
    for ax in figure.axes[:6]:  # two columns of pixels at the right and two rows below are no image
        assert [(p.get_width(), p.get_height()) for p in ax.patches] == [(4, 32), (44, 2)]


@pytest.mark.parametrize("grid", [(3, 20), (20, 3)])
def test_pictures_of_wide_and_tall_images_fit_a_screen(grid):
    importance = np.random.default_rng(0).random(grid, dtype=np.float32)
    layers = [PruningLayer(i, importance, importance > 0.5) for i in (1, 3, 5)]
    figure = draw_pruning(np.zeros((grid[0] * 4, grid[1] * 4, 3), np.uint8), layers, 4, "title")
    width, height = figure.get_size_inches()
    assert 0.5 < height / width < 1.5


def test_picture_of_equal_importance():
    zeros = np.zeros((2, 2), dtype=np.float32)
    kept = np.array([[True, True], [False, False]])
    figure = draw_pruning(np.zeros((8, 8, 3), np.uint8), [PruningLayer(0, zeros, kept)], 4, "flat")
    figure.canvas.draw()


def test_keeping_everything_is_no_pruning():
    _, model = build(SEGMENTER)
    model.backbone.pruning.keep_ratios = {1: 1.0, 3: 1.0}
    with pytest.raises(UserError, match=r"keeps all 64 tokens of this image"):
        observe_pruning(model.backbone, torch.rand(1, 3, 64, 64))


def test_patch_size_is_the_backbones():
    _, model = build(SEGMENTER)
    tokens, grid = model.backbone.patch_embed(torch.rand(1, 3, 41, 64))
    assert patch_size_of(model.backbone) == 8 and grid == (6, 8) and tokens.shape[1] == 48


# The defaults of a command line that works, what to change in it, and words of the answer.
MISTAKES = {
    "no config": (dict(config="configs/none.py"), "there is no config file configs/none.py"),
    "no image": (dict(image="none.png"), "there is no image"),
    "image is a folder": (dict(image="."), "there is no image"),
    "not an image": (dict(image="words.png"), "words.png is not an image that mmcv can read"),
    "no checkpoint": (dict(checkpoint="none.pth"), "there is no checkpoint file"),
    "damaged": (dict(checkpoint="damaged.pth"), "not a readable PyTorch checkpoint"),
    "other model": (dict(checkpoint="detector.pth"), "does not fit this config's model"),
    "dense backbone": (
        dict(config="configs/plainmamba_upernet_shapes.py"),
        "this config's backbone, PlainMamba, prunes nothing",
    ),
    "other backbone": (
        dict(config="configs/groupmamba_upernet_shapes.py"),
        "this config's backbone, GroupMamba, prunes nothing",
    ),
    "no folder": (dict(out="missing/kept.png"), "for the picture does not exist"),
    "not a picture": (dict(out="kept.xyz"), "the name must end in .png"),
    "ratio": (
        dict(extra=["--cfg-options", f"{PRUNING}.keep_ratio=2"]),
        "keep_ratio must be in (0, 1]; got 2",
    ),
    "unpackable": (  # 199 is a prime number
        dict(extra=["--cfg-options", f"{PRUNING}.alignment=none", f"{PRUNING}.keep_ratio=0.4975"]),
        "alignment='none' cannot pack the 199 tokens",
    ),
    "no such device": (dict(extra=["--device", "abacus"]), "cannot use --device abacus"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_in_one_sentence(visualize, files, tmp_path, name):
    changes, words = MISTAKES[name]
    given = dict(config=SEGMENTER, checkpoint="segmenter.pth", image="square.png", out="kept.png")
    given.update(changes)
    code, stdout, stderr = visualize(
        given["config"],
        files / given["checkpoint"],
        files / given["image"],
        "--out",
        tmp_path / given["out"],
        *given.get("extra", []),
    )
    assert code == 1 and not stdout
    (sentence,) = [line for line in stderr.splitlines() if line.startswith("error: ")]
    assert words in sentence and "Traceback" not in stderr
    assert not list(tmp_path.iterdir())
