"""Which images and videos to predict on, and what becomes of their pixels on the way."""

from __future__ import annotations

import glob
import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import mmcv
import numpy as np
from PIL import Image

from ...datasets.memory import Memory
from ...datasets.pictures import IMAGE_SUFFIXES, Loading, read_images, without_size_limit
from ...errors import UserError, user_mistakes

VIDEO_SUFFIXES = (".mp4", ".m4v", ".mov", ".avi", ".mkv", ".webm", ".mpg", ".mpeg")
_KNOWN = IMAGE_SUFFIXES + VIDEO_SUFFIXES
_OTHERS_SHOWN = 5
_DEFAULT_FPS = 25.0


class UnreadableError(Exception):
    """Why a file is left out: words to follow its name in a sentence."""


@dataclass(frozen=True)
class Source:
    """A file to predict on.

    Attributes:
        path: Where it is.
        name: What its outputs are called, without a suffix: its place in the folder that was given,
            below a folder of that name if there are several inputs. No other source has it.
    """

    path: str
    name: str

    @property
    def is_video(self) -> bool:
        """Whether it has frames, or is an image."""
        return self.path.lower().endswith(VIDEO_SUFFIXES)


# ------------------------------------------------------------------------------------- which files


def find_sources(inputs: Sequence[str]) -> tuple[list[Source], list[str]]:
    """The images and videos that files, folders and glob patterns stand for.

    A folder stands for the files in it, not for those in folders further down. Hidden files, and files
    of other kinds beside images and videos, are left out. What is named twice is there once.

    Args:
        inputs: As on the command line.

    Returns:
        The sources, those of a folder or pattern sorted; and warnings of what was left out.

    Raises:
        UserError: If an input is missing, of an unknown kind, or stands for nothing.
    """
    found: dict[str, tuple[str, str]] = {}  # path and name by absolute path
    warnings: list[str] = []
    for given in inputs:
        if os.path.isfile(given):
            if not _is_known(given):
                raise UserError(
                    f"{given} is not an image or video of a kind that is known; names end in "
                    f"{', '.join(_KNOWN)}"
                )
            found.setdefault(os.path.abspath(given), (given, os.path.basename(given)))
            continue
        folder, files = _expand(given)
        known, others = _sorted_out(files)
        if not known:
            raise UserError(_nothing_there(given, files, others))
        if others:
            suffixes = Counter(os.path.splitext(path)[1] or "no suffix" for path in others)
            listing = ", ".join(suffix for suffix, _ in suffixes.most_common(_OTHERS_SHOWN))
            warnings.append(
                f"left out of {given}: what is no image or video, {len(others)} in all ({listing}"
                f"{', ...' * (len(suffixes) > _OTHERS_SHOWN)})"
            )
        above = os.path.basename(os.path.abspath(folder)) if folder and len(inputs) > 1 else ""
        for path in known:
            name = os.path.join(above, os.path.relpath(path, folder or os.curdir))
            found.setdefault(os.path.abspath(path), (path, name))
    return _named(list(found.values())), warnings


def _expand(given: str) -> tuple[str, list[str]]:
    """The folder that an input names, or of a pattern what stands before the wildcards; and what is there."""
    if os.path.isdir(given):
        with user_mistakes(f"cannot list the folder {given}", (OSError,)):
            names = sorted(name for name in os.listdir(given) if not name.startswith("."))
        return given, [os.path.join(given, name) for name in names]
    if not glob.has_magic(given):
        raise UserError(f"there is no file or folder {given}")
    literal = re.split(r"[*?[]", given, maxsplit=1)[0]
    return os.path.dirname(literal), sorted(glob.glob(given, recursive=True))


def _is_known(path: str) -> bool:
    return path.lower().endswith(_KNOWN)


