"""Generate a data set of overlapping shapes for detection and segmentation.

Each scene is annotated twice, as COCO instances and as a semantic map::

    ROOT/annotations/instances_{train,val}2017.json
    ROOT/{train,val}2017/000000.png ...
    ROOT/semantic_{train,val}2017/000000.png ...    0 background, i + 1 the i-th class
    ROOT/shapes.json                                the settings of the data set

The same settings give the same bytes on every machine. So we use integer arithmetic only, ``RandomState`` (NumPy has
frozen its streams, unlike ``Generator``'s), and write PNG files ourselves, uncompressed: libraries' compressors change
between versions.
"""

import json
import os
import re
import shutil
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Union

import numpy as np
from filelock import FileLock
from numpy.random import RandomState

from ..files import read_json
from ..registry import TASK_UTILS

CLASSES = ("disk", "square", "triangle", "star", "ring")
_OURS = re.compile(
    r"shapes\.json|annotations/instances_(train|val)2017\.json|(semantic_)?(train|val)2017/\d{6}\.png"
)
FORMAT_VERSION = 2  # raise it when the same settings give other bytes than before

# Lengths are counted in eighths of a pixel; a pixel is sampled at 4 x 4 points, 2 units apart.
UNIT = 8
SAMPLES = 4

# Polygons by their corners: (degrees, radius in 64ths of the shape's radius).
POLYGONS = {
    "square": [(45 + 90 * i, 64) for i in range(4)],
    "triangle": [(120 * i, 64) for i in range(3)],
    "star": [(36 * i, 64 if i % 2 == 0 else 27) for i in range(10)],
}
RING_HOLE = 36  # inner radius of a ring, in 64ths of the outer one

# Rounded to 1/1024, so that machines with other last bits of the cosine agree.
COS = np.rint(1024 * np.cos(np.deg2rad(np.arange(360)))).astype(np.int64)
SIN = np.rint(1024 * np.sin(np.deg2rad(np.arange(360)))).astype(np.int64)

MIN_VISIBLE_PIXELS = 40
MIN_VISIBLE_SHARE = 0.3  # of a shape's pixels; we drop shapes that are hidden more
MIN_VIVIDNESS = 110  # of a shape: largest minus smallest colour channel


@dataclass(frozen=True)
class Shape:
    """One shape, ignoring shapes above it.

    Attributes:
        label: Index into ``CLASSES``.
        coverage: ``(H, W)`` int64, how many of a pixel's 16 sample points lie inside.
    """

    label: int
    coverage: np.ndarray

    @property
    def mask(self) -> np.ndarray:
        """Pixels at least half covered, bool ``(H, W)``."""
        return 2 * self.coverage >= SAMPLES**2


@dataclass(frozen=True)
class Scene:
    """One picture and its annotations.

    Attributes:
        image: ``(H, W, 3)`` uint8, RGB.
        labels: One index into ``CLASSES`` per instance, the rearmost first.
        masks: ``(N, H, W)`` bool, the visible pixels of each instance; no two overlap.
    """

    image: np.ndarray
    labels: list[int]
    masks: np.ndarray

    @property
    def semantic_map(self) -> np.ndarray:
        """Label map, uint8 ``(H, W)``: 0 background, i + 1 the i-th class."""
        values = np.array(self.labels, dtype=np.uint8) + 1
        return (self.masks * values[:, None, None]).sum(axis=0).astype(np.uint8)


def draw_scene(rng: RandomState, size: int) -> Scene:
    """Draw one scene of ``size`` x ``size`` pixels."""
    image = _texture(rng, size, _muted_colour(rng))
    shapes = _drop_hidden([_random_shape(rng, size) for _ in range(_integer(rng, 2, 8))])
    owner = np.full((size, size), -1)
    for index, shape in enumerate(shapes):
        fill = _texture(rng, size, _vivid_colour(rng))
        alpha = shape.coverage[..., None]
        image = (fill * alpha + image * (SAMPLES**2 - alpha)) // SAMPLES**2
        owner[shape.mask] = index
    image = np.clip(image + _integers(rng, -12, 12, (size, size, 3)), 0, 255)
    masks = owner == np.arange(len(shapes))[:, None, None]
    return Scene(image.astype(np.uint8), [shape.label for shape in shapes], masks)


