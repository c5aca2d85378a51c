"""Recognise the layout of a data set by the names of its folders and files."""

from __future__ import annotations

import os
import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import combinations, product
from typing import Optional

from PIL import Image

from ..errors import UserError, shown
from .pictures import IMAGE_SUFFIXES, without_size_limit

# Names of the splits, the usual ones first. A test set validates if there is no validation set.
WORDS = {
    "train": ("train", "training", "trainval"),
    "val": ("val", "valid", "validation", "test", "testing"),
}
_WORD_IN_PATH = re.compile(rf"(?:^|[^a-z])({'|'.join(sum(WORDS.values(), ()))})(?=[^a-z]|annot|$)")
ABOUT = "about.json"  # in folders that we wrote
ROBOFLOW = "_annotations.coco.json"
_MOST_TAILS = 8  # that we try for the names of label maps


@dataclass(frozen=True, eq=False)
class Layout:
    """Paths of a data set's images and labels, relative to its root or absolute.

    Attributes:
        key: Its name for ``--data-format``.
        name: Its name in messages.
        images: Folder of images of each split, ``"train"`` and ``"val"``.
        labels: Annotation file, or folder of label maps or of other label files, of each split.
        lists: Files that list the images of each split, one a line without suffix; empty if they are all in the folder.
        tail: What the name of a label map has after that of its image, such as ``"_mask"``.
        classes: Class names, if the labels have them.
        note: What we drew or converted.
    """

    key: str
    name: str
    images: dict[str, str]
    labels: dict[str, str]
    lists: dict[str, str] = field(default_factory=dict)
    tail: str = ""
    classes: Sequence[str] = ()
    note: str = ""

    def __str__(self) -> str:
        parts = [f"{self.images[s]}/ with {label}" for s, label in self.labels.items()]
        return f"{self.name} ({'; '.join(parts)})"


COCO = Layout(
    "coco",
    "the COCO layout",
    images={"train": "train2017", "val": "val2017"},
    labels={
        "train": "annotations/instances_train2017.json",
        "val": "annotations/instances_val2017.json",
    },
)
COCO_MAPS = Layout(
    "coco",
    "the COCO layout with semantic maps",
    images=COCO.images,
    labels={"train": "semantic_train2017", "val": "semantic_val2017"},
)
ADE20K = Layout(
    "ade20k",
    "the ADE20K layout",
    images={"train": "images/training", "val": "images/validation"},
    labels={"train": "annotations/training", "val": "annotations/validation"},
)
INSTANCES = (
    f"{COCO}, Roboflow's (train/{ROBOFLOW}), Pascal VOC (Annotations/*.xml, JPEGImages/) or YOLO (a .yaml file with "
    "names, labels/ beside images/)"
)
MAPS = f"{COCO_MAPS}, {ADE20K}, or label maps in a folder beside images of the same names"

# Pairs of images and labels; {} stands for the split's name.
_COCO_FILES = [f"annotations/{name}.json" for name in ("instances_{}2017", "instances_{}", "{}")]
_COCO_IMAGES = ("{}2017", "{}", "images/{}", "images")
_COCO_PAIRS = [(i, file) for file in [*_COCO_FILES, "instances_{}.json"] for i in _COCO_IMAGES]
_COCO_PAIRS.append(("{}", f"{{}}/{ROBOFLOW}"))
_YOLO_PAIRS = [("images/{}", "labels/{}"), ("{}/images", "{}/labels")]
_YOLO_PAIRS += [("images/{}2017", "labels/{}2017"), ("images", "labels")]
VOC_FOLDERS = (("JPEGImages", "Annotations"), ("images", "annotations"))


def find_instances(root: str, splits: Sequence[str], data_format: Optional[str]) -> Layout:
    """Return the layout of a data set for detection.

    Args:
        root: Its folder.
        splits: The splits that the run uses; a missing ``"val"`` can be drawn from ``"train"``.
        data_format: Key of the layout, for folders that have several.

    Raises:
        UserError: If there is no known layout, or more than one.
    """
    found = [_match("coco", COCO.name, root, _COCO_PAIRS)]
    for images, labels in VOC_FOLDERS:
        if _holds(root, labels, ".xml"):
            listed = [(images, "ImageSets/Main/{}.txt")]
            voc = ("voc", "Pascal VOC", root)
            found.append(_match(*voc, listed) or _match(*voc, [(images, labels)]))
    yolo = _match("yolo", "YOLO", root, _YOLO_PAIRS)
    has_names = any(name.endswith((".yaml", ".yml")) for name in os.listdir(root))
    if yolo and has_names and any(_holds(root, part, ".txt") for part in yolo.labels.values()):
        found.append(yolo)
    return _the_one(root, found, splits, data_format, f"detection expects {INSTANCES}")


def find_maps(root: str, splits: Sequence[str], data_format: Optional[str]) -> Layout:
    """Return the layout of a data set for segmentation; see :func:`find_instances`."""
    found = [
        _match(COCO_MAPS.key, COCO_MAPS.name, root, [("{}2017", "semantic_{}2017")]),
        _match(ADE20K.key, ADE20K.name, root, [("images/{}", "annotations/{}")]),
    ]
    known = [
        p for p in found if p and all(list_files(os.path.join(root, m)) for m in p.labels.values())
    ]
    found = known or [_beside(root)]
    return _the_one(root, found, splits, data_format, f"segmentation expects {MAPS}")


