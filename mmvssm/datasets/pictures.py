"""Read headers of images and labels of label maps, and remember them for the next run."""

from __future__ import annotations

import os
import signal
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor
from contextlib import contextmanager
from functools import partial
from typing import Any, BinaryIO, Callable, NamedTuple, Optional, Union

import cv2
import mmcv
import numpy as np
from mmengine.config import ConfigDict
from mmengine.utils import is_list_of
from PIL import Image, ImageOps
from rich.progress import track

from ..errors import UserError, brief, user_mistakes
from ..files import open_regular
from ..processes import end_with_parent
from .memory import Memory

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp")
LABEL_MODES = ("L", "P", "1")  # Pillow's names of one channel of at most 8 bits
_ORIENTATION, _TIFF_WIDTH, _TIFF_HEIGHT = 274, 256, 257  # tags of EXIF and TIFF
_QUICK_FORMATS = ("JPEG", "MPO", "PNG")  # their last bytes show whether a file is complete
_FEW = 400  # files; this process reads fewer by itself, without a progress bar
_CHUNK = 64  # files that a worker process takes at a time


class Picture(NamedTuple):
    """Findings about one file.

    Attributes:
        format: Pillow's name, such as ``"JPEG"``; empty if the file cannot be read.
        width: Stored width in pixels, before EXIF's orientation is applied.
        height: Stored height in pixels.
        mode: Pillow's name of the kind of pixels, such as ``"RGB"``; ``"RGB;16"`` stands for 16 bits a channel.
        orientation: EXIF orientation, 1 to 8; 1 is upright.
        problem: Why the file cannot be used, after its name in a message; empty if it can.
        labels: The values in a label map, sorted.
    """

    format: str = ""
    width: int = 0
    height: int = 0
    mode: str = ""
    orientation: int = 1
    problem: str = ""
    labels: Sequence[int] = ()

    @property
    def is_deep(self) -> bool:
        """Whether the file stores 16 bits a channel."""
        return ";16" in self.mode


class Loading(NamedTuple):
    """How a pipeline decodes images: the settings of its ``LoadImageFromFile``."""

    backend: str = "cv2"
    color_type: str = "color"

    @property
    def applies_orientation(self) -> bool:
        """Whether the decoder applies the EXIF orientation."""
        return self.backend in ("cv2", "pillow") and self.color_type in ("color", "grayscale")

    @classmethod
    def of(cls, transform: ConfigDict) -> Loading:
        """Read the settings from the transform's config."""
        return cls(
            transform.get("imdecode_backend") or cls().backend,
            transform.get("color_type") or cls().color_type,
        )


def read_images(paths: Sequence[str], backend: str, memory: Memory) -> list[Picture]:
    """Read the headers of images.

    We decode the pixels of a JPEG or PNG file only if its end is damaged, and those of all other formats. So damage in
    the middle of a JPEG or PNG file is not detected.

    Args:
        paths: The files.
        backend: mmcv's decoder that will read them.
        memory: Findings of earlier runs; new ones are added.

    Returns:
        One description each, in the order of ``paths``.
    """
    return _read(partial(_read_image, backend=backend), f"image-{backend}", "images", paths, memory)


def read_label_maps(paths: Sequence[str], memory: Memory) -> list[Picture]:
    """Decode label maps completely and list the labels in each; see :func:`read_images`."""
    return _read(_read_label_map, "map", "label maps", paths, memory)


def _read(
    function: Callable[[str], Picture], kind: str, what: str, paths: Sequence[str], memory: Memory
) -> list[Picture]:
    known = {path: _remembered(memory.recall(kind, path)) for path in dict.fromkeys(paths)}
    unread = [path for path, picture in known.items() if picture is None]
    for path, picture in zip(unread, map_files(function, unread, what)):
        known[path] = picture
        memory.note(kind, path, picture)
    return [known[path] for path in paths]


def map_files(function: Callable[[Any], Any], paths: Sequence[Any], what: str) -> Iterator[Any]:
    """Apply ``function`` to every path, in several processes with a progress bar if there are many."""
    if len(paths) < _FEW:
        with without_size_limit():
            yield from map(function, paths)
        return
    # More processes than cores, because they wait for the disk most of the time.
    workers = min(16, 2 * (os.cpu_count() or 1))
    try:
        with ProcessPoolExecutor(workers, initializer=_start_worker) as pool:
            try:
                found = pool.map(function, paths, chunksize=_CHUNK)
                yield from track(found, f"Reading {what}", total=len(paths))
            except BaseException:  # including Ctrl-C: do not wait for the remaining files
                pool.shutdown(wait=False, cancel_futures=True)
                raise
    except (OSError, BrokenExecutor) as error:
        raise UserError(
            f"processes that read {len(paths)} {what} failed ({error}); --no-data-check skips this"
        ) from error


def _start_worker() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles Ctrl-C and ends its workers
    end_with_parent()
    Image.MAX_IMAGE_PIXELS = None


@contextmanager
def without_size_limit() -> Iterator[None]:
    """Lift Pillow's limit of pixels, a protection from hostile files, for the user's own data."""
    limit = Image.MAX_IMAGE_PIXELS
    Image.MAX_IMAGE_PIXELS = None
    try:
        yield
    finally:
        Image.MAX_IMAGE_PIXELS = limit


