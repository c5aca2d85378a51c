"""Compare the images that a run will read with their annotations."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Optional

import cv2
from PIL import Image

from ..errors import UserError
from .memory import Memory
from .pictures import Loading, Picture, read_images

Size = tuple[int, int]
_FEW = 8  # pictures of which we read the pixels to know their range
_DARK = 64  # of 255; values of up to 14 bits stay below


def check_images(
    loading: Loading, paths: Sequence[str], annotated: Optional[Sequence[Size]], memory: Memory
) -> tuple[list[Size], list[str]]:
    """Read the headers of a data set's images.

    Args:
        loading: How the data set's pipeline decodes them.
        paths: The images.
        annotated: ``(width, height)`` of each in the annotations; None if they give none.
        memory: Findings of earlier runs.

    Returns:
        ``(width, height)`` of each image as the pipeline will load it, and warnings.

    Raises:
        UserError: If an image cannot be read, or its size differs from that in the annotations.
    """
    pictures = read_images(paths, loading.backend, memory)
    refuse_unreadable(paths, pictures, "images")
    sizes = [loaded_size(picture, loading) for picture in pictures]
    if annotated:
        _compare_sizes(paths, pictures, sizes, annotated)
    doubts = {
        "have another format than their suffix, and are read in their true format": _is_misnamed,
    }
    if loading.applies_orientation:
        doubts[
            "are turned or mirrored by their EXIF orientation when they are read, and we cannot "
            "know whether the annotations are for the turned or for the stored pixels"
        ] = _is_undecided
    deep = [path for path, picture in zip(paths, pictures) if picture.is_deep]
    if deep:
        what = f"have 16 bits a channel, of which the upper 8 are read{_range_of(deep)}"
        doubts[what] = lambda path, picture: picture.is_deep
    warnings = []
    for what, is_so in doubts.items():
        named = [path for path, picture in zip(paths, pictures) if is_so(path, picture)]
        if named:
            warnings.append(f"{len(named)} of {len(paths)} images {what} (first: {named[0]})")
    return sizes, warnings


def and_more(faulty: Sequence, total: int, kind: str) -> str:
    """Count the other files with the first one's fault, for the end of a message about the first.

    Args:
        faulty: All files with the fault.
        total: Number of checked files.
        kind: Name of the files in the plural.
    """
    return f" (and {len(faulty) - 1} more of {total} {kind})" if len(faulty) > 1 else ""


def refuse_unreadable(paths: Sequence[str], pictures: Sequence[Picture], kind: str) -> None:
    """Raise a :class:`UserError` if there is a file that cannot be read.

    Args:
        paths: The files.
        pictures: Findings about each.
        kind: Name of the files in the plural.
    """
    bad = [(path, picture.problem) for path, picture in zip(paths, pictures) if picture.problem]
    if bad:
        path, problem = bad[0]
        raise UserError(
            f"{path} {problem}{and_more(bad, len(paths), kind)}; restore or remove what is broken, "
            "or skip this check with --no-data-check"
        )


def loaded_size(picture: Picture, loading: Loading) -> Size:
    """Return ``(width, height)`` of a picture as a pipeline loads it."""
    if loading.applies_orientation and picture.orientation >= 5:  # those that turn by 90 degrees
        return picture.height, picture.width
    return picture.width, picture.height


def _compare_sizes(
    paths: Sequence[str],
    pictures: Sequence[Picture],
    sizes: Sequence[Size],
    annotated: Sequence[Size],
) -> None:
    wrong = [i for i, size in enumerate(sizes) if size != tuple(annotated[i])]
    if not wrong:
        return
    picture, size, (width, height) = (part[wrong[0]] for part in (pictures, sizes, annotated))
    if size != (picture.width, picture.height) == (width, height):
        why = (
            f"is turned by its EXIF orientation ({picture.orientation}) when it is read, and its "
            f"annotations ({width}x{height}) are for the picture as stored; turn the pixels or "
            "remove the EXIF tag (mogrify -strip)"
        )
    else:
        swapped = ", width and height swapped" if size == (height, width) else ""
        why = (
            f"has {size[0]}x{size[1]} pixels, but {width}x{height} in the annotation file{swapped}; "
            "its boxes would be elsewhere"
        )
    raise UserError(f"{paths[wrong[0]]} {why}{and_more(wrong, len(paths), 'images')}")


def _is_misnamed(path: str, picture: Picture) -> bool:
    expected = Image.registered_extensions().get(os.path.splitext(path)[1].lower())
    # MPO is JPEG with a second picture behind, from a phone or a stereo camera.
    actual = "JPEG" if picture.format == "MPO" else picture.format
    return expected is not None and actual not in (expected, "?")


def _range_of(deep: Sequence[str]) -> str:
    """Describe the values of the first few pictures of 16 bits, and say so if only dark ones are left of them."""
    some = [cv2.imread(path, cv2.IMREAD_UNCHANGED) for path in deep[:_FEW]]
    # Without an alpha channel, which is bright.
    some = [p if p.ndim == 2 else p[..., :3] for p in some if p is not None]
    if not some:
        return ""
    low, high = min(int(pixels.min()) for pixels in some), max(int(pixels.max()) for pixels in some)
    dark = ", nearly black: stretch their values to 16 bits" if high >> 8 < _DARK else ""
    return f"; the values {low} to {high} of the first {len(some)} become {low >> 8} to {high >> 8} of 255{dark}"


def _is_undecided(path: str, picture: Picture) -> bool:
    """Whether a picture is turned or mirrored without a change of its size."""
    turns_shape = picture.orientation >= 5 and picture.width != picture.height
    return picture.orientation != 1 and not turns_shape