def _the_one(
    root: str,
    found: Sequence[Optional[Layout]],
    splits: Sequence[str],
    data_format: Optional[str],
    expected: str,
) -> Layout:
    found = [part for part in found if part and data_format in (None, part.key)]
    usable = [part for part in found if "train" in part.labels or "train" not in splits]
    if len(usable) == 1:
        return usable[0]
    if usable:
        keys = " or ".join(part.key for part in usable)
        raise UserError(
            f"{root} has {' and '.join(map(str, usable))}: name one by --data-format {keys}"
        )
    has = f"{found[0]} alone" if found else shown(sorted(os.listdir(root))) or "no files"
    raise UserError(f"{root} has {has}, which is no {data_format or 'known'} data set; {expected}")


def _match(key: str, name: str, root: str, pairs: Sequence[tuple[str, str]]) -> Optional[Layout]:
    """Return the layout of each split's first pair that exists; None if there is none."""
    layout = Layout(key, name, {}, {})
    for split, words in WORDS.items():
        for word, pair in product(words, pairs):
            images, labels = (part.format(word) for part in pair)
            is_there = all(os.path.exists(os.path.join(root, part)) for part in (images, labels))
            if is_there and labels not in layout.labels.values():
                layout.images[split], layout.labels[split] = images, labels
                break
    return layout if layout.labels else None


def _holds(root: str, folder: str, suffix: str) -> bool:
    """Whether a file with this suffix is somewhere below a folder."""
    walk = os.walk(os.path.join(root, folder), followlinks=True)
    return any(name.lower().endswith(suffix) for _, _, names in walk for name in names)


# ------------------------------------------------------------------------- label maps beside images


def _beside(root: str) -> Optional[Layout]:
    """Find images and label maps in two folders, for each split or for all."""
    by_word = defaultdict(list)
    for directory, folders, names in os.walk(root, followlinks=True):
        part = os.path.relpath(directory, root)
        if ABOUT in names:
            folders.clear()
        stems = sorted(os.path.splitext(name)[0] for name in filter(_is_picture, names))
        if stems and part != os.curdir:
            word = _WORD_IN_PATH.search(part.lower())
            by_word[word and word.group(1)].append((part, stems))
    images, maps, tail = {}, {}, ""
    for split, words in WORDS.items():
        # Folders without a split's name are those of training.
        for word in (*words, None) if split == "train" else words:
            pairs = [
                p for a, b in combinations(sorted(by_word[word]), 2) if (p := _pair(root, a, b))
            ]
            if len(pairs) > 1:
                listing = "; ".join(f"{one} with {other}" for one, other, _ in pairs)
                raise UserError(
                    f"{root} has several folders of label maps ({listing}): move away all but one"
                )
            if pairs:
                images[split], maps[split], tail = pairs[0]
                break
    return Layout("maps", "label maps beside images", images, maps, tail=tail) if maps else None


def _pair(
    root: str, one: tuple[str, list[str]], other: tuple[str, list[str]]
) -> Optional[tuple[str, str, str]]:
    """Return the folders of images and of their maps, and the maps' tail; None if the names do not correspond."""
    for (images, stems), (maps, names) in ((one, other), (other, one)):
        tails = {name[len(stems[0]) :] for name in names if name.startswith(stems[0])}
        for tail in sorted(tails, key=len)[:_MOST_TAILS]:
            # The check of the data names single maps that are missing.
            if 2 * len({stem + tail for stem in stems} & set(names)) > len(stems):
                turned = not tail and _colours(root, images) < _colours(root, maps)
                return (maps, images, tail) if turned else (images, maps, tail)
    return None


def _colours(root: str, folder: str) -> int:
    """Count the colours of a folder's first picture: fewer in label maps than in images."""
    path = os.path.join(root, folder, list_files(os.path.join(root, folder))[0])
    try:
        with without_size_limit(), Image.open(path) as picture:
            sample = picture.convert("RGB").resize((256, 256), Image.Resampling.NEAREST)
            return len(sample.getcolors(256 * 256))
    except (OSError, SyntaxError, ValueError):
        return 0  # The check of the data names it.


# -------------------------------------------------------------------------------------------- files


def list_files(folder: str) -> list[str]:
    """Return relative paths of all pictures under a folder, sorted."""
    found = []
    for directory, _, names in os.walk(folder, followlinks=True):
        found += [
            os.path.relpath(os.path.join(directory, name), folder)
            for name in filter(_is_picture, names)
        ]
    return sorted(found)


def _is_picture(name: str) -> bool:
    return name.lower().endswith(IMAGE_SUFFIXES) and not name.startswith(".")


def only_suffix(folder: str) -> str:
    """Return the file name suffix that all pictures in ``folder`` share.

    Raises:
        UserError: If there are no pictures, or several suffixes (mmseg takes one).
    """
    suffixes = Counter(os.path.splitext(name)[1] for name in list_files(folder))
    if not suffixes:
        raise UserError(f"there are no pictures in {folder}")
    if len(suffixes) > 1:
        raise UserError(
            f"the pictures in {folder} end in {' and '.join(sorted(suffixes))}, but mmseg reads "
            "one kind; convert or rename them to one"
        )
    return next(iter(suffixes))
