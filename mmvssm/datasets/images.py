"""Compare the images that a run will read with their annotations."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Optional

from PIL import Image

from ..errors import UserError
from .memory import Memory
from .pictures import Loading, Picture, read_images

Size = tuple[int, int]


def check_images(
    loading: Loading, paths: Sequence[str], annotated: Optional[Sequence[Size]], memory: Memory
) -> tuple[list[Size], list[str]]:
    """Read the headers of a data set's images.

    Args:
        loading: How the data set's pipeline decodes them.
        paths: The images.
        annotated: ``(width, height)`` of each, as the annotations have it; None if they do not say.
        memory: Of what earlier runs read.

    Returns:
        ``(width, height)`` of each image as the pipeline will load it, and warnings.

    Raises:
        UserError: If an image cannot be read, or is not of the size that the annotations say.
    """
    pictures = read_images(paths, loading.backend, memory)
    refuse_unreadable(paths, pictures, "images")
    sizes = [_loaded_size(picture, loading) for picture in pictures]
    if annotated:
        _compare_sizes(paths, pictures, sizes, annotated)
    found = [
        (what, [path for path, picture in zip(paths, pictures) if is_so(path, picture)])
        for is_so, what in (
            (_is_misnamed, "are of another format than their name says, and read as what they are"),
            (_is_deep, "have 16 bits a channel, of which the upper 8 are read"),
        )
    ]
    if loading.applies_orientation:
        what = (
            "are turned or mirrored when they are read, as their EXIF orientation says, and nothing "
            "tells whether the annotations are for what is seen or for what is stored"
        )
        undecided = [p for p, picture in zip(paths, pictures) if _is_undecided(picture)]
        found.append((what, undecided))
    warnings = [
        f"{len(named)} of {len(paths)} images {what} (first: {named[0]})"
        for what, named in found
        if named
    ]
    return sizes, warnings


def refuse_unreadable(paths: Sequence[str], pictures: Sequence[Picture], kind: str) -> None:
    """Raise a :class:`UserError` if there is a file that cannot be read.

    Args:
        paths: The files.
        pictures: What was found out about each.
        kind: What they are called, in the plural.
    """
    bad = [(path, picture.problem) for path, picture in zip(paths, pictures) if picture.problem]
    if bad:
        path, problem = bad[0]
        others = f", and {len(bad) - 1} more of {len(paths)} {kind} cannot be read" * (len(bad) > 1)
        raise UserError(
            f"{path} {problem}{others}; restore or remove what is broken (--no-data-check goes on "
            f"without opening {kind})"
        )


def _loaded_size(picture: Picture, loading: Loading) -> Size:
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
    path, picture, size, said = (part[wrong[0]] for part in (paths, pictures, sizes, annotated))
    stored = (picture.width, picture.height)
    if size != stored and tuple(said) == stored:
        why = (
            f"is turned by its EXIF orientation ({picture.orientation}) when it is read, and its "
            f"annotations ({said[0]}x{said[1]}) are for the picture as stored; turn the pixels or "
            "remove the EXIF tag (mogrify -strip)"
        )
    else:
        why = (
            f"has {size[0]}x{size[1]} pixels, but {said[0]}x{said[1]} in the annotation file"
            + ", width and height swapped" * (size == tuple(said)[::-1])
            + "; its boxes would be elsewhere"
        )
    others = f" ({len(wrong)} of {len(paths)} images are such)" * (len(wrong) > 1)
    raise UserError(f"{path} {why}{others}")


def _is_misnamed(path: str, picture: Picture) -> bool:
    expected = Image.registered_extensions().get(os.path.splitext(path)[1].lower())
    # MPO is JPEG with a second picture behind, from a phone or a stereo camera.
    actual = "JPEG" if picture.format == "MPO" else picture.format
    return expected is not None and actual not in (expected, "?")


def _is_deep(path: str, picture: Picture) -> bool:
    return picture.mode.startswith("I;16")


def _is_undecided(picture: Picture) -> bool:
    """Whether a picture is turned or mirrored in a way that its size does not show."""
    turns_shape = picture.orientation >= 5 and picture.width != picture.height
    return picture.orientation != 1 and not turns_shape