def _sorted_out(paths: Sequence[str]) -> tuple[list[str], list[str]]:
    """Of some paths the images and videos, and the other files."""
    files = [path for path in paths if os.path.isfile(path)]
    return [p for p in files if _is_known(p)], [p for p in files if not _is_known(p)]


def _nothing_there(given: str, found: Sequence[str], others: Sequence[str]) -> str:
    """Why an input stands for nothing."""
    if not os.path.isdir(given):
        return (
            f"none of the {len(found)} files and folders that {given} stands for is an image or video"
            if found
            else f"{given} stands for no file at all"
        )
    if not found:
        return f"the folder {given} is empty"
    folders = len(found) - len(others)
    deeper = os.path.join(given, "**", "*")
    return f"the folder {given} holds no images or videos" + (
        f"; for those in its {folders} folders, give '{deeper}'" if folders else ""
    )


def _named(files: Sequence[tuple[str, str]]) -> list[Source]:
    """Sources of paths and wished names, with suffixes, of which several may be the same."""
    # A pattern may lead out of the folder that it begins in; what is written stays in the output folder.
    inside = [Path(*(part for part in Path(name).parts if part != os.pardir)) for _, name in files]
    stems = [name.with_suffix("") for name in inside]
    folders = {parent.as_posix().lower() for stem in stems for parent in stem.parents}
    taken: set[str] = set()
    sources = []
    for (path, _), stem in zip(files, stems):
        source, number = Source(path, stem.as_posix()), 1
        # A video's label maps go to a folder of its name, which images of a folder must not share.
        while source.name.lower() in (taken | folders if source.is_video else taken):
            number += 1
            source = Source(path, f"{stem.as_posix()}-{number}")
        taken.add(source.name.lower())
        sources.append(source)
    return sources


# ----------------------------------------------------------------------------------------- pixels


def describe_image(path: str, loading: Loading) -> list[str]:
    """Check that an image file is whole, and find what of it is not used.

    Args:
        path: The file.
        loading: How the pipeline decodes it.

    Returns:
        Phrases that say what mmcv's reader leaves out, such as the lower half of 16 bits.

    Raises:
        UnreadableError: If it is damaged, or nothing that can be read.
    """
    (picture,) = read_images([path], loading.backend, Memory())
    if picture.problem:
        raise UnreadableError(picture.problem)
    found = []
    reduces = loading.backend == "cv2" and loading.color_type != "unchanged"
    if reduces and picture.mode in ("RGBA", "LA", "PA"):
        found.append("transparency, which is ignored: the colours underneath are used")
    if picture.format in ("PNG", "TIFF", "WEBP"):
        with without_size_limit(), Image.open(path) as image:
            # Pillow's name of the pixels in the file; its mode is that of what it would make of them.
            if reduces and any(";16" in str(tile) for tile in getattr(image, "tile", ())):
                found.append("16 bits a channel, of which the upper 8 are used")
            if getattr(image, "n_frames", 1) > 1:
                found.append("several pages or frames, of which the first is used")
    return found


class Video:
    """The frames of a video file.

    Args:
        path: The file.

    Attributes:
        fps: Frames a second; 25 where the file does not say.
        num_announced: How many frames the file says that it has; 0 where it does not.

    Raises:
        UnreadableError: If it cannot be opened.
    """

    def __init__(self, path: str) -> None:
        # Otherwise FFmpeg prints what it makes of broken files.
        os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")
        self._reader = mmcv.VideoReader(path)
        if not self._reader.opened:
            raise UnreadableError("is damaged, or no video that OpenCV reads")
        fps = self._reader.fps
        self.fps = float(fps) if 0 < fps < float("inf") else _DEFAULT_FPS
        self.num_announced = max(self._reader.frame_cnt, 0)

    def __iter__(self) -> Iterator[np.ndarray]:
        """Frames, BGR, uint8 ``(H, W, 3)``."""
        yield from self._reader

    def close(self) -> None:
        """Release the file."""
        self._reader.vcap.release()