def _remembered(facts: Optional[list]) -> Optional[Picture]:
    """Return the picture described by facts from a memory; None if they are malformed."""
    if facts is None or len(facts) != len(Picture._fields):
        return None
    picture = Picture(*facts)
    numbers = [picture.width, picture.height, picture.orientation]
    texts = [picture.format, picture.mode, picture.problem]
    sound = is_list_of(numbers, int) and is_list_of(texts, str)
    return picture if sound and is_list_of(picture.labels, int) else None


def path_or_pixels(picture: Any) -> Union[str, np.ndarray]:
    """Return the path of a file, or the pixels of a PIL image or an array as mmcv would read them.

    Args:
        picture: A file, a PIL image, or an array uint8, BGR ``(H, W, 3)`` or grey ``(H, W)``.

    Returns:
        A path, or pixels BGR, uint8 ``(H, W, 3)``.

    Raises:
        UserError: If it is none of them, or the file does not exist.
    """
    if isinstance(picture, (str, os.PathLike)):
        if not os.path.isfile(picture):
            raise UserError(f"there is no file {os.fspath(picture)}")
        return os.fspath(picture)
    if isinstance(picture, Image.Image):
        with user_mistakes("the picture cannot be decoded"):
            return np.asarray(ImageOps.exif_transpose(picture).convert("RGB"))[..., ::-1].copy()
    if isinstance(picture, np.ndarray) and picture.dtype == np.uint8 and picture.size:
        if picture.ndim == 2:
            return np.repeat(picture[..., None], 3, axis=2)
        if picture.ndim == 3 and picture.shape[2] == 3:
            return picture
    what = f"{picture.dtype} {picture.shape}" if isinstance(picture, np.ndarray) else type(picture)
    raise UserError(
        f"a picture is a file, a PIL image, or an array uint8 (H, W, 3) in the order BGR; got {brief(what)}"
    )


# ---------------------------------------------------------------------------------- one picture


def _read_image(path: str, backend: str) -> Picture:
    try:
        with open_regular(path) as file, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow warns about odd EXIF
            if not os.fstat(file.fileno()).st_size:
                return Picture(problem="is empty")
            try:
                picture = _describe_header(file)
            except Image.UnidentifiedImageError:
                return _decode(path, backend, Picture(format="?"))
            if picture.format not in _QUICK_FORMATS:
                return _decode(path, backend, picture)
            if _ends_properly(file):
                return picture
            file.seek(0)
            with Image.open(file) as image:
                image.load()
            return picture
    except FileNotFoundError:
        return Picture(problem="does not exist")
    except IsADirectoryError:
        return Picture(problem="is a folder")
    except (OSError, SyntaxError, ValueError) as error:  # what Pillow raises
        return Picture(problem=f"is damaged ({error})")


def _describe_header(file: BinaryIO) -> Picture:
    with Image.open(file) as image:
        width, height = image.size
        if image.format == "PNG":  # its getexif() would decode the pixels
            exif = Image.Exif()
            exif.load(image.info.get("exif") or b"")
        else:
            exif = image.getexif()
        if image.format == "TIFF":  # Pillow gives its size after applying the orientation
            width, height = image.tag_v2[_TIFF_WIDTH], image.tag_v2[_TIFF_HEIGHT]
        orientation = exif.get(_ORIENTATION, 1)
        orientation = orientation if orientation in range(1, 9) else 1
        # Pillow's modes of colours have 8 bits; only the tile names the 16 that are stored.
        deep = ";16" if ";16" in str(getattr(image, "tile", "")) and ";16" not in image.mode else ""
        return Picture(image.format or "?", width, height, image.mode + deep, int(orientation))


def _ends_properly(file: BinaryIO) -> bool:
    """Whether a JPEG or PNG file has the last bytes of a complete one."""
    file.seek(-12, os.SEEK_END)
    tail = file.read()
    return tail.endswith(b"\xff\xd9") or tail[4:8] == b"IEND"


def _decode(path: str, backend: str, picture: Picture) -> Picture:
    """Return ``picture`` if mmcv reads the file, with the size that mmcv finds if Pillow finds none."""
    with _silent_opencv():
        try:
            pixels = mmcv.imread(path, backend=backend)
        except Exception:  # the decoder would raise the same in the run
            pixels = None
    if pixels is None:
        what = f"a {picture.format} file" if picture.format != "?" else "a file"
        return Picture(problem=f"is damaged, or {what} that mmcv's {backend} does not read")
    if picture.format == "?":
        picture = picture._replace(height=pixels.shape[0], width=pixels.shape[1])
    return picture


@contextmanager
def _silent_opencv() -> Iterator[None]:
    """Suppress OpenCV's messages about files that it cannot read."""
    logging = cv2.utils.logging
    level = logging.getLogLevel()
    logging.setLogLevel(logging.LOG_LEVEL_SILENT)
    try:
        yield
    finally:
        logging.setLogLevel(level)


def _read_label_map(path: str) -> Picture:
    try:
        with open_regular(path) as file, Image.open(file) as image:
            image.load()
            labels = []
            if image.mode == "1":
                labels = np.unique(np.asarray(image)).astype(int).tolist()
            elif image.mode in LABEL_MODES:
                labels = np.flatnonzero(image.histogram()).tolist()
            return Picture(image.format or "?", *image.size, image.mode, labels=labels)
    except FileNotFoundError:
        return Picture(problem="does not exist")
    except (OSError, SyntaxError, ValueError) as error:
        if os.path.isfile(path) and not os.path.getsize(path):
            return Picture(problem="is empty")
        return Picture(problem=f"is no picture, or damaged ({error})")
