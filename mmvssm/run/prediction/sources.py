"""Find the images and videos to predict on, and check that we can read them."""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import mmcv
from PIL import Image

from ...datasets.memory import Memory
from ...datasets.pictures import IMAGE_SUFFIXES, Loading, read_images, without_size_limit
from ...errors import UserError, shown, user_mistakes

VIDEO_SUFFIXES = (".mp4", ".m4v", ".mov", ".avi", ".mkv", ".webm", ".mpg", ".mpeg")
_KNOWN = IMAGE_SUFFIXES + VIDEO_SUFFIXES
_DEFAULT_FPS = 25.0
_LONGEST_NAME = 200  # bytes of an output's, of 255 that file systems take


class UnreadableError(Exception):
    """Raised for a file that cannot be read; the message continues a line that begins with its name."""


@dataclass(frozen=True)
class Source:
    """A file to predict on.

    Attributes:
        path: The file.
        name: The unique name of its outputs, without a suffix: its place in the given folder, below
            the folder's name if there are several inputs.
    """

    path: str
    name: str

    @property
    def is_video(self) -> bool:
        """Whether it is a video rather than an image."""
        return self.path.lower().endswith(VIDEO_SUFFIXES)


# ------------------------------------------------------------------------------------- which files


def find_sources(inputs: Sequence[str]) -> tuple[list[Source], list[str]]:
    """Find the images and videos in files, folders and glob patterns.

    We do not look into subfolders, skip hidden files and those of other kinds, and take each file once.

    Args:
        inputs: Paths and patterns of the command line.

    Returns:
        The sources, sorted within each folder or pattern; and warnings about skipped files.

    Raises:
        UserError: If an input does not exist, is of an unknown kind, or contains no image or video.
    """
    found: dict[str, tuple[str, str]] = {}  # path and name by absolute path
    warnings: list[str] = []
    for given in inputs:
        if os.path.isfile(given):
            if not _is_known(given):
                raise UserError(
                    f"{given} is not an image or video that we can read; known suffixes are {', '.join(_KNOWN)}, "
                    "and names must be UTF-8"
                )
            found.setdefault(os.path.abspath(given), (given, os.path.basename(given)))
            continue
        folder, files = _expand(given)
        others = [path for path in files if os.path.isfile(path) and not _is_known(path)]
        known = [path for path in files if os.path.isfile(path) and _is_known(path)]
        if not known:
            raise UserError(_why_empty(given))
        if others:
            suffixes = dict.fromkeys(os.path.splitext(path)[1] or "no suffix" for path in others)
            warnings.append(
                f"{given}: we skip {len(others)} files that are no images or videos, or whose names are no UTF-8 "
                f"({shown(list(suffixes))})"
            )
        above = os.path.basename(os.path.abspath(folder)) if folder and len(inputs) > 1 else ""
        for path in known:
            name = os.path.join(above, os.path.relpath(path, folder or os.curdir))
            found.setdefault(os.path.abspath(path), (path, name))
    return _named(list(found.values())), warnings


def _expand(given: str) -> tuple[str, list[str]]:
    """Return the folder of an input, for a pattern the one before its first wildcard, and the paths in it."""
    if os.path.isdir(given):
        with user_mistakes(f"cannot list the folder {given}", (OSError,)):
            names = sorted(name for name in os.listdir(given) if not name.startswith("."))
        return given, [os.path.join(given, name) for name in names]
    if not glob.has_magic(given):
        raise UserError(f"there is no file or folder {given}")
    literal = re.split(r"[*?[]", given, maxsplit=1)[0]
    return os.path.dirname(literal), sorted(glob.glob(given, recursive=True))


def _is_known(path: str) -> bool:
    # OpenCV's videos end the process on a name that is no UTF-8, and JSON could not hold it.
    return path.lower().endswith(_KNOWN) and path.encode(errors="ignore") == os.fsencode(path)


def _why_empty(given: str) -> str:
    if os.path.isdir(given):
        deeper = os.path.join(given, "**", "*")
        return f"the folder {given} holds no images or videos; for those in its folders, give '{deeper}'"
    return f"{given} matches no image or video"


def _named(files: Sequence[tuple[str, str]]) -> list[Source]:
    """Make sources of paths and preferred names, which have suffixes and need not be unique."""
    # A pattern with .. , or a file called "...mp4", must not lead out of the output folder.
    inside = [Path(*(part for part in Path(name).parts if part != os.pardir)) for _, name in files]
    names = [name.with_suffix("").name.encode(errors="ignore") for name in inside]
    names = [name[:_LONGEST_NAME].decode(errors="ignore") for name in names]
    stems = [
        path.parent / (name if name.strip(".") else "unnamed") for path, name in zip(inside, names)
    ]
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
    """Check that an image file is whole, and describe which of its data mmcv's reader ignores.

    Args:
        path: The file.
        loading: How the pipeline decodes it.

    Returns:
        Phrases such as "16 bits a channel, of which the upper 8 are used".

    Raises:
        UnreadableError: If the file is damaged or no image.
    """
    (picture,) = read_images([path], loading.backend, Memory())
    if picture.problem:
        raise UnreadableError(picture.problem)
    found = []
    reduces = loading.backend == "cv2" and loading.color_type != "unchanged"
    if reduces and picture.mode.partition(";")[0] in ("RGBA", "LA", "PA"):
        found.append("transparency, which is ignored: the colours underneath are used")
    if reduces and picture.is_deep:
        found.append("16 bits a channel, of which the upper 8 are used")
    if picture.format in ("PNG", "TIFF", "WEBP"):
        with without_size_limit(), Image.open(path) as image:
            if getattr(image, "n_frames", 1) > 1:
                found.append("several pages or frames, of which the first is used")
    return found


def open_video(path: str) -> mmcv.VideoReader:
    """Open a video; iterating yields its frames, BGR, uint8 ``(H, W, 3)``.

    Raises:
        UnreadableError: If OpenCV cannot open it.
    """
    os.environ.setdefault(
        "OPENCV_FFMPEG_LOGLEVEL", "-8"
    )  # FFmpeg must not print about broken files
    reader = mmcv.VideoReader(path)
    if not reader.opened:
        raise UnreadableError("is damaged, or no video that OpenCV can read")
    return reader


def fps_of(video: mmcv.VideoReader) -> float:
    """Return the frames per second of a video; 25 if the file has none."""
    return float(video.fps) if 0 < video.fps < float("inf") else _DEFAULT_FPS


def count_frames(source: Source) -> int:
    """Return the number of frames in a video's header; 1 for an image or an unreadable video."""
    if not source.is_video:
        return 1
    try:
        with open_video(source.path) as video:
            return max(video.frame_cnt, 1)
    except UnreadableError:
        return 1
