"""Compare the label maps of segmentation with the classes and with their images."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Optional

from ..errors import UserError, shown
from .images import Size, and_more, refuse_unreadable
from .memory import Memory
from .pictures import LABEL_MODES, Picture, read_label_maps

IGNORED_LABEL = 255


def labels_in(paths: Sequence[str], memory: Memory) -> set[int]:
    """Return all labels in some maps, without the one for pixels to ignore.

    Raises:
        UserError: If a file is no label map.
    """
    found = set()
    for picture in _read(paths, memory):
        found.update(picture.labels)
    return found - {IGNORED_LABEL}


def check_label_maps(
    backend: Optional[str],
    dataset: Any,
    records: Sequence[dict],
    sizes: Optional[Sequence[Size]],
    trains: bool,
    memory: Memory,
) -> list[str]:
    """Read all label maps of a data set.

    Args:
        backend: mmcv's decoder that the pipeline names; None if it names none.
        dataset: The data set, a ``BaseSegDataset`` of mmseg.
        records: Its ``load_data_list()``.
        sizes: ``(width, height)`` of each image; None if they are not known.
        trains: Whether a model is trained on it. Maps of images to predict on may be blank.
        memory: Findings of earlier runs.

    Returns:
        Warnings.

    Raises:
        UserError: If a file is no label map, or has another size than its image or a label without a class, or if
            training maps have no label to learn.
    """
    paths = [record["seg_map_path"] for record in records]
    pictures = _read(paths, memory)
    if backend == "cv2":
        _refuse_expanded_palettes(paths, pictures)
    if sizes is not None:
        _refuse_other_sizes(paths, pictures, sizes)
    classes = list(dataset.metainfo.get("classes") or ())
    first, last = _range_of_labels(dataset, len(classes))
    ignored = {IGNORED_LABEL, dataset.ignore_index} | ({0} if first else set())
    if classes:
        _refuse_unknown_labels(paths, pictures, last, ignored, len(classes))
    warnings = _warn_of_blank_maps(paths, pictures, ignored)
    if trains:
        warnings += _check_what_remains(paths, pictures, ignored, classes, first, dataset)
    return warnings


def _read(paths: Sequence[str], memory: Memory) -> list[Picture]:
    pictures = read_label_maps(paths, memory)
    refuse_unreadable(paths, pictures, "label maps")
    bad = [pair for pair in zip(paths, pictures) if pair[1].mode not in LABEL_MODES]
    if bad:
        path, picture = bad[0]
        raise UserError(
            f"{path} is a {picture.mode} picture, not a map of labels"
            f"{and_more(bad, len(paths), 'label maps')}; save one channel of 8 bits, in which each "
            "pixel holds its class's number"
        )
    return pictures


def _refuse_expanded_palettes(paths: Sequence[str], pictures: Sequence[Picture]) -> None:
    """Raise for maps with a palette if OpenCV reads them: it gives the colours, Pillow the labels."""
    for path, picture in zip(paths, pictures):
        if picture.mode == "P":
            raise UserError(
                f"{path} has a palette, of which imdecode_backend='cv2' of this config's "
                "LoadAnnotations reads the colours instead of the labels; use 'pillow'"
            )


def _refuse_other_sizes(
    paths: Sequence[str], pictures: Sequence[Picture], sizes: Sequence[Size]
) -> None:
    wrong = [i for i, p in enumerate(pictures) if (p.width, p.height) != tuple(sizes[i])]
    if wrong:
        picture, size = pictures[wrong[0]], tuple(sizes[wrong[0]])
        turned = ", EXIF orientation applied" if (picture.height, picture.width) == size else ""
        raise UserError(
            f"{paths[wrong[0]]} has {picture.width}x{picture.height} pixels and its image "
            f"{size[0]}x{size[1]} as it is read{turned}{and_more(wrong, len(paths), 'label maps')}; "
            "give each label map its image's size"
        )


def _range_of_labels(dataset: Any, num_classes: int) -> tuple[int, int]:
    """Return the first and the last label that mean a class, as stored in the maps."""
    # A data set that keeps some of its own classes renumbers its labels after it reads them.
    count = len(dataset.label_map) if dataset.label_map else num_classes
    first = 1 if dataset.reduce_zero_label else 0
    return first, first + count - 1


def _refuse_unknown_labels(
    paths: Sequence[str],
    pictures: Sequence[Picture],
    last: int,
    ignored: set[int],
    num_classes: int,
) -> None:
    strange = {
        path: label
        for path, picture in zip(paths, pictures)
        for label in picture.labels
        if label > last and label not in ignored
    }
    if strange:
        path, label = next(iter(strange.items()))
        raise UserError(
            f"{path} holds label {label}, but {num_classes} classes end at {last}"
            f"{and_more(list(strange), len(paths), 'label maps')}; name every label with --classes, "
            "or mark pixels to ignore with 255"
        )


def _check_what_remains(
    paths: Sequence[str],
    pictures: Sequence[Picture],
    ignored: set[int],
    classes: Sequence[str],
    first: int,
    dataset: Any,
) -> list[str]:
    """Raise if no map has a label to learn; warn of classes without a label."""
    labels = set().union(*(picture.labels for picture in pictures))
    if not labels - ignored:
        values = " and ".join(map(str, sorted(labels)))
        reason = " (0 does because of reduce_zero_label)" if first else ""
        raise UserError(
            f"nothing is left to train on: all {len(paths)} label maps beside {paths[0]} hold "
            f"nothing but {values}, which means pixels to ignore{reason}"
        )
    if labels == {0, IGNORED_LABEL} and len(classes) > 1 and not first:
        raise UserError(
            f"all {len(paths)} label maps beside {paths[0]} hold nothing but 0 and 255, and 255 "
            f"means pixels to ignore, not {classes[1]!r}; write 1 in its place"
        )
    absent = [name for i, name in enumerate(classes) if i + first not in labels]
    if dataset.label_map or not absent:
        return []
    return [
        f"{len(absent)} of {len(classes)} classes occur in none of the {len(paths)} label maps to "
        f"train on ({shown(absent)}; first map: {paths[0]})"
    ]


def _warn_of_blank_maps(
    paths: Sequence[str], pictures: Sequence[Picture], ignored: set[int]
) -> list[str]:
    blank = [path for path, picture in zip(paths, pictures) if not set(picture.labels) - ignored]
    if not blank:
        return []
    return [
        f"{len(blank)} of {len(paths)} label maps hold nothing but pixels to ignore (first: "
        f"{blank[0]})"
    ]
