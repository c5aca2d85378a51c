"""Measure and draw token pruning: the tokens a backbone keeps of an image, and the FLOPs and time saved."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.colors import BoundaryNorm, ListedColormap
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator
from mmengine.config import Config
from mmengine.dataset import Compose
from torch import Tensor, nn

from ..datasets.walk import inference_pipeline
from ..errors import UserError
from ..models.backbones.token_backbone import LayerState
from .flops import count

_MIN_RUNS = 5
_MIN_SECONDS = 0.5  # of all dense runs; small models need many for a stable minimum
_DPI = 150
_PANEL_AREA = 10.0  # square inches
_PANEL_WIDTH = (2.7, 6.5)  # inches; titles need the smaller one
_PANEL_HEIGHT = 5.0
_GONE = "0.85"
_PADDING_EDGE = "0.45"


@dataclass(frozen=True)
class PruningLayer:
    """The tokens before and after one pruning layer.

    Attributes:
        index: Index of the layer, from 0.
        importance: ``(h, w)``, NaN at tokens pruned by earlier layers.
        kept: ``(h, w)`` bool, True at tokens that the layer keeps.
    """

    index: int
    importance: np.ndarray
    kept: np.ndarray

    @property
    def num_tokens(self) -> int:
        """Number of tokens before the layer."""
        return int(np.isfinite(self.importance).sum())

    @property
    def num_kept(self) -> int:
        """Number of tokens that it keeps."""
        return int(self.kept.sum())


@dataclass(frozen=True)
class Saving:
    """Cost of one forward pass of a backbone without and with pruning.

    Attributes:
        dense_flops: FLOPs without pruning, as :func:`~mmvssm.analysis.flops.count` counts them.
        pruned_flops: FLOPs with pruning.
        dense_seconds: Wall-clock time without pruning, the best of ``num_runs``.
        pruned_seconds: The same with pruning.
        num_runs: Number of timed runs of each.
    """

    dense_flops: int
    pruned_flops: int
    dense_seconds: float
    pruned_seconds: float
    num_runs: int


# ------------------------------------------------------------------------------------ measuring


def pruned_backbone(model: nn.Module) -> nn.Module:
    """Return the backbone of a detector or segmenter.

    Raises:
        UserError: If the model has no backbone that prunes tokens.
    """
    backbone = getattr(model, "backbone", None)
    if getattr(backbone, "pruning", None) is None:
        raise UserError(
            f"this config's backbone, {type(backbone).__name__}, prunes nothing; use a config with "
            "model.backbone.pruning, such as configs/plainmamba_pruned_upernet_ade20k.py"
        )
    return backbone


def patch_size_of(backbone: nn.Module) -> int:
    """Return the height and width in pixels of the square patch that a token covers."""
    convs = (m for m in backbone.patch_embed.modules() if isinstance(m, nn.Conv2d))
    return math.prod(conv.stride[0] for conv in convs)


def load_image(cfg: Config, model: nn.Module, path: str) -> tuple[np.ndarray, Tensor]:
    """Prepare an image with a config's test pipeline and a model's data preprocessor.

    Args:
        cfg: The model's config.
        model: The model.
        path: The image.

    Returns:
        The image after resizing, RGB, uint8 ``(H, W, 3)``; and the backbone's input ``(1, C, H', W')``,
        which may be padded at the bottom and right.
    """
    return as_backbone_sees(model, Compose(inference_pipeline(cfg))(dict(img_path=path, img_id=0)))


def as_backbone_sees(model: nn.Module, data: dict[str, Any]) -> tuple[np.ndarray, Tensor]:
    """Return the same as :func:`load_image` for the output ``data`` of a test pipeline."""
    pixels = data["inputs"].permute(1, 2, 0).numpy()
    image = np.broadcast_to(pixels[..., ::-1], (*pixels.shape[:2], 3)).clip(0, 255).astype(np.uint8)
    batch = dict(inputs=[data["inputs"]], data_samples=[data["data_samples"]])
    return image, model.data_preprocessor(batch, False)["inputs"]


@torch.no_grad()
def observe_pruning(backbone: nn.Module, x: Tensor) -> list[PruningLayer]:
    """Run a pruned backbone on one image and record which tokens each layer prunes.

    Args:
        backbone: In evaluation mode, with ``walk_layers``, such as
            :class:`~mmvssm.models.backbones.PlainMamba`.
        x: The image ``(1, C, H, W)``.

    Returns:
        One entry for each layer that pruned tokens.

    Raises:
        UserError: If no layer did.
    """
    states = list(backbone.walk_layers(x))
    layers = []
    for index, (state, following) in enumerate(zip(states, states[1:])):
        if state.importance is None:
            continue
        values = state.importance[0].float().cpu().numpy()
        importance = np.full(math.prod(state.grid), np.nan, dtype=np.float32)
        importance[slice(None) if state.pruned is None else _positions(state)] = values
        kept = np.zeros(importance.shape, dtype=bool)
        kept[_positions(following)] = True
        layers.append(PruningLayer(index, importance.reshape(state.grid), kept.reshape(state.grid)))
    if not layers:
        height, width = states[0].grid
        raise UserError(
            f"the backbone keeps all {height * width} tokens of this image; lower model.backbone.pruning.keep_ratio"
        )
    return layers


def _positions(state: LayerState) -> np.ndarray:
    return state.pruned.positions[0].cpu().numpy()


def measure_saving(backbone: nn.Module, x: Tensor) -> Saving:
    """Compare a pruned backbone's FLOPs and time on images ``(B, C, H, W)`` with its dense form.

    The times are the best of several runs. Dense and pruned runs alternate, so that both see the same load.
    """
    dense, pruned = [], []
    with _unpruned(backbone):
        dense_flops = count(backbone, lambda: backbone(x))["total"].flops
    pruned_flops = count(backbone, lambda: backbone(x))["total"].flops
    while len(dense) < _MIN_RUNS or sum(dense) < _MIN_SECONDS:
        with _unpruned(backbone):
            dense.append(_seconds(backbone, x))
        pruned.append(_seconds(backbone, x))
    return Saving(dense_flops, pruned_flops, min(dense), min(pruned), len(dense))


@contextmanager
def _unpruned(backbone: nn.Module) -> Iterator[None]:
    pruning, backbone.pruning = backbone.pruning, None
    try:
        yield
    finally:
        backbone.pruning = pruning


@torch.no_grad()
def _seconds(backbone: nn.Module, x: Tensor) -> float:
    if x.is_cuda:
        torch.cuda.synchronize(x.device)
    start = time.perf_counter()
    backbone(x)
    if x.is_cuda:
        torch.cuda.synchronize(x.device)
    return time.perf_counter() - start


def count_tokens(layers: Sequence[PruningLayer]) -> str:
    """Return a phrase with the number of tokens before the first pruning layer and after each."""
    first, last = layers[0].num_tokens, layers[-1].num_kept
    tokens = " -> ".join(str(n) for n in (first, *(layer.num_kept for layer in layers)))
    return f"tokens {tokens} ({last / first:.1%} reach the end)"


def summarize(layers: Sequence[PruningLayer], saving: Saving, device: object) -> list[str]:
    """Return three phrases: tokens kept, FLOPs saved and time saved."""
    fewer_flops = 1 - saving.pruned_flops / saving.dense_flops
    times_as_fast = saving.dense_seconds / saving.pruned_seconds
    return [
        count_tokens(layers),
        f"backbone, dense -> pruned: {saving.dense_flops / 1e9:.3f} -> {saving.pruned_flops / 1e9:.3f} GFLOPs "
        f"(-{fewer_flops:.1%})",
        f"{saving.dense_seconds * 1e3:.1f} -> {saving.pruned_seconds * 1e3:.1f} ms "
        f"({times_as_fast:.2f} times as fast, best of {saving.num_runs}, {device})",
    ]


# -------------------------------------------------------------------------------------- drawing


def draw_pruning(
    image: np.ndarray, layers: Sequence[PruningLayer], patch_size: int, title: str
) -> Figure:
    """Draw an image and, for each pruning layer, the tokens that it kept and their importance.

    The panel beside the image shows after which layer each token was pruned. Padding tokens are hatched.

    Args:
        image: RGB, uint8 ``(H, W, 3)``.
        layers: From :func:`observe_pruning`.
        patch_size: Height and width of a token in pixels.
        title: Title of the figure.
    """
    canvas = _fill_tokens(image, layers[0].kept.shape, patch_size)
    height, width = canvas.shape[:2]
    panel_width = float(np.clip(math.sqrt(_PANEL_AREA * width / height), *_PANEL_WIDTH))
    panel_height = min(panel_width * height / width, _PANEL_HEIGHT)
    # Panels of wide images go below each other.
    wide = width > 2 * height
    shape = (len(layers) + 1, 2) if wide else (2, len(layers) + 1)
    margins = (0.3, 1.2)  # for titles and colour bars
    size = (shape[1] * (panel_width + margins[0]), shape[0] * (panel_height + margins[1]) + 0.6)
    figure = Figure(figsize=size, dpi=_DPI, layout="constrained")
    figure.get_layout_engine().set(h_pad=0.08, w_pad=0.06)
    figure.suptitle(title, fontsize="medium")
    axes = figure.subplots(*shape)
    panels = axes if wide else axes.T

    # Blend pixels only where the image is shrunk.
    interpolation = "antialiased" if width > panel_width * _DPI else "nearest"
    panels[0, 0].imshow(canvas, interpolation=interpolation)
    padding = ", hatched: padding" * (canvas.shape != image.shape)
    panels[0, 0].set_title(
        f"image, {image.shape[1]}x{image.shape[0]}\n{layers[0].kept.size} tokens{padding}"
    )
    _show_pruned_at(panels[0, 1], layers, canvas.shape)
    for (tokens, importance), layer in zip(panels[1:], layers):
        tokens.imshow(_dim(canvas, layer.kept, patch_size), interpolation=interpolation)
        tokens.add_collection(_outline(layer.kept, patch_size))
        tokens.set_title(
            f"after layer {layer.index}\n{layer.num_kept} of {layer.num_tokens} tokens kept"
        )
        _show_importance(importance, layer, canvas.shape)
    for ax in axes.flat:
        ax.set(xticks=[], yticks=[])
        ax.title.set_fontsize("medium")
        _mark_padding(ax, image.shape, canvas.shape)
    return figure


def _fill_tokens(image: np.ndarray, grid: tuple[int, int], patch_size: int) -> np.ndarray:
    """Pad an image at the bottom and right with white to the size of a grid of tokens."""
    rows, columns = (n * patch_size for n in grid)
    below, right = max(rows - image.shape[0], 0), max(columns - image.shape[1], 0)
    padded = np.pad(image, ((0, below), (0, right), (0, 0)), constant_values=255)
    return padded[:rows, :columns]


def _dim(canvas: np.ndarray, kept: np.ndarray, patch_size: int) -> np.ndarray:
    """Fade the pixels of pruned tokens to a light grey."""
    mask = kept.repeat(patch_size, 0).repeat(patch_size, 1)[..., None]
    faded = 0.2 * canvas.mean(-1, keepdims=True) + 0.8 * 255 * float(_GONE)
    return np.where(mask, canvas, faded).astype(np.uint8)


def _outline(kept: np.ndarray, patch_size: int) -> LineCollection:
    """Outline the kept tokens; in pale images, fading alone is hard to see."""
    beside = [((x + 1, y), (x + 1, y + 1)) for y, x in np.argwhere(kept[:, 1:] != kept[:, :-1])]
    below = [((x, y + 1), (x + 1, y + 1)) for y, x in np.argwhere(kept[1:] != kept[:-1])]
    lines = np.array(beside + below).reshape(-1, 2, 2) * patch_size - 0.5
    return LineCollection(lines, colors="tab:orange", linewidths=0.8)


def _show_tokens(ax: Axes, values: np.ndarray, canvas_shape: Sequence[int], **style) -> AxesImage:
    height, width = canvas_shape[:2]
    extent = (-0.5, width - 0.5, height - 0.5, -0.5)  # as imshow places an image's pixels
    return ax.imshow(values, extent=extent, interpolation="nearest", **style)


def _show_importance(ax: Axes, layer: PruningLayer, canvas_shape: Sequence[int]) -> None:
    # Without clipping, a few extreme tokens would give all others one colour.
    low, high = np.nanpercentile(layer.importance, (1, 99))
    colors = colormaps["viridis"].with_extremes(bad=_GONE)
    mappable = _show_tokens(
        ax, layer.importance, canvas_shape, cmap=colors, vmin=low, vmax=max(high, low + 1e-12)
    )
    ax.set_title("importance" + ", grey: pruned before" * bool(np.isnan(layer.importance).any()))
    bar = ax.figure.colorbar(mappable, ax=ax, location="bottom", extend="both", aspect=25)
    bar.locator = MaxNLocator(4)
    threshold = layer.importance[layer.kept].min()
    # White on black is visible on every colour of the map.
    bar.ax.axvline(threshold, color="black", linewidth=4)
    bar.ax.axvline(threshold, color="white", linewidth=2)
    bar.set_label("white line: the least important token kept", fontsize="small")


def _show_pruned_at(ax: Axes, layers: Sequence[PruningLayer], canvas_shape: Sequence[int]) -> None:
    """Colour each token by the layer that pruned it, or as kept to the end."""
    stages = sum(layer.kept.astype(int) for layer in layers)
    shades = ListedColormap(colormaps["Blues"](np.linspace(0.15, 0.95, len(layers) + 1)))
    norm = BoundaryNorm(np.arange(len(layers) + 2) - 0.5, len(layers) + 1)
    mappable = _show_tokens(ax, stages, canvas_shape, cmap=shades, norm=norm)
    ax.set_title("where tokens were pruned")
    bar = ax.figure.colorbar(mappable, ax=ax, location="bottom", aspect=25)
    labels = [str(layer.index) for layer in layers] + ["kept"]
    bar.set_ticks(range(len(labels)), labels=labels)
    bar.set_label("pruned after layer", fontsize="small")


def _mark_padding(ax: Axes, image_shape: Sequence[int], canvas_shape: Sequence[int]) -> None:
    (height, width), (rows, columns) = image_shape[:2], canvas_shape[:2]
    style = dict(fill=False, hatch="////", edgecolor=_PADDING_EDGE, linewidth=0.5)
    if columns > width:
        ax.add_patch(Rectangle((width - 0.5, -0.5), columns - width, rows, **style))
    if rows > height:
        ax.add_patch(Rectangle((-0.5, height - 0.5), min(width, columns), rows - height, **style))