def rasterise(kind: str, centre: tuple[int, int], radius: int, angle: int, size: int) -> np.ndarray:
    """Count the sample points of every pixel that lie inside a shape.

    Args:
        kind: One of ``CLASSES``.
        centre: x and y, in units of 1/8 pixel.
        radius: Radius of the shape, or of the circle around its corners, in units of 1/8 pixel.
        angle: Whole degrees, 0 to 359.
        size: Height and width of the picture in pixels.

    Returns:
        ``(size, size)`` int64, 0 to 16.
    """
    coverage = np.zeros((size, size), dtype=np.int64)
    # Sample only the pixels within the circle around the shape.
    left, top = (max(0, (c - radius) // UNIT) for c in centre)
    right, bottom = (min(size, (c + radius) // UNIT + 1) for c in centre)
    x = _sample_points(left, right)[None, :] - centre[0]
    y = _sample_points(top, bottom)[:, None] - centre[1]
    if kind in POLYGONS:
        inside = _inside_polygon(x, y, POLYGONS[kind], radius, angle)
    else:
        squared = x * x + y * y
        inside = squared <= radius * radius
        if kind == "ring":
            inside &= 64 * 64 * squared >= (RING_HOLE * radius) ** 2
    counts = inside.reshape(bottom - top, SAMPLES, right - left, SAMPLES).sum(axis=(1, 3))
    coverage[top:bottom, left:right] = counts
    return coverage


def _sample_points(first: int, last: int) -> np.ndarray:
    """Sample points of pixels ``first`` to ``last - 1`` along one axis, in units of 1/8 pixel."""
    return np.arange(first * SAMPLES, last * SAMPLES) * (UNIT // SAMPLES) + 1


def _inside_polygon(
    x: np.ndarray, y: np.ndarray, polygon: list[tuple[int, int]], radius: int, angle: int
) -> np.ndarray:
    """Even-odd rule: a point is inside if a ray to the right crosses the outline an odd number of times."""
    x, y = 64 * 1024 * x, 64 * 1024 * y  # to the scale of the corners
    corners = [
        (r * radius * int(COS[(a + angle) % 360]), r * radius * int(SIN[(a + angle) % 360]))
        for a, r in polygon
    ]
    inside = np.zeros(np.broadcast_shapes(x.shape, y.shape), dtype=bool)
    for (x0, y0), (x1, y1) in zip(corners, corners[1:] + corners[:1]):
        spans = (y0 <= y) != (y1 <= y)
        left = (x - x0) * (y1 - y0) < (x1 - x0) * (y - y0)
        inside ^= spans & (left if y1 > y0 else ~left)
    return inside


def _random_shape(rng: RandomState, size: int) -> Shape:
    label = _integer(rng, 0, len(CLASSES) - 1)
    smallest = size * UNIT // 20
    octave = (0, 0, 1, 1, 2)[_integer(rng, 0, 4)]
    radius = _integer(rng, smallest << octave, (smallest << octave + 1) - 1)
    margin = radius // 2  # the border may cut a shape, but never down to a sliver
    x, y = (_integer(rng, margin, size * UNIT - margin) for _ in range(2))
    angle = _integer(rng, 0, 359)
    return Shape(label, rasterise(CLASSES[label], (x, y), radius, angle, size))


def _drop_hidden(shapes: list[Shape]) -> list[Shape]:
    """Keep the shapes that are visible enough; later ones cover earlier ones."""
    kept: list[Shape] = []
    covered = np.zeros_like(shapes[0].mask)
    for shape in reversed(shapes):
        visible = np.count_nonzero(shape.mask & ~covered)
        whole = np.count_nonzero(shape.mask)
        if visible >= max(MIN_VISIBLE_PIXELS, MIN_VISIBLE_SHARE * whole):
            kept.append(shape)
            covered |= shape.mask
    return kept[::-1]


def _texture(rng: RandomState, size: int, colour: np.ndarray) -> np.ndarray:
    """Draw a colour with blotches, often with stripes or a checker board, int64 ``(size, size, 3)``."""
    y, x = np.indices((size, size))
    pattern = _blotches(rng, size, 32, 24) + _blotches(rng, size, 8, 12)
    kind = _integer(rng, 0, 3)
    period, strength = _integer(rng, 3, 9), _integer(rng, 10, 30)
    a, b = _integer(rng, -2, 2), _integer(rng, 1, 2)
    if kind == 0:
        pattern += strength * ((a * x + b * y) // period % 2)
    elif kind == 1:
        pattern += strength * ((x // period + y // period) % 2)
    return colour + pattern[..., None]


def _blotches(rng: RandomState, size: int, cell: int, strength: int) -> np.ndarray:
    """Interpolate random values on a coarse grid, int64 ``(size, size)``."""
    knots = -(-size // cell) + 1
    grid = _integers(rng, -strength, strength, (knots, knots))
    whole, part = np.divmod(np.arange(size), cell)
    rows = grid[whole] * (cell - part)[:, None] + grid[whole + 1] * part[:, None]
    return (rows[:, whole] * (cell - part) + rows[:, whole + 1] * part) // cell**2


def _muted_colour(rng: RandomState) -> np.ndarray:
    """Draw an RGB colour near grey, for backgrounds."""
    return _integer(rng, 60, 196) + _integers(rng, -16, 16, 3)


def _vivid_colour(rng: RandomState) -> np.ndarray:
    """Draw an RGB colour far from grey, so that shapes stand out from any background."""
    while True:
        colour = _integers(rng, 20, 236, 3)
        if np.ptp(colour) >= MIN_VIVIDNESS:
            return colour


def _integer(rng: RandomState, low: int, high: int) -> int:
    return int(_integers(rng, low, high, ()))


def _integers(
    rng: RandomState, low: int, high: int, shape: Union[int, tuple[int, ...]]
) -> np.ndarray:
    """Draw from ``low`` to ``high``, inclusive."""
    # The default type, and with it the stream, differs between systems.
    return rng.randint(low, high + 1, size=shape, dtype=np.int64)


def encode_rle(mask: np.ndarray) -> dict:
    """Encode a bool mask ``(H, W)`` as COCO's run lengths: column by column, zeros first.

    pycocotools encodes only to compressed text, whose bytes could change between versions.
    """
    flat = mask.ravel(order="F")
    changes = np.flatnonzero(flat[1:] != flat[:-1]) + 1
    counts = np.diff(np.concatenate([[0], changes, [flat.size]])).tolist()
    return {"size": list(mask.shape), "counts": [0, *counts] if flat[0] else counts}


def encode_png(pixels: np.ndarray) -> bytes:
    """Encode uint8 pixels, ``(H, W)`` grey or ``(H, W, 3)`` RGB, as an uncompressed PNG file."""
    height, width = pixels.shape[:2]
    colour_type = 0 if pixels.ndim == 2 else 2
    lines = np.zeros((height, 1 + pixels[0].size), dtype=np.uint8)  # each line begins with filter 0
    lines[:, 1:] = pixels.reshape(height, -1)
    data = lines.tobytes()

    stream = [b"\x78\x01"]
    for start in range(0, len(data), 0xFFFF):
        block = data[start : start + 0xFFFF]
        is_last = start + len(block) == len(data)
        stream += [struct.pack("<BHH", is_last, len(block), len(block) ^ 0xFFFF), block]
    stream.append(struct.pack(">I", zlib.adler32(data)))

    def chunk(kind: bytes, body: bytes) -> bytes:
        checksum = zlib.crc32(kind + body)
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", checksum)

    header = struct.pack(">IIBBBBB", width, height, 8, colour_type, 0, 0, 0)
    chunks = [chunk(b"IHDR", header), chunk(b"IDAT", b"".join(stream)), chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


@TASK_UTILS.register_module()
class ShapesGenerator:
    """Writes the data set of shapes unless it exists.

    Configs have ``prepare_data = dict(type='mmvssm.ShapesGenerator', root='data/shapes')``; our tools build it and call
    :meth:`ensure` before anything reads the data.

    Args:
        root: Folder of the data set.
        num_train: Number of training images.
        num_val: Number of validation images.
        image_size: Height and width of the images in pixels, 64 to 1024.
        seed: Chooses the scenes. Training and validation scenes differ for any seed.

    Raises:
        ValueError: If a number is out of range.
    """

    SPLITS = ("train", "val")

    def __init__(
        self,
        root: Union[str, os.PathLike] = "data/shapes",
        num_train: int = 800,
        num_val: int = 100,
        image_size: int = 160,
        seed: int = 0,
    ) -> None:
        if min(num_train, num_val) < 1:
            raise ValueError(
                "ShapesGenerator needs at least one training and one validation image, "
                f"not num_train={num_train} and num_val={num_val}."
            )
        if not 64 <= image_size <= 1024:
            raise ValueError(f"ShapesGenerator needs 64 <= image_size <= 1024, not {image_size}.")
        if not 0 <= seed < 2**32:
            raise ValueError(f"ShapesGenerator needs a seed from 0 to 2**32 - 1, not {seed}.")
        self.root = Path(root).expanduser().absolute()
        self.num_images = {"train": num_train, "val": num_val}
        self.image_size = image_size
        self.seed = seed

    @property
    def settings(self) -> dict:
        """The settings that determine the bytes of the data set."""
        return {
            "format_version": FORMAT_VERSION,
            "num_train": self.num_images["train"],
            "num_val": self.num_images["val"],
            "image_size": self.image_size,
            "seed": self.seed,
        }

    def ensure(self) -> Path:
        """Generate the data set unless it exists with these settings.

        If several processes call this at once, the first generates and the others wait. A killed process leaves no
        incomplete data set.

        Returns:
            The data set's folder.

        Raises:
            FileExistsError: If ``root`` holds files that this class did not write; we change nothing then.
        """
        if self._is_up_to_date():
            return self.root
        self.root.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(self.root.with_name(f".{self.root.name}.lock")):
            if not self._is_up_to_date():
                self._refuse_foreign_files()
                self._replace()
        return self.root

    def scene(self, split: str, index: int) -> Scene:
        """Draw scene number ``index`` of a split, ``'train'`` or ``'val'``."""
        rng = RandomState([self.seed, self.SPLITS.index(split), index])
        return draw_scene(rng, self.image_size)

    def _is_up_to_date(self) -> bool:
        return self._found_settings() == self.settings

    def _found_settings(self) -> dict:
        try:
            return read_json(self.root / "shapes.json", dict)
        except (OSError, ValueError):
            return {}

    def _refuse_foreign_files(self) -> None:
        if not os.path.lexists(self.root):
            return
        found = [path for path in self.root.rglob("*") if path.is_symlink() or not path.is_dir()]
        ours = all(_OURS.fullmatch(path.relative_to(self.root).as_posix()) for path in found)
        if (
            self.root.is_symlink()
            or not ours
            or self._found_settings().keys() != self.settings.keys()
        ):
            raise FileExistsError(
                f"{self.root} exists but is not a data set of ShapesGenerator: move it away, or "
                "set another root for the generated data set; nothing was changed."
            )

    def _replace(self) -> None:
        # Rename the new data set when it is complete, so that the folder never holds half of one.
        fresh = self.root.with_name(f".{self.root.name}.partial")
        old = self.root.with_name(f".{self.root.name}.old")
        for leftover in (fresh, old):
            shutil.rmtree(leftover, ignore_errors=True)
        self._write(fresh)
        if self.root.exists():
            self.root.rename(old)
        fresh.rename(self.root)
        shutil.rmtree(old, ignore_errors=True)

    def _write(self, folder: Path) -> None:
        total = sum(self.num_images.values())
        for split in self.SPLITS:
            for kind in (f"{split}2017", f"semantic_{split}2017", "annotations"):
                (folder / kind).mkdir(parents=True, exist_ok=True)
        coco = {split: _empty_coco() for split in self.SPLITS}
        jobs = [(split, i) for split in self.SPLITS for i in range(self.num_images[split])]
        for done, (split, index) in enumerate(jobs, start=1):
            scene = self.scene(split, index)
            name = f"{index:06d}.png"
            (folder / f"{split}2017" / name).write_bytes(encode_png(scene.image))
            (folder / f"semantic_{split}2017" / name).write_bytes(encode_png(scene.semantic_map))
            _add_to_coco(coco[split], name, scene)
            if done % 100 == 0 or done == total:
                print(f"Drawing shapes into {self.root}: {done} of {total} scenes", flush=True)
        for split, content in coco.items():
            _write_json(folder / "annotations" / f"instances_{split}2017.json", content)
        _write_json(folder / "shapes.json", self.settings)


def _empty_coco() -> dict:
    categories = [{"id": i + 1, "name": name} for i, name in enumerate(CLASSES)]
    return {"images": [], "categories": categories, "annotations": []}


def _add_to_coco(coco: dict, file_name: str, scene: Scene) -> None:
    height, width = scene.image.shape[:2]
    image_id = len(coco["images"]) + 1
    coco["images"].append(
        {"id": image_id, "file_name": file_name, "width": width, "height": height}
    )
    for label, mask in zip(scene.labels, scene.masks):
        xs, ys = np.flatnonzero(mask.any(axis=0)), np.flatnonzero(mask.any(axis=1))
        x, y = int(xs[0]), int(ys[0])
        coco["annotations"].append(
            {
                "id": len(coco["annotations"]) + 1,
                "image_id": image_id,
                "category_id": label + 1,
                "bbox": [x, y, int(xs[-1]) + 1 - x, int(ys[-1]) + 1 - y],
                "area": int(np.count_nonzero(mask)),
                "iscrowd": 0,
                "segmentation": encode_rle(mask),
            }
        )


def _write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, separators=(",", ":")) + "\n")
